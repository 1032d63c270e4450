"""From the embeddings of the same images by one or two models to one record of numbers.

`METRICS` is the table of single-model numbers: a new one is a function of an `Analysis` and a line.
Differences are always hf - local. Where a class has too few images for halves there is no interval.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ijepa.agreement import (
    cka_null,
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
    effective_rank_of_spectrum,
    explained_variance,
    hubness,
    knn_correct,
    mean_silhouettes,
    num_components,
    participation_ratio,
    precision_at_k,
    silhouette_samples,
    validate_embeddings,
)
from ijepa.uncertainty import (
    KNN_K,
    NUM_HALVES,
    Estimate,
    NeighborLists,
    can_halve,
    estimate,
    half_deviations,
    half_samples,
    jackknife_blocks,
    list_neighbors,
    mutual_knn_halves,
    neighbor_halves,
    overall,
    spectrum_deviations,
)

NAN = float("nan")
MUTUAL_K = 10
PROBE = 2048
"""Images whose pairs tell the time of all: a tile of similarities, four of distances."""
GPU_PROBE = 2**14
"""The same on a GPU: its tiles are larger, and fewer images would tell its pauses alone."""
MODEL_NAMES = {"local": "Local model", "hf": "HF model"}
"""What the models are called where no other name is given."""
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

    @property
    def neighbors(self) -> Int[np.ndarray, "n m"]:
        """Nearest neighbors of each image, best first."""
        return self.lists.neighbors

    @property
    def similarities(self) -> Float[np.ndarray, "n m"]:
        """Cosine similarities of the nearest neighbors."""
        return self.lists.similarities

    def precisions(self, k: int) -> Float[np.ndarray, " n"]:
        """Precision@k of each image; NaN where there are fewer than k other images."""
        if k > self.lists.neighbors.shape[1]:
            return np.full(len(self.labels), NAN)
        return precision_at_k(self.lists.neighbors, self.labels, k)

    def first_is_right(self) -> Bool[np.ndarray, " n"]:
        """Whether the nearest neighbour of each image has its class."""
        return self.precisions(1) == 1

    def knn_correct(self) -> Bool[np.ndarray, " n"]:
        """Whether the vote of the 20 nearest others (or all, if fewer) names the right class."""
        k = min(KNN_K, self.lists.neighbors.shape[1])
        return knn_correct(self.lists.neighbors, self.lists.similarities, self.labels, k)

    def hubness(self) -> tuple[float, float, float]:
        """Skew, maximum and share of anti-hubs of the 10-NN lists."""
        if self.lists.neighbors.shape[1] < 10:
            return NAN, NAN, NAN
        found = hubness(self.lists.neighbors, 10)
        return found.skew, float(found.maximum), found.anti_hub_share


def analyze(
    X: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], name: str, device: str = "cpu"
) -> Analysis:
    """Search neighbours and compute spectrum and silhouettes once.

    Raises:
        UserError: If a row is not finite or has zero length; names the model and the image.
    """
    validate_embeddings(X, name)
    silhouettes = {
        metric: silhouette_samples(X, labels, metric, device) for metric in ("euclidean", "cosine")
    }
    return Analysis(list_neighbors(X, device), labels, covariance_spectrum(X), silhouettes)


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
    "effective_rank": lambda a: effective_rank_of_spectrum(a.eigenvalues),
    "effective_rank_uncentered": lambda a: effective_rank(a.embeddings, centered=False),
    "participation_ratio": lambda a: participation_ratio(a.eigenvalues, len(a.labels)),
    "hubness_skew": lambda a: a.hubness()[0],
    "hubness_maximum": lambda a: a.hubness()[1],
    "anti_hub_share": lambda a: a.hubness()[2],
}


def measure(analysis: Analysis) -> dict[str, float]:
    """Every metric of the table."""
    return {name: metric(analysis) for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Resampling:
    """The parts of the images on which all models of a run are measured again."""

    halves: Bool[np.ndarray, "B n"]
    blocks: Int[np.ndarray, " n"]


def resample(labels: Int[np.ndarray, " n"], seed: int) -> Resampling | None:
    """Halves and blocks drawn by the seed; None where a class has too few images."""
    if not can_halve(labels):
        return None
    return Resampling(half_samples(labels, NUM_HALVES, seed), jackknife_blocks(labels, seed))


Deviations = Mapping[str, Float[np.ndarray, " r *_"]]
"""By metric, for `estimate`, also by class; empty where there are no intervals."""


def class_deviations(a: Analysis, parts: Resampling | None) -> Deviations:
    """Deviations by class of the metrics of neighbours."""
    if parts is None:
        return {}
    on_halves = neighbor_halves(a.lists, a.labels, parts.halves)
    return {name: half_deviations(values) for name, values in on_halves.items()}


def deviations(a: Analysis, by_class: Deviations, parts: Resampling | None) -> Deviations:
    """Deviations of all metrics that have an interval."""
    if parts is None:
        return {}
    silhouettes = {
        name: half_deviations(
            mean_silhouettes(a.embeddings, a.labels, parts.halves, metric, a.lists.device)
        )
        for name, metric in (("silhouette", "euclidean"), ("silhouette_cosine", "cosine"))
    }
    neighbors = {name: overall(values, a.labels) for name, values in by_class.items()}
    return neighbors | silhouettes | spectrum_deviations(a.embeddings, parts.blocks)


def paired_deviations(
    analyses: Mapping[str, Analysis], by_class: Mapping[str, Deviations], parts: Resampling | None
) -> Deviations:
    """Deviations by class of hf - local in P@5 and of what the models have in common."""
    if parts is None:
        return {}
    local, hf = (analyses[name] for name in ("local", "hf"))
    on_halves = mutual_knn_halves(local.lists, hf.lists, local.labels, parts.halves, MUTUAL_K)
    metric = "precision_at_5"
    return {
        metric: by_class["hf"][metric] - by_class["local"][metric],
        "mutual_knn": half_deviations(on_halves),
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
    names: dict[str, str]
    """Short name of each model, for tables and sentences."""
    metrics: dict[str, dict[str, Estimate]]
    """By model, then metric; `se` and `ci95` are NaN where there is no interval."""
    references: dict[str, dict[str, float]]
    gains: dict[str, Estimate]
    """By reference: precision@5 of the local model less that of the reference."""
    differences: dict[str, dict[str, Any]]
    """By metric: an `estimate` of hf - local, the `ratio` local / hf, tests where there are any."""
    per_class: list[dict[str, Any]]
    class_precision: dict[str, list[Estimate]]
    """By model: precision@5 of each class that occurs, in the order of the labels."""
    agreement: dict[str, Any]
    mutual: Float[np.ndarray, " n"] | None
    """Share of common 10-NN per image."""
    chance_precision: float
    seeds: dict[str, SeedSpread]
    """By metric, over several trainings of the local model; empty for one."""
    num_halves: int
    """0 where the images are too few for intervals."""
    seed: int


def compare(  # noqa: PLR0913
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    references: Mapping[str, Float[np.ndarray, "n _"]],
    labels: Int[np.ndarray, " n"],
    seed: int,
    other_seeds: Sequence[Float[np.ndarray, "n _"]] = (),
    device: str = "cpu",
    names: Mapping[str, str] | None = None,
) -> Comparison:
    """Measure one model or two, and the references, on the same images.

    Args:
        embeddings: `local` and perhaps `hf`, rows in the same order.
        references: Embeddings that show what a number means, such as raw pixels.
        labels: Class of each row.
        seed: Of the halves and of the permutation tests.
        other_seeds: Embeddings by other trainings of the local model.
        device: Where all pairs of images are looked at, as in `ijepa.metrics`.
        names: Short names of the models.

    Raises:
        ValueError: If the numbers of rows differ.
        UserError: If embeddings are not finite or zero.
    """
    others = [("other_seeds", X) for X in other_seeds]
    for name, X in [*embeddings.items(), *references.items(), *others]:
        if len(X) != len(labels):
            raise ValueError(f"{name} has {len(X)} rows for {len(labels)} labels")
    parts = resample(labels, seed)
    analyses = {name: analyze(X, labels, name, device) for name, X in embeddings.items()}
    values = {name: measure(a) for name, a in analyses.items()}
    by_class = {name: class_deviations(a, parts) for name, a in analyses.items()}
    deviating = {name: deviations(a, by_class[name], parts) for name, a in analyses.items()}
    for name, X in references.items():
        reference = analyze(X, labels, name, device)
        values[name], by_class[name] = measure(reference), class_deviations(reference, parts)
    paired = len(analyses) == 2
    pair = paired_deviations(analyses, by_class, parts) if paired else {}
    return Comparison(
        analyses=analyses,
        names={name: (names or MODEL_NAMES)[name] for name in analyses},
        metrics={
            name: {
                metric: with_interval(value, deviating[name].get(metric))
                for metric, value in values[name].items()
            }
            for name in analyses
        },
        references={
            name: {"embedding_dim": float(X.shape[1]), **values[name]}
            for name, X in references.items()
        },
        gains={name: gain(values, by_class, labels, name) for name in references},
        differences=differences(analyses, values, deviating, seed) if paired else {},
        per_class=per_class(analyses, pair, seed) if paired else [],
        class_precision={name: class_precision(a, by_class[name]) for name, a in analyses.items()},
        agreement=agreement(analyses, pair, seed) if paired else {},
        mutual=mutual_per_image(analyses) if paired else None,
        chance_precision=chance_precision(labels),
        seeds=seed_spread(values["local"], other_seeds, labels, device),
        num_halves=len(parts.halves) if parts else 0,
        seed=seed,
    )


def pairwise_seconds(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    references: Mapping[str, Float[np.ndarray, "n _"]],
    num_classes: int,
    device: str = "cpu",
) -> float:
    """Seconds that `compare` will need for all pairs of images here, from those of a few.

    Neighbours and silhouettes of n images cost a n + b n^2, which two small n tell; the rest of a
    comparison is soon less than that.
    """
    few = min(PROBE if device == "cpu" else GPU_PROBE, len(embeddings["local"]) // 2)
    generator = np.random.default_rng(0)

    def seconds(n: int) -> float:
        labels, halves = np.arange(n) % num_classes, generator.random((NUM_HALVES, n)) < 0.5
        began = time.perf_counter()
        for name, X in {**references, **embeddings}.items():
            list_neighbors(X[:n], device)
            silhouette_samples(X[:n], labels, device=device)
            if name in embeddings:
                mean_silhouettes(X[:n], labels, halves, device=device)
        return time.perf_counter() - began

    seconds(few)  # the first time is slower
    once, twice = seconds(few), seconds(2 * few)
    curved = min(max(twice / 2 - once, 0.0), once)
    times = len(embeddings["local"]) / few
    return (once - curved) * times + curved * times**2


def gain(
    values: Mapping[str, Mapping[str, float]],
    by_class: Mapping[str, Deviations],
    labels: Int[np.ndarray, " n"],
    reference: str,
) -> Estimate:
    """P@5 of the local model less that of a reference, on the same images."""
    metric = "precision_at_5"
    change = None
    if metric in by_class["local"]:
        change = overall(by_class["local"][metric] - by_class[reference][metric], labels)
    return with_interval(values["local"][metric] - values[reference][metric], change)


def seed_spread(
    local: Mapping[str, float],
    other_seeds: Sequence[Float[np.ndarray, "n _"]],
    labels: Int[np.ndarray, " n"],
    device: str,
) -> dict[str, SeedSpread]:
    """Spread of every metric over trainings; kept apart from the intervals over images."""
    if not other_seeds:
        return {}
    trainings = [local]
    for row, X in enumerate(other_seeds, start=2):
        trainings.append(measure(analyze(X, labels, f"local_{row}", device)))
    columns = {metric: [numbers[metric] for numbers in trainings] for metric in METRICS}
    return {
        metric: SeedSpread(values, float(np.mean(values)), float(np.std(values, ddof=1)))
        for metric, values in columns.items()
    }


def with_interval(value: float, deviating: Float[np.ndarray, " r"] | None) -> Estimate:
    """The estimate of a value; without usable deviations its interval is NaN."""
    if deviating is None or not math.isfinite(value) or not np.isfinite(deviating).all():
        return Estimate(value, NAN, (NAN, NAN))
    return estimate(value, deviating)


def ratio(local: float, hf: float) -> float:
    """Local over hf; NaN where that says nothing: below zero more would read as better."""
    return local / hf if hf > 0 and local >= 0 else NAN


def changes(
    values: Mapping[str, Mapping[str, float]], deviating: Mapping[str, Deviations]
) -> dict[str, dict[str, Any]]:
    """Take hf - local and local / hf of every metric."""
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        local, hf = (values[name][metric] for name in ("local", "hf"))
        quotient = ratio(local, hf)
        change = relative = None
        if metric in deviating["local"]:
            change = deviating["hf"][metric] - deviating["local"][metric]
            # A quotient changes with its parts as its derivative says: the delta method.
            relative = (deviating["local"][metric] - quotient * deviating["hf"][metric]) / hf
        result[metric] = {
            "estimate": with_interval(hf - local, change),
            "ratio": with_interval(quotient, relative),
        }
    return result


def differences(
    analyses: Mapping[str, Analysis],
    values: Mapping[str, Mapping[str, float]],
    deviating: Mapping[str, Deviations],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Changes of every metric; for P@5 and P@1 also tests on single images."""
    result = changes(values, deviating)
    precisions = [analyses[name].precisions(5) for name in ("local", "hf")]
    result["precision_at_5"] |= precision_tests(*precisions, seed)
    first = [analyses[name].first_is_right() for name in ("local", "hf")]
    result["precision_at_1"]["mcnemar_p"] = mcnemar_exact_p(*first)
    return result


