"""From the embeddings of the same images by one or two models to one record of numbers.

`analyze` passes each model's embeddings through all that is computed from them, to one `Analysis`;
the rest puts these records side by side. `METRICS` is the table of single-model numbers: a new one
is a function of an `Analysis` and a line, its interval an entry of `deviations` in `analyze`.
Differences are always hf - local. Without halves (`uncertainty.half_samples`) there is no interval.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float

from ijepa import metrics, uncertainty
from ijepa.agreement import class_groups, compare_pair
from ijepa.metrics import NAN, SILENT, Embeddings, Labels, PerImage, Progress
from ijepa.uncertainty import Analysis, Estimate, Halves, class_average, confusion, estimate

MAX_GAP = 1000
"""Labels without images are named in reports; with many more, labels are ids and no numbering."""
MODEL_NAMES = {"local": "Local model", "hf": "HF model"}
"""What the models are called where no other name is given."""


METRICS: dict[str, Callable[[Analysis], float]] = {
    "variance_10pc": lambda a: metrics.explained_variance(a.eigenvalues, 10),
    "variance_50pc": lambda a: metrics.explained_variance(a.eigenvalues, 50),
    "components_80": lambda a: metrics.num_components(a.eigenvalues, 0.80),
    "components_90": lambda a: metrics.num_components(a.eigenvalues, 0.90),
    "components_95": lambda a: metrics.num_components(a.eigenvalues, 0.95),
    **{
        name: lambda a, name=name: float(a.scores[name].mean())
        for name in ("silhouette", "silhouette_cosine", *uncertainty.NEIGHBOR_SCORES)
    },
    "effective_rank": lambda a: metrics.effective_rank(a.eigenvalues),
    "effective_rank_uncentered": lambda a: metrics.effective_rank(
        metrics.covariance_spectrum(a.embeddings, centered=False)
    ),
    "participation_ratio": lambda a: metrics.participation_ratio(a.eigenvalues, len(a.labels)),
    "hubness_skew": lambda a: metrics.hubness(a.neighbors)["skew"],
    "hubness_maximum": lambda a: metrics.hubness(a.neighbors)["maximum"],
    "anti_hub_share": lambda a: metrics.hubness(a.neighbors)["anti_hub_share"],
}


def analyze(  # noqa: PLR0913
    X: Embeddings,
    labels: Labels,
    name: str,
    halves: Halves,
    reference: bool = False,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Analysis:
    """All from which the numbers of one model and their intervals are computed.

    Of a `reference` only precision@k and kNN accuracy have deviations.

    Raises:
        UserError: If a row is not finite or has zero length; names the model and the image.
    """
    metrics.validate_embeddings(X, name)
    bar = partial(progress, desc=f"pairs {name}")
    of_distances = halves[:0] if reference else halves
    pairs = metrics.all_pairs(X, uncertainty.LIST_LENGTH, labels, of_distances, device, bar)
    lists = pairs.neighbors, pairs.similarities
    found = uncertainty.neighbor_halves(*lists, labels, halves)
    deviations, by_class = {}, {}
    for metric, values in found.values.items():
        deviations[metric], by_class[metric] = uncertainty.mean_deviations(values, labels)
    for metric, values in pairs.half_silhouettes.items():
        deviations[metric] = uncertainty.half_deviations(values)
    if len(of_distances):
        eigenvalues, components = metrics.principal_scores(X)
        deviations |= uncertainty.spectrum_deviations(eigenvalues, components)
    else:
        eigenvalues = metrics.covariance_spectrum(X)
    scores = {
        "silhouette": pairs.silhouettes,
        "silhouette_cosine": metrics.cosine_silhouettes(X, labels),
        "knn_accuracy": metrics.knn_correct(*lists, labels),
    }
    for k in uncertainty.PRECISION_KS:
        scores[f"precision_at_{k}"] = metrics.precision_at_k(lists[0], labels, k)
    return Analysis(
        embeddings=X,
        labels=labels,
        neighbors=pairs.neighbors,
        similarities=pairs.similarities,
        eigenvalues=eigenvalues,
        scores=scores,
        halves=found,
        class_deviations=by_class["precision_at_5"],
        deviations=deviations,
    )


def measure(a: Analysis) -> dict[str, Estimate]:
    """Every metric of the table, with an interval where there is one."""
    return {name: of_one(metric(a), a.deviations_of(name)) for name, metric in METRICS.items()}


def of_one(value: float, deviations: Float[np.ndarray, " r"]) -> Estimate:
    """The estimate of one model, without an interval where all deviations are 0.

    All halves of few images may have all neighbors right; of other images some would be wrong.
    """
    return estimate(value, deviations if deviations.any() else deviations[:0])


@dataclass(frozen=True)
class Comparison:
    """All numbers of a run but a probe's. Keys of the mappings are `local` and, if given, `hf`."""

    analyses: dict[str, Analysis]
    names: dict[str, str]  # short, for tables and sentences
    metrics: dict[str, dict[str, Estimate]]
    """By model, then metric; `se` and `ci95` are NaN where there is no interval."""
    references: dict[str, dict[str, float]]
    gains: dict[str, Estimate]  # by reference: precision@5 of the local model less the reference's
    differences: dict[str, dict[str, Any]]
    """By metric: an `estimate` of hf - local, the `ratio` local / hf, tests where there are any."""
    per_class: list[dict[str, Any]]
    class_precision: dict[str, list[Estimate]]
    """By model: precision@5 of each class that occurs, in the order of the labels."""
    rankings: dict[str, dict[str, Any]]
    """By model: which classes come first, and how often the halves repeat it."""
    class_groups: dict[str, Any]
    """Which classes each model places close together; empty for fewer than three classes."""
    agreement: dict[str, Any]
    mutual: PerImage | None  # share of common 10-NN
    chance_precision: float
    seeds: dict[str, dict[str, Any]]  # by metric: see `seed_spread`
    small_classes: int
    """Classes too small for halves: kept whole in all of them, and without own intervals."""
    num_halves: int  # 0 where there are no intervals: see `uncertainty.half_samples`
    seed: int


