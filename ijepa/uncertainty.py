"""Standard errors, 95% intervals and p-values of one model's numbers, from parts of the images.

Statistics of neighbors and distances are recomputed on random halves of the images, drawn without
replacement inside every class: copies of an image, as a bootstrap makes them, would retrieve each
other. Every half is paired with the images that it leaves out. Half the difference of a pair is one
deviation of the statistic: McCarthy 1969, "Pseudo-Replication: Half Samples", Review of the
International Statistical Institute 37. The mean square of the deviations is half the variance at
n / 2 images. For means over images this is the variance at n. A statistic of pairs of images gets
up to twice its variance: its interval is too wide rather than too narrow. In a half every image
stands for two, and k neighbors become k / 2, so that a neighborhood is as wide as it is among all
images.

Statistics of the spectrum have influence functions instead: a half has too few images for each
dimension. The models of a run share their halves and images, so that the deviations of a difference
are the differences of the deviations. Where there are no intervals, halves and deviations are empty
arrays. Intervals hold for new images of the same classes. They leave out the variance between
training runs: one checkpoint is one draw.

Dimension key: n images, d width, B halves, h images of a half, C classes, m listed neighbors,
r deviations.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtr, stdtrit

from ijepa import metrics
from ijepa.metrics import KNN_K, NAN, Eigenvalues, Embeddings, Labels, Neighbors, PerImage

NUM_HALVES = 200
LEVEL = 0.95
MIN_IMAGES_PER_CLASS = 20  # fewer leave a half too small for a standard deviation
MIN_HALVED = 0.8  # share of the images in such classes: the spread of all others is left out
PRECISION_KS = (1, 5, 10, 20)
NEIGHBOR_SCORES = (*(f"precision_at_{k}" for k in PRECISION_KS), "knn_accuracy")
MUTUAL_K = 10
LIST_LENGTH = 64  # half of them are expected in a half; fewer than 10 have a chance of 2e-9
VARIANCE_COMPONENTS = (10, 50)
NUM_CONFUSIONS = 3  # pairs of classes that a ranking of confusions names

Halves = Bool[np.ndarray, "B n"]
Deviations = Float[np.ndarray, " r"]
ClassDeviations = Float[np.ndarray, "r C"]


@dataclass(frozen=True)
class Estimate:
    """A statistic with its standard error and 95% interval, all in the statistic's unit."""

    value: float
    se: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class NeighborHalves:
    """What the neighbors inside each half say."""

    values: dict[str, Float[np.ndarray, "B C"]]
    """Class means by metric of `NEIGHBOR_SCORES`."""
    first: list[Int[np.ndarray, "h _"]]  # the first `MUTUAL_K` / 2 neighbors of the kept images
    confused: list[set[tuple[int, int]]]  # the pairs of classes that `most_confused` finds


@dataclass(frozen=True)
class Analysis:
    """One model's embeddings with all that several metrics and intervals share."""

    embeddings: Embeddings
    labels: Labels
    neighbors: Neighbors
    similarities: metrics.Similarities
    eigenvalues: Eigenvalues
    scores: dict[str, PerImage]  # by metric: `NEIGHBOR_SCORES` and both silhouettes
    halves: NeighborHalves
    class_deviations: ClassDeviations  # of precision@5
    deviations: dict[str, Deviations]  # of all metrics that have an interval

    def precisions(self, k: int) -> PerImage:
        """Precision@k of each image; NaN for fewer than k others, or no two images of a class."""
        return self.scores[f"precision_at_{k}"]

    def first_is_right(self) -> Bool[np.ndarray, " n"]:
        """Whether the nearest neighbor of each image has its class."""
        return self.precisions(1) == 1

    def deviations_of(self, metric: str) -> Deviations:
        """For `estimate`: none where the metric has no interval."""
        return self.deviations.get(metric, np.empty(0))


