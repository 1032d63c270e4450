import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from ijepa.metrics import covariance_spectrum, effective_rank
from ijepa.model import VisionTransformer
from ijepa.plots import Caption
from ijepa.runs import collapses_now, evaluate, plot_training_curves

FLOAT = torch.float32


def test_a_run_is_monitored_by_the_mean_tokens_of_plain_images(tiny_vit):
    torch.manual_seed(0)
    encoder = VisionTransformer(tiny_vit)
    size = (258, 3, 32, 32)  # one batch of 256 and a rest
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    images[::2] //= 8  # a dark and a bright class
    tokens = encoder(images.float() / 127.5 - 1)
    embeddings = tokens.mean(dim=1).detach().numpy()
    result = evaluate(encoder, images, np.arange(258) % 2, FLOAT)
    assert result["heldout_precision_at_5"] == 1.0
    assert result["target_variance"] == pytest.approx(embeddings.var(axis=0).mean(), rel=1e-5)
    rank = effective_rank(covariance_spectrum(embeddings))
    assert result["effective_rank"] == pytest.approx(rank, rel=1e-3)
    shuffled = evaluate(encoder, images, np.arange(258) // 2 % 2, FLOAT)
    assert shuffled["heldout_precision_at_5"] < 0.8
    for labels in (None, np.arange(258)):
        expected = {**result, "heldout_precision_at_5": None}
        assert evaluate(encoder, images, labels, FLOAT) == expected
    encoder.norm.bias.data[0] = np.inf
    with pytest.raises(FloatingPointError, match="no longer numbers"):
        evaluate(encoder, images, None, FLOAT)


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


def test_training_curves_skip_what_was_not_measured_and_draw_zero():
    rows = [
        {"epoch": 1, "loss": 0.5, "lr": 0.0, "heldout_precision_at_5": None, "seconds": 9.0},
        {"epoch": 2, "loss": 0.4, "lr": 1e-3, "heldout_precision_at_5": 0.3},
        {"epoch": 3, "loss": float("nan"), "lr": 0.0, "heldout_precision_at_5": 0.4},
    ]
    figure = plot_training_curves(rows, Caption("Training", "seed 0"))
    figure.draw_without_rendering()
    drawn = {ax.get_title(): ax for ax in figure.findobj(Axes) if ax.lines}
    assert list(drawn) == ["prediction loss", "learning rate", "held-out precision@5"]
    (loss, lr, precision) = (ax.lines[0].get_xydata().tolist() for ax in drawn.values())
    assert loss == [[1, 0.5], [2, 0.4]]
    assert lr == [[1, 0.0], [2, 1e-3], [3, 0.0]]
    assert precision == [[2, 0.3], [3, 0.4]]
    plot_training_curves(rows[:1], Caption("Training")).draw_without_rendering()
