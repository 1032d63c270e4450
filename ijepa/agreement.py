"""How far two models agree on the same images, and whether a difference between them is chance.

Both models give one row per image in the same order. Where a function takes a seed, the same seed
gives the same number.

Dimension key: n images, d and e widths of the two embeddings, k neighbors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import pdist, squareform
from scipy.special import bdtr

from ijepa import uncertainty
from ijepa.metrics import NAN, Embeddings, Labels, PerImage, class_means, unit_rows
from ijepa.uncertainty import MUTUAL_K, Analysis, Deviations, Estimate, class_average, estimate

MAX_SPEARMAN_IMAGES = 2000  # with two million pairs
NUM_PERMUTATIONS = 200

Other = Float[np.ndarray, "n e"]  # the second model's embeddings
Values = Mapping[str, Mapping[str, Estimate]]  # by model, then metric


def mutual_knn(a: Int[np.ndarray, "n m"], b: Int[np.ndarray, "n l"], k: int = 10) -> PerImage:
    """Share of each image's first k neighbors that both models have in common, in [0, 1].

    The mean over images is the metric; higher is more agreement, unrelated models give k / (n - 1).
    Huh et al. 2024, "The Platonic Representation Hypothesis", https://arxiv.org/abs/2405.07987.
    """
    return (a[:, :k, None] == b[:, None, :k]).sum(axis=(1, 2)) / k


def mutual_knn_of_classes(same_a: PerImage, same_b: PerImage, labels: Labels, k: int = 10) -> float:
    """Mutual kNN of two models that agree on the classes and on nothing else: mean over images.

    `same_a` and `same_b` are the shares of each image's k neighbors that have its label; a and b
    are their means in a class of n_c images. Its images share a b k / (n_c - 1) neighbors of the
    class and (1 - a) (1 - b) k / (n - n_c) others.
    """
    codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    a, b = class_average(same_a, codes), class_average(same_b, codes)
    others = len(labels) - counts
    inside = a * b * k / np.maximum(counts - 1, 1)
    outside = (1 - a) * (1 - b) * k / np.maximum(others, 1)
    return float(np.average(inside + outside, weights=counts))


def linear_cka(X: Embeddings, Y: Other, labels: Labels | None = None) -> float:
    """Debiased linear centered kernel alignment; 1 if equal up to rotation, scale and offset.

    Unrelated embeddings give 0 on average whatever their widths and the number of classes; single
    values may be slightly negative. With labels, each row's class mean is subtracted. NaN for
    fewer than 3 images more than classes, and unless both models' self terms are positive. The
    ratio of the unbiased HSIC estimators of Song et al. 2012, Journal of Machine Learning Research
    13, without n x n matrices.
    """
    labels = np.zeros(len(X), np.int64) if labels is None else labels
    codes = np.unique(labels, return_inverse=True)[1]
    return _cka(_residuals(X, codes), _residuals(Y, codes), codes)[0]


def _residuals(X: Embeddings, codes: Labels) -> Embeddings:
    """Rows less the mean of their class, over the root of their mean square."""
    rows = X - class_means(X, codes)[codes]
    return rows / (np.sqrt(np.square(rows).sum() / len(X)) or 1.0)


def _cka(A: Embeddings, B: Other, codes: Labels) -> tuple[float, float]:
    """`linear_cka` of residuals, and its denominator, the geometric mean of the self terms."""
    one, other = (_debiased_product(Z, Z, codes) for Z in (A, B))
    enough = len(A) - codes.max() > 3 and min(one, other) > 0
    scale = math.sqrt(one) * math.sqrt(other) if enough else NAN
    return _debiased_product(A, B, codes) / scale, scale


def _debiased_product(A: Embeddings, B: Other, codes: Labels) -> float:
    """Unbiased inner product of the Gram matrices of two matrices of residuals."""
    return float(np.square(A.T @ B).sum()) - _bias(_row_squares(A), _row_squares(B), codes)


def _row_squares(X: Embeddings) -> PerImage:
    return np.einsum("ij,ij->i", X, X)


def _bias(r_x: PerImage, r_y: PerImage, codes: Labels) -> float:
    """Part of ||X^T Y||^2 that comes from the diagonals of the Gram matrices, given as r."""
    n, common, t_x, t_y = (np.bincount(codes, weights) for weights in (None, r_x * r_y, r_x, r_y))
    larger = np.maximum(n, 3)
    bias = larger / (larger - 2) * common - t_x * t_y / ((larger - 1) * (larger - 2))
    # Residuals of a class of two images are opposite, of one they are zero.
    return float(np.where(n > 2, bias, t_x * t_y).sum())


def cka_and_null(
    X: Embeddings, Y: Other, labels: Labels, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0
) -> tuple[float, Float[np.ndarray, " p"]]:
    """`linear_cka`, and after shuffling which image is which inside each class, once per entry.

    The latter is what two models that share the classes and nothing else would give.
    """
    codes = np.zeros(len(X), np.int64)
    narrow, wide = (_residuals(Z, codes) for Z in ((X, Y) if X.shape[1] < Y.shape[1] else (Y, X)))
    cka, scale = _cka(narrow, wide, codes)
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
    return cka, np.array(values)


def similarity_spearman(X: Embeddings, Y: Other, seed: int = 0) -> float:
    """Spearman correlation of the cosine similarities of all pairs of images, in [-1, 1].

    Higher is more agreement. The seed picks `MAX_SPEARMAN_IMAGES` of more images. NaN where all
    pairs of a model are equally similar. Representational similarity analysis, Kriegeskorte et al.
    2008, https://doi.org/10.3389/neuro.06.004.2008.
    """
    if len(X) > MAX_SPEARMAN_IMAGES:
        kept = np.random.default_rng(seed).choice(len(X), MAX_SPEARMAN_IMAGES, replace=False)
        X, Y = X[kept], Y[kept]
    pairs = np.triu_indices(len(X), k=1)
    # Rounded: equal pairs of images must not be ordered by their rounding errors.
    values = [(Z @ Z.T)[pairs].round(10) for Z in (unit_rows(X), unit_rows(Y))]
    if any(np.ptp(similarities) == 0 for similarities in values):
        return NAN
    return float(np.corrcoef(*map(average_ranks, values))[0, 1])


def average_ranks(values: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    """Ranks from 1 on; equal values share their mean rank.

    As `scipy.stats.rankdata`, without the import of `scipy.stats`, which may take a second.
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def mcnemar_exact_p(correct_a: Bool[np.ndarray, " n"], correct_b: Bool[np.ndarray, " n"]) -> float:
    """Two-sided exact McNemar p-value of equal accuracy on the same images.

    McNemar 1947, https://doi.org/10.1007/BF02295996.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    # Twice the smaller tail; the tails of equal counts overlap.
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def add_holm(rows: Sequence[dict[str, Any]], test: str, name: str) -> None:
    """Add to each row, under `name`, its p-value `test` adjusted for all rows; NaN stays.

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 6.
    """
    p_values = np.array([row[test] for row in rows])
    order = np.argsort(p_values, kind="stable")  # NaN is last, and stays
    factors = np.isfinite(p_values).sum() - np.arange(len(order))
    adjusted = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    for row, p in zip(order, adjusted.tolist(), strict=True):
        rows[row][name] = p


def compare_pair(
    local: Analysis, hf: Analysis, values: Values, halves: uncertainty.Halves, seed: int
) -> dict[str, Any]:
    """All numbers of two models, whose metrics are `values`, by field of `Comparison`."""
    labels, mutual = local.labels, None
    if local.neighbors.shape[1] >= MUTUAL_K:
        mutual = mutual_knn(local.neighbors, hf.neighbors, MUTUAL_K)
    common = np.full(len(labels), NAN) if mutual is None else mutual
    codes = np.unique(labels, return_inverse=True)[1]
    on_halves = np.empty((len(halves), codes.max() + 1))
    for half, keep in enumerate(halves):
        shared = mutual_knn(local.halves.first[half], hf.halves.first[half], MUTUAL_K // 2)
        on_halves[half] = class_average(shared, codes[keep])
    deviations, by_class = uncertainty.mean_deviations(on_halves, labels)
    mutual_mean = estimate(float(common.mean()), deviations)
    return {
        "differences": differences(local, hf, values),
        "per_class": per_class(local, hf, common, by_class),
        "agreement": {"mutual_knn": mutual_mean, **agreement(local, hf, seed)},
        "mutual": mutual,
    }


def differences(local: Analysis, hf: Analysis, values: Values) -> dict[str, dict[str, Any]]:
    """By metric: `estimate` is hf - local and `ratio` local / hf, each with its interval.

    The ratio is NaN where the interval of hf reaches 0 or local is negative. P@5 also has `p`,
    `wins`, `ties` and `losses` of hf over images, and P@1 `mcnemar_p`, where they are defined. No
    report shows that one: images share neighbors, so it is too small.
    """
    result: dict[str, dict[str, Any]] = {}
    for metric, ours in values["local"].items():
        theirs = values["hf"][metric]
        parts = local.deviations_of(metric), hf.deviations_of(metric)
        # A quotient of a negative number, or by what may be 0, says nothing; NaN is no interval.
        defined = ours.value >= 0 and theirs.value > 0 and not theirs.ci95[0] <= 0
        quotient = ours.value / theirs.value if defined else NAN
        # It changes with its parts as its derivative says: the delta method.
        relative = (parts[0] - quotient * parts[1]) / theirs.value
        result[metric] = {
            "estimate": estimate(theirs.value - ours.value, parts[1] - parts[0]),
            "ratio": estimate(quotient, relative),
        }
    changed = hf.deviations_of("precision_at_5") - local.deviations_of("precision_at_5")
    result["precision_at_5"] |= paired_precision(local.precisions(5), hf.precisions(5), changed)
    if np.isfinite(local.precisions(1)).all():
        p = mcnemar_exact_p(local.first_is_right(), hf.first_is_right())
        result["precision_at_1"]["mcnemar_p"] = p
    return result


def paired_precision(local: PerImage, hf: PerImage, deviations: Deviations) -> dict[str, Any]:
    """p-value of no difference and the images on which hf wins, ties and loses; or nothing."""
    if not np.isfinite(local).all():
        return {}
    return {
        "p": uncertainty.student_p(float((hf - local).mean()), deviations),
        "wins": int((hf > local).sum()),
        "ties": int((hf == local).sum()),
        "losses": int((hf < local).sum()),
    }


def per_class(
    local: Analysis, hf: Analysis, mutual: PerImage, shared: uncertainty.ClassDeviations
) -> list[dict[str, Any]]:
    """By class: P@5 of both models, difference, tests and mutual kNN; p-values also after Holm."""
    if not np.isfinite(local.precisions(5)).all():
        return []
    changed, rows = hf.class_deviations - local.class_deviations, []
    for code, label in enumerate(np.unique(local.labels)):
        own = local.labels == label
        ours, theirs = (model.precisions(5)[own] for model in (local, hf))
        row = {
            "label": int(label),
            "n": int(own.sum()),
            "local": float(ours.mean()),
            "hf": float(theirs.mean()),
            "difference": estimate(float((theirs - ours).mean()), changed[:, code]),
            **paired_precision(ours, theirs, changed[:, code]),
            "mcnemar_p": mcnemar_exact_p(local.first_is_right()[own], hf.first_is_right()[own]),
            "mutual_knn": estimate(float(mutual[own].mean()), shared[:, code]),
        }
        rows.append(row)
    add_holm(rows, "p", "holm_p")
    add_holm(rows, "mcnemar_p", "mcnemar_holm_p")
    return rows


def agreement(local: Analysis, hf: Analysis, seed: int) -> dict[str, float]:
    """How alike the two models see the images, each number next to its chance level."""
    labels, n = local.labels, len(local.labels)
    X, Y = local.embeddings, hf.embeddings
    cka, null = cka_and_null(X, Y, labels, seed=seed)
    # Shuffles that change nothing differ from it by the rounding of float32.
    reached = (1 + int((null >= cka - 1e-5).sum())) / (1 + len(null))
    if np.bincount(labels).max() < 2:  # there is nothing to shuffle
        null[:] = NAN
    same = [a.precisions(MUTUAL_K) for a in (local, hf)]
    return {
        "mutual_knn_chance": MUTUAL_K / (n - 1) if n > MUTUAL_K else NAN,
        "cka": cka,
        "cka_class_demeaned": linear_cka(X, Y, labels),
        "similarity_spearman": similarity_spearman(X, Y, seed),
        "cka_null_p99": float(np.quantile(null, 0.99)),
        "cka_null_p": NAN if np.isnan(null).any() else reached,
        "mutual_knn_class_only": mutual_knn_of_classes(*same, labels, MUTUAL_K),
    }


def class_groups(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    labels: Labels,
    seed: int = 0,
    num_permutations: int = 1000,
) -> dict[str, Any]:
    """Which classes each model places close together, and how well two models agree on it.

    Average linkage of the class means, less their mean, by 1 - cosine similarity. `merges` of each
    model are the pairs of groups of labels that become one, in this order, with their distance;
    `top` is the last pair. For two models `cophenetic` is the correlation over pairs of classes of
    the distances at which they join, in [-1, 1], Sokal and Rohlf 1962,
    https://doi.org/10.2307/1217208, and `p` the share of 1 + `num_permutations` orders of one
    model's classes that agree as well or better; fewer orders of over 1,000 classes. Empty for
    fewer than 3 classes or where a class mean has no direction.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 3:
        return {}
    groups: dict[str, Any] = {}
    heights = []
    for name, X in embeddings.items():
        means = class_means(X, codes)
        distances = pdist(means - means.mean(axis=0), "cosine")
        if not np.isfinite(distances).all():
            return {}
        tree = linkage(distances, "average")
        clusters, merges = [[int(label)] for label in classes], []
        for left, right, height, _ in tree:
            pair = sorted(sorted(clusters[int(side)]) for side in (left, right))
            clusters.append(pair[0] + pair[1])
            merges.append([*pair, float(height)])
        groups[name] = {"merges": merges, "top": merges[-1][:2]}
        heights.append(cophenet(tree))
    if len(heights) == 2:
        # Of very many classes each order takes long.
        num_orders = min(num_permutations, max(100, 10**9 // len(classes) ** 2))
        groups["cophenetic"], groups["p"] = permuted_correlation(*heights, seed, num_orders)
    return groups


def permuted_correlation(
    a: Float[np.ndarray, " p"], b: Float[np.ndarray, " p"], seed: int, num_permutations: int
) -> tuple[float, float]:
    """Correlation and p as in `class_groups`; NaN where all pairs of a model are equally far."""
    a, b = a - a.mean(), b - b.mean()
    scale, square = float(np.linalg.norm(a) * np.linalg.norm(b)), squareform(b)
    if scale < 1e-12:
        return NAN, NAN
    observed = float(a @ b) / scale
    generator, as_large = np.random.default_rng(seed), 0
    for _ in range(num_permutations):
        order = generator.permutation(len(square))
        shuffled = squareform(square[np.ix_(order, order)], checks=False)
        as_large += float(a @ shuffled) / scale >= observed - 1e-12
    return observed, (1 + as_large) / (1 + num_permutations)
