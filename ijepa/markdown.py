"""`report.md`: caveats, the sentences of `narrative` and tables, under the headings of a report."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ijepa import narrative
from ijepa.comparison import HEADLINES, Comparison, neighbor_confusion
from ijepa.narrative import (
    INTERVALS,
    P5,
    ROWS,
    accuracy,
    count,
    gap,
    interval,
    label,
    number,
    p_value,
    short_names,
)
from ijepa.projections import PERPLEXITY, Maps
from ijepa.uncertainty import MIN_IMAGES_PER_CLASS

SIGNIFICANT = 0.05
MAX_CONFUSION = 12
"""Classes up to which a table shows every pair."""
FILES = {
    "metrics.json": "every number with its standard error and interval",
    "report.html": "the same to explore by hand",
    "per_image.csv": "every image: label, scores, neighbors, place on the maps",
    "tsne_comparison.png": "t-SNE maps, for looking only",
    "pca_comparison.png": "the first two principal components",
    "similarity_matrices.png": "cosine similarity of class means",
    "variance_explained.png": "variance by component",
    "class_precision.png": "precision@5 by class with intervals",
    "nn_queries.png": "neighbors of one image of each class, drawn by the seed",
    "nn_disagreement.png": "images whose first neighbor is right in only one model: the largest "
    "differences in precision@5, both ways, ties in an order drawn by the seed",
    "embeddings_*.npz": "the embeddings",
}


def markdown(
    comparison: Comparison,
    facts: Mapping[str, Any],
    caveats: Sequence[str],
    files: Sequence[str],
    probe: Any = None,
) -> str:
    """The whole report; names and classes are shown as they are, never as markup.

    Args:
        comparison: The numbers.
        facts: `dataset`, `models`, `run` and `settings` as in metrics.json.
        caveats: Sentences that limit what the numbers mean.
        files: Names of the files that are written.
        probe: Accuracies with a bank of labeled images.
    """
    names = {role: literal(name) for role, name in short_names(comparison).items()}
    comparison, data = replace(comparison, names=names), facts["dataset"]
    classes = [literal(name) for name in data["classes"]]
    brackets = INTERVALS if comparison.num_halves else "There are too few images for intervals."
    written = [f"- `{name}`: {what}" for name, what in FILES.items() if matches(name, files)]
    said = conclusions(comparison, classes, probe)
    sections = {
        "Overview": [
            f"{data['n']:,} images of {literal(data['name'])} ({data['split']} split), "
            f"{len(classes)} classes, embedded by:",
            "\n".join(f"- {describe(r, names.get(r), m)}" for r, m in facts["models"].items()),
            protocol(comparison, facts),
        ],
        "Quantitative Results": [markdown_table(narrative.table(comparison)), brackets],
        "Caveats": ["\n".join(f"- {literal(caveat)}" for caveat in caveats) or "None."],
        "Key Findings": key_findings(comparison, classes, probe),
        "Conclusions": ["\n".join(f"{i}. {sentence}" for i, sentence in enumerate(said, 1))],
        "Files Generated": ["\n".join(written)],
    }
    if command := facts["run"]["command"]:
        sections["Reproduction"] = [f"```bash\n{command}\n```"]
    parts = [f"# I-JEPA Embedding Analysis: {' vs '.join(names.values())}"]
    for heading, paragraphs in sections.items():
        parts += [f"## {heading}", *paragraphs]
    return "\n\n".join(parts) + "\n"


def matches(name: str, files: Sequence[str]) -> bool:
    """Whether a file, or one of a pattern's, was written."""
    return any(re.fullmatch(name.replace("*", ".*"), file) for file in files)


def key_findings(comparison: Comparison, classes: Sequence[str], probe: Any) -> list[str]:
    """The numbered subsections; those that say nothing are left out."""
    paired = "hf" in comparison.metrics
    learned = [
        narrative.class_groups_finding(comparison, classes),
        narrative.confusion_finding(comparison, classes),
    ]
    if len(classes) <= MAX_CONFUSION:
        cells = " / ".join(short_names(comparison).values())
        learned.append(
            f"Class of images (rows) and their five nearest neighbors (columns), percent, {cells}:"
        )
        learned.append(confusion_table(comparison, classes))
    classed = [classes_finding(comparison, classes), per_class_table(comparison, classes)]
    sections = {
        "Representation Efficiency": paired and [narrative.efficiency_finding(comparison)],
        "Variance Structure": [narrative.variance_finding(comparison)],
        "Class Separability": [narrative.separability_finding(comparison)],
        "What the Embeddings Learn": learned,
        "Nearest Neighbor Retrieval Quality": [narrative.retrieval_finding(comparison)],
        "Probe with Labeled Images": probe and probe_section(comparison, probe),
        "Agreement of the Two Models": paired and [narrative.agreement_finding(comparison)],
        "Class by Class": comparison.per_class and classed,
        "Spread over Training Seeds": comparison.seeds
        and [narrative.seeds_finding(comparison), seeds_table(comparison)],
    }
    parts = []
    said = {title: paragraphs for title, paragraphs in sections.items() if paragraphs}
    for position, (title, paragraphs) in enumerate(said.items(), start=1):
        parts += [f"### {position}. {title}", *filter(None, paragraphs)]
    return parts


