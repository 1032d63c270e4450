import pytest
import torch

from ijepa.muon import Muon

SHAPES = [(12, 5), (5, 12), (8, 8), (12, 5), (1, 6), (6, 1)]


def make_weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 5e-7), (torch.float32, 1e-2)])
def test_it_is_the_optimizer_of_pytorch_but_for_the_dtype_of_products(options, dtype, atol):
    ours, theirs = make_weights(), make_weights()
    optimizer = Muon(ours, 0.1, 0.3, dtype, **options)
    oracle = torch.optim.Muon(theirs, 0.1, 0.3, **options, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=generator)
        optimizer.step()
        oracle.step()
        for one, other in zip(ours, theirs, strict=True):
            # The same directions; a product is rounded before it is subtracted.
            torch.testing.assert_close(one, other, atol=atol, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        saved, expected = optimizer.state[one], oracle.state[other]
        assert saved.keys() == expected.keys()
        assert torch.equal(saved["momentum_buffer"], expected["momentum_buffer"])
        assert dtype == torch.bfloat16 or not torch.equal(one, other)


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
