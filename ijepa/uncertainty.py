"""Standard errors and 95 % intervals from parts of the images.

Statistics of neighbours and distances are recomputed on random halves of the images, drawn without
replacement inside every class; copies of an image, as a bootstrap makes them, would retrieve each
other. Every half is paired with the images that it leaves out, and half the difference of a pair is
one deviation of the statistic: McCarthy 1969, "Pseudo-Replication: Half Samples", Review of the
International Statistical Institute 37. A pair are two independent samples, so that the mean square
of the deviations is half the variance at n / 2 images whatever the statistic. For means over images
this is the variance at n; what depends on r images jointly is overstated by 2**(r - 1), where the
spread of single halves would overstate it by 2**r - 1. In a half every image stands for two, and k
neighbours become k / 2, so that a neighbourhood is as wide as it is among all images.

Statistics of the spectrum have a block jackknife instead: a half has too few images for each
dimension, its spectrum is another one. The models of a run share their halves and blocks, so that
the deviations of a difference are the differences of the deviations.

The intervals hold for new images of the same classes. They leave out the variance between training
runs: one checkpoint is one draw.

Dimension key: n images, d width, B halves, h images of a half, C classes, m listed neighbours,
g blocks, r deviations.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit

from ijepa.agreement import mutual_knn
from ijepa.metrics import (
    Residuals,
    effective_rank_of_spectrum,
    explained_variance,
    gram,
    gram_eigenvalues,
    knn_correct,
    nearest_neighbors,
    residuals,
    row_blocks,
)

NUM_HALVES = 200
# Fewer images of a class than this leave its half too small for a standard deviation.
MIN_IMAGES_PER_CLASS = 20
PRECISION_KS = (1, 5, 10, 20)
KNN_K = 20
# Half of 64 listed neighbours are expected to be kept; fewer than 10 have a chance of about 1e-9.
LIST_LENGTH = 64
VARIANCE_COMPONENTS = (10, 50)
# Thirty blocks know a standard error to 13 %; each costs an eigendecomposition.
NUM_BLOCKS = 30


@dataclass(frozen=True)
class Estimate:
    """A statistic with its standard error and 95 % interval, all in the statistic's unit."""

    value: float
    se: float
    ci95: tuple[float, float]


def estimate(value: float, deviations: Float[np.ndarray, " r"]) -> Estimate:
    """Interval around the statistic of all images.

    The standard error is the root mean square of the deviations, and the interval as wide as
    Student's t with one degree of freedom less than there are deviations asks for: 1.98 standard
    errors on either side for 100 pairs of halves, 2.05 for 30 blocks.
    """
    se = float(np.sqrt(np.mean(np.square(deviations))))
    margin = float(stdtrit(len(deviations) - 1, 0.975)) * se
    return Estimate(value, se, (value - margin, value + margin))


def can_halve(labels: Int[np.ndarray, " n"]) -> bool:
    """Whether there are two classes at least, each with enough images for intervals from halves."""
    counts = np.unique(labels, return_counts=True)[1]
    return bool(len(counts) > 1 and counts.min() >= MIN_IMAGES_PER_CLASS)


