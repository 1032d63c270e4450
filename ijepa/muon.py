"""Muon, an optimizer for matrices, and AdamW for all other parameters.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. This is `torch.optim.Muon` except
for one rounding and for the dtype of the matrix products, which is always bfloat16 there. Where a
CPU emulates bfloat16, that makes a whole update take 1.6 times as long as in float32
(benchmarks/training.py).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that moves singular values from (0, 1] toward 1; from the post."""
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Step each matrix along the orthogonal one nearest to its averaged gradient (Nesterov's).

    Steps are as large as those of AdamW with the same learning rate. Weight decay is decoupled: a
    step multiplies the weights by 1 - lr * weight_decay (Liu et al. 2025, section 2.2,
    https://arxiv.org/abs/2502.16982). `dtype` is that of the matrix products, `momentum` the share
    of the average that a step keeps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for weights in alike.values():
                self.update(weights, group)

    def update(self, weights: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """Take one step for matrices of one shape: decay, and orthogonalized averaged gradients."""
        lr, momentum = group["lr"], group["momentum"]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        gradients = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        slopes = torch.stack(torch._foreach_lerp(gradients, averages, momentum))
        directions = orthogonalize(slopes.to(self.dtype)).to(slopes.dtype)
        scale = 0.2 * math.sqrt(max(weights[0].shape))
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(weights, (directions * (lr * scale)).unbind())


def orthogonalize(matrices: Float[Tensor, "b m n"]) -> Float[Tensor, "b m n"]:
    """Move all singular values close to 1 by Newton-Schulz iterations, in the dtype of the input.

    They end between 0.68 and 1.21; those under 1/300 of the Frobenius norm end lower.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices  # for the smaller Gram matrix
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values <= 1
    for _ in range(STEPS):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide.mT if tall else wide


def make_optimizers(
    parameters: Sequence[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for matrices; AdamW for patch projection, mask token and, without decay, vectors."""
    muon = Muon([p for p in parameters if p.ndim == 2], lr, weight_decay, dtype)
    groups = [
        {"params": [p for p in parameters if p.ndim > 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return muon, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
