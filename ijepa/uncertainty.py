"""Standard errors and 95 % intervals from parts of the images.

Each statistic is recomputed on random halves of the images, drawn without replacement inside every
class; copies of an image, as a bootstrap makes them, would retrieve each other. For halves of n the
standard deviation over the halves is the standard error at n, with no further factor. Only this
deviation is used: most statistics are shifted on a half. With the same halves for both models, the
half values of a difference are the differences of the half values. Statistics of the spectrum have
a block jackknife instead, with the same blocks for both models.

The intervals hold for new images of the same classes. They leave out the variance between training
runs: one checkpoint is one draw.

Dimension key: n images, d width, B halves, h images of a half, m listed neighbours, g blocks.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ijepa.agreement import mutual_knn
from ijepa.metrics import (
    center_columns,
    effective_rank_of_spectrum,
    explained_variance,
    gram_eigenvalues,
    knn_correct,
    nearest_neighbors,
    precision_at_k,
    silhouette_of_subsets,
)

NUM_HALVES = 200
# Fewer images of a class than this leave its half too small for a standard deviation.
MIN_IMAGES_PER_CLASS = 20
# Half of 128 listed neighbours are expected to be kept; fewer than 20 have a chance of about 1e-15.
LIST_LENGTH = 128
PRECISION_KS = (1, 5, 10, 20)
VARIANCE_COMPONENTS = (10, 50)
# Thirty blocks know a standard error to 13 %; each costs an eigendecomposition.
NUM_BLOCKS = 30


@dataclass(frozen=True)
class Estimate:
    """A statistic with its standard error and 95 % interval, all in the statistic's unit."""

    value: float
    se: float
    ci95: tuple[float, float]


def estimate(value: float, half_values: Float[np.ndarray, " B"]) -> Estimate:
    """Normal interval around the statistic of all images.

    Args:
        value: The statistic.
        half_values: Its values on the halves, or its jackknife replicates.
    """
    se = float(np.std(half_values, ddof=1))
    return Estimate(value, se, (value - 1.96 * se, value + 1.96 * se))


def can_halve(labels: Int[np.ndarray, " n"]) -> bool:
    """Whether every class, and the whole, has enough images for intervals from halves."""
    counts = np.unique(labels, return_counts=True)[1]
    enough_neighbors = len(labels) // 2 > max(PRECISION_KS)
    return bool(len(counts) > 1 and counts.min() >= MIN_IMAGES_PER_CLASS and enough_neighbors)