def estimate(value: float, deviations: Deviations) -> Estimate:
    """Interval around the statistic of all images; NaN without finite value and deviations.

    The standard error is the root mean square of the deviations. The interval is that of Student's
    t with one degree of freedom less than deviations: +-1.98 standard errors for 100 pairs.
    """
    if not (len(deviations) and math.isfinite(value) and np.isfinite(deviations).all()):
        return Estimate(value, NAN, (NAN, NAN))
    se = float(np.sqrt(np.mean(np.square(deviations))))
    margin = float(stdtrit(len(deviations) - 1, (1 + LEVEL) / 2)) * se
    return Estimate(value, se, (value - margin, value + margin))


def student_p(value: float, deviations: Deviations) -> float:
    """Two-sided p-value of no difference, 2 P(T > |value| / SE); NaN without an interval.

    T has Student's distribution with r - 1 degrees of freedom. Where SE is 0 the p-value is 0, or 1
    for a value of 0.
    """
    se = estimate(value, deviations).se
    if se == 0:
        return float(value == 0)
    return float(2 * stdtr(len(deviations) - 1, -abs(value) / se))


def small_classes(labels: Labels) -> Int[np.ndarray, " s"]:
    """Labels with too few images to be halved."""
    classes, counts = np.unique(labels, return_counts=True)
    return classes[counts < MIN_IMAGES_PER_CLASS]


def half_samples(labels: Labels, num_halves: int = NUM_HALVES, seed: int = 0) -> Halves:
    """Random halves, True for the kept images; none for one class or if too few can be halved.

    Of the images, `MIN_HALVED` must be in classes of `MIN_IMAGES_PER_CLASS`: with fewer, intervals
    would leave out most of the spread, and differences would seem sure that are chance. Each keeps
    half of every class, and all of `small_classes`. Rows 2i and 2i + 1 are a pair: each keeps what
    the other leaves out. In each draw as many classes of odd size round up as down, or one fewer,
    chosen at random.
    """
    small = np.isin(labels, small_classes(labels))
    if (~small).mean() < MIN_HALVED or len(np.unique(labels)) < 2:
        return np.empty((0, len(labels)), bool)
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


def mean_deviations(
    half_values: Float[np.ndarray, "B C"], labels: Labels
) -> tuple[Deviations, ClassDeviations]:
    """Deviations of a mean over images, and of the means of classes, from those on the halves.

    A class too small to be halved has NaN.
    """
    deviations = half_deviations(half_values)
    classes, counts = np.unique(labels, return_counts=True)
    small = np.isin(classes, small_classes(labels))
    return deviations @ counts / len(labels), np.where(small, NAN, deviations)


def neighbors_within(
    neighbors: Neighbors, similarities: metrics.Similarities, keep: Bool[np.ndarray, " n"], k: int
) -> tuple[Int[np.ndarray, "h k"], Float[np.ndarray, "h k"]]:
    """The first k kept neighbors, and their similarities, of each kept image.

    A list with fewer than k kept neighbors repeats its last one: see `LIST_LENGTH`.
    """
    images = np.flatnonzero(keep)
    lists = neighbors[images]
    places = np.flatnonzero(keep.take(lists))
    bounds = np.searchsorted(places, np.arange(len(images) + 1) * lists.shape[1])
    first = places.take(np.minimum(bounds[:-1, None] + np.arange(k), bounds[1:, None] - 1))
    return lists.take(first), similarities[images].take(first)


def class_average(scores: PerImage, codes: Labels) -> Float[np.ndarray, " C"]:
    """Mean score of each class, numbered from 0."""
    return np.bincount(codes, scores) / np.bincount(codes)


