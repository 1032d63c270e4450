"""Muon, an optimizer for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

It is `torch.optim.Muon` but for the dtype of its matrix products, which there is always bfloat16:
emulated, that makes a whole update of the shipped recipe take 3.5 times as long as in float32
(benchmarks/training.py).
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that takes singular values from (0, 1] towards 1; from the post."""
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Step along the orthogonal matrix nearest to the averaged gradient (Nesterov's average).

    Steps are scaled to be as large as those of AdamW with the same learning rate, and the weight
    decay is decoupled (Liu et al. 2025, section 2.2, https://arxiv.org/abs/2502.16982).

    Args:
        parameters: Matrices.
        lr: Learning rate.
        weight_decay: Share of the weights, times `lr`, that a step takes away.
        dtype: Of the matrix products.
        momentum: Share of the average that a step keeps.
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
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                average = self.state[weight]["momentum_buffer"]
                average.lerp_(weight.grad, 1 - momentum)
                direction = orthogonalize(weight.grad.lerp(average, momentum).to(self.dtype))
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(weight.shape)))


def orthogonalize(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Move all singular values near to 1 by Newton-Schulz iterations, in the matrix's own dtype.

    They end between 0.68 and 1.21; those under a 300th of the Frobenius norm stay lower.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix  # the smaller Gram matrix of the two
    wide = wide / wide.norm().clamp(min=1e-7)  # singular values <= 1
    for _ in range(STEPS):
        gram = wide @ wide.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.addmm(wide, polynomial, wide, beta=a)
    return wide.T if tall else wide