def precision_tests(
    local: Float[np.ndarray, " n"], hf: Float[np.ndarray, " n"], seed: int
) -> dict[str, Any]:
    """Sign-flip p and the images on which hf wins, ties and loses; nothing without five others."""
    if not np.isfinite(local).all():
        return {}
    return {
        "sign_flip_p": sign_flip_p(hf - local, seed=seed),
        "wins": int((hf > local).sum()),
        "ties": int((hf == local).sum()),
        "losses": int((hf < local).sum()),
    }


def per_class(
    analyses: Mapping[str, Analysis], pair: Deviations, seed: int
) -> list[dict[str, Any]]:
    """By class: P@5 of both models, difference, tests and mutual kNN; p-values also after Holm."""
    labels = analyses["local"].labels
    local, hf = (analyses[name].precisions(5) for name in ("local", "hf"))
    if not np.isfinite(local).all():
        return []
    first = [analyses[name].first_is_right() for name in ("local", "hf")]
    mutual = mutual_per_image(analyses)
    rows = []
    for column, label in enumerate(np.unique(labels)):
        own = labels == label
        change = float((hf[own] - local[own]).mean())
        common = NAN if mutual is None else float(mutual[own].mean())
        deviating = {metric: values[:, column] for metric, values in pair.items()}
        rows.append(
            {
                "label": int(label),
                "n": int(own.sum()),
                "local": float(local[own].mean()),
                "hf": float(hf[own].mean()),
                "difference": with_interval(change, deviating.get("precision_at_5")),
                **precision_tests(local[own], hf[own], seed),
                "mcnemar_p": mcnemar_exact_p(first[0][own], first[1][own]),
                "mutual_knn": with_interval(common, deviating.get("mutual_knn")),
            }
        )
    for test, corrected in (("sign_flip_p", "holm_p"), ("mcnemar_p", "mcnemar_holm_p")):
        for row, p in zip(rows, holm(np.array([row[test] for row in rows])), strict=True):
            row[corrected] = float(p)
    return rows


