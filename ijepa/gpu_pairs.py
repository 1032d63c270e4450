"""All pairs of images on a GPU, where they are so many that a processor would take hours.

What `ijepa.metrics` does in tiles, with its results up to rounding: similarities are products in
float32, distances in float64. The embeddings are copied to the GPU once, as they are. Devices are
named as PyTorch names them; any will do.

Dimension key: n images, d width of an embedding, C classes, b subsets of the images, t images of
one tile.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SIDE = 2**13
"""Rows and columns of a tile: 0.3 GB of similarities and 0.5 GB of their keys, or of distances."""
BLOCK_ENTRIES = 2**23
"""Numbers that are copied to the device at once."""


def _upload(
    make: Callable[[slice], Float[np.ndarray, "t d"]], n: int, device: str
) -> Float[Tensor, "n d"]:
    """All rows on the device, made and copied block by block."""
    first = torch.from_numpy(make(slice(0, 1)).copy())
    d = first.shape[1]
    stored = torch.empty((n, d), dtype=first.dtype, device=device)
    step = max(1, BLOCK_ENTRIES // d)
    for start in range(0, n, step):
        stored[start : start + step] = torch.from_numpy(make(slice(start, start + step)).copy())
    return stored


def largest_keys(
    make: Callable[[slice], Float[np.ndarray, "t d"]],
    positions: Int[np.ndarray, " n"],
    k: int,
    device: str,
) -> Int[np.ndarray, "n m"]:
    """Keys of the k largest products (or all, if fewer) of each row with all rows, best first.

    A key holds the bits of a float32 similarity, in numeric order, above 2^32 - 1 less a position.
    """
    n = len(positions)
    rows = _upload(make, n, device)
    names = torch.tensor(2**32 - 1 - positions, device=device)
    found = np.empty((n, min(k, n)), np.int64)
    for start, left in zip(range(0, n, SIDE), rows.split(SIDE), strict=True):
        best = torch.empty((len(left), 0), dtype=torch.int64, device=device)
        for right, own in zip(rows.split(SIDE), names.split(SIDE), strict=True):
            bits = (left @ right.T).view(torch.int32)
            keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | own
            both = torch.cat([best, keys], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        found[start : start + SIDE] = best.cpu().numpy()
    return found


def distance_sums(
    X: Float[np.ndarray, "n d"],
    center: Float[np.ndarray, " d"],
    members: Sequence[Int[np.ndarray, " _"]],
    keep: Bool[np.ndarray, "b n"],
    device: str,
) -> Callable[[slice], Iterator[Float[np.ndarray, "t b"]]]:
    """A function of some rows: the sums of their Euclidean distances to the kept images of a class.

    Args:
        X: The embeddings.
        center: A point near them, so that few digits are lost in differences of squares.
        members: The images of each class in turn.
        keep: Which images are in each subset.
        device: Where to compute.
    """
    stored = _upload(lambda rows: X[rows], len(X), device)
    origin, kept = torch.tensor(center, device=device), torch.tensor(keep.T, device=device)
    classes = [torch.tensor(images, device=device) for images in members]

    def sums_of(rows: slice) -> Iterator[Float[np.ndarray, "t b"]]:
        left = stored[rows].double() - origin
        own = torch.arange(rows.start, rows.start + len(left), device=device)[:, None]
        left_squares, left = left.square().sum(dim=1, keepdim=True), -2.0 * left
        for images in classes:
            total = left.new_zeros((len(left), kept.shape[1]))
            for part in images.split(SIDE):
                right = stored[part].double() - origin
                squares = left @ right.T
                squares += right.square().sum(dim=1)
                squares += left_squares
                squares.masked_fill_(part == own, 0)  # not what rounding leaves of it
                total += squares.clamp_(min=0).sqrt_() @ kept[part].double()
            yield total.cpu().numpy()

    return sums_of
