"""From the embeddings of the same images by one or two models to one record of numbers.

`METRICS` is the table of single-model numbers: a new one is a function of an `Analysis` and a line.
Differences are always hf - local. Where a class has too few images for halves there is no interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ijepa.agreement import (
    cka_null,
    demean_by_class,
    holm,
    linear_cka,
    mcnemar_exact_p,
    mutual_knn,
    sign_flip_p,
    similarity_spearman,
)
from ijepa.metrics import (
    chance_precision,
    covariance_spectrum,
    effective_rank,
    explained_variance,
    hubness,
    knn_correct,
    num_components,
    participation_ratio,
    precision_at_k,
    silhouette_samples,
    unit_scale,
    validate_embeddings,
)
from ijepa.uncertainty import (
    NUM_HALVES,
    Estimate,
    NeighborLists,
    can_halve,
    estimate,
    half_samples,
    jackknife_blocks,
    list_neighbors,
    mutual_knn_halves,
    neighbor_halves,
    neighbors_within,
    silhouette_halves,
    spectrum_replicates,
)

NAN = float("nan")
MUTUAL_K = 10
HEADLINES = ("variance_10pc", "variance_50pc", "silhouette", "precision_at_5")
"""The rows of the table, after the embedding dimension."""


@dataclass(frozen=True)
class Analysis:
    """One model's embeddings with what several metrics share."""

    lists: NeighborLists
    labels: Int[np.ndarray, " n"]
    eigenvalues: Float[np.ndarray, " rank"]
    silhouettes: dict[str, Float[np.ndarray, " n"]]
    """Per image, by distance: `euclidean` and `cosine`."""

    @property
    def embeddings(self) -> Float[np.ndarray, "n d"]:
        """The embeddings themselves."""
        return self.lists.embeddings

    def precisions(self, k: int) -> Float[np.ndarray, " n"]:
        """Precision@k of each image; NaN where there are fewer than k other images."""
        if k > self.lists.neighbors.shape[1]:
            return np.full(len(self.labels), NAN)
        return precision_at_k(self.lists.neighbors, self.labels, k)

    def knn_correct(self) -> Bool[np.ndarray, " n"]:
        """Whether the vote of the 20 nearest others (or all, if fewer) names the right class."""
        k = min(20, self.lists.neighbors.shape[1])
        return knn_correct(self.lists.neighbors, self.lists.similarities, self.labels, k)

    def hubness(self) -> tuple[float, float, float]:
        """Skew, maximum and share of anti-hubs of the 10-NN lists."""
        if self.lists.neighbors.shape[1] < 10:
            return NAN, NAN, NAN
        found = hubness(self.lists.neighbors, 10)
        return found.skew, float(found.maximum), found.anti_hub_share


def analyze(X: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], name: str) -> Analysis:
    """Search neighbours and compute spectrum and silhouettes once.

    Raises:
        UserError: If a row is not finite or has zero length; names the model and the image.
    """
    validate_embeddings(X, name)
    X = unit_scale(X)
    silhouettes = {
        metric: silhouette_samples(X, labels, metric) for metric in ("euclidean", "cosine")
    }
    return Analysis(list_neighbors(X), labels, covariance_spectrum(X), silhouettes)


def share_of_variance(a: Analysis, k: int) -> float:
    """Explained variance of k components; NaN where the sample itself has no more than k."""
    n, d = a.embeddings.shape
    return explained_variance(a.eigenvalues, k) if k <= min(n - 1, d) else NAN


def components_for(a: Analysis, share: float) -> float:
    """Principal components that hold this share of the variance; NaN without any variance."""
    return float(num_components(a.eigenvalues, share)) if a.eigenvalues.sum() > 0 else NAN


METRICS: dict[str, Callable[[Analysis], float]] = {
    "variance_10pc": lambda a: share_of_variance(a, 10),
    "variance_50pc": lambda a: share_of_variance(a, 50),
    "components_80": lambda a: components_for(a, 0.80),
    "components_90": lambda a: components_for(a, 0.90),
    "components_95": lambda a: components_for(a, 0.95),
    "silhouette": lambda a: float(a.silhouettes["euclidean"].mean()),
    "silhouette_cosine": lambda a: float(np.nanmean(a.silhouettes["cosine"])),
    "precision_at_1": lambda a: float(a.precisions(1).mean()),
    "precision_at_5": lambda a: float(a.precisions(5).mean()),
    "precision_at_10": lambda a: float(a.precisions(10).mean()),
    "precision_at_20": lambda a: float(a.precisions(20).mean()),
    "knn_accuracy": lambda a: float(a.knn_correct().mean()),
    "effective_rank": lambda a: effective_rank(a.embeddings),
    "effective_rank_uncentered": lambda a: effective_rank(a.embeddings, centered=False),
    "participation_ratio": lambda a: participation_ratio(a.eigenvalues, len(a.labels)),
    "hubness_skew": lambda a: a.hubness()[0],
    "hubness_maximum": lambda a: a.hubness()[1],
    "anti_hub_share": lambda a: a.hubness()[2],
}