def half_samples(
    labels: Int[np.ndarray, " n"], num_halves: int = NUM_HALVES, seed: int = 0
) -> Bool[np.ndarray, "B n"]:
    """Random halves, True for the kept images, with half of each class in every one.

    Rows 2i and 2i + 1 are a pair: each keeps what the other leaves out. A class of odd size keeps
    the smaller or the larger half; in each draw as many classes round up as down, or one fewer,
    chosen at random.

    Raises:
        ValueError: The images are too few, see `can_halve`, or the number of halves is odd.
    """
    if not can_halve(labels):
        counts = np.unique(labels, return_counts=True)[1]
        raise ValueError(
            f"halves need 2 classes of at least {MIN_IMAGES_PER_CLASS} images, "
            f"got {len(counts)} of at least {counts.min()}"
        )
    if num_halves % 2:
        raise ValueError(f"halves come in pairs, got {num_halves}")
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    members = [np.flatnonzero(labels == label) for label in classes]
    odd = np.flatnonzero(counts % 2)
    keep = np.zeros((num_halves, len(labels)), bool)
    for half in keep[::2]:
        sizes = counts // 2
        sizes[generator.permutation(odd)[: len(odd) // 2]] += 1
        for images, size in zip(members, sizes, strict=True):
            half[generator.choice(images, size, replace=False)] = True
    keep[1::2] = ~keep[::2]
    return keep


def half_deviations(half_values: Float[np.ndarray, " B *C"]) -> Float[np.ndarray, " r *C"]:
    """For `estimate`: half the difference between the values of each half and its partner."""
    return (half_values[0::2] - half_values[1::2]) / 2


@dataclass(frozen=True)
class NeighborLists:
    """One model's embeddings with the nearest neighbours of every image among all images."""

    embeddings: Float[np.ndarray, "n d"]
    neighbors: Int[np.ndarray, "n m"]
    similarities: Float[np.ndarray, "n m"]
    device: str = "cpu"
    """Where all pairs of these embeddings are looked at."""


def list_neighbors(X: Float[np.ndarray, "n d"], device: str = "cpu") -> NeighborLists:
    """Lists long enough that halves of the images hardly ever need a search of their own."""
    return NeighborLists(X, *nearest_neighbors(X, min(LIST_LENGTH, len(X) - 1), device), device)


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
    counts = chosen.sum(axis=1)
    if (counts < k).any():
        return nearest_neighbors(lists.embeddings[images], k, lists.device)
    # Where in the flattened lists each image's first k chosen neighbours stand.
    starts = np.cumsum(counts) - counts
    first = np.flatnonzero(chosen)[starts[:, None] + np.arange(k)]
    return position[neighbors.ravel()[first]], lists.similarities[images].ravel()[first]


def class_means(
    scores: Float[np.ndarray, " h"], codes: Int[np.ndarray, " h"]
) -> Float[np.ndarray, " C"]:
    """Mean score of each class, numbered from 0."""
    return np.bincount(codes, scores) / np.bincount(codes)


def overall(
    by_class: Float[np.ndarray, "B C"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " B"]:
    """Means over images from the means of their classes, in the order of the sorted labels."""
    return by_class @ np.unique(labels, return_counts=True)[1] / len(labels)


def half_precision(hits: Bool[np.ndarray, "h m"], k: int) -> Float[np.ndarray, " h"]:
    """Share of hits among the first k / 2 neighbours; of an odd k the last one counts half."""
    whole, odd = divmod(k, 2)
    return (2 * hits[:, :whole].sum(axis=1) + hits[:, whole : whole + odd].sum(axis=1)) / k


def neighbor_halves(
    lists: NeighborLists, labels: Int[np.ndarray, " n"], halves: Bool[np.ndarray, "B n"]
) -> dict[str, Float[np.ndarray, "B C"]]:
    """Class means on the halves of precision@k, k in `PRECISION_KS`, and of kNN accuracy."""
    codes = np.unique(labels, return_inverse=True)[1]
    values: dict[str, list[Float[np.ndarray, " C"]]] = {}
    for keep in halves:
        own = codes[keep]
        neighbors, similarities = neighbors_within(lists, keep, max(KNN_K, *PRECISION_KS) // 2)
        hits = own[neighbors] == own[:, None]
        scores = {f"precision_at_{k}": half_precision(hits, k) for k in PRECISION_KS}
        correct = knn_correct(neighbors, similarities, own, KNN_K // 2)
        scores["knn_accuracy"] = correct.astype(np.float64)
        for name, score in scores.items():
            values.setdefault(name, []).append(class_means(score, own))
    return {name: np.array(rows) for name, rows in values.items()}


def mutual_knn_halves(
    lists_a: NeighborLists,
    lists_b: NeighborLists,
    labels: Int[np.ndarray, " n"],
    halves: Bool[np.ndarray, "B n"],
    k: int = 10,
) -> Float[np.ndarray, "B C"]:
    """Class means on the halves of mutual kNN; k is even."""
    codes = np.unique(labels, return_inverse=True)[1]
    values = []
    for keep in halves:
        a, b = (neighbors_within(lists, keep, k // 2)[0] for lists in (lists_a, lists_b))
        values.append(class_means(mutual_knn(a, b, k // 2), codes[keep]))
    return np.array(values)


def jackknife_blocks(labels: Int[np.ndarray, " n"], seed: int = 0) -> Int[np.ndarray, " n"]:
    """Block of each image, from 0: random blocks of equal size and class balance, to within one."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    blocks = np.empty(len(labels), np.int64)
    blocks[by_class] = np.arange(len(labels)) % NUM_BLOCKS
    return blocks


def spectrum_deviations(
    X: Float[np.ndarray, "n d"], blocks: Int[np.ndarray, " n"]
) -> dict[str, Float[np.ndarray, " g"]]:
    """Jackknife deviations of explained variance and of the centred effective rank.

    For `estimate`: how far the statistic without each block lies from their mean, stretched so that
    the root mean square is the jackknife standard error. Efron 1982, "The Jackknife, the Bootstrap
    and Other Resampling Plans". An effective rank above half the number of images has NaN instead:
    so near to its bound it measures the number of images, and a jackknife overstates its error
    about twofold.
    """
    points, num_blocks = residuals(X), int(blocks.max()) + 1
    values: dict[str, list[float]] = {f"variance_{k}pc": [] for k in VARIANCE_COMPONENTS}
    values["effective_rank"] = []
    for others in grams_without_blocks(points, blocks):
        spectrum = gram_eigenvalues(others, max(points.shape))
        for k in VARIANCE_COMPONENTS:
            values[f"variance_{k}pc"].append(explained_variance(spectrum, k))
        values["effective_rank"].append(effective_rank_of_spectrum(spectrum))
    if np.mean(values["effective_rank"]) > len(X) / 2:
        values["effective_rank"] = [float("nan")] * num_blocks
    stretch = np.sqrt(num_blocks - 1)
    return {name: stretch * (np.array(r) - np.mean(r)) for name, r in values.items()}


def grams_without_blocks(
    points: Residuals, blocks: Int[np.ndarray, " n"]
) -> Iterator[Float[np.ndarray, "s s"]]:
    """Yield, block by block, the smaller Gram matrix of the other images, centred on their mean."""
    n, d = points.shape
    whole = gram(points)
    for block in range(blocks.max() + 1):
        if d <= n:
            left_out = np.flatnonzero(blocks == block)
            product, offset = np.zeros((d, d)), np.zeros(d)
            for part in row_blocks(len(left_out), d):
                rows = points[left_out[part]]
                product += rows.T @ rows
                offset += rows.sum(axis=0)
            # The columns of all images sum to 0, so that those of the others sum to -offset.
            yield whole - product - np.outer(offset, offset) / (n - len(left_out))
        else:
            others = np.flatnonzero(blocks != block)
            products = whole[np.ix_(others, others)]
            products = products - products.mean(axis=0)
            yield products - products.mean(axis=1, keepdims=True)
