import numpy as np
import pytest
import torch

from ijepa.muon import Muon, orthogonalize

SHAPES = [(12, 5), (5, 12), (8, 8), (12, 5), (1, 6)]


def make_weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES
    ]


def set_gradients(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
def test_in_bfloat16_it_is_the_optimizer_of_pytorch(options):
    ours, theirs = make_weights(), make_weights()
    pairs = [
        (ours, Muon(ours, 0.1, 0.3, torch.bfloat16, **options)),
        (
            theirs,
            torch.optim.Muon(theirs, 0.1, 0.3, **options, adjust_lr_fn="match_rms_adamw"),
        ),
    ]
    for seed in range(4):
        for weights, optimizer in pairs:
            set_gradients(weights, seed)
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            # The same directions; a product is rounded before it is subtracted.
            torch.testing.assert_close(one, other, atol=5e-7, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        saved, expected = pairs[0][1].state[one], pairs[1][1].state[other]
        assert saved.keys() == expected.keys()
        assert torch.equal(saved["momentum_buffer"], expected["momentum_buffer"])


def test_in_float32_it_is_close_to_that():
    ours, theirs = make_weights(), make_weights()
    optimizers = [
        Muon(ours, 0.1, 0.3, torch.float32),
        torch.optim.Muon(theirs, 0.1, 0.3, adjust_lr_fn="match_rms_adamw"),
    ]
    for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
        set_gradients(weights, 0)
        optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
        assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", [(30, 30), (40, 10), (10, 40), (1, 9), (9, 1)])
def test_the_singular_vectors_stay_and_the_values_come_near_to_1(shape):
    rng = np.random.default_rng(0)
    vectors = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = np.geomspace(1, 0.02, min(shape))  # at least a hundredth of their norm
    matrix = vectors[0] * values @ vectors[2]
    ours = orthogonalize(torch.tensor(matrix)[None])[0].numpy()
    inner = vectors[0].T @ ours @ vectors[2].T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-12)
    assert 0.68 < np.diag(inner).min() <= np.diag(inner).max() < 1.21
    np.testing.assert_allclose(vectors[0] @ inner @ vectors[2], ours, atol=1e-12)


def test_the_direction_does_not_depend_on_the_size_of_the_gradient():
    matrices = torch.tensor(np.random.default_rng(0).normal(size=(3, 6, 9)))
    scales = torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    torch.testing.assert_close(orthogonalize(matrices), orthogonalize(scales * matrices))
    torch.testing.assert_close(orthogonalize(matrices), -orthogonalize(-matrices))
    torch.testing.assert_close(orthogonalize(matrices), orthogonalize(matrices.mT).mT)


def test_no_gradient_is_no_step_and_a_zero_one_only_decays():
    weights = make_weights()
    before = [weight.detach().clone() for weight in weights]
    optimizer = Muon(weights, 0.1, 0.5, torch.float32)
    optimizer.step()
    assert all(map(torch.equal, weights, before))
    assert not optimizer.state
    weights[1].grad = torch.zeros_like(weights[1])
    optimizer.step()
    torch.testing.assert_close(weights[1].detach(), before[1] * 0.95)
    assert torch.equal(weights[0], before[0])


def test_it_goes_on_from_its_state():
    straight, other = make_weights(), make_weights()
    first, second, third = (
        Muon(weights, 0.1, 0.0, torch.float32) for weights in (straight, other, other)
    )
    for weights, optimizer in ((straight, first), (other, second)):
        set_gradients(weights, 0)
        optimizer.step()
    third.load_state_dict(second.state_dict())
    for weights, optimizer in ((straight, first), (other, third)):
        set_gradients(weights, 1)
        optimizer.step()
    assert all(map(torch.equal, straight, other))