def class_precision(a: Analysis, by_class: Deviations) -> list[Estimate]:
    """P@5 of each class that occurs."""
    precision = a.precisions(5)
    rows = []
    for column, label in enumerate(np.unique(a.labels)):
        deviating = by_class["precision_at_5"][:, column] if by_class else None
        rows.append(with_interval(float(precision[a.labels == label].mean()), deviating))
    return rows


def mutual_per_image(analyses: Mapping[str, Analysis]) -> Float[np.ndarray, " n"] | None:
    """Share of common 10-NN of each image; None for fewer than 11 images."""
    lists = [analyses[name].lists.neighbors for name in ("local", "hf")]
    return mutual_knn(*lists, MUTUAL_K) if lists[0].shape[1] >= MUTUAL_K else None


def agreement(analyses: Mapping[str, Analysis], pair: Deviations, seed: int) -> dict[str, Any]:
    """How alike the two models see the images, each number beside its chance level."""
    local, hf = (analyses[name] for name in ("local", "hf"))
    labels = local.labels
    n, counts = len(labels), np.bincount(labels)
    mutual = mutual_per_image(analyses)
    common = overall(pair["mutual_knn"], labels) if pair else None
    class_only = np.minimum(MUTUAL_K / np.maximum(counts - 1, 1), 1.0)[labels].mean()
    null = cka_null(local.embeddings, hf.embeddings, labels, seed=seed)
    return {
        "mutual_knn": with_interval(NAN if mutual is None else float(mutual.mean()), common),
        "mutual_knn_chance": MUTUAL_K / (n - 1) if n > MUTUAL_K else NAN,
        "mutual_knn_class_only": float(class_only) if n > MUTUAL_K else NAN,
        "cka": linear_cka(local.embeddings, hf.embeddings),
        "cka_class_demeaned": linear_cka(local.embeddings, hf.embeddings, labels),
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
