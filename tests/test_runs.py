import numpy as np
import pytest
import torch

from ijepa.metrics import effective_rank
from ijepa.model import VisionTransformer
from ijepa.runs import collapses_now, evaluate

FLOAT = torch.float32


def test_a_run_is_monitored_by_the_mean_tokens_of_plain_images(tiny_vit):
    encoder = VisionTransformer(tiny_vit)
    images = torch.randint(
        0, 256, (258, 3, 32, 32), dtype=torch.uint8
    )  # one batch of 256 and a rest
    images[::2] //= 8  # a dark and a bright class
    tokens = encoder(images.float() / 127.5 - 1)
    embeddings = tokens.mean(dim=1).detach().numpy()
    result = evaluate(encoder, images, np.arange(258) % 2, FLOAT)
    assert result["heldout_precision_at_5"] == 1.0
    assert result["target_variance"] == pytest.approx(embeddings.var(axis=0).mean(), rel=1e-5)
    assert result["effective_rank"] == pytest.approx(effective_rank(embeddings), rel=1e-3)
    shuffled = evaluate(encoder, images, np.arange(258) // 2 % 2, FLOAT)
    assert shuffled["heldout_precision_at_5"] < 0.8
    assert evaluate(encoder, images, None, FLOAT) == {**result, "heldout_precision_at_5": None}


@pytest.mark.parametrize(
    ("ranks", "now"),
    [
        ([3.0] * 5, False),  # too early
        ([3.0] * 6, True),
        ([3.0] * 7, False),  # it was the epoch before
        ([1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2], False),  # low, but rising
        ([9.0, 20.0, 30.0, 9.0, 6.0, 4.0], True),  # fallen to the level of random weights
        ([9.0, 20.0, 30.0, 9.0, 6.0, 5.0], False),
        ([], False),
    ],
)
def test_a_collapse_is_noticed_once_when_the_rank_is_low_and_does_not_rise(ranks, now):
    assert collapses_now(ranks, 4.0) is now