def half_samples(
    labels: Int[np.ndarray, " n"], num_halves: int = NUM_HALVES, seed: int = 0
) -> Bool[np.ndarray, "B n"]:
    """Random halves, True for the kept images, with half of each class in every one.

    A class of odd size keeps the smaller or the larger half; in each draw as many classes round up
    as down, or one fewer, chosen at random.

    Raises:
        ValueError: The images are too few, see `can_halve`.
    """
    if not can_halve(labels):
        smallest = np.unique(labels, return_counts=True)[1].min()
        raise ValueError(
            f"halves need 2 classes of at least {MIN_IMAGES_PER_CLASS} images and "
            f"{2 * max(PRECISION_KS) + 2} images, got {smallest} in one class of {len(labels)}"
        )
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    members = [np.flatnonzero(labels == label) for label in classes]
    odd = np.flatnonzero(counts % 2)
    keep = np.zeros((num_halves, len(labels)), bool)
    for half in keep:
        sizes = counts // 2
        sizes[generator.permutation(odd)[: len(odd) // 2]] += 1
        for images, size in zip(members, sizes, strict=True):
            half[generator.choice(images, size, replace=False)] = True
    return keep


@dataclass(frozen=True)
class NeighborLists:
    """One model's embeddings with the nearest neighbours of every image among all images."""

    embeddings: Float[np.ndarray, "n d"]
    neighbors: Int[np.ndarray, "n m"]
    similarities: Float[np.ndarray, "n m"]


def list_neighbors(X: Float[np.ndarray, "n d"]) -> NeighborLists:
    """Lists long enough that halves of the images hardly ever need a search of their own."""
    return NeighborLists(X, *nearest_neighbors(X, min(LIST_LENGTH, len(X) - 1)))


def neighbors_within(
    lists: NeighborLists, keep: Bool[np.ndarray, " n"], k: int
) -> tuple[Int[np.ndarray, "h k"], Float[np.ndarray, "h k"]]:
    """Neighbours and similarities of the kept images among the kept images, exactly.

    Neighbours are positions among the kept images, as if the others had never been embedded.
    """
    images = np.flatnonzero(keep)
    position = np.cumsum(keep) - 1
    neighbors = lists.neighbors[images]
    chosen = keep[neighbors]
    chosen &= np.cumsum(chosen, axis=1, dtype=np.int16) <= k
    if (chosen.sum(axis=1) < k).any():
        return nearest_neighbors(lists.embeddings[images], k)
    similarities = lists.similarities[images][chosen]
    return position[neighbors[chosen]].reshape(-1, k), similarities.reshape(-1, k)


def neighbor_halves(
    lists: NeighborLists, labels: Int[np.ndarray, " n"], halves: Bool[np.ndarray, "B n"]
) -> dict[str, Float[np.ndarray, " B"]]:
    """Values on the halves of `precision_at_k`, k in `PRECISION_KS`, and of `knn_accuracy`."""
    names = [*(f"precision_at_{k}" for k in PRECISION_KS), "knn_accuracy"]
    values = {name: np.empty(len(halves)) for name in names}
    for index, keep in enumerate(halves):
        neighbors, similarities = neighbors_within(lists, keep, max(PRECISION_KS))
        for k in PRECISION_KS:
            precision = precision_at_k(neighbors, labels[keep], k).mean()
            values[f"precision_at_{k}"][index] = precision
        values["knn_accuracy"][index] = knn_correct(neighbors, similarities, labels[keep]).mean()
    return values


def mutual_knn_halves(
    lists_a: NeighborLists, lists_b: NeighborLists, halves: Bool[np.ndarray, "B n"], k: int = 10
) -> Float[np.ndarray, " B"]:
    """Values of the mean mutual kNN on the halves."""
    pairs = (
        (neighbors_within(lists, keep, k)[0] for lists in (lists_a, lists_b)) for keep in halves
    )
    return np.array([mutual_knn(a, b, k).mean() for a, b in pairs])


def silhouette_halves(
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    halves: Bool[np.ndarray, "B n"],
    metric: str = "euclidean",
) -> Float[np.ndarray, " B"]:
    """Values of the mean silhouette on the halves."""
    return np.nanmean(silhouette_of_subsets(X, labels, halves, metric), axis=1)


def jackknife_blocks(labels: Int[np.ndarray, " n"], seed: int = 0) -> Int[np.ndarray, " n"]:
    """Block of each image, from 0: random blocks of equal size and class balance, to within one."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    blocks = np.empty(len(labels), np.int64)
    blocks[by_class] = np.arange(len(labels)) % NUM_BLOCKS
    return blocks


def spectrum_replicates(
    X: Float[np.ndarray, "n d"], blocks: Int[np.ndarray, " n"]
) -> dict[str, Float[np.ndarray, " g"]]:
    """Jackknife replicates of explained variance and of the centred effective rank.

    For `estimate`, in place of half values: the statistic without each block, its deviations
    stretched so that the standard deviation of the replicates is the jackknife standard error. A
    half has too few images for each dimension: its spectrum is another one, with another spread.
    Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans".
    """
    points = center_columns(X)
    whole, num_blocks = points.T @ points, int(blocks.max()) + 1
    values: dict[str, list[float]] = {f"variance_{k}pc": [] for k in VARIANCE_COMPONENTS}
    values["effective_rank"] = []
    for block in range(num_blocks):
        left_out = points[blocks == block]
        # The columns of all images sum to 0, so that those of the others sum to -offset.
        offset, num_left = left_out.sum(axis=0), len(points) - len(left_out)
        gram = whole - left_out.T @ left_out - np.outer(offset, offset) / num_left
        spectrum = gram_eigenvalues(gram, len(points))
        for k in VARIANCE_COMPONENTS:
            values[f"variance_{k}pc"].append(explained_variance(spectrum, k))
        values["effective_rank"].append(effective_rank_of_spectrum(spectrum))
    stretch = (num_blocks - 1) / np.sqrt(num_blocks)
    replicates = {name: np.array(series) for name, series in values.items()}
    return {name: r.mean() + stretch * (r - r.mean()) for name, r in replicates.items()}