def compare(  # noqa: PLR0913
    embeddings: Mapping[str, Any],
    references: Mapping[str, Any],
    labels: Any,
    seed: SupportsIndex,
    other_seeds: Sequence[Any] = (),
    device: str = "cpu",
    names: Mapping[str, str] = MODEL_NAMES,
    progress: Progress = SILENT,
) -> Comparison:
    """Measure one model or two, and the references, on the same images.

    Args:
        embeddings: `local` and perhaps `hf`, n rows of numbers each, in the same order: arrays or
            what NumPy makes an array of. Kinds other than float64 become float32.
        references: Embeddings that show what a number means, such as raw pixels; may be empty.
        labels: Class of each row, a whole number from 0.
        seed: Of the half-samples, the permutations and the images for Spearman's correlation.
        other_seeds: Embeddings by other trainings of the local model.
        device: "cpu", or a CUDA device for all pairs of images.
        names: Short names of the models.
        progress: See `Progress`.

    Raises:
        ValueError: If there are other models or references of their names, labels do not number
            classes from 0, or embeddings are no rows of real numbers, one for each label.
        UserError: If a row has NaN or infinity, or only zeros.
    """
    labels, seed = as_labels(labels), operator.index(seed)
    if "local" not in embeddings or not embeddings.keys() <= MODEL_NAMES.keys():
        raise ValueError(f"embeddings must be of local, or local and hf, got {list(embeddings)}")
    seeds = {f"local_{row}": X for row, X in enumerate(other_seeds, start=2)}
    if not references.keys().isdisjoint({*MODEL_NAMES, *seeds, "chance"}):
        raise ValueError(
            f"references must not be named like a model or chance, got {[*references]}"
        )
    given = {name: embeddings[name] for name in MODEL_NAMES if name in embeddings}
    given |= {**references, **seeds}
    arrays = {name: as_rows(X, name, len(labels)) for name, X in given.items()}
    halves, found = uncertainty.half_samples(labels, seed=seed), {}
    for name, X in arrays.items():
        own = halves[:0] if name in seeds else halves
        found[name] = analyze(X, labels, name, own, name in references, device, progress)
    values = {name: measure(a) for name, a in found.items()}
    analyses = {name: found[name] for name in found if name in embeddings}
    pair = {"differences": {}, "per_class": [], "agreement": {}, "mutual": None}
    if "hf" in analyses:
        pair = compare_pair(analyses["local"], analyses["hf"], values, halves, seed)
    return Comparison(
        analyses=analyses,
        names={name: names.get(name, MODEL_NAMES[name]) for name in analyses},
        metrics={name: values[name] for name in analyses},
        references={
            name: {"embedding_dim": float(arrays[name].shape[1])}
            | {metric: one.value for metric, one in values[name].items()}
            for name in references
        },
        gains={name: gain(found["local"], found[name]) for name in references},
        class_precision={name: class_precision(a) for name, a in analyses.items()},
        rankings={name: ranking(a) for name, a in analyses.items()},
        class_groups=class_groups({name: arrays[name] for name in analyses}, labels, seed),
        chance_precision=metrics.chance_precision(labels),
        seeds=seed_spread([values["local"], *(values[name] for name in seeds)]),
        small_classes=len(uncertainty.small_classes(labels)),
        num_halves=len(halves),
        seed=seed,
        **pair,
    )