def measure(analysis: Analysis) -> dict[str, float]:
    """Every metric of the table."""
    return {name: metric(analysis) for name, metric in METRICS.items()}


def values_on_halves(
    a: Analysis, halves: Bool[np.ndarray, "B n"], seed: int
) -> dict[str, Float[np.ndarray, " _"]]:
    """The metrics that have an interval, on every half of the images or jackknife replicate."""
    return {
        **neighbor_halves(a.lists, a.labels, halves),
        "silhouette": silhouette_halves(a.embeddings, a.labels, halves, "euclidean"),
        "silhouette_cosine": silhouette_halves(a.embeddings, a.labels, halves, "cosine"),
        **spectrum_replicates(a.embeddings, jackknife_blocks(a.labels, seed)),
    }


@dataclass(frozen=True)
class SeedSpread:
    """A metric of several trainings that differ in their seed, on the same images."""

    values: list[float]
    """The local model's first, then the others in the order given."""
    mean: float
    sd: float
    """Sample standard deviation over trainings: what another seed would change."""


@dataclass(frozen=True)
class Comparison:
    """All numbers of a run. Keys of the mappings are `local` and, if it was given, `hf`."""

    analyses: dict[str, Analysis]
    metrics: dict[str, dict[str, Estimate]]
    """By model, then metric; `se` and `ci95` are NaN where there is no interval."""
    references: dict[str, dict[str, float]]
    differences: dict[str, dict[str, Any]]
    """By metric: an `estimate` of hf - local, and tests where there are any."""
    per_class: list[dict[str, Any]]
    agreement: dict[str, Any]
    mutual: Float[np.ndarray, " n"] | None
    """Share of common 10-NN per image."""
    chance_precision: float
    seeds: dict[str, SeedSpread]
    """By metric, over several trainings of the local model; empty for one."""
    num_halves: int
    """0 where the images are too few for intervals."""
    seed: int


def compare(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    references: Mapping[str, Float[np.ndarray, "n _"]],
    labels: Int[np.ndarray, " n"],
    seed: int,
    other_seeds: Sequence[Float[np.ndarray, "n _"]] = (),
) -> Comparison:
    """Measure one model or two, and the references, on the same images.

    Args:
        embeddings: `local` and perhaps `hf`, rows in the same order.
        references: Embeddings that show what a number means, such as raw pixels.
        labels: Class of each row.
        seed: Of the halves and of the permutation tests.
        other_seeds: Embeddings by other trainings of the local model.

    Raises:
        ValueError: If the numbers of rows differ.
        UserError: If embeddings are not finite or zero.
    """
    others = [("other_seeds", X) for X in other_seeds]
    for name, X in [*embeddings.items(), *references.items(), *others]:
        if len(X) != len(labels):
            raise ValueError(f"{name} has {len(X)} rows for {len(labels)} labels")
    analyses = {name: analyze(X, labels, name) for name, X in embeddings.items()}
    halves = half_samples(labels, NUM_HALVES, seed) if can_halve(labels) else None
    on_halves = {
        name: values_on_halves(a, halves, seed) if halves is not None else {}
        for name, a in analyses.items()
    }
    values = {name: measure(a) for name, a in analyses.items()}
    paired = len(analyses) == 2
    return Comparison(
        analyses=analyses,
        metrics={
            name: {
                metric: with_interval(value, on_halves[name].get(metric))
                for metric, value in values[name].items()
            }
            for name in analyses
        },
        references={name: measure(analyze(X, labels, name)) for name, X in references.items()},
        differences=differences(analyses, values, on_halves, seed) if paired else {},
        per_class=per_class_differences(analyses, halves, seed) if paired else [],
        agreement=agreement(analyses, halves, seed) if paired else {},
        mutual=mutual_per_image(analyses) if paired else None,
        chance_precision=chance_precision(labels),
        seeds=seed_spread(values["local"], other_seeds, labels),
        num_halves=0 if halves is None else len(halves),
        seed=seed,
    )


def seed_spread(
    local: Mapping[str, float],
    other_seeds: Sequence[Float[np.ndarray, "n _"]],
    labels: Int[np.ndarray, " n"],
) -> dict[str, SeedSpread]:
    """Spread of every metric over trainings; kept apart from the intervals over images."""
    if not other_seeds:
        return {}
    trainings = [local]
    for row, X in enumerate(other_seeds, start=2):
        trainings.append(measure(analyze(X, labels, f"local_{row}")))
    columns = {metric: [numbers[metric] for numbers in trainings] for metric in METRICS}
    return {
        metric: SeedSpread(values, float(np.mean(values)), float(np.std(values, ddof=1)))
        for metric, values in columns.items()
    }


def with_interval(value: float, half_values: Float[np.ndarray, " B"] | None) -> Estimate:
    """The estimate of a value; without usable half values its interval is NaN."""
    if half_values is None or not math.isfinite(value) or not np.isfinite(half_values).all():
        return Estimate(value, NAN, (NAN, NAN))
    return estimate(value, half_values)


