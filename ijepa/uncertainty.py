"""One model's record, with standard errors, 95% intervals and p-values from parts of the images.

`analyze` is where the embeddings of a model are passed through all that is computed from them.

Statistics of neighbors and distances are recomputed on random halves of the images, drawn without
replacement inside every class; copies of an image, as a bootstrap makes them, would retrieve each
other. Every half is paired with the images that it leaves out, and half the difference of a pair is
one deviation of the statistic: McCarthy 1969, "Pseudo-Replication: Half Samples", Review of the
International Statistical Institute 37. A pair are two independent samples, so that the mean square
of the deviations is half the variance at n / 2 images whatever the statistic. For means over images
this is the variance at n; what depends on r images jointly is overstated by 2**(r - 1), where the
spread of single halves would overstate it by 2**r - 1. In a half every image stands for two, and k
neighbors become k / 2, so that a neighborhood is as wide as it is among all images.

Statistics of the spectrum have influence functions instead: a half has too few images for each
dimension, its spectrum is another one. The models of a run share their halves and images, so that
the deviations of a difference are the differences of the deviations.

The intervals hold for new images of the same classes. They leave out the variance between training
runs: one checkpoint is one draw.

Dimension key: n images, d width, B halves, h images of a half, C classes, m listed neighbors,
r deviations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from ijepa.metrics import (
    KNN_K,
    NAN,
    all_pairs,
    centered_gram,
    covariance_spectrum,
    knn_correct,
    knn_vote,
    precision_at_k,
    silhouette_samples,
    validate_embeddings,
    without_rounding_errors,
)

NUM_HALVES = 200
LEVEL = 0.95
MIN_IMAGES_PER_CLASS = 20
"""Fewer images of a class leave its half too small for a standard deviation."""
PRECISION_KS = (1, 5, 10, 20)
MUTUAL_K = 10
LIST_LENGTH = 64
"""Half of 64 listed neighbors are expected in a half; fewer than 10 have a chance of 2e-9."""
VARIANCE_COMPONENTS = (10, 50)
NUM_CONFUSIONS = 3
"""Pairs of classes that a ranking of confusions names."""

Deviations = Mapping[str, Float[np.ndarray, "..."]]
"""By metric, for `estimate`, also by class; empty where there are no intervals."""
Progress = Callable[..., Any]
"""Makes a progress bar like `tqdm(total=..., desc=...)`."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its standard error and 95% interval, all in the statistic's unit."""

    value: float
    se: float
    ci95: tuple[float, float]


def estimate(value: float, deviations: Float[np.ndarray, " r"] | None) -> Estimate:
    """Interval around the statistic of all images; NaN without finite value and deviations.

    The standard error is the root mean square of the deviations, and the interval as wide as
    Student's t with one degree of freedom less than there are deviations asks for: 1.98 standard
    errors on either side for 100 pairs of halves.
    """
    if deviations is None or not math.isfinite(value) or not np.isfinite(deviations).all():
        return Estimate(value, NAN, (NAN, NAN))
    se = float(np.sqrt(np.mean(np.square(deviations))))
    margin = float(stats.t.ppf((1 + LEVEL) / 2, len(deviations) - 1)) * se
    return Estimate(value, se, (value - margin, value + margin))


def student_p(value: float, deviations: Float[np.ndarray, " r"] | None) -> float:
    """Two-sided p-value of no difference, 2 P(T > |value| / SE); NaN without an interval.

    Scores of single images are not independent, as images share neighbors: a test that shuffles
    their signs raises three times as many false alarms as it claims.
    """
    se = estimate(value, deviations).se
    if deviations is None or not math.isfinite(se):
        return NAN
    if se == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stats.t.sf(abs(value) / se, len(deviations) - 1))


def small_classes(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " s"]:
    """Labels with too few images to be halved."""
    classes, counts = np.unique(labels, return_counts=True)
    return classes[counts < MIN_IMAGES_PER_CLASS]


def columns(
    deviations: Float[np.ndarray, "r C"] | None, labels: Int[np.ndarray, " n"]
) -> list[Float[np.ndarray, " r"] | None]:
    """Deviations of each class; None without intervals or where it is too small to be halved."""
    classes = np.unique(labels)
    if deviations is None:
        return [None] * len(classes)
    small = np.isin(classes, small_classes(labels))
    return [None if one else column for one, column in zip(small, deviations.T, strict=True)]


