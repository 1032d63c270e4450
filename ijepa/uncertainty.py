"""Standard errors and 95 % intervals from halves of the images.

Each statistic is recomputed on random halves of the images, drawn without replacement inside every
class; copies of an image, as a bootstrap makes them, would retrieve each other. For halves of n the
standard deviation over the halves is the standard error at n, with no further factor. Only this
deviation is used: most statistics are shifted on a half. With the same halves for both models, the
half values of a difference are the differences of the half values.

The intervals hold for new images of the same classes. They leave out the variance between training
runs: one checkpoint is one draw.

Dimension key: n images, d width, B halves, h images of a half, m listed neighbours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ijepa.agreement import mutual_knn
from ijepa.metrics import (
    center_columns,
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


@dataclass(frozen=True)
class Estimate:
    """A statistic with its standard error and 95 % interval, all in the statistic's unit."""

    value: float
    se: float
    ci95: tuple[float, float]


def estimate(value: float, half_values: Float[np.ndarray, " B"]) -> Estimate:
    """Normal interval around the statistic of all images from its values on the halves."""
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


def spectrum_halves(
    X: Float[np.ndarray, "n d"], halves: Bool[np.ndarray, "B n"]
) -> dict[str, Float[np.ndarray, " B"]]:
    """Linearised values on the halves of explained variance and of the centred effective rank.

    Functions of the spectrum bend strongly where a half has few images per dimension, and their
    plain half values deviate too little. Here each image has an influence, the derivative of the
    statistic by the image's weight, and a half moves the statistic by the mean influence of its
    images: the infinitesimal jackknife, Efron 1982, "The Jackknife, the Bootstrap and Other
    Resampling Plans". An image x moves eigenvalue l of direction v by (v.x)^2 - l.
    """
    points = center_columns(X)
    eigenvalues, directions = np.linalg.eigh(points.T @ points / len(points))
    eigenvalues, directions = eigenvalues[::-1], directions[:, ::-1]
    names = [*(f"variance_{k}pc" for k in VARIANCE_COMPONENTS), "effective_rank"]
    # Rounding leaves values of this size where there is no direction at all.
    positive = eigenvalues > eigenvalues[0] * max(X.shape) * np.finfo(np.float64).eps
    if not positive.any():
        return {name: np.full(len(halves), np.nan) for name in names}
    eigenvalues, directions = eigenvalues[positive], directions[:, positive]
    moves = np.square(points @ directions) - eigenvalues  # (n, rank)
    values, gradients = _spectrum_gradients(eigenvalues)
    weights = halves / halves.sum(axis=1, keepdims=True)
    shifted = values + weights @ (moves @ gradients.T)  # (B, statistics)
    return dict(zip(names, shifted.T, strict=True))


def _spectrum_gradients(
    eigenvalues: Float[np.ndarray, " rank"],
) -> tuple[Float[np.ndarray, " statistics"], Float[np.ndarray, "statistics rank"]]:
    """Explained variances and the effective rank with their derivatives by each eigenvalue."""
    total = eigenvalues.sum()
    values, gradients = [], []
    for k in VARIANCE_COMPONENTS:
        values.append(eigenvalues[:k].sum() / total)
        inside = np.arange(len(eigenvalues)) < k
        gradients.append((inside - values[-1]) / total)
    singular_values = np.sqrt(eigenvalues)
    p = singular_values / singular_values.sum()
    entropy = -(p * np.log(p)).sum()
    values.append(np.exp(entropy))
    # d entropy / d s = -(ln p + entropy) / sum s, and d s / d l = 1 / (2 s).
    slope = -(np.log(p) + entropy) / singular_values.sum() / (2 * singular_values)
    gradients.append(values[-1] * slope)
    return np.array(values), np.stack(gradients)
