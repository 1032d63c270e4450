"""The report in words: sentences chosen by rules from the numbers of one run.

A sentence claims a difference only when the 95 % interval of hf - local leaves out zero; without an
interval it states numbers and no verdict. Nothing here is typed in by hand that a run can measure.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ijepa.comparison import HEADLINES, Comparison, neighbor_confusion
from ijepa.uncertainty import Estimate

ROWS = {
    "embedding_dim": "Embedding dimension",
    "variance_10pc": "Variance in 10 PCs",
    "variance_50pc": "Variance in 50 PCs",
    "silhouette": "Silhouette score",
    "precision_at_5": "NN precision@5",
}
PERCENT = ("variance_10pc", "variance_50pc", "precision_at_5")
MISSING = "n/a"
INTERVALS = (
    "Brackets hold 95 % intervals over images: from stratified half-samples for silhouette and "
    "precision, from a block jackknife for variance and effective rank."
)


def number(metric: str, value: float, sign: str = "") -> str:
    """A value as printed: percent with one digit for shares, three digits otherwise."""
    if not math.isfinite(value):
        return MISSING
    if metric == "embedding_dim":
        return f"{value:.0f}"
    percent = metric in PERCENT
    # Adding 0 turns a negative zero, left by rounding, into a plain one.
    value = round(100 * value, 1) + 0.0 if percent else round(value, 3) + 0.0
    return f"{value:{sign}.1f}%" if percent else f"{value:{sign}.3f}"


def interval(metric: str, estimate: Estimate, sign: str = "") -> str:
    """The value and, where there is one, its 95 % interval in brackets."""
    shown = number(metric, estimate.value, sign)
    if not math.isfinite(estimate.se):
        return shown
    low, high = (number(metric, bound, sign).rstrip("%") for bound in estimate.ci95)
    return f"{shown} [{low}, {high}]"


def ratio(local: float, hf: float) -> float:
    """Local over hf; NaN where that says nothing: below zero more would read as better."""
    return local / hf if hf > 0 and local >= 0 else float("nan")


def verdict(difference: Estimate) -> str:
    """`higher` or `lower` for hf when the interval leaves out 0, `unclear`, or `unknown`."""
    if not math.isfinite(difference.se):
        return "unknown"
    low, high = difference.ci95
    return "higher" if low > 0 else "lower" if high < 0 else "unclear"


def summary(comparison: Comparison) -> dict[str, dict[str, float | int]]:
    """The five headline numbers of each model and local / hf."""
    result = {
        name: {
            "embedding_dim": analysis.embeddings.shape[1],
            **{metric: comparison.metrics[name][metric].value for metric in HEADLINES},
        }
        for name, analysis in comparison.analyses.items()
    }
    if "hf" in result:
        result["ratio"] = {
            metric: ratio(float(result["local"][metric]), float(result["hf"][metric]))
            for metric in ROWS
        }
    return result


def table(comparison: Comparison) -> list[list[str]]:
    """The headline table as cells, its header first."""
    head = summary(comparison)
    paired = "hf" in head
    header = ["Metric", "Local I-JEPA"]
    header += ["HF I-JEPA", "Ratio", "HF - local [95 %]"] if paired else []
    header += ["Pixels", "Random weights"]
    widths = {"pixels": 3072, "random_weights": head["local"]["embedding_dim"]}
    rows = [header]
    for metric, title in ROWS.items():
        row = [title, number(metric, float(head["local"][metric]))]
        if paired:
            quotient = head["ratio"][metric]
            row += [number(metric, float(head["hf"][metric]))]
            row += [f"{quotient:.2f}x" if math.isfinite(quotient) else MISSING]
            difference = comparison.differences.get(metric)
            row += [interval(metric, difference["estimate"], "+") if difference else ""]
        for reference, metrics in comparison.references.items():
            row.append(number(metric, metrics.get(metric, float(widths[reference]))))
        rows.append(row)
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; bars and line breaks in cells are escaped."""
    safe = [
        [cell.replace("|", "\\|").replace("\n", " ").replace("\r", " ") for cell in row]
        for row in rows
    ]
    lines = ["| " + " | ".join(row) + " |" for row in safe]
    lines.insert(1, "|" + " --- |" * len(safe[0]))
    return "\n".join(lines)