def half_samples(
    labels: Int[np.ndarray, " n"], num_halves: int = NUM_HALVES, seed: int = 0
) -> Bool[np.ndarray, "B n"] | None:
    """Random halves, True for the kept images; None for one class or without any to be halved.

    Each keeps half of every class, and all images of `small_classes`. Rows 2i and 2i + 1 are a
    pair: each keeps what the other leaves out. A class of odd size keeps the smaller or the larger
    half; in each draw as many classes round up as down, or one fewer, chosen at random.

    Raises:
        ValueError: The number of halves is odd.
    """
    if num_halves % 2:
        raise ValueError(f"halves come in pairs, got {num_halves}")
    small = np.isin(labels, small_classes(labels))
    if small.all() or len(np.unique(labels)) < 2:
        return None
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels[~small], return_counts=True)
    members = [np.flatnonzero(labels == label) for label in classes]
    odd = np.flatnonzero(counts % 2)
    keep = np.zeros((num_halves, len(labels)), bool)
    for half in keep[::2]:
        sizes = counts // 2
        sizes[generator.permutation(odd)[: len(odd) // 2]] += 1
        for images, size in zip(members, sizes, strict=True):
            half[generator.choice(images, size, replace=False)] = True
    keep[1::2] = ~keep[::2]
    keep[:, small] = True
    return keep


def half_deviations(half_values: Float[np.ndarray, " B *C"]) -> Float[np.ndarray, " r *C"]:
    """For `estimate`: half the difference between the values of each half and its partner."""
    return (half_values[0::2] - half_values[1::2]) / 2


def neighbors_within(
    neighbors: Int[np.ndarray, "n m"],
    similarities: Float[np.ndarray, "n m"],
    keep: Bool[np.ndarray, " n"],
    k: int,
) -> tuple[Int[np.ndarray, "h k"], Float[np.ndarray, "h k"]]:
    """The first k kept neighbors, and their similarities, of each kept image.

    As if the other images had never been embedded. A list with fewer than k kept neighbors repeats
    its last one: see `LIST_LENGTH`.
    """
    images = np.flatnonzero(keep)
    chosen = keep.take(neighbors[images])
    places = np.flatnonzero(chosen)
    starts = np.arange(len(images) + 1) * neighbors.shape[1]
    bounds = np.searchsorted(places, starts)
    first = np.minimum(bounds[:-1, None] + np.arange(k), bounds[1:, None] - 1)
    found = images[:, None], places[first] - starts[:-1, None]
    return neighbors[found], similarities[found]


def class_average(
    scores: Float[np.ndarray, " h"], codes: Int[np.ndarray, " h"]
) -> Float[np.ndarray, " C"]:
    """Mean score of each class, numbered from 0."""
    return np.bincount(codes, scores) / np.bincount(codes)


def overall(
    by_class: Float[np.ndarray, "B C"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " B"]:
    """Means over images from the means of their classes, in the order of the sorted labels."""
    return by_class @ np.unique(labels, return_counts=True)[1] / len(labels)


def half_precision(hits: Int[np.ndarray, "h m"], k: int) -> Float[np.ndarray, " h"]:
    """Share of hits among the first k / 2 neighbors; of an odd k the last one counts half.

    Args:
        hits: How many of the first 0, 1, 2 ... neighbors have the image's class.
        k: Among all images; at most 2 (m - 1).
    """
    return (hits[:, k // 2] + hits[:, (k + 1) // 2]) / k


def most_confused(
    codes: Int[np.ndarray, " h"],
    neighbor_codes: Int[np.ndarray, "h m"],
    weights: Float[np.ndarray, " m"],
) -> list[tuple[int, int, float]]:
    """The other classes that neighbors most often belong to: class, other class, and the share.

    Args:
        codes: Class of each image, numbered from 0.
        neighbor_codes: Classes of its neighbors.
        weights: Of the first neighbor, of the second one, and so on.
    """
    size = int(max(codes.max(), neighbor_codes.max())) + 1
    pairs = (codes[:, None] * size + neighbor_codes).ravel()
    counts = np.bincount(pairs, np.tile(weights, len(codes)), size**2).reshape(size, size)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    best = np.argsort(-shares, axis=None, kind="stable")[:NUM_CONFUSIONS]
    rows, columns = np.divmod(best, size)
    found = zip(rows, columns, shares.ravel()[best], strict=True)
    return [(int(row), int(column), float(share)) for row, column, share in found if share > 0]


@dataclass(frozen=True)
class NeighborHalves:
    """What the neighbors inside each half say.

    Args:
        values: Class means by metric: precision@k, k in `PRECISION_KS`, and kNN accuracy.
        first: The first `MUTUAL_K` / 2 neighbors of the kept images of each half.
        confused: The pairs of classes that `most_confused` finds in each half.
    """

    values: dict[str, Float[np.ndarray, "B C"]]
    first: list[Int[np.ndarray, "h _"]]
    confused: list[set[tuple[int, int]]]


def neighbor_halves(
    neighbors: Int[np.ndarray, "n m"],
    similarities: Float[np.ndarray, "n m"],
    labels: Int[np.ndarray, " n"],
    halves: Bool[np.ndarray, "B n"],
) -> NeighborHalves:
    """Precision@k, kNN accuracy and confusions on the halves."""
    classes, codes = np.unique(labels, return_inverse=True)
    found = NeighborHalves({}, [], [])
    lists: dict[str, list[Float[np.ndarray, " C"]]] = {}
    for keep in halves:
        own = codes[keep]
        nearest, near = neighbors_within(
            neighbors, similarities, keep, max(KNN_K, *PRECISION_KS) // 2
        )
        others = codes[nearest]
        hits = np.zeros((len(own), others.shape[1] + 1), np.int64)
        np.cumsum(others == own[:, None], axis=1, out=hits[:, 1:])
        scores = {f"precision_at_{k}": half_precision(hits, k) for k in PRECISION_KS}
        votes = knn_vote(others[:, : KNN_K // 2], near[:, : KNN_K // 2], len(classes))
        scores["knn_accuracy"] = (votes == own).astype(np.float64)
        for name, score in scores.items():
            lists.setdefault(name, []).append(class_average(score, own))
        confused = most_confused(own, others[:, :3], np.array([2.0, 2.0, 1.0]))
        found.first.append(nearest[:, : MUTUAL_K // 2])
        found.confused.append({pair[:2] for pair in confused})
    found.values.update({name: np.array(rows) for name, rows in lists.items()})
    return found


def principal_scores(
    X: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " rank"], Float[np.ndarray, "n rank"]]:
    """The eigenvalues of `covariance_spectrum`, and the images on these principal axes.

    The scores are float32, in units of the standard deviation of the embeddings as a whole.
    """
    rows, gram = centered_gram(X)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = without_rounding_errors(values, max(X.shape)), vectors[:, ::-1]
    unit = np.sqrt(values.sum() / (len(X) - 1)) or 1.0
    if X.shape[1] <= len(X):
        scores = (rows / unit).astype(np.float32) @ vectors.astype(np.float32)
    else:
        scores = (vectors * (np.sqrt(values) / unit)).astype(np.float32)
    return values / (len(X) - 1), scores


def spectrum_deviations(
    eigenvalues: Float[np.ndarray, " rank"], scores: Float[np.ndarray, "n rank"]
) -> dict[str, Float[np.ndarray, " n"]]:
    """Deviations of explained variance and of the centered effective rank, one for each image.

    For `estimate`: influence functions over sqrt(n), so that the root mean square is the standard
    error. An image with principal component scores s moves the eigenvalue l_j by s_j^2 - l_j, and
    the statistic by its derivative. An effective rank above half the number of images has NaN
    instead: so near to its bound it measures the number of images.

    Args:
        eigenvalues: Of the covariance, descending.
        scores: Principal component scores of the images, in any unit.
    """
    n, total = len(scores), eigenvalues.sum()
    names = [*(f"variance_{k}pc" for k in VARIANCE_COMPONENTS), "effective_rank"]
    if total == 0:
        return {name: np.full(n, NAN) for name in names}
    squares = np.square(scores)
    squares = squares / squares.sum(axis=1, dtype=np.float64).mean()
    lengths = squares.sum(axis=1)
    influences = []
    for k in VARIANCE_COMPONENTS:
        share = eigenvalues[:k].sum() / total
        influences.append(squares[:, :k].sum(axis=1) - share * lengths)
    positive = eigenvalues > 0
    roots = np.sqrt(eigenvalues[positive] / total)
    p = roots / roots.sum()
    entropy = -(p * np.log(p)).sum()
    rank = np.exp(entropy)
    slopes = -rank * (np.log(p) + entropy) / (2 * roots * roots.sum())
    influence = squares[:, positive] @ slopes
    influences.append(influence if rank <= n / 2 else np.full(n, NAN))
    return {
        name: (values - values.mean()) / np.sqrt(n)
        for name, values in zip(names, influences, strict=True)
    }


@dataclass(frozen=True)
class Analysis:
    """One model's embeddings with all that several metrics and intervals share."""

    name: str
    embeddings: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    neighbors: Int[np.ndarray, "n m"]
    """Nearest neighbors of each image, best first."""
    similarities: Float[np.ndarray, "n m"]
    """Cosine similarities of the nearest neighbors."""
    eigenvalues: Float[np.ndarray, " rank"]
    silhouettes: dict[str, Float[np.ndarray, " n"]]
    """Per image, by distance: `euclidean` and `cosine`."""
    scores: dict[str, Float[np.ndarray, " n"]]
    """Per image, by metric: precision@k, k in `PRECISION_KS`, and kNN accuracy."""
    halves: NeighborHalves | None
    """None where there are no intervals."""
    class_deviations: Deviations
    """By class, of the metrics of neighbors."""
    deviations: Deviations
    """Of all metrics that have an interval."""

    def precisions(self, k: int) -> Float[np.ndarray, " n"]:
        """Precision@k of each image; NaN for fewer than k others, or no two images of a class."""
        return self.scores[f"precision_at_{k}"]

    def first_is_right(self) -> Bool[np.ndarray, " n"]:
        """Whether the nearest neighbor of each image has its class."""
        return self.precisions(1) == 1

    def knn_correct(self) -> Bool[np.ndarray, " n"]:
        """Whether the vote of the 20 nearest others (or all, if fewer) names the right class."""
        return self.scores["knn_accuracy"] == 1


def analyze(  # noqa: PLR0913
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    name: str,
    halves: Bool[np.ndarray, "B n"] | None = None,
    reference: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Analysis:
    """Everything that is computed from one model's embeddings.

    Args:
        X: The embeddings.
        labels: Class of each row.
        name: Of the model, for errors and the progress bar.
        halves: On which statistics are repeated for the intervals; None for no intervals.
        reference: Whether only precision@k and kNN accuracy need intervals.
        device: Where all pairs of images are compared, as in `ijepa.metrics.all_pairs`.
        progress: See `Progress`.

    Raises:
        UserError: If a row is not finite or has zero length; names the model and the image.
    """
    validate_embeddings(X, name)
    bar = partial(progress, desc=f"pairs {name}") if progress else None
    on_halves = None if reference else halves
    pairs = all_pairs(X, min(LIST_LENGTH, len(X) - 1), labels, on_halves, device, bar)
    silhouettes = {
        "euclidean": pairs.silhouettes,
        "cosine": silhouette_samples(X, labels, "cosine"),
    }
    if on_halves is None:
        eigenvalues, components = covariance_spectrum(X), None
    else:
        eigenvalues, components = principal_scores(X)
    scores = neighbor_scores(pairs.neighbors, pairs.similarities, labels)
    found = None
    class_deviations: dict[str, Float[np.ndarray, "r C"]] = {}
    deviations: dict[str, Float[np.ndarray, " r"]] = {}
    if halves is not None:
        found = neighbor_halves(pairs.neighbors, pairs.similarities, labels, halves)
        class_deviations |= {key: half_deviations(v) for key, v in found.values.items()}
        deviations |= {key: overall(v, labels) for key, v in class_deviations.items()}
    if components is not None:
        for key, metric in (("silhouette", "euclidean"), ("silhouette_cosine", "cosine")):
            deviations[key] = half_deviations(pairs.half_silhouettes[metric])
        deviations |= spectrum_deviations(eigenvalues, components)
    return Analysis(
        name=name,
        embeddings=X,
        labels=labels,
        neighbors=pairs.neighbors,
        similarities=pairs.similarities,
        eigenvalues=eigenvalues,
        silhouettes=silhouettes,
        scores=scores,
        halves=found,
        class_deviations=class_deviations,
        deviations=deviations,
    )


def neighbor_scores(
    neighbors: Int[np.ndarray, "n m"],
    similarities: Float[np.ndarray, "n m"],
    labels: Int[np.ndarray, " n"],
) -> dict[str, Float[np.ndarray, " n"]]:
    """Scores of each image; NaN for too few neighbors, or where no class has two images."""
    undefined = np.full(len(labels), NAN)
    scores = {
        f"precision_at_{k}": precision_at_k(neighbors, labels, k)
        if k <= neighbors.shape[1]
        else undefined
        for k in PRECISION_KS
    }
    single = np.isnan(scores["precision_at_1"])
    correct = knn_correct(neighbors, similarities, labels)
    return scores | {"knn_accuracy": np.where(single, NAN, correct)}
