"""How far two models agree on the same images, and whether a difference between them is chance.

Both models give one row per image in the same order. Where a function takes a seed, the same seed
gives the same number.

Dimension key: n images, d and e widths of the two embeddings, k neighbours.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import pdist, squareform

from ijepa.metrics import (
    TILE_ENTRIES,
    Residuals,
    cross_product,
    residuals,
    row_blocks,
    unit_rows,
)

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


def linear_cka(
    X: Float[np.ndarray, "n d"],
    Y: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"] | None = None,
) -> float:
    """Debiased linear centred kernel alignment; 1 for equal up to rotation, scale and offset.

    Unrelated embeddings give 0 on average whatever their widths, so that single values may be
    slightly negative; they are not clamped. With labels it is that of what is left beside the
    classes: each row less the mean of its class. NaN for fewer than 4 images and where the self
    term of a model is not positive. The ratio of the unbiased HSIC estimators of Song et al. 2012,
    Journal of Machine Learning Research 13, computed from the embeddings without n x n matrices.
    """
    if len(X) < 4:
        return float("nan")
    A, B = residuals(X, labels), residuals(Y, labels)
    scale = _cka_scale(A, B)
    return _debiased_product(A, B) / scale if scale > 0 else float("nan")


def _cka_scale(X: Residuals, Y: Residuals) -> float:
    """Geometric mean of the self terms, by which the cross term is divided; 0 if one is not > 0."""
    self_terms = _debiased_product(X, X), _debiased_product(Y, Y)
    return math.prod(math.sqrt(max(term, 0.0)) for term in self_terms)


def _debiased_product(X: Residuals, Y: Residuals) -> float:
    """Unbiased inner product of the Gram matrices of two centred matrices, up to a factor of n."""
    bias = _bias(_row_squares(X), _row_squares(Y))
    return float(np.square(cross_product(X, Y)).sum()) - bias


def _row_squares(X: Residuals) -> Float[np.ndarray, " n"]:
    return np.concatenate([np.square(X[rows]).sum(axis=1) for rows in row_blocks(*X.shape)])


def _bias(r_x: Float[np.ndarray, " n"], r_y: Float[np.ndarray, " n"]) -> float:
    """Part of ||X^T Y||^2 that comes from the diagonals of the Gram matrices, given as r."""
    n = len(r_x)
    return float(n / (n - 2) * (r_x @ r_y) - r_x.sum() * r_y.sum() / ((n - 1) * (n - 2)))


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
    n = len(labels)
    narrow, wide = map(residuals, (X, Y) if X.shape[1] < Y.shape[1] else (Y, X))
    scale = _cka_scale(narrow, wide) if n >= 4 else 0.0
    if scale == 0:
        return np.full(num_permutations, np.nan)
    r_narrow, r_wide = _row_squares(narrow), _row_squares(wide)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(seed)
    values = np.empty(num_permutations)
    # As many orders at once as their products have room for: each time all rows are made anew.
    step = max(1, TILE_ENTRIES // max(n, narrow.shape[1] * wide.shape[1]))
    for start in range(0, num_permutations, step):
        orders = np.empty((min(step, num_permutations - start), n), np.int64)
        for order in orders:
            for images in members:
                order[images] = generator.permutation(images)
        crosses = _shuffled_products(narrow, wide, orders, r_narrow.max(), r_wide.max())
        for row, (order, cross) in enumerate(zip(orders, crosses, strict=True), start=start):
            values[row] = (cross - _bias(r_narrow[order], r_wide)) / scale
    return values


def _shuffled_products(
    narrow: Residuals,
    wide: Residuals,
    orders: Int[np.ndarray, "o n"],
    *largest: float,
) -> Float[np.ndarray, " o"]:
    """||wide^T narrow||^2 for rows of narrow in several orders, from the largest squares of rows.

    Each product feeds d * e squares into one sum: float32 costs it 1e-6 and saves half the time.
    A power of two keeps the squares inside its range.
    """
    shrink, shrink_wide = (2.0 ** -np.frexp(np.sqrt(square))[1] for square in largest)
    totals = np.zeros((len(orders), wide.shape[1], narrow.shape[1]))
    for rows in row_blocks(*wide.shape):
        block = (wide[rows] * shrink_wide).astype(np.float32).T
        for order, total in zip(orders, totals, strict=True):
            total += block @ (narrow[order[rows]] * shrink).astype(np.float32)
    return np.square(totals).sum(axis=(1, 2)) / (shrink * shrink_wide) ** 2


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


def class_groups(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    labels: Int[np.ndarray, " n"],
    seed: int = 0,
    num_permutations: int = 1000,
) -> dict[str, Any] | None:
    """Which classes each model holds for alike, and how well two models agree on it.

    Average linkage of the class means, less their mean, by 1 - cosine similarity. Of each model
    `merges` are the pairs of groups of labels in the order in which they become one, with the
    distance at which they do, and `top` the last two groups. For two models `cophenetic` is the
    correlation over pairs of classes of the distances at which they join, Sokal and Rohlf 1962,
    https://doi.org/10.2307/1217208, in [-1, 1], and `p` the share of 1 + `num_permutations` orders
    of the classes of one model that agree as well or better. None for fewer than 3 classes or
    where a class mean has no direction.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 3:
        return None
    groups: dict[str, Any] = {}
    heights = []
    for name, X in embeddings.items():
        means = np.stack([X[codes == c].mean(axis=0, dtype=float) for c in range(len(classes))])
        distances = pdist(means - means.mean(axis=0), "cosine")
        if not np.isfinite(distances).all():
            return None
        tree = linkage(distances, "average")
        clusters, merges = [[int(label)] for label in classes], []
        for left, right, height, _ in tree:
            pair = sorted(sorted(clusters[int(side)]) for side in (left, right))
            clusters.append(pair[0] + pair[1])
            merges.append([*pair, float(height)])
        groups[name] = {"merges": merges, "top": merges[-1][:2]}
        heights.append(cophenet(tree))
    if len(heights) == 2:
        groups["cophenetic"], groups["p"] = _permuted_correlation(*heights, seed, num_permutations)
    return groups


def _permuted_correlation(
    a: Float[np.ndarray, " p"], b: Float[np.ndarray, " p"], seed: int, num_permutations: int
) -> tuple[float, float]:
    """Correlation of the distances of all pairs, with its p-value when b's classes are shuffled.

    NaN where all pairs of a model are equally far.
    """
    a, square = a - a.mean(), squareform(b - b.mean())
    scale = float(np.linalg.norm(a) * np.linalg.norm(b - b.mean()))
    if scale < 1e-12:
        return float("nan"), float("nan")
    observed = float(a @ (b - b.mean())) / scale
    generator, as_large = np.random.default_rng(seed), 0
    for _ in range(num_permutations):
        order = generator.permutation(len(square))
        shuffled = squareform(square[np.ix_(order, order)], checks=False)
        as_large += float(a @ shuffled) / scale >= observed - 1e-12
    return observed, (1 + as_large) / (1 + num_permutations)