def console_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def retrieval_finding(comparison: Comparison) -> str:
    """Who retrieves better, and what that means beside chance and the references."""
    local = comparison.metrics["local"]["precision_at_5"]
    text = (
        f"Of the five nearest neighbours of an image, {interval('precision_at_5', local)} share "
        f"its class with the local model; chance is {100 * comparison.chance_precision:.1f}%"
    )
    for name, metrics in comparison.references.items():
        text += (
            f", {name.replace('_', ' ')} give {number('precision_at_5', metrics['precision_at_5'])}"
        )
    text += "."
    if "hf" not in comparison.metrics:
        return text
    hf = comparison.metrics["hf"]["precision_at_5"]
    facts = comparison.differences["precision_at_5"]
    difference = facts["estimate"]
    shown = interval("precision_at_5", difference, "+")
    text += f" With the HF model it is {interval('precision_at_5', hf)}"
    text += {
        "higher": f": the HF model retrieves better, by {shown}.",
        "lower": f": the local model retrieves better; HF - local is {shown}.",
        "unclear": f"; HF - local is {shown}, so no difference can be shown at "
        f"n = {count(comparison)}.",
        "unknown": "; there are too few images for an interval, so this is no verdict.",
    }[verdict(difference)]
    if "wins" in facts:
        text += (
            f" Image by image the HF model does better on {facts['wins']}, as well on "
            f"{facts['ties']} and worse on {facts['losses']} "
            f"(sign-flip p = {facts['sign_flip_p']:.4g})."
        )
    return text


def question(comparison: Comparison) -> str:
    """What the answer answers."""
    if "hf" in comparison.metrics:
        return "Which of the two encoders brings images of the same class closer together?"
    return "How well does the local encoder bring images of the same class together?"


def answer(comparison: Comparison) -> str:
    """One sentence on precision@5, with a winner only where the interval leaves out zero."""
    local = comparison.metrics["local"]["precision_at_5"]
    if not math.isfinite(local.value):
        return "With fewer than six images there are no five nearest neighbours to judge by."
    others = " and ".join(
        f"{name.replace('_', ' ')} {number('precision_at_5', metrics['precision_at_5'])}"
        for name, metrics in comparison.references.items()
    )
    beside = f"chance gives {100 * comparison.chance_precision:.1f}%, {others}"
    if "hf" not in comparison.metrics:
        shown = interval("precision_at_5", local)
        return f"{shown} of an image's five nearest neighbours share its class; {beside}."
    hf = comparison.metrics["hf"]["precision_at_5"]
    shown = [number("precision_at_5", value) for value in (local.value, hf.value)]
    difference = comparison.differences["precision_at_5"]["estimate"]
    gap = interval("precision_at_5", difference, "+").replace("%", "")
    first = {
        "higher": f"The HF model: {shown[1]} of an image's five nearest neighbours share its class,"
        f" against {shown[0]} with the local model (HF - local {gap} points)",
        "lower": f"The local model: {shown[0]} of an image's five nearest neighbours share its "
        f"class, against {shown[1]} with the HF model (HF - local {gap} points)",
        "unclear": f"No difference can be shown: {shown[0]} of an image's five nearest neighbours "
        f"share its class with the local model and {shown[1]} with the HF model "
        f"(HF - local {gap} points)",
        "unknown": "There are too few images for a verdict: of an image's five nearest neighbours "
        f"{shown[0]} share its class with the local model and {shown[1]} with the HF model",
    }[verdict(difference)]
    return f"{first}; {beside}."


def efficiency_finding(comparison: Comparison) -> str:
    """What share of the HF model's retrieval the local dimensions buy."""
    head = summary(comparison)
    if "hf" not in head or not math.isfinite(head["ratio"]["precision_at_5"]):
        return "This run has one model alone, so there is no ratio to report."
    return (
        f"The local model reaches {100 * head['ratio']['precision_at_5']:.0f}% of the HF model's "
        f"precision@5 with {100 * head['ratio']['embedding_dim']:.0f}% of its dimensions "
        f"({head['local']['embedding_dim']} against {head['hf']['embedding_dim']})."
    )


def variance_finding(comparison: Comparison) -> str:
    """How the variance is spread, and whether the models differ in that."""
    parts = []
    for name, analysis in comparison.analyses.items():
        m, width = comparison.metrics[name], analysis.embeddings.shape[1]
        rank = m["effective_rank"]
        parts.append(
            f"{label(name)}: {interval('variance_10pc', m['variance_10pc'])} of the variance in 10 "
            f"PCs, {interval('variance_50pc', m['variance_50pc'])} in 50; "
            f"PCs for 80 %: {whole(m['components_80'].value)}; effective rank "
            f"{rank.value:.1f} of {width} ({100 * rank.value / width:.0f}%)."
        )
    text = " ".join(parts)
    if "hf" in comparison.metrics:
        difference = comparison.differences["variance_10pc"]["estimate"]
        text += {
            "higher": " The HF model puts more of its variance into 10 PCs",
            "lower": " The local model puts more of its variance into 10 PCs",
            "unclear": " No difference in 10 PCs can be shown",
            "unknown": " Without an interval, no verdict on 10 PCs is given",
        }[verdict(difference)]
        text += f" (HF - local {interval('variance_10pc', difference, '+')})."
    return text + (
        " Explained variance describes a shape and not a quality: raw pixels reach "
        f"{number('variance_10pc', comparison.references['pixels']['variance_10pc'])} in 10 PCs."
    )