def as_labels(labels: Any) -> Labels:
    """Labels as an array; ValueError unless they are whole numbers that number classes."""
    labels = np.asarray(labels)
    hint = "np.unique(names, return_inverse=True)[1] numbers the classes"
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        got = f"{labels.dtype} of shape {labels.shape}"
        raise ValueError(f"labels must be whole numbers from 0 in one dimension, got {got}: {hint}")
    if len(labels) < 2:
        raise ValueError(f"there must be labels of at least 2 images, got {len(labels)}")
    if labels.max() >= MAX_GAP + 10 * len(np.unique(labels)):
        raise ValueError(f"labels are far apart, up to {labels.max():,}: {hint}")
    return labels.astype(np.int64)


def as_rows(X: Any, name: str, n: int) -> Embeddings:
    """Embeddings as an array of float32 or float64; ValueError unless they are n rows of numbers.

    Float16 has too small a range for the products of rows.
    """
    masked = isinstance(X, np.ma.MaskedArray)
    try:
        X = np.asarray(X)
    except (RuntimeError, TypeError) as error:  # as of tensors with gradients
        raise ValueError(f"{name}: {error}") from error
    if masked or X.ndim != 2 or X.dtype.kind not in "fiu":
        got = f"{'masked ' * masked}{X.dtype} of shape {X.shape}"
        raise ValueError(f"{name} must be rows of real numbers, one for each label, got {got}")
    if len(X) != n:
        raise ValueError(f"{name} has {len(X)} rows for {n} labels")
    return X if X.dtype in (np.float32, np.float64) else X.astype(np.float32)


def seed_spread(trainings: Sequence[Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    """By metric: `values` over trainings, `mean` and `sd`; empty for fewer than two trainings.

    The local model's value comes first. The sample standard deviation is what another seed would
    change. It is kept apart from the intervals, which are over images.
    """
    several = METRICS if len(trainings) > 1 else {}
    columns = {metric: [one[metric].value for one in trainings] for metric in several}
    return {
        metric: {"values": x, "mean": float(np.mean(x)), "sd": float(np.std(x, ddof=1))}
        for metric, x in columns.items()
    }


def gain(local: Analysis, reference: Analysis) -> Estimate:
    """P@5 of the local model less that of a reference, on the same images."""
    value = float(local.precisions(5).mean() - reference.precisions(5).mean())
    changes = [a.deviations_of("precision_at_5") for a in (local, reference)]
    return estimate(value, changes[0] - changes[1])


def class_precision(a: Analysis) -> list[Estimate]:
    """P@5 of each class that occurs, with its interval, in the order of the labels."""
    means = [float(a.precisions(5)[a.labels == label].mean()) for label in np.unique(a.labels)]
    return [of_one(*one) for one in zip(means, a.class_deviations.T, strict=True)]


def ranking(a: Analysis) -> dict[str, Any]:
    """The purest class and the most frequent confusions, and how often the halves repeat them.

    The share of halves is that of the same class, and of the same confusions in any order; NaN
    without halves, or where some classes stay whole in them, which makes these denser. Empty where
    precision@5 is not defined.
    """
    if not np.isfinite(a.precisions(5)).all():
        return {}
    classes, codes = np.unique(a.labels, return_inverse=True)
    purest = int(class_average(a.precisions(5), codes).argmax())
    shares = confusion(codes, codes[a.neighbors[:, :5]], len(classes))
    confused = uncertainty.most_confused(shares)
    pairs = {pair[:2] for pair in confused}
    halves = zip(a.halves.values["precision_at_5"].argmax(axis=1), a.halves.confused, strict=True)
    repeated = [(first == purest, found == pairs) for first, found in halves]
    if not repeated or len(uncertainty.small_classes(a.labels)):
        repeated = [(NAN, NAN)]
    same_purest, same_confusions = np.mean(repeated, axis=0).tolist()
    return {
        "purest_class": {"label": int(classes[purest]), "share_of_halves": same_purest},
        "confusions": [
            {"from": int(classes[row]), "to": int(classes[column]), "share": share}
            for row, column, share in confused
        ],
        "confusions_share_of_halves": same_confusions,
    }
