"""How far two models agree on the same images, and whether a difference between them is chance.

Both models give one row per image in the same order. Where a function takes a seed, the same seed
gives the same number.

Dimension key: n images, d and e widths of the two embeddings, k neighbours.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from ijepa.metrics import center_columns, unit_rows

# All pairs of this many images: two million similarities, which two cores rank in a second.
MAX_SPEARMAN_IMAGES = 2000
# Signs drawn at once in a sign-flip test.
_SIGN_ENTRIES = 2**24


def mutual_knn(
    neighbors_a: Int[np.ndarray, "n m"], neighbors_b: Int[np.ndarray, "n l"], k: int = 10
) -> Float[np.ndarray, " n"]:
    """Share of each image's first k neighbours that both models have in common, in [0, 1].

    The mean over images is the metric; higher is more agreement, unrelated models give k / (n - 1).
    Huh et al. 2024, "The Platonic Representation Hypothesis", https://arxiv.org/abs/2405.07987.

    Raises:
        ValueError: k exceeds the number of neighbours given.
    """
    fewest = min(neighbors_a.shape[1], neighbors_b.shape[1])
    if k > fewest:
        raise ValueError(f"k must be at most the {fewest} neighbours, got {k}")
    common = neighbors_a[:, :k, None] == neighbors_b[:, None, :k]
    return common.sum(axis=(1, 2)) / k


def linear_cka(X: Float[np.ndarray, "n d"], Y: Float[np.ndarray, "n e"]) -> float:
    """Debiased linear centred kernel alignment; 1 for equal up to rotation, scale and offset.

    Unrelated embeddings give 0 on average whatever their widths, so that single values may be
    slightly negative; they are not clamped. NaN for fewer than 4 images and where the self term of
    a model is not positive. The ratio of the unbiased HSIC estimators of Song et al. 2012,
    Journal of Machine Learning Research 13, computed from the embeddings without n x n matrices.
    """
    if len(X) < 4:
        return float("nan")
    X, Y = center_columns(X), center_columns(Y)
    self_terms = _debiased_product(X, X), _debiased_product(Y, Y)
    if min(self_terms) <= 0:
        return float("nan")
    return float(_debiased_product(X, Y) / math.sqrt(self_terms[0] * self_terms[1]))


def _debiased_product(X: Float[np.ndarray, "n d"], Y: Float[np.ndarray, "n e"]) -> float:
    """Unbiased inner product of the Gram matrices of two centred matrices, up to a factor of n."""
    return float(np.square(X.T @ Y).sum()) - _bias(np.square(X).sum(1), np.square(Y).sum(1))


def _bias(r_x: Float[np.ndarray, " n"], r_y: Float[np.ndarray, " n"]) -> float:
    """Part of ||X^T Y||^2 that comes from the diagonals of the Gram matrices, given as r."""
    n = len(r_x)
    return float(n / (n - 2) * (r_x @ r_y) - r_x.sum() * r_y.sum() / ((n - 1) * (n - 2)))


def demean_by_class(
    X: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    """Embeddings less the mean of their class, float64: what is left beside the classes."""
    codes = np.unique(labels, return_inverse=True)[1]
    residuals = X.astype(np.float64)
    for code in range(codes.max() + 1):
        # center_columns and not a plain mean, so that a class of equal rows becomes exactly zero.
        residuals[codes == code] = center_columns(X[codes == code])
    return residuals


def cka_null(
    X: Float[np.ndarray, "n d"],
    Y: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    num_permutations: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " p"]:
    """`linear_cka` after shuffling which image is which inside each class, once per entry.

    What two models that share the classes and nothing else would give. NaN as in `linear_cka`.
    """
    if math.isnan(linear_cka(X, Y)):
        return np.full(num_permutations, np.nan)
    X, Y = center_columns(X), center_columns(Y)
    narrow, wide = (X, Y) if X.shape[1] < Y.shape[1] else (Y, X)
    scale = math.sqrt(_debiased_product(X, X) * _debiased_product(Y, Y))
    r_narrow, r_wide = np.square(narrow).sum(axis=1), np.square(wide).sum(axis=1)
    # Each product feeds d * e squares into one sum: float32 costs it 1e-6 and saves half the time.
    narrow32, wide32 = narrow.astype(np.float32), wide.astype(np.float32)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(seed)
    values = np.empty(num_permutations)
    for index in range(num_permutations):
        order = np.empty(len(labels), np.int64)
        for images in members:
            order[images] = generator.permutation(images)
        cross = np.square(wide32.T @ narrow32[order], dtype=np.float64).sum()
        values[index] = (cross - _bias(r_narrow[order], r_wide)) / scale
    return values


def similarity_spearman(
    X: Float[np.ndarray, "n d"], Y: Float[np.ndarray, "n e"], seed: int = 0
) -> float:
    """Spearman correlation of the cosine similarities of all pairs of images, in [-1, 1].

    Higher is more agreement. More than `MAX_SPEARMAN_IMAGES` images are thinned to that number by
    the seed. NaN where all pairs of a model are equally similar. Representational similarity
    analysis, Kriegeskorte et al. 2008, https://doi.org/10.3389/neuro.06.004.2008.
    """
    n = len(X)
    if n > MAX_SPEARMAN_IMAGES:
        kept = np.random.default_rng(seed).choice(n, MAX_SPEARMAN_IMAGES, replace=False)
        X, Y, n = X[kept], Y[kept], MAX_SPEARMAN_IMAGES
    pairs = np.triu_indices(n, k=1)
    ranks = np.stack([_average_ranks((Z @ Z.T)[pairs]) for Z in (unit_rows(X), unit_rows(Y))])
    ranks -= ranks.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / lengths.prod()) if lengths.all() else float("nan")


def _average_ranks(values: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    """Ranks from 1, ascending; equal values share the mean of their ranks."""
    # Twelve decimals: equal pairs of images must not be ordered by their rounding errors.
    _, inverse, counts = np.unique(values.round(12), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def sign_flip_p(
    differences: Float[np.ndarray, " n"], num_flips: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of a mean paired difference when each sign could as well be the other.

    (1 + flips at least as extreme) / (1 + flips), at least 1 / (1 + num_flips); 1 when all
    differences are 0.
    """
    nonzero = differences[differences != 0]
    if nonzero.size == 0:
        return 1.0
    # Sums that are equal on paper must count as equal whatever the order of their terms.
    observed = abs(nonzero.sum()) - 1e-9 * np.abs(nonzero).sum()
    generator = np.random.default_rng(seed)
    extreme, step = 0, max(1, _SIGN_ENTRIES // nonzero.size)
    for start in range(0, num_flips, step):
        shape = (min(step, num_flips - start), nonzero.size)
        # A sum with random signs is the total less twice the flipped part.
        flipped = generator.integers(0, 2, shape, dtype=np.uint8).astype(bool)
        sums = nonzero.sum() - 2.0 * np.where(flipped, nonzero, 0.0).sum(axis=1)
        extreme += int((np.abs(sums) >= observed).sum())
    return (1 + extreme) / (1 + num_flips)


def mcnemar_exact_p(correct_a: Bool[np.ndarray, " n"], correct_b: Bool[np.ndarray, " n"]) -> float:
    """Two-sided exact McNemar p-value of equal accuracy on the same images.

    Twice the smaller binomial tail, at most 1, of the images where one model alone is right.
    McNemar 1947, https://doi.org/10.1007/BF02295996.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    total = only_a + only_b
    # Integers, because 2**-total is no float for more than a thousand images.
    tail = term = 1
    for count in range(min(only_a, only_b)):
        term = term * (total - count) // (count + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def holm(p_values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """P-values adjusted for looking at all of them together, in the order given.

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 6.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return adjusted