def confusion(
    codes: Labels,
    neighbor_codes: Neighbors,
    num_classes: int,
    weights: Float[np.ndarray, " m"] | float = 1.0,
) -> Float[np.ndarray, "C C"]:
    """Share of the neighbors of each class (row) that belong to each class (column), in [0, 1].

    The classes are numbered from 0; one without images has zeros, the others sum to 1. The weights
    are those of the first neighbor, of the second one, and so on; or one for all.
    """
    pairs = codes[:, None] * num_classes + neighbor_codes
    weights = np.broadcast_to(weights, pairs.shape).ravel()
    counts = np.bincount(pairs.ravel(), weights, num_classes**2).reshape(num_classes, -1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def most_confused(shares: Float[np.ndarray, "C C"]) -> list[tuple[int, int, float]]:
    """The largest shares of `confusion` with another class: class, other class, and the share."""
    flat = np.where(np.eye(len(shares), dtype=bool), 0, shares).ravel()
    # Of many classes there are too many pairs to sort all in every half.
    last = np.partition(flat, -min(NUM_CONFUSIONS, len(flat)))[-NUM_CONFUSIONS:].min()
    large = np.flatnonzero((flat >= last) & (flat > 0))
    best = large[np.argsort(-flat[large], kind="stable")][:NUM_CONFUSIONS]
    return [(*divmod(int(pair), len(shares)), float(flat[pair])) for pair in best]


def neighbor_halves(
    neighbors: Neighbors, similarities: metrics.Similarities, labels: Labels, halves: Halves
) -> NeighborHalves:
    """Precision@k, kNN accuracy and confusions on the halves."""
    classes, codes = np.unique(labels, return_inverse=True)
    values = {name: np.empty((len(halves), len(classes))) for name in NEIGHBOR_SCORES}
    found = NeighborHalves(values, [], [])
    for half, keep in enumerate(halves):
        own = codes[keep]
        nearest, near = neighbors_within(neighbors, similarities, keep, KNN_K // 2)
        others = codes[nearest]
        # How many of the first 0, 1, 2 ... neighbors have the image's class.
        hits = np.pad(np.cumsum(others == own[:, None], axis=1), ((0, 0), (1, 0)))
        for k in PRECISION_KS:  # k / 2 neighbors; of an odd k the last one counts half
            score = (hits[:, k // 2] + hits[:, (k + 1) // 2]) / k
            values[f"precision_at_{k}"][half] = class_average(score, own)
        correct = (metrics.knn_vote(others, near, len(classes)) == own).astype(np.float64)
        values["knn_accuracy"][half] = class_average(correct, own)
        # Half of five neighbors: two, and half of the third.
        shares = confusion(own, others[:, :3], len(classes), np.array([2.0, 2.0, 1.0]))
        found.first.append(nearest[:, : MUTUAL_K // 2])
        found.confused.append({pair[:2] for pair in most_confused(shares)})
    return found


def spectrum_deviations(
    eigenvalues: Eigenvalues, scores: Float[np.ndarray, "n rank"]
) -> dict[str, Deviations]:
    """Deviations of explained variance and of the centered effective rank, one for each image.

    From the covariance's eigenvalues, and the images' principal component scores in any unit.
    Influence functions over sqrt(n), so that the root mean square is the standard error: an image
    with scores s moves the eigenvalue l_j by s_j^2 - l_j, and the statistic by its derivative. NaN
    for an effective rank above half of n: so near to its bound it measures the number of images.
    """
    n, total = len(scores), eigenvalues.sum()
    if total == 0:  # nothing varies
        names = (*(f"variance_{k}pc" for k in VARIANCE_COMPONENTS), "effective_rank")
        return dict.fromkeys(names, np.full(n, NAN))
    squares = np.square(scores)
    squares = squares / squares.sum(axis=1, dtype=np.float64).mean()
    lengths = squares.sum(axis=1)
    influences = {}
    for k in VARIANCE_COMPONENTS:
        share = eigenvalues[:k].sum() / total
        influences[f"variance_{k}pc"] = squares[:, :k].sum(axis=1) - share * lengths
    positive = eigenvalues > 0
    roots = np.sqrt(eigenvalues[positive] / total)
    p = roots / roots.sum()
    entropy = -(p * np.log(p)).sum()
    rank = np.exp(entropy)
    slopes = -rank * (np.log(p) + entropy) / (2 * roots * roots.sum())
    influence = squares[:, positive] @ slopes
    influences["effective_rank"] = influence if rank <= n / 2 else np.full(n, NAN)
    return {name: (one - one.mean()) / np.sqrt(n) for name, one in influences.items()}
