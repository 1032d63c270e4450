"""Which patches the context encoder sees and which ones the predictor must predict.

The multi-block sampler of I-JEPA (Assran et al. 2023, section 3 and appendix A.1), written for
small grids: every position of a block is possible, the last row and column included; one block
shape serves the whole batch, so that tensors are rectangular, while positions differ per image; the
context has a fixed size and is cut at random, not in raster order.

Dimension key: B images, N patches in the grid (row-major), K context patches, T target blocks of M
patches each.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class MaskConfig:
    """Sizes of the blocks as shares of the grid's area, and the number of context patches kept."""

    num_targets: int = 2
    """The paper has four; two make an update a tenth shorter and the features no worse."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_patches: int = 20


class Masks(NamedTuple):
    """Patch indices of one batch; the context never touches a target block of its image."""

    context: Int[Tensor, "B K"]
    targets: Int[Tensor, "B T M"]


def sample_masks(
    config: MaskConfig, grid_size: int, batch_size: int, seed: int, device: torch.device
) -> Masks:
    """Draw the context and target blocks of one batch; the same seed gives the same masks.

    Context patches come from a large block with the targets cut out; where fewer than
    `context_patches` are left in it, free patches outside fill up.

    Raises:
        ValueError: If the grid is too small for the blocks and the context asked for.
    """
    # Shapes come from the CPU: reading them back from an accelerator would stall every step.
    host = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed + 1)
    height, width = sample_shape(config.target_scale, config.target_aspect, grid_size, host)
    shape = (batch_size, config.num_targets)
    top, left = sample_corners(shape, grid_size, height, width, generator)
    # Too few patches left: the last block moves onto the first, until the context fits.
    for last in reversed(range(config.num_targets)):
        free = ~cover(grid_size, top, left, height, width).any(dim=1)  # (B, N)
        crowded = free.sum(dim=1) < config.context_patches
        top[:, last] = torch.where(crowded, top[:, 0], top[:, last])
        left[:, last] = torch.where(crowded, left[:, 0], left[:, last])
    if grid_size**2 - height * width < config.context_patches:
        raise ValueError(
            f"a {grid_size} x {grid_size} grid with a {height} x {width} target block leaves fewer "
            f"than {config.context_patches} context patches"
        )

    height_c, width_c = sample_shape(config.context_scale, (1.0, 1.0), grid_size, host)
    top_c, left_c = sample_corners((batch_size, 1), grid_size, height_c, width_c, generator)
    inside = cover(grid_size, top_c, left_c, height_c, width_c)[:, 0]  # (B, N)
    # Uniform scores in [0, 1), one more inside the context block, minus infinity on targets.
    scores = torch.rand(free.shape, generator=generator, device=generator.device) + inside
    scores = scores.masked_fill(~free, -torch.inf)
    context = scores.topk(config.context_patches, dim=1).indices.sort(dim=1).values

    line = torch.arange(grid_size, device=top.device)
    offsets = line[:height, None] * grid_size + line[:width]
    targets = (top * grid_size + left)[..., None] + offsets.flatten()  # (B, T, M)
    return Masks(context, targets)


def sample_shape(
    scale: tuple[float, float],
    aspect: tuple[float, float],
    grid_size: int,
    generator: torch.Generator,
) -> tuple[int, int]:
    """Draw the height and width in patches of a block from its area and aspect (height / width)."""
    u, v = torch.rand(2, generator=generator).tolist()
    area = (scale[0] + u * (scale[1] - scale[0])) * grid_size**2
    ratio = aspect[0] + v * (aspect[1] - aspect[0])
    height = min(max(round(math.sqrt(area * ratio)), 1), grid_size)
    width = min(max(round(math.sqrt(area / ratio)), 1), grid_size)
    return height, width


def sample_corners(
    shape: tuple[int, int], grid_size: int, height: int, width: int, generator: torch.Generator
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Draw the top row and left column of each block, uniform over all that fit."""
    # randint excludes its upper end; without the + 1 no block reaches the last row or column.
    device = generator.device
    top = torch.randint(0, grid_size - height + 1, shape, generator=generator, device=device)
    left = torch.randint(0, grid_size - width + 1, shape, generator=generator, device=device)
    return top, left


def cover(
    grid_size: int, top: Int[Tensor, "B T"], left: Int[Tensor, "B T"], height: int, width: int
) -> Bool[Tensor, "B T N"]:
    """Mark the patches inside each block."""
    line = torch.arange(grid_size, device=top.device)
    rows = (line >= top[..., None]) & (line < top[..., None] + height)  # (B, T, grid)
    columns = (line >= left[..., None]) & (line < left[..., None] + width)
    return (rows[..., :, None] & columns[..., None, :]).flatten(2)
