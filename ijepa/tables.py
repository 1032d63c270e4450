"""Tables of the report and the page, as rows of cells with the header first."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ijepa.comparison import Comparison
from ijepa.formats import MISSING, P5, capital, gap, in_points, interval, label, number, p_value
from ijepa.uncertainty import KNN_K, confusion

ROWS = {
    "embedding_dim": "Embedding dimension",
    "variance_10pc": "Variance in 10 PCs",
    "variance_50pc": "Variance in 50 PCs",
    "silhouette": "Silhouette score",
    P5: "NN precision@5",
}
HEADLINES = tuple(ROWS)[1:]
DIFFERENCE = "HF - local [95%]"
INTERVALS = (
    "Brackets hold 95% intervals over images. Those of silhouette and precision come from "
    "stratified half-samples, those of variance and effective rank from each image's influence."
)
MAX_CONFUSION = 12  # classes up to which a table shows every pair

Rows = list[list[str]]


def summary(comparison: Comparison) -> dict[str, dict[str, float | int]]:
    """The headline numbers of each model and local / hf."""
    result: dict[str, dict[str, float | int]] = {}
    for name, analysis in comparison.analyses.items():
        result[name] = {"embedding_dim": analysis.embeddings.shape[1]}
        result[name] |= {metric: comparison.metrics[name][metric].value for metric in HEADLINES}
    if "hf" in result:
        local, hf = (one["embedding_dim"] for one in result.values())
        quotients = {name: comparison.differences[name]["ratio"].value for name in HEADLINES}
        result["ratio"] = {"embedding_dim": local / hf, **quotients}
    return result


def class_means(comparison: Comparison) -> dict[str, float]:
    """By model: the mean over classes of their precision@5, where classes differ in size."""
    sizes = np.unique(comparison.analyses["local"].labels, return_counts=True)[1]
    if sizes.min() == sizes.max():
        return {}
    precisions = comparison.class_precision.items()
    return {role: float(np.mean([one.value for one in rows])) for role, rows in precisions}


def model_facts(model: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a model: what it is, and what it was trained with."""
    epochs, planned = model.get("epochs"), model.get("planned_epochs")
    size = model.get("input_size")
    facts = {
        "Source": model["source"],
        "Encoder": model.get("weights"),
        "Training": model.get("losses") or "not recorded",
        "Epochs": f"{epochs} of {planned} planned" if planned not in (None, epochs) else epochs,
        "Dimensions": f"{model['embedding_dim']:,}",
        "Parameters": model.get("parameters") and f"{model['parameters'] / 1e6:.1f} million",
        "Input": size and ", ".join(filter(None, [f"{size} px", model.get("dtype")])),
        "Revision": model.get("revision"),
        "SHA-256": (model.get("sha256") or "")[:16],
    }
    return {name: str(value) for name, value in facts.items() if value}


def headline_table(comparison: Comparison) -> Rows:
    """The headline numbers of the models, chance and the references."""
    head, names = summary(comparison), comparison.names
    paired = "hf" in head
    columns = [*names.values(), *(["local / HF", DIFFERENCE] if paired else []), "Chance"]
    rows = [["Metric", *columns, *(capital(label(name)) for name in comparison.references)]]
    for metric, title in ROWS.items():
        row = [title, *(number(metric, float(head[role][metric])) for role in names)]
        if paired:
            quotient = head["ratio"][metric]
            row.append(f"{number('quotient', quotient)}x" if math.isfinite(quotient) else MISSING)
            difference = comparison.differences.get(metric)
            row.append(gap(metric, difference["estimate"]) if difference else "")
        row.append(number(P5, comparison.chance_precision) if metric == P5 else "")
        rows.append(row + [number(metric, one[metric]) for one in comparison.references.values()])
    if means := class_means(comparison):
        row = [f"{ROWS[P5]}, mean over classes", *(number(P5, value) for value in means.values())]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def class_table(comparison: Comparison, classes: Sequence[str]) -> Rows:
    """Precision@5 by class; for two models with the tests and the neighbors that they share."""
    labels, sizes = np.unique(comparison.analyses["local"].labels, return_counts=True)
    columns = comparison.class_precision
    rows = [["Class", "n", *(f"{capital(label(role))} [95%]" for role in columns)]]
    for row, size, *found in zip(labels, sizes, *columns.values(), strict=True):
        rows.append([classes[row], f"{size:,}", *(interval(P5, one) for one in found)])
    if comparison.per_class:
        rows[0] += [DIFFERENCE, "HF wins / ties / losses", "Holm p", "Shared 10-NN [95%]"]
    for row, found in zip(rows[1:], comparison.per_class, strict=False):
        row += [
            gap(P5, found["difference"]),
            f"{found['wins']} / {found['ties']} / {found['losses']}",
            p_value(found["holm_p"]),
            interval("mutual_knn", found["mutual_knn"]),
        ]
    return rows


