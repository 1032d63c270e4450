"""From the embeddings of the same images by one or two models to one record of numbers.

Each model's embeddings become one `Analysis`; the rest puts these records side by side.
`METRICS` is the table of single-model numbers: a new one is a function of an `Analysis` and a line.
Differences are always hf - local. Where no class has enough images for halves there is no interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ijepa.agreement import PairNumbers, change, class_groups, compare_pair
from ijepa.metrics import (
    NAN,
    chance_precision,
    effective_rank,
    effective_rank_of_spectrum,
    explained_variance,
    hubness,
    num_components,
    participation_ratio,
)
from ijepa.uncertainty import (
    NUM_HALVES,
    Analysis,
    Estimate,
    Progress,
    analyze,
    class_average,
    columns,
    estimate,
    half_samples,
    most_confused,
    small_classes,
)

MODEL_NAMES = {"local": "Local model", "hf": "HF model"}
"""What the models are called where no other name is given."""
HEADLINES = ("variance_10pc", "variance_50pc", "silhouette", "precision_at_5")
"""The rows of the table, after the embedding dimension."""


def share_of_variance(a: Analysis, k: int) -> float:
    """Explained variance of k components; NaN where the sample itself has no more than k."""
    n, d = a.embeddings.shape
    return explained_variance(a.eigenvalues, k) if k <= min(n - 1, d) else NAN


def components_for(a: Analysis, share: float) -> float:
    """Principal components that hold this share of the variance; NaN without any variance."""
    return float(num_components(a.eigenvalues, share)) if a.eigenvalues.sum() > 0 else NAN


def k_occurrence(a: Analysis, statistic: str) -> float:
    """A statistic of the 10-NN lists, see `hubness`; NaN for fewer than 11 images."""
    return hubness(a.neighbors)[statistic] if a.neighbors.shape[1] >= 10 else NAN


METRICS: dict[str, Callable[[Analysis], float]] = {
    "variance_10pc": lambda a: share_of_variance(a, 10),
    "variance_50pc": lambda a: share_of_variance(a, 50),
    "components_80": lambda a: components_for(a, 0.80),
    "components_90": lambda a: components_for(a, 0.90),
    "components_95": lambda a: components_for(a, 0.95),
    "silhouette": lambda a: float(a.silhouettes["euclidean"].mean()),
    "silhouette_cosine": lambda a: float(a.silhouettes["cosine"].mean()),
    "precision_at_1": lambda a: float(a.precisions(1).mean()),
    "precision_at_5": lambda a: float(a.precisions(5).mean()),
    "precision_at_10": lambda a: float(a.precisions(10).mean()),
    "precision_at_20": lambda a: float(a.precisions(20).mean()),
    "knn_accuracy": lambda a: float(a.scores["knn_accuracy"].mean()),
    "effective_rank": lambda a: effective_rank_of_spectrum(a.eigenvalues),
    "effective_rank_uncentered": lambda a: effective_rank(a.embeddings, centered=False),
    "participation_ratio": lambda a: participation_ratio(a.eigenvalues, len(a.labels)),
    "hubness_skew": lambda a: k_occurrence(a, "skew"),
    "hubness_maximum": lambda a: k_occurrence(a, "maximum"),
    "anti_hub_share": lambda a: k_occurrence(a, "anti_hub_share"),
}


def measure(a: Analysis) -> dict[str, Estimate]:
    """Every metric of the table, with an interval where there is one."""
    return {name: estimate(metric(a), a.deviations.get(name)) for name, metric in METRICS.items()}


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
    rankings: dict[str, dict[str, Any]]
    """By model: which classes come first, and how often the halves repeat it."""
    class_groups: dict[str, Any]
    """Which classes each model holds for alike; empty for fewer than three classes."""
    agreement: dict[str, Any]
    mutual: Float[np.ndarray, " n"] | None
    """Share of common 10-NN per image."""
    chance_precision: float
    seeds: dict[str, SeedSpread]
    """By metric, over several trainings of the local model; empty for one."""
    small_classes: int
    """Classes too small for halves: kept whole in all of them, and without own intervals."""
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
    progress: Progress | None = None,
) -> Comparison:
    """Measure one model or two, and the references, on the same images.

    Args:
        embeddings: `local` and perhaps `hf`, rows in the same order.
        references: Embeddings that show what a number means, such as raw pixels; may be empty.
        labels: Class of each row.
        seed: Of the halves, the permutations and the pairs that are correlated.
        other_seeds: Embeddings by other trainings of the local model.
        device: "cpu" or the CUDA device on which all pairs of images are compared.
        names: Short names of the models.
        progress: See `Progress`.

    Raises:
        ValueError: If the numbers of rows differ.
        UserError: If embeddings are not finite or zero.
    """
    seeds = {f"local_{row}": X for row, X in enumerate(other_seeds, start=2)}
    for name, X in [*embeddings.items(), *references.items(), *seeds.items()]:
        if len(X) != len(labels):
            raise ValueError(f"{name} has {len(X)} rows for {len(labels)} labels")
    halves = half_samples(labels, NUM_HALVES, seed)
    found = {
        name: analyze(
            X,
            labels,
            name,
            halves if name not in seeds else None,
            name in references,
            device,
            progress,
        )
        for name, X in {**embeddings, **references, **seeds}.items()
    }
    values = {name: measure(a) for name, a in found.items()}
    analyses = {name: found[name] for name in embeddings}
    pair = PairNumbers({}, [], {}, None)
    if "hf" in analyses:
        pair = compare_pair(analyses["local"], analyses["hf"], values, halves, seed)
    return Comparison(
        analyses=analyses,
        names={name: (names or MODEL_NAMES)[name] for name in analyses},
        metrics={name: values[name] for name in analyses},
        references={
            name: {"embedding_dim": float(X.shape[1])}
            | {metric: one.value for metric, one in values[name].items()}
            for name, X in references.items()
        },
        gains={name: gain(found["local"], found[name]) for name in references},
        differences=pair.differences,
        per_class=pair.per_class,
        class_precision={name: class_precision(a) for name, a in analyses.items()},
        rankings={name: ranking(a) for name, a in analyses.items()},
        class_groups=class_groups(embeddings, labels, seed) or {},
        agreement=pair.agreement,
        mutual=pair.mutual,
        chance_precision=chance_precision(labels),
        seeds=seed_spread([values["local"], *(values[name] for name in seeds)]),
        small_classes=len(small_classes(labels)),
        num_halves=0 if halves is None else len(halves),
        seed=seed,
    )


def seed_spread(trainings: Sequence[Mapping[str, Estimate]]) -> dict[str, SeedSpread]:
    """Spread of every metric over trainings; kept apart from the intervals over images."""
    if len(trainings) < 2:
        return {}
    columns = {metric: [one[metric].value for one in trainings] for metric in METRICS}
    return {
        metric: SeedSpread(values, float(np.mean(values)), float(np.std(values, ddof=1)))
        for metric, values in columns.items()
    }


def gain(local: Analysis, reference: Analysis) -> Estimate:
    """P@5 of the local model less that of a reference, on the same images."""
    value = float(local.precisions(5).mean() - reference.precisions(5).mean())
    return estimate(value, change(reference.deviations, local.deviations, "precision_at_5"))


def class_precision(a: Analysis) -> list[Estimate]:
    """P@5 of each class that occurs."""
    precision = a.precisions(5)
    deviations = columns(a.class_deviations.get("precision_at_5"), a.labels)
    return [
        estimate(float(precision[a.labels == label].mean()), column)
        for label, column in zip(np.unique(a.labels), deviations, strict=True)
    ]


def ranking(a: Analysis) -> dict[str, Any]:
    """The purest class and the most frequent confusions, and how often the halves repeat them.

    The share of halves is that of the same class, and of the same confusions in any order; NaN
    without halves. Empty where precision@5 is not defined.
    """
    precision = a.precisions(5)
    if not np.isfinite(precision).all():
        return {}
    classes, codes = np.unique(a.labels, return_inverse=True)
    purest = int(class_average(precision, codes).argmax())
    confused = most_confused(codes, codes[a.neighbors[:, :5]], np.ones(5))
    same = same_pairs = NAN
    if a.halves is not None:
        on_halves = a.halves.values["precision_at_5"].argmax(axis=1)
        same = float((on_halves == purest).mean())
        pairs = {pair[:2] for pair in confused}
        same_pairs = float(np.mean([found == pairs for found in a.halves.confused]))
    return {
        "purest_class": {"label": int(classes[purest]), "share_of_halves": same},
        "confusions": [
            {"from": int(classes[row]), "to": int(classes[column]), "share": share}
            for row, column, share in confused
        ],
        "confusions_share_of_halves": same_pairs,
    }


def neighbor_confusion(
    analysis: Analysis, num_classes: int, k: int = 5
) -> Float[np.ndarray, "C C"]:
    """Share of the k nearest neighbors of each class (row) that belong to each class (column)."""
    k = min(k, analysis.neighbors.shape[1])
    found = analysis.labels[analysis.neighbors[:, :k]]
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (np.repeat(analysis.labels, k), found.ravel()), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