def differences(
    analyses: Mapping[str, Analysis],
    values: Mapping[str, Mapping[str, float]],
    on_halves: Mapping[str, Mapping[str, Float[np.ndarray, " B"]]],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Take hf - local of every metric; for P@5 and P@1 also what single images say."""
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        pair = [on_halves[name].get(metric) for name in ("local", "hf")]
        change = None if pair[0] is None or pair[1] is None else pair[1] - pair[0]
        difference = values["hf"][metric] - values["local"][metric]
        result[metric] = {"estimate": with_interval(difference, change)}
    local, hf = (analyses[name].precisions(5) for name in ("local", "hf"))
    if np.isfinite(local).all():
        result["precision_at_5"] |= {
            "sign_flip_p": sign_flip_p(hf - local, seed=seed),
            "wins": int((hf > local).sum()),
            "ties": int((hf == local).sum()),
            "losses": int((hf < local).sum()),
        }
    first = [analyses[name].precisions(1) == 1 for name in ("local", "hf")]
    result["precision_at_1"]["mcnemar_p"] = mcnemar_exact_p(*first)
    return result


def per_class_differences(
    analyses: Mapping[str, Analysis], halves: Bool[np.ndarray, "B n"] | None, seed: int
) -> list[dict[str, Any]]:
    """P@5 of both models by class, the difference, and a sign-flip p corrected after Holm."""
    labels = analyses["local"].labels
    local, hf = (analyses[name].precisions(5) for name in ("local", "hf"))
    if not np.isfinite(local).all():
        return []
    on_halves = precision_halves_by_class(analyses, halves) if halves is not None else {}
    rows = []
    for label in np.unique(labels):
        own = labels == label
        difference = hf[own] - local[own]
        rows.append(
            {
                "label": int(label),
                "n": int(own.sum()),
                "local": float(local[own].mean()),
                "hf": float(hf[own].mean()),
                "difference": with_interval(float(difference.mean()), on_halves.get(int(label))),
                "sign_flip_p": sign_flip_p(difference, seed=seed),
            }
        )
    corrected = holm(np.array([row["sign_flip_p"] for row in rows]))
    for row, p in zip(rows, corrected, strict=True):
        row["holm_p"] = float(p)
    return rows


def precision_halves_by_class(
    analyses: Mapping[str, Analysis], halves: Bool[np.ndarray, "B n"]
) -> dict[int, Float[np.ndarray, " B"]]:
    """Difference of P@5 on every half, by the class of the query."""
    labels = analyses["local"].labels
    classes = np.unique(labels)
    result = {int(label): np.empty(len(halves)) for label in classes}
    for index, keep in enumerate(halves):
        local, hf = (
            precision_at_k(neighbors_within(analyses[name].lists, keep, 5)[0], labels[keep], 5)
            for name in ("local", "hf")
        )
        for label in classes:
            result[int(label)][index] = (hf - local)[labels[keep] == label].mean()
    return result


def mutual_per_image(analyses: Mapping[str, Analysis]) -> Float[np.ndarray, " n"] | None:
    """Share of common 10-NN of each image; None for fewer than 11 images."""
    lists = [analyses[name].lists.neighbors for name in ("local", "hf")]
    return mutual_knn(*lists, MUTUAL_K) if lists[0].shape[1] >= MUTUAL_K else None


def agreement(
    analyses: Mapping[str, Analysis], halves: Bool[np.ndarray, "B n"] | None, seed: int
) -> dict[str, Any]:
    """How alike the two models see the images, each number beside its chance level."""
    local, hf = (analyses[name] for name in ("local", "hf"))
    labels = local.labels
    n, counts = len(labels), np.bincount(labels)
    mutual = mutual_per_image(analyses)
    on_halves = (
        mutual_knn_halves(local.lists, hf.lists, halves, MUTUAL_K) if halves is not None else None
    )
    class_only = np.minimum(MUTUAL_K / np.maximum(counts - 1, 1), 1.0)[labels].mean()
    demeaned = [demean_by_class(a.embeddings, labels) for a in (local, hf)]
    null = cka_null(local.embeddings, hf.embeddings, labels, seed=seed)
    return {
        "mutual_knn": with_interval(NAN if mutual is None else float(mutual.mean()), on_halves),
        "mutual_knn_chance": MUTUAL_K / (n - 1) if n > MUTUAL_K else NAN,
        "mutual_knn_class_only": float(class_only) if n > MUTUAL_K else NAN,
        "cka": linear_cka(local.embeddings, hf.embeddings),
        "cka_class_demeaned": linear_cka(*demeaned),
        "cka_null_p99": float(np.quantile(null, 0.99)),
        "similarity_spearman": similarity_spearman(local.embeddings, hf.embeddings),
    }


def neighbor_confusion(
    analysis: Analysis, num_classes: int, k: int = 5
) -> Float[np.ndarray, "C C"]:
    """Share of the k nearest neighbours of each class (row) that belong to each class (column)."""
    k = min(k, analysis.lists.neighbors.shape[1])
    found = analysis.labels[analysis.lists.neighbors[:, :k]]
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (np.repeat(analysis.labels, k), found.ravel()), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
