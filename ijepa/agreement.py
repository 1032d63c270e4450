"""How far two models agree on the same images, and whether a difference between them is chance.

Both models give one row per image in the same order. Where a function takes a seed, the same seed
gives the same number.

Dimension key: n images, d and e widths of the two embeddings, k neighbors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import pdist, squareform

from ijepa.metrics import NAN, class_means, unit_rows
from ijepa.uncertainty import (
    MUTUAL_K,
    Analysis,
    Deviations,
    Estimate,
    class_average,
    columns,
    estimate,
    half_deviations,
    overall,
    student_p,
)

MAX_SPEARMAN_IMAGES = 2000
"""All pairs of this many images are two million similarities."""
NUM_PERMUTATIONS = 200


def mutual_knn(
    neighbors_a: Int[np.ndarray, "n m"], neighbors_b: Int[np.ndarray, "n l"], k: int = 10
) -> Float[np.ndarray, " n"]:
    """Share of each image's first k neighbors that both models have in common, in [0, 1].

    The mean over images is the metric; higher is more agreement, unrelated models give k / (n - 1).
    Huh et al. 2024, "The Platonic Representation Hypothesis", https://arxiv.org/abs/2405.07987.

    Raises:
        ValueError: k exceeds the number of neighbors given.
    """
    fewest = min(neighbors_a.shape[1], neighbors_b.shape[1])
    if k > fewest:
        raise ValueError(f"k must be at most the {fewest} neighbors, got {k}")
    common = neighbors_a[:, :k, None] == neighbors_b[:, None, :k]
    return common.sum(axis=(1, 2)) / k


def mutual_knn_of_classes(
    same_a: Float[np.ndarray, " n"],
    same_b: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    k: int = 10,
) -> float:
    """Mutual kNN of two models that agree on the classes and on nothing else.

    Each takes its own shares of neighbors from the same class, of which k / n_c would be common by
    chance. The mean over classes.

    Args:
        same_a: Share of each image's k neighbors that have its label, in one model.
        same_b: The same in the other one.
        labels: Class of each image.
        k: Number of neighbors.
    """
    codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    shares = [np.bincount(codes, same) / counts for same in (same_a, same_b)]
    return float((shares[0] * shares[1] * k / counts).mean())


def linear_cka(
    X: Float[np.ndarray, "n d"],
    Y: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"] | None = None,
) -> float:
    """Debiased linear centered kernel alignment; 1 for equal up to rotation, scale and offset.

    Unrelated embeddings give 0 on average whatever their widths and the number of classes, so that
    single values may be slightly negative; they are not clamped. With labels it is that of what is
    left next to the classes: each row less the mean of its class. NaN for fewer than 4 images and
    where the self term of a model is not positive. The ratio of the unbiased HSIC estimators of
    Song et al. 2012, Journal of Machine Learning Research 13, computed from the embeddings without
    n x n matrices.
    """
    codes = np.zeros(len(X), np.int64)
    if labels is not None:
        codes = np.unique(labels, return_inverse=True)[1]
    A, B = (_residuals(Z, codes) for Z in (X, Y))
    scale = _cka_scale(A, B, codes)
    return _debiased_product(A, B, codes) / scale if scale > 0 else NAN


def _residuals(
    X: Float[np.ndarray, "n d"], codes: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    """Rows less the mean of their class, over the root of their mean square."""
    rows = X - class_means(X, codes)[codes]
    return rows / (np.sqrt(np.square(rows).sum() / len(X)) or 1.0)


def _cka_scale(
    X: Float[np.ndarray, "n d"], Y: Float[np.ndarray, "n e"], codes: Int[np.ndarray, " n"]
) -> float:
    """Geometric mean of the self terms; 0 if one is not positive or there are too few images."""
    if len(X) < 4:
        return 0.0
    return math.prod(math.sqrt(max(_debiased_product(Z, Z, codes), 0.0)) for Z in (X, Y))


def _debiased_product(
    X: Float[np.ndarray, "n d"], Y: Float[np.ndarray, "n e"], codes: Int[np.ndarray, " n"]
) -> float:
    """Unbiased inner product of the Gram matrices of two matrices of residuals."""
    return float(np.square(X.T @ Y).sum()) - _bias(_row_squares(X), _row_squares(Y), codes)


def _row_squares(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    return np.einsum("ij,ij->i", X, X)


def _bias(
    r_x: Float[np.ndarray, " n"], r_y: Float[np.ndarray, " n"], codes: Int[np.ndarray, " n"]
) -> float:
    """Part of ||X^T Y||^2 that comes from the diagonals of the Gram matrices, given as r."""
    n, common, t_x, t_y = (np.bincount(codes, weights) for weights in (None, r_x * r_y, r_x, r_y))
    larger = np.maximum(n, 3)
    bias = larger / (larger - 2) * common - t_x * t_y / ((larger - 1) * (larger - 2))
    # Residuals of a class of two images are opposite, of one they are zero.
    return float(np.where(n > 2, bias, t_x * t_y).sum())


def cka_null(
    X: Float[np.ndarray, "n d"],
    Y: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> Float[np.ndarray, " p"]:
    """`linear_cka` after shuffling which image is which inside each class, once per entry.

    What two models that share the classes and nothing else would give. NaN as in `linear_cka`.
    """
    codes = np.zeros(len(X), np.int64)
    narrow, wide = (_residuals(Z, codes) for Z in ((X, Y) if X.shape[1] < Y.shape[1] else (Y, X)))
    scale = _cka_scale(narrow, wide, codes)
    if scale == 0:
        return np.full(num_permutations, NAN)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(seed)
    # Each product feeds d * e squares into one sum: float32 costs it 1e-6 and saves half the time.
    left, right = narrow.astype(np.float32), wide.astype(np.float32).T
    squares = [_row_squares(Z) for Z in (narrow, wide)]
    order, values = np.empty(len(X), np.int64), []
    for _ in range(num_permutations):
        for images in members:
            order[images] = generator.permutation(images)
        cross = np.square(right @ left[order]).sum(dtype=np.float64)
        values.append((cross - _bias(squares[0][order], squares[1], codes)) / scale)
    return np.array(values)


def similarity_spearman(
    X: Float[np.ndarray, "n d"], Y: Float[np.ndarray, "n e"], seed: int = 0
) -> float:
    """Spearman correlation of the cosine similarities of all pairs of images, in [-1, 1].

    Higher is more agreement. More than `MAX_SPEARMAN_IMAGES` images are thinned to that number by
    the seed. NaN where all pairs of a model are equally similar. Representational similarity
    analysis, Kriegeskorte et al. 2008, https://doi.org/10.3389/neuro.06.004.2008.
    """
    if len(X) > MAX_SPEARMAN_IMAGES:
        kept = np.random.default_rng(seed).choice(len(X), MAX_SPEARMAN_IMAGES, replace=False)
        X, Y = X[kept], Y[kept]
    pairs = np.triu_indices(len(X), k=1)
    # Rounded: equal pairs of images must not be ordered by their rounding errors.
    values = [(Z @ Z.T)[pairs].round(10) for Z in (unit_rows(X), unit_rows(Y))]
    if any(np.ptp(similarities) == 0 for similarities in values):
        return NAN
    return float(stats.spearmanr(*values).statistic)


def mcnemar_exact_p(correct_a: Bool[np.ndarray, " n"], correct_b: Bool[np.ndarray, " n"]) -> float:
    """Two-sided exact McNemar p-value of equal accuracy on the same images.

    McNemar 1947, https://doi.org/10.1007/BF02295996.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """P-values adjusted for looking at all of them together, in the order given; NaN stays.

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 6.
    """
    order = np.argsort(p_values, kind="stable")[: np.isfinite(p_values).sum()]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(p_values), NAN)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return adjusted


@dataclass(frozen=True)
class PairNumbers:
    """What `Comparison` has to say about two models: see there."""

    differences: dict[str, dict[str, Any]]
    per_class: list[dict[str, Any]]
    agreement: dict[str, Any]
    mutual: Float[np.ndarray, " n"] | None


def compare_pair(
    local: Analysis,
    hf: Analysis,
    values: Mapping[str, Mapping[str, Estimate]],
    halves: Bool[np.ndarray, "B n"] | None,
    seed: int,
) -> PairNumbers:
    """All numbers of two models.

    Args:
        local: The first model.
        hf: The second one.
        values: Every metric of `local` and `hf`.
        halves: On which mutual kNN is repeated; None for no intervals.
        seed: Of the permutations and of the pairs of images that are correlated.
    """
    mutual = None
    if min(local.neighbors.shape[1], hf.neighbors.shape[1]) >= MUTUAL_K:
        mutual = mutual_knn(local.neighbors, hf.neighbors, MUTUAL_K)
    shared = None if halves is None else mutual_deviations(local, hf, halves)
    return PairNumbers(
        differences(local, hf, values),
        per_class(local, hf, mutual, shared),
        agreement(local, hf, mutual, shared, seed),
        mutual,
    )


def change(first: Deviations, second: Deviations, metric: str) -> Float[np.ndarray, "..."] | None:
    """Deviations of the second model's metric less the first one's; None without intervals."""
    return second[metric] - first[metric] if metric in first else None


def ratio(local: float, hf: float) -> float:
    """Local over hf; NaN where that says nothing: below zero more would read as better."""
    return local / hf if hf > 0 and local >= 0 else NAN


def differences(
    local: Analysis, hf: Analysis, values: Mapping[str, Mapping[str, Estimate]]
) -> dict[str, dict[str, Any]]:
    """Take hf - local and local / hf of every metric; for P@5 and P@1 also tests."""
    result: dict[str, dict[str, Any]] = {}
    for metric, ours in values["local"].items():
        theirs = values["hf"][metric]
        quotient, relative = ratio(ours.value, theirs.value), None
        if theirs.ci95[0] <= 0:  # a quotient by what may be 0 says nothing
            quotient = NAN
        elif metric in local.deviations:
            # A quotient changes with its parts as its derivative says: the delta method.
            relative = local.deviations[metric] - quotient * hf.deviations[metric]
            relative = relative / theirs.value
        changed = change(local.deviations, hf.deviations, metric)
        result[metric] = {
            "estimate": estimate(theirs.value - ours.value, changed),
            "ratio": estimate(quotient, relative),
        }
    changed = change(local.deviations, hf.deviations, "precision_at_5")
    result["precision_at_5"] |= paired_precision(local.precisions(5), hf.precisions(5), changed)
    if np.isfinite(local.precisions(1)).all():
        p = mcnemar_exact_p(local.first_is_right(), hf.first_is_right())
        result["precision_at_1"]["mcnemar_p"] = p
    return result


def paired_precision(
    local: Float[np.ndarray, " n"],
    hf: Float[np.ndarray, " n"],
    deviations: Float[np.ndarray, " r"] | None,
) -> dict[str, Any]:
    """p-value of no difference and the images on which hf wins, ties and loses; or nothing."""
    if not np.isfinite(local).all():
        return {}
    return {
        "p": student_p(float((hf - local).mean()), deviations),
        "wins": int((hf > local).sum()),
        "ties": int((hf == local).sum()),
        "losses": int((hf < local).sum()),
    }


def per_class(
    local: Analysis,
    hf: Analysis,
    mutual: Float[np.ndarray, " n"] | None,
    shared: Float[np.ndarray, "r C"] | None,
) -> list[dict[str, Any]]:
    """By class: P@5 of both models, difference, tests and mutual kNN; p-values also after Holm."""
    labels, precisions = local.labels, [a.precisions(5) for a in (local, hf)]
    if not np.isfinite(precisions[0]).all():
        return []
    changed = change(local.class_deviations, hf.class_deviations, "precision_at_5")
    intervals = zip(columns(changed, labels), columns(shared, labels), strict=True)
    rows = []
    for label, (deviations, of_mutual) in zip(np.unique(labels), intervals, strict=True):
        own = labels == label
        ours, theirs = (values[own] for values in precisions)
        common = NAN if mutual is None else float(mutual[own].mean())
        rows.append(
            {
                "label": int(label),
                "n": int(own.sum()),
                "local": float(ours.mean()),
                "hf": float(theirs.mean()),
                "difference": estimate(float((theirs - ours).mean()), deviations),
                **paired_precision(ours, theirs, deviations),
                "mcnemar_p": mcnemar_exact_p(local.first_is_right()[own], hf.first_is_right()[own]),
                "mutual_knn": estimate(common, of_mutual),
            }
        )
    for test, corrected in (("p", "holm_p"), ("mcnemar_p", "mcnemar_holm_p")):
        for row, p in zip(rows, holm(np.array([row[test] for row in rows])), strict=True):
            row[corrected] = float(p)
    return rows


def mutual_deviations(
    local: Analysis, hf: Analysis, halves: Bool[np.ndarray, "B n"]
) -> Float[np.ndarray, "r C"]:
    """Deviations of mutual kNN by class."""
    codes = np.unique(local.labels, return_inverse=True)[1]
    lists = zip(local.halves.first, hf.halves.first, halves, strict=True)
    return half_deviations(
        np.array(
            [class_average(mutual_knn(a, b, MUTUAL_K // 2), codes[keep]) for a, b, keep in lists]
        )
    )


def agreement(
    local: Analysis,
    hf: Analysis,
    mutual: Float[np.ndarray, " n"] | None,
    shared: Float[np.ndarray, "r C"] | None,
    seed: int,
) -> dict[str, Any]:
    """How alike the two models see the images, each number next to its chance level."""
    labels, n = local.labels, len(local.labels)
    X, Y = local.embeddings, hf.embeddings
    numbers = {
        "mutual_knn_chance": MUTUAL_K / (n - 1) if n > MUTUAL_K else NAN,
        "cka": linear_cka(X, Y),
        "cka_class_demeaned": linear_cka(X, Y, labels),
        "similarity_spearman": similarity_spearman(X, Y, seed),
    }
    null = cka_null(X, Y, labels, seed=seed)
    reached = int((null >= numbers["cka"]).sum())
    numbers["cka_null_p99"] = float(np.quantile(null, 0.99))
    numbers["cka_null_p"] = NAN if np.isnan(null).any() else (1 + reached) / (1 + len(null))
    same = [a.precisions(MUTUAL_K) for a in (local, hf)]
    numbers["mutual_knn_class_only"] = mutual_knn_of_classes(*same, labels, MUTUAL_K)
    common = None if shared is None else overall(shared, labels)
    value = NAN if mutual is None else float(mutual.mean())
    return {"mutual_knn": estimate(value, common), **numbers}


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
        means = class_means(X, codes)
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
        groups["cophenetic"], groups["p"] = permuted_correlation(*heights, seed, num_permutations)
    return groups


def permuted_correlation(
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