def separability_finding(comparison: Comparison) -> str:
    """Silhouettes, and whether one model separates the classes better."""
    shown = ", ".join(
        f"{label(name)} {interval('silhouette', comparison.metrics[name]['silhouette'])}"
        for name in comparison.analyses
    )
    text = f"Mean silhouette with the true labels, from -1 to 1, higher is better: {shown}."
    if "hf" in comparison.metrics:
        difference = comparison.differences["silhouette"]["estimate"]
        shown = interval("silhouette", difference, "+")
        text += {
            "higher": f" The HF model separates the classes better (by {shown}).",
            "lower": f" The local model separates the classes better (HF - local {shown}).",
            "unclear": f" No difference can be shown at n = {count(comparison)} ({shown}).",
            "unknown": " Without an interval this is no verdict.",
        }[verdict(difference)]
    if all(m["silhouette"].value < 0.1 for m in comparison.metrics.values()):
        text += " Values this near to 0 mean classes that overlap, however good the neighbours are."
    return text


def confusion_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """The classes that each model confuses most among its five nearest neighbours."""
    parts = []
    for name, analysis in comparison.analyses.items():
        confusion = neighbor_confusion(analysis, len(classes))
        hits = confusion.diagonal().copy()
        np.fill_diagonal(confusion, 0)
        worst = np.unravel_index(np.argsort(-confusion, axis=None)[:3], confusion.shape)
        pairs = ", ".join(
            f"{literal(classes[a])} to {literal(classes[b])} ({100 * confusion[a, b]:.0f}%)"
            for a, b in zip(*worst, strict=True)
            if confusion[a, b] > 0
        )
        present = np.unique(analysis.labels)
        best = present[hits[present].argmax()]
        parts.append(
            f"{label(name)}: the purest neighbourhoods are those of {literal(classes[best])} "
            f"({100 * hits[best]:.0f}%)"
            + (f"; neighbours stray most from {pairs}." if pairs else "; none stray.")
        )
    return " ".join(parts)


def agreement_finding(comparison: Comparison) -> str:
    """Whether the two models see the same neighbours and the same geometry."""
    facts = comparison.agreement
    mutual = facts["mutual_knn"]
    text = (
        f"The models share {100 * mutual.value:.1f}% of their 10 nearest neighbours"
        if math.isfinite(mutual.value)
        else "There are too few images for mutual 10-NN"
    )
    if math.isfinite(mutual.se):
        low, high = (100 * bound for bound in mutual.ci95)
        chance, class_only = facts["mutual_knn_chance"], facts["mutual_knn_class_only"]
        text += f" [{low:.1f}, {high:.1f}]; {100 * chance:.1f}% would be chance and "
        text += f"{100 * class_only:.1f}% the level of two models that agree on classes alone"
        text += (
            ", so they agree on more than classes."
            if mutual.ci95[0] > class_only
            else ", so no agreement beyond the classes is shown."
        )
    else:
        text += "."
    cka, demeaned, null = facts["cka"], facts["cka_class_demeaned"], facts["cka_null_p99"]
    if math.isfinite(cka):
        text += f" Debiased linear CKA is {cka:.3f}"
        text += f", {demeaned:.3f} within classes" if math.isfinite(demeaned) else ""
        text += (
            f"; shuffling images inside their classes gives at most {null:.3f} in 99 % of cases."
        )
    return text


def seeds_finding(comparison: Comparison) -> str:
    """What another training seed changes, beside what other images would change."""
    parts = []
    for metric in HEADLINES:
        spread = comparison.seeds[metric]
        parts.append(
            f"{ROWS[metric]}: mean {number(metric, spread.mean)}, standard deviation "
            f"{number(metric, spread.sd)} over trainings, standard error "
            f"{number(metric, comparison.metrics['local'][metric].se)} over images"
        )
    trainings = len(comparison.seeds["precision_at_5"].values)
    return f"Over {trainings} trainings of the local model: {'; '.join(parts)}."