def describe(role: str, name: str | None, model: Mapping[str, Any]) -> str:
    """One model in a line: what it is, and what it was trained with."""
    epochs, planned = model.get("epochs"), model.get("planned_epochs")
    of_planned = f" of {planned} planned" if planned not in (None, epochs) else ""
    losses = model.get("losses") or ("losses that are not recorded" if role == "local" else None)
    facts = {
        "{:,} dimensions": model["embedding_dim"],
        "{:.1f} million parameters": (model.get("parameters") or 0) / 1e6,
        "input {} px": model.get("input_size"),
        "{} encoder": model.get("weights"),
        "trained for {} epochs" + of_planned: epochs,
        "trained with {}": losses and literal(losses),
    }
    title = f"{label(role)}: {name}" if name else label(role)
    known = [words.format(value) for words, value in facts.items() if value]
    return ", ".join([f"**{title}**", literal(str(model["source"])), *known])


def protocol(comparison: Comparison, facts: Mapping[str, Any]) -> str:
    """What was done, for a paper."""
    run, data = facts["run"], facts["dataset"]
    vectors = "; ".join(
        f"{name}: {facts['models'][role].get('pooling', 'pooling not recorded')}, "
        f"{facts['models'][role].get('dtype', 'float32')}"
        for role, name in short_names(comparison).items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    sizes = np.unique(comparison.analyses["local"].labels, return_counts=True)[1]
    each = f"{sizes.min():,}" + (f" to {sizes.max():,}" if sizes.min() < sizes.max() else "")
    return narrative.paragraph(
        f"*Protocol.* Frozen encoders give each image one vector ({vectors}).",
        f"We compare {data['n']:,} images of {literal(data['name'])} ({data['split']} split), "
        f"{each} of each of {len(sizes)} classes, drawn with seed {comparison.seed}.",
        "Neighbors are ranked by cosine similarity among all other images.",
        "Silhouettes use Euclidean distance and the true labels.",
        f"Intervals come from {comparison.num_halves} stratified half-samples."
        if comparison.num_halves
        else "",
        f"Versions: {versions}; commit {run.get('git_commit') or 'unknown'}.",
    )


def classes_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """On which classes a model is better, all classes tested together."""
    total, names = len(comparison.per_class), short_names(comparison)
    if not comparison.num_halves:
        return "There are too few images per class for a verdict on classes."
    better: dict[str, list[str]] = {"higher": [], "lower": []}
    for row in comparison.per_class:
        found = narrative.verdict(row["difference"])
        if found in better and row["holm_p"] < SIGNIFICANT:
            better[found].append(classes[row["label"]])
    parts = [
        f"{names[role]} retrieves better on {narrative.listed(better[found])} (precision@5)."
        for role, found in (("hf", "higher"), ("local", "lower"))
        if better[found]
    ]
    if rest := total - sum(map(len, better.values())):
        which = f"the other {rest} of {total} classes" if parts else "any class"
        parts.append(
            f"No difference in precision@5 can be shown on {which} at n = {count(comparison):,}."
        )
    parts.append(
        f"A difference counts when its interval excludes 0 and Holm's p is below {SIGNIFICANT}."
    )
    return narrative.paragraph(*parts)


def conclusions(comparison: Comparison, classes: Sequence[str], probe: Any = None) -> list[str]:
    """What can be said in the end."""
    paired = "hf" in comparison.metrics and not narrative.undefined(comparison)
    found = [
        narrative.answer(comparison),
        narrative.probe_finding(comparison, probe) if probe is not None else "",
        narrative.efficiency_finding(comparison) if paired else "",
        narrative.neighbors_in_common(comparison) if paired else "",
        narrative.class_groups_finding(comparison, classes),
    ]
    return [sentences for sentences in found if sentences]


def console_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def headline_lines(comparison: Comparison) -> list[str]:
    """What the console says under the table: agreement, and wins, ties and losses."""
    facts, retrieval, lines = comparison.agreement, comparison.differences.get(P5, {}), []
    if facts and math.isfinite(facts["mutual_knn"].value):
        lines.append(
            f"agreement: mutual 10-NN {facts['mutual_knn'].value:.3f} (chance "
            f"{facts['mutual_knn_chance']:.3f}, classes only {facts['mutual_knn_class_only']:.3f})"
            f", debiased CKA {number('cka', facts['cka'])}"
        )
    if "wins" in retrieval:
        lines.append(
            f"precision@5 by image: hf better on {retrieval['wins']}, equal on "
            f"{retrieval['ties']}, local better on {retrieval['losses']}"
        )
    return lines


def per_class_table(comparison: Comparison, classes: Sequence[str]) -> str:
    """P@5 by class with the Holm-corrected tests, and the neighbors that the models share."""
    names = short_names(comparison)
    header = ["Class", "n", *names.values(), "HF - local [95%]", "Wins / ties / losses", "Holm p"]
    rows = [[*header, "First neighbor, Holm p", "Shared 10-NN [95%]"]]
    rows += [
        [
            classes[row["label"]],
            f"{row['n']:,}",
            *(number(P5, row[role]) for role in names),
            gap(P5, row["difference"]),
            f"{row['wins']} / {row['ties']} / {row['losses']}",
            p_value(row["holm_p"]),
            p_value(row["mcnemar_holm_p"]),
            interval("mutual_knn", row["mutual_knn"]),
        ]
        for row in comparison.per_class
    ]
    return markdown_table(rows)


def confusion_table(comparison: Comparison, classes: Sequence[str]) -> str:
    """Percent of the five nearest neighbors by class of query (row) and neighbor (column)."""
    matrices = [neighbor_confusion(a, len(classes)) for a in comparison.analyses.values()]
    rows = [["Image", *classes]]
    for row, name in enumerate(classes):
        cells = zip(*(100 * matrix[row] for matrix in matrices), strict=True)
        rows.append([name, *(" / ".join(f"{value:.0f}" for value in cell) for cell in cells)])
    return markdown_table(rows)


def probe_section(comparison: Comparison, probe: Any) -> list[str]:
    """The finding and a table of all accuracies of the probe."""
    models, names = probe.models, short_names(comparison)
    rows = [["Accuracy", *(names.get(role, label(role)) for role in models)]]
    first = next(iter(models.values()))
    for k in sorted(first["knn"]):
        shown = [interval("knn", model["knn"][k]) for model in models.values()]
        rows.append([f"kNN, k = {k}", *shown])
    rows.append(["Linear probe", *(accuracy(model, "linear") for model in models.values())])
    for size, measures in first["few_shot"].items():
        for measure in measures:
            few = [model["few_shot"][size][measure] for model in models.values()]
            shown = [
                f"{interval('knn', one['estimate'])} (SD {number('knn', one['sd'])})" for one in few
            ]
            rows.append([f"{measure}, images per class: {size}", *shown])
    return [narrative.probe_finding(comparison, probe), markdown_table(rows)]


def seeds_table(comparison: Comparison) -> str:
    """The headline numbers over trainings next to their error over images."""
    rows = [["Metric", "Trainings", "Mean", "Deviation over trainings", "Error over images"]]
    for metric in HEADLINES:
        spread, error = comparison.seeds[metric], comparison.metrics["local"][metric].se
        trainings = ", ".join(number(metric, value) for value in spread.values)
        spreads = (number(metric, value, extra=1) for value in (spread.sd, error))
        points = (value.replace("%", " points") for value in spreads)
        rows.append([ROWS[metric], trainings, number(metric, spread.mean), *points])
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; names in them have been through `literal`."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def literal(text: str) -> str:
    """A name inside Markdown, on one line: shown as it is, never as markup or a cell's end."""
    single_line = " ".join(text.split())
    escaped = re.sub(r"([\\`*\[\]<>|#&~$])", r"\\\1", single_line)
    # An underscore inside a word is never markup.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)


def caveats(
    comparison: Comparison,
    facts: Mapping[str, Any],
    maps: Maps | None = None,
    notes: Sequence[str] = (),
    one_training: bool = False,
) -> list[str]:
    """What a reader must know before believing a number, a sentence each.

    Args:
        comparison: The numbers.
        facts: `dataset` and `models` as in metrics.json.
        maps: What the figures show.
        notes: Of the data, the cache and the figures.
        one_training: Whether the two sides are the bundled checkpoint and the bundled export.
    """
    models, n = facts["models"], count(comparison)
    dtypes = sorted({str(model.get("dtype")) for model in models.values()})
    sizes = np.unique(comparison.analyses["local"].labels, return_counts=True)[1]
    single, small = int((sizes == 1).sum()), getattr(comparison, "small_classes", 0)
    copies = {"images": 0, "with_two_labels": 0} | (facts["dataset"].get("duplicates") or {})
    same = same_weights(comparison, models)
    seeds = "see the training seeds" if comparison.seeds else "one checkpoint is one draw"
    undefined, few = narrative.undefined(comparison), MIN_IMAGES_PER_CLASS
    missing = [
        f"{ROWS[metric][0].lower()}{ROWS[metric][1:]} of {name}"
        for role, name in short_names(comparison).items()
        for metric in HEADLINES[:-1]
        if math.isnan(comparison.metrics[role][metric].value)
    ]
    rules = [
        (same, "Both sides hold the same weights."),
        (
            one_training and not same,
            "This run compares the two encoders of one training; neither is a ViT-Huge.",
        ),
        (len(dtypes) > 1, f"The two sides differ in dtype: {narrative.listed(dtypes)}."),
        (
            facts["dataset"].get("split") == "train",
            "The checkpoint may have been trained on these images (train split): "
            "the intervals do not hold for new images.",
        ),
        (
            copies["images"],
            f"{copies['images']:,} images have an exact copy in the sample, "
            f"{copies['with_two_labels']:,} a copy with another label; copies are neighbors.",
        ),
        (True, f"The intervals cover images, not training: {seeds}."),
        (True, f"Precision@k and kNN accuracy depend on the number of images, here {n:,}."),
        (
            True,
            "Explained variance and effective rank depend on n and on the embedding's width; "
            "they describe a shape, not quality.",
        ),
        (undefined, undefined),
        (missing, f"Undefined for this sample: {narrative.listed(missing)}."),
        (
            single and not undefined,
            f"In {single} classes with one image precision and silhouette are undefined.",
        ),
        (not comparison.num_halves, "There are too few images for intervals."),
        (
            small,
            f"{small} classes have fewer than {few} images and are kept whole in the "
            "half-samples: intervals leave out their own spread.",
        ),
    ]
    found = [note for model in models.values() for note in model.get("notes", ())]
    found += [*notes, *(sentence for holds, sentence in rules if holds)]
    for role, name in short_names(comparison).items():
        found += model_caveats(comparison, role, name, models.get(role, {}))
    if maps is not None and len(maps.rows) < n:
        found.append(f"Maps show {len(maps.rows):,} of {n:,} images; all numbers use all images.")
    if maps is not None and (used := next(iter(maps.tsne.values())).perplexity) < PERPLEXITY:
        found.append(f"The t-SNE perplexity is {used:.1f}, not {PERPLEXITY:.0f}.")
    return list(dict.fromkeys(found))


def same_weights(comparison: Comparison, models: Mapping[str, Any]) -> bool:
    """Whether the two models come from the same file or give equal embeddings."""
    if len(comparison.analyses) < 2:
        return False
    files = [[models[role].get(key) for key in ("sha256", "weights")] for role in comparison.names]
    if files[0] == files[1] and files[0][0]:
        return True
    X, Y = (analysis.embeddings for analysis in comparison.analyses.values())
    return X.shape == Y.shape and np.allclose(X, Y, rtol=1e-4, atol=1e-5 * np.abs(X).max())


def model_caveats(
    comparison: Comparison, role: str, name: str, model: Mapping[str, Any]
) -> list[str]:
    """What to know of one model: too few epochs, an unbounded rank, or collapse."""
    metrics, n = comparison.metrics[role], count(comparison)
    rank, precision = metrics["effective_rank"], metrics[P5].value
    few = 0.1 * min(n - 1, comparison.analyses[role].embeddings.shape[1])
    baseline = max((values[P5] for values in comparison.references.values()), default=-1.0)
    epochs, planned = model.get("epochs"), model.get("planned_epochs")
    rules = [
        (planned not in (None, epochs), f"{name} had {epochs} of {planned} planned epochs."),
        (
            comparison.num_halves and math.isfinite(rank.value) and not math.isfinite(rank.se),
            f"The effective rank of {name} is above n / 2, which bounds it: no interval.",
        ),
        (
            math.isnan(rank.value),
            f"All embeddings of {name} are the same: the model has collapsed.",
        ),
        (
            rank.value < few and precision < 1 and precision <= baseline,
            f"{name} looks collapsed: few dimensions, and retrieval no better than that of pixels "
            "or random weights.",
        ),
    ]
    return [sentence for holds, sentence in rules if holds]