def confusion_table(comparison: Comparison, classes: Sequence[str]) -> Rows:
    """Percent of the five nearest neighbors by class of query (row) and neighbor (column)."""
    present, codes = np.unique(comparison.analyses["local"].labels, return_inverse=True)
    classes = [classes[label] for label in present]
    analyses = comparison.analyses.values()
    matrices = [confusion(codes, codes[a.neighbors[:, :5]], len(present)) for a in analyses]
    shares = [[[number("share", x)[:-1] for x in row] for row in matrix] for matrix in matrices]
    rows = (map(" / ".join, zip(*row, strict=True)) for row in zip(*shares, strict=True))
    return [["Image", *classes], *([name, *row] for name, row in zip(classes, rows, strict=True))]


def probe_table(probe: Any) -> Rows:
    """All accuracies of the probe, with the differences that it has."""
    models, changes = probe.models.values(), probe.differences
    rows = [["Accuracy [95%]", *(capital(label(role)) for role in probe.models)]]
    rows[0] += [DIFFERENCE] * bool(changes)

    def add(title: str, accuracies: list[str], change: Any) -> None:
        last = [gap("knn", change["estimate"]) if change else ""] * bool(changes)
        rows.append([title, *accuracies, *last])

    first = next(iter(models))
    for k in first["knn"]:
        change = changes.get("knn") if k == KNN_K else None
        add(f"kNN, k = {k}", [interval("knn", model["knn"][k]) for model in models], change)
    add("Linear", [interval("linear", model["linear"]) for model in models], changes.get("linear"))
    for size, measures in first["few_shot"].items():
        for measure in measures:
            found = [model["few_shot"][size][measure] for model in models]
            shown = [
                f"{interval(measure, one['estimate'])}, SD {in_points(number(measure, one['sd']))}"
                for one in found
            ]
            title = {"linear": "Linear", "knn": f"kNN, k = {KNN_K}"}[measure]
            change = changes["few_shot"][size][measure] if changes else None
            add(f"{title}, images per class: {size}", shown, change)
    return rows


def probe_class_table(probe: Any, measure: str, classes: Sequence[str]) -> Rows:
    """Accuracy of the probe by class: `linear`, or `knn` of the headline's k."""
    header = ["Class", "n", *(f"{capital(label(role))} [95%]" for role in probe.models)]
    rows = [header + [DIFFERENCE, "Holm p"] * bool(probe.differences)]
    for found in probe.per_class:
        shown = (interval(measure, found[measure][role]) for role in probe.models)
        row = [classes[found["label"]], f"{found['n']:,}", *shown]
        if change := found[measure].get("difference"):
            row += [gap(measure, change["estimate"]), p_value(change["holm_p"])]
        rows.append(row)
    return rows


def seeds_table(comparison: Comparison) -> Rows:
    """The headline numbers over trainings next to their error over images."""
    rows = [["Metric", "Trainings", "Mean", "Deviation over trainings", "Error over images"]]
    for metric in HEADLINES:
        spread, error = comparison.seeds[metric], comparison.metrics["local"][metric].se
        trainings = ", ".join(number(metric, value) for value in spread["values"])
        errors = (in_points(number(metric, value, extra=1)) for value in (spread["sd"], error))
        rows.append([ROWS[metric], trainings, number(metric, spread["mean"]), *errors])
    return rows


def finding_tables(
    comparison: Comparison, classes: Sequence[str], probe: Any = None
) -> dict[str, dict[str, Rows]]:
    """The tables that belong to findings, by the finding's title and their own captions."""
    tables: dict[str, dict[str, Rows]] = {}
    present = np.unique(comparison.analyses["local"].labels)
    if len(present) <= MAX_CONFUSION and math.isfinite(comparison.metrics["local"][P5].value):
        models = " / ".join(label(role) for role in comparison.analyses)
        caption = f"Class of images (rows) and their five nearest neighbors, percent, {models}"
        tables["What the Embeddings Learn"] = {caption: confusion_table(comparison, classes)}
    if probe:
        tables["Probe with Labeled Images"] = {
            "Accuracy with a bank of labeled images": probe_table(probe),
            "Linear-probe accuracy by class": probe_class_table(probe, "linear", classes),
            f"{KNN_K}-NN accuracy by class": probe_class_table(probe, "knn", classes),
        }
    tables["Class by Class"] = {"Precision@5 by class": class_table(comparison, classes)}
    if comparison.seeds:
        tables["Spread over Training Seeds"] = {"Over training seeds": seeds_table(comparison)}
    return tables
