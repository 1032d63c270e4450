"""`report.md`: the sections of the report, made of the sentences of `narrative` and of tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ijepa.comparison import HEADLINES, Comparison, neighbor_confusion
from ijepa.narrative import (
    INTERVALS,
    MISSING,
    ROWS,
    agreement_finding,
    classes_finding,
    conclusions,
    confusion_finding,
    efficiency_finding,
    interval,
    label,
    literal,
    number,
    retrieval_finding,
    seeds_finding,
    separability_finding,
    table,
    variance_finding,
)

MAX_CONFUSION = 12
"""Classes of which every pair is told; more make a table that nobody can read."""
DISAGREEMENT_RULE = (
    "images whose nearest neighbour is of the right class in one model alone: those with the "
    "largest difference in precision@5, both ways, ties in an order drawn by the seed"
)


def markdown(comparison: Comparison, facts: Mapping[str, Any], caveats: Sequence[str]) -> str:
    """The whole report.

    Args:
        comparison: The numbers.
        facts: `dataset`, `models` and `run` as in metrics.json.
        caveats: Sentences that limit what the numbers mean.
    """
    dataset, models = facts["dataset"], facts["models"]
    paired = "hf" in comparison.metrics
    opening = [
        f"{dataset['n']} images of {literal(dataset['name'])} ({dataset['split']} split), "
        f"{len(dataset['classes'])} classes, embedded by:",
        "\n".join(f"- **{label(name)}**: {describe(model)}" for name, model in models.items()),
    ]
    results = [
        markdown_table(table(comparison)),
        INTERVALS if comparison.num_halves else "There are too few images per class for intervals.",
    ]
    sections = [
        ("Overview", opening),
        ("Quantitative results", results),
        ("Read with it", ["\n".join(f"- {caveat}" for caveat in caveats)]),
        ("Key findings", key_findings(comparison, dataset["classes"])),
        ("Conclusions", ["\n".join(f"{i}. {s}" for i, s in enumerate(conclusions(comparison), 1))]),
        ("Files", [files_written(paired)]),
        ("Reproduction", [f"```bash\n{facts['run']['command']}\n```"]),
    ]
    title = "# I-JEPA embeddings: " + ("local against Hugging Face" if paired else "local")
    parts = [title]
    for heading, paragraphs in sections:
        parts += [f"## {heading}", *paragraphs]
    return "\n\n".join(parts) + "\n"


def key_findings(comparison: Comparison, classes: Sequence[str]) -> list[str]:
    """The numbered sections, each a heading followed by its paragraphs."""
    paired = "hf" in comparison.metrics
    confused = [confusion_finding(comparison, classes)]
    if len(classes) <= MAX_CONFUSION:
        told = "local / HF" if paired else "the local model"
        confused.append(
            "Class of the image (row) and of its five nearest neighbours (column), percent, "
            f"{told}:"
        )
        confused.append(confusion_table(comparison, classes))
    sections = {
        "Variance structure": [variance_finding(comparison)],
        "Class separability": [separability_finding(comparison)],
        "What the embeddings confuse": confused,
        "Nearest neighbour retrieval": [retrieval_finding(comparison)],
    }
    if paired:
        sections = {"Representation efficiency": [efficiency_finding(comparison)], **sections}
        sections["Agreement of the two models"] = [agreement_finding(comparison)]
    if comparison.per_class:
        sections["Class by class"] = [
            classes_finding(comparison, classes),
            per_class_table(comparison, classes),
        ]
    if comparison.seeds:
        sections["Spread over training seeds"] = [
            seeds_finding(comparison),
            seeds_table(comparison),
        ]
    parts = []
    for position, (title, paragraphs) in enumerate(sections.items(), start=1):
        parts += [f"### {position}. {title}", *paragraphs]
    return parts


def files_written(paired: bool) -> str:
    """What lies beside the report."""
    lines = {
        "metrics.json": "every number with its standard error and interval",
        "report.html": "the same to explore by hand",
        "per_image.csv": "every image: label, scores, neighbours, place on the maps",
        "tsne_comparison.png": "maps, for looking only",
        "pca_comparison.png": "the first two principal components",
        "similarity_matrices.png": "cosine similarity of class means",
        "variance_explained.png": "variance by component",
        "nn_queries.png": "neighbours of images drawn by the seed, one of each class",
        "embeddings_*.npz": "the embeddings",
    }
    if paired:
        lines["nn_disagreement.png"] = DISAGREEMENT_RULE
    return "\n".join(f"- `{name}`: {what}" for name, what in lines.items())


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


def plain_name(name: str) -> str:
    """A class name on one line, for a table."""
    return " ".join(name.split())


def per_class_table(comparison: Comparison, classes: Sequence[str]) -> str:
    """P@5 by class with the Holm-corrected tests, and the neighbours that the models share."""
    header = ["Class", "n", "Local", "HF", "HF - local [95 %]", "Wins / ties / losses", "Holm p"]
    rows = [[*header, "Top-1, Holm p", "Shared 10-NN [95 %]"]]
    rows += [
        [
            plain_name(classes[row["label"]]),
            str(row["n"]),
            number("precision_at_5", row["local"]),
            number("precision_at_5", row["hf"]),
            interval("precision_at_5", row["difference"], "+"),
            f"{row['wins']} / {row['ties']} / {row['losses']}",
            f"{row['holm_p']:.2g}" if math.isfinite(row["holm_p"]) else MISSING,
            f"{row['mcnemar_holm_p']:.2g}",
            interval("mutual_knn", row["mutual_knn"]),
        ]
        for row in comparison.per_class
    ]
    return markdown_table(rows)


def confusion_table(comparison: Comparison, classes: Sequence[str]) -> str:
    """Percent of the five nearest neighbours by class of query (row) and neighbour (column)."""
    matrices = [neighbor_confusion(a, len(classes)) for a in comparison.analyses.values()]
    names = [plain_name(name) for name in classes]
    rows = [["Image", *names]]
    for row, name in enumerate(names):
        cells = zip(*(100 * matrix[row] for matrix in matrices), strict=True)
        rows.append([name, *(" / ".join(f"{value:.0f}" for value in cell) for cell in cells)])
    return markdown_table(rows)


def seeds_table(comparison: Comparison) -> str:
    """The headline numbers over trainings beside their error over images."""
    rows = [["Metric", "Trainings", "Mean", "Deviation over trainings", "Error over images"]]
    for metric in HEADLINES:
        spread, error = comparison.seeds[metric], comparison.metrics["local"][metric].se
        rows.append(
            [
                ROWS[metric],
                ", ".join(number(metric, value) for value in spread.values),
                number(metric, spread.mean),
                number(metric, spread.sd, extra=1),
                number(metric, error, extra=1),
            ]
        )
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; bars and line breaks in cells are escaped."""
    safe = [
        [cell.replace("|", "\\|").replace("\n", " ").replace("\r", " ") for cell in row]
        for row in rows
    ]
    lines = ["| " + " | ".join(row) + " |" for row in safe]
    lines.insert(1, "|" + " --- |" * len(safe[0]))
    return "\n".join(lines)
