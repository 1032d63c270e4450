"""From the embeddings of the same images by one or two models to one record of numbers.

Each model's embeddings become one `Analysis`, in `analyze`; the rest puts records side by side.
`METRICS` is the table of single-model numbers: a new one is a function of an `Analysis` and a line.
Differences are always hf - local. Where no class has enough images for halves there is no interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ijepa.agreement import (
    cka_null,
    class_groups,
    holm,
    linear_cka,
    mcnemar_exact_p,
    mutual_knn,
    mutual_knn_of_classes,
    similarity_spearman,
)
from ijepa.metrics import (
    NAN,
    all_pairs,
    chance_precision,
    covariance_spectrum,
    effective_rank,
    effective_rank_of_spectrum,
    explained_variance,
    hubness,
    knn_correct,
    num_components,
    participation_ratio,
    precision_at_k,
    principal_scores,
    silhouette_samples,
    validate_embeddings,
)
from ijepa.uncertainty import (
    LIST_LENGTH,
    MUTUAL_K,
    NUM_HALVES,
    Deviations,
    Estimate,
    NeighborHalves,
    class_average,
    estimate,
    half_deviations,
    half_samples,
    most_confused,
    neighbor_halves,
    overall,
    small_classes,
    spectrum_deviations,
    student_p,
)

MODEL_NAMES = {"local": "Local model", "hf": "HF model"}
"""What the models are called where no other name is given."""
HEADLINES = ("variance_10pc", "variance_50pc", "silhouette", "precision_at_5")
"""The rows of the table, after the embedding dimension."""

Progress = Callable[..., Any]
"""Makes a progress bar like `tqdm(total=..., desc=...)`."""


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
    halves: NeighborHalves | None
    """None where there are no intervals."""
    class_deviations: Deviations
    """By class, of the metrics of neighbors."""
    deviations: Deviations
    """Of all metrics that have an interval."""

    def precisions(self, k: int) -> Float[np.ndarray, " n"]:
        """Precision@k of each image; NaN for fewer than k others, or no two images of a class."""
        if k > self.neighbors.shape[1]:
            return np.full(len(self.labels), NAN)
        return precision_at_k(self.neighbors, self.labels, k)

    def first_is_right(self) -> Bool[np.ndarray, " n"]:
        """Whether the nearest neighbor of each image has its class."""
        return self.precisions(1) == 1

    def knn_correct(self) -> Bool[np.ndarray, " n"]:
        """Whether the vote of the 20 nearest others (or all, if fewer) names the right class."""
        return knn_correct(self.neighbors, self.similarities, self.labels)

    def hubness(self) -> tuple[float, float, float]:
        """Skew, maximum and share of anti-hubs of the 10-NN lists."""
        if self.neighbors.shape[1] < 10:
            return NAN, NAN, NAN
        found = hubness(self.neighbors, 10)
        return found.skew, float(found.maximum), found.anti_hub_share


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
    found = None
    class_deviations: dict[str, Float[np.ndarray, "r C"]] = {}
    deviations: dict[str, Float[np.ndarray, " r"]] = {}
    if halves is not None:
        found = neighbor_halves(pairs.neighbors, pairs.similarities, labels, halves)
        class_deviations |= {key: half_deviations(v) for key, v in found.values.items()}
        deviations |= {key: overall(v, labels) for key, v in class_deviations.items()}
    if on_halves is None:
        eigenvalues = covariance_spectrum(X)
    else:
        for key, metric in (("silhouette", "euclidean"), ("silhouette_cosine", "cosine")):
            deviations[key] = half_deviations(pairs.half_silhouettes[metric])
        eigenvalues, scores = principal_scores(X)
        deviations |= spectrum_deviations(eigenvalues, scores)
    silhouettes = {
        "euclidean": pairs.silhouettes,
        "cosine": silhouette_samples(X, labels, "cosine"),
    }
    return Analysis(
        name=name,
        embeddings=X,
        labels=labels,
        neighbors=pairs.neighbors,
        similarities=pairs.similarities,
        eigenvalues=eigenvalues,
        silhouettes=silhouettes,
        halves=found,
        class_deviations=class_deviations,
        deviations=deviations,
    )


def share_of_variance(a: Analysis, k: int) -> float:
    """Explained variance of k components; NaN where the sample itself has no more than k."""
    n, d = a.embeddings.shape
    return explained_variance(a.eigenvalues, k) if k <= min(n - 1, d) else NAN


def components_for(a: Analysis, share: float) -> float:
    """Principal components that hold this share of the variance; NaN without any variance."""
    return float(num_components(a.eigenvalues, share)) if a.eigenvalues.sum() > 0 else NAN


def knn_accuracy(a: Analysis) -> float:
    """Share of right votes; NaN where no class has two images."""
    return float(a.knn_correct().mean()) if chance_precision(a.labels) > 0 else NAN


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
    "knn_accuracy": knn_accuracy,
    "effective_rank": lambda a: effective_rank_of_spectrum(a.eigenvalues),
    "effective_rank_uncentered": lambda a: effective_rank(a.embeddings, centered=False),
    "participation_ratio": lambda a: participation_ratio(a.eigenvalues, len(a.labels)),
    "hubness_skew": lambda a: a.hubness()[0],
    "hubness_maximum": lambda a: a.hubness()[1],
    "anti_hub_share": lambda a: a.hubness()[2],
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
    pair = [analyses["local"], analyses["hf"]] if "hf" in analyses else []
    mutual = mutual_per_image(*pair) if pair else None
    shared = mutual_deviations(*pair, halves) if pair and halves is not None else None
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
        differences=differences(*pair, values) if pair else {},
        per_class=per_class(*pair, mutual, shared) if pair else [],
        class_precision={name: class_precision(a) for name, a in analyses.items()},
        rankings={name: ranking(a) for name, a in analyses.items()},
        class_groups=class_groups(embeddings, labels, seed) or {},
        agreement=agreement(*pair, mutual, shared, seed) if pair else {},
        mutual=mutual,
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


def change(first: Deviations, second: Deviations, metric: str) -> Float[np.ndarray, "..."] | None:
    """Deviations of the second model's metric less the first one's; None without intervals."""
    return second[metric] - first[metric] if metric in first else None


def gain(local: Analysis, reference: Analysis) -> Estimate:
    """P@5 of the local model less that of a reference, on the same images."""
    value = float(local.precisions(5).mean() - reference.precisions(5).mean())
    return estimate(value, change(reference.deviations, local.deviations, "precision_at_5"))


def ratio(local: float, hf: float) -> float:
    """Local over hf; NaN where that says nothing: below zero more would read as better."""
    return local / hf if hf > 0 and local >= 0 else NAN


def differences(
    local: Analysis, hf: Analysis, values: Mapping[str, Mapping[str, Estimate]]
) -> dict[str, dict[str, Any]]:
    """Take hf - local and local / hf of every metric; for P@5 and P@1 also tests."""
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        ours, theirs = values["local"][metric], values["hf"][metric]
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


def columns(
    deviations: Float[np.ndarray, "r C"] | None, labels: Int[np.ndarray, " n"]
) -> list[Float[np.ndarray, " r"] | None]:
    """Deviations of each class; None without intervals or where it is too small to be halved."""
    classes = np.unique(labels)
    if deviations is None:
        return [None] * len(classes)
    small = np.isin(classes, small_classes(labels))
    return [None if one else column for one, column in zip(small, deviations.T, strict=True)]


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


def mutual_per_image(local: Analysis, hf: Analysis) -> Float[np.ndarray, " n"] | None:
    """Share of common 10-NN of each image; None for fewer than 11 images."""
    lists = [local.neighbors, hf.neighbors]
    return mutual_knn(*lists, MUTUAL_K) if lists[0].shape[1] >= MUTUAL_K else None


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
    common = None if shared is None else overall(shared, labels)
    same = [a.precisions(MUTUAL_K) for a in (local, hf)]
    cka, null = linear_cka(X, Y), cka_null(X, Y, labels, seed=seed)
    return {
        "mutual_knn": estimate(NAN if mutual is None else float(mutual.mean()), common),
        "mutual_knn_chance": MUTUAL_K / (n - 1) if n > MUTUAL_K else NAN,
        "mutual_knn_class_only": mutual_knn_of_classes(*same, labels, MUTUAL_K),
        "cka": cka,
        "cka_class_demeaned": linear_cka(X, Y, labels),
        "cka_null_p99": float(np.quantile(null, 0.99)),
        "cka_null_p": float((1 + (null >= cka).sum()) / (1 + len(null))) if cka == cka else NAN,
        "similarity_spearman": similarity_spearman(X, Y, seed),
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