def headline_lines(comparison: Comparison) -> list[str]:
    """What the console says under the table: agreement, and wins, ties and losses."""
    if "hf" not in comparison.metrics:
        return []
    facts, retrieval = comparison.agreement, comparison.differences["precision_at_5"]
    lines = []
    if math.isfinite(facts["mutual_knn"].value):
        lines.append(
            f"agreement: mutual 10-NN {facts['mutual_knn'].value:.3f} (chance "
            f"{facts['mutual_knn_chance']:.3f}, same classes {facts['mutual_knn_class_only']:.3f})"
            + (f", debiased CKA {facts['cka']:.3f}" if math.isfinite(facts["cka"]) else "")
        )
    if "wins" in retrieval:
        lines.append(
            f"precision@5 by image: hf better on {retrieval['wins']}, equal on "
            f"{retrieval['ties']}, local better on {retrieval['losses']}"
        )
    return lines


def count(comparison: Comparison) -> int:
    """Images compared."""
    return len(comparison.analyses["local"].labels)


def label(name: str) -> str:
    """A model's name in a sentence."""
    return "HF" if name == "hf" else name.replace("_", " ").capitalize()


def whole(value: float) -> str:
    """A count, or a word where there is none."""
    return f"{value:.0f}" if math.isfinite(value) else MISSING


def literal(text: str) -> str:
    """A class name or path inside Markdown: shown as it is, never as markup."""
    single_line = " ".join(text.split())
    for character in "\\`*_[]<>|#&":
        single_line = single_line.replace(character, "\\" + character)
    return single_line


def per_class_table(comparison: Comparison, classes: Sequence[str]) -> str:
    """P@5 by class with the Holm-corrected test."""
    rows = [["Class", "n", "Local", "HF", "HF - local [95 %]", "Holm p"]]
    rows += [
        [
            " ".join(classes[row["label"]].split()),
            str(row["n"]),
            number("precision_at_5", row["local"]),
            number("precision_at_5", row["hf"]),
            interval("precision_at_5", row["difference"], "+"),
            f"{row['holm_p']:.4g}",
        ]
        for row in comparison.per_class
    ]
    return markdown_table(rows)


def markdown(comparison: Comparison, facts: Mapping[str, Any], caveats: Sequence[str]) -> str:
    """The whole report.

    Args:
        comparison: The numbers.
        facts: `dataset`, `models` and `run` as in metrics.json.
        caveats: Sentences that limit what the numbers mean.
    """
    dataset, models = facts["dataset"], facts["models"]
    paired = "hf" in comparison.metrics
    lines = ["# I-JEPA embeddings: " + ("local against Hugging Face" if paired else "local"), ""]
    lines += ["## Overview", ""]
    lines += [
        f"{dataset['n']} images of {literal(dataset['name'])} ({dataset['split']} split), "
        f"{len(dataset['classes'])} classes, embedded by:",
        "",
    ]
    lines += [f"- **{label(name)}**: {describe(model)}" for name, model in models.items()]
    lines += ["", "## Quantitative results", "", markdown_table(table(comparison)), ""]
    lines += [INTERVALS, ""]
    if not comparison.num_halves:
        lines[-2] = "There are too few images per class for intervals."
    lines += ["## Read with it", "", *(f"- {caveat}" for caveat in caveats), ""]
    sections = {
        "Representation efficiency": efficiency_finding(comparison),
        "Variance structure": variance_finding(comparison),
        "Class separability": separability_finding(comparison),
        "What the embeddings confuse": confusion_finding(comparison, dataset["classes"]),
        "Nearest neighbour retrieval": retrieval_finding(comparison),
    }
    if paired:
        sections["Agreement of the two models"] = agreement_finding(comparison)
    lines += ["## Key findings", ""]
    for position, (title, text) in enumerate(sections.items(), start=1):
        lines += [f"### {position}. {title}", "", text, ""]
    if comparison.seeds:
        lines += ["## Spread over training seeds", "", seeds_finding(comparison), ""]
    if comparison.per_class:
        lines += ["## Precision@5 by class", ""]
        lines += [per_class_table(comparison, dataset["classes"]), ""]
    lines += ["## Files", "", "`metrics.json` holds every number, `per_image.csv` every image.", ""]
    lines += ["## Reproduction", "", "```bash", facts["run"]["command"], "```", ""]
    return "\n".join(lines)


def describe(model: Mapping[str, Any]) -> str:
    """One model in a line."""
    text = f"`{model['source']}`, {model['embedding_dim']} dimensions, "
    text += f"{model['parameters'] / 1e6:.1f} million parameters, input {model['input_size']} px"
    if model.get("weights"):
        text += f", {model['weights']} encoder"
    if model.get("epochs") is not None:
        text += f", trained for {model['epochs']} epochs"
        if model.get("planned_epochs") not in (None, model["epochs"]):
            text += f" of {model['planned_epochs']} planned"
    return text + f", {model['dtype']}"
