"""`report.md`: caveats, the sentences of `narrative` and the tables of `tables` under headings."""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ijepa import narrative
from ijepa.comparison import Comparison
from ijepa.errors import counted
from ijepa.formats import NO_INTERVALS, P5, capital, label, listed, number
from ijepa.narrative import RETRIEVAL, called, count
from ijepa.projections import PERPLEXITY, Maps
from ijepa.tables import HEADLINES, INTERVALS, ROWS, finding_tables, headline_table, model_facts
from ijepa.uncertainty import MIN_IMAGES_PER_CLASS

MANY_TIED = 0.05  # share of the images whose fifth neighbor is a matter of their order
FILES = {
    "metrics.json": "every number, with standard error and interval where there is one",
    "report.html": "the same to explore by hand",
    "per_image.csv": "every image: label, scores, neighbors, place on the maps",
    "tsne_comparison.png": "t-SNE maps, for looking only",
    "pca_comparison.png": "the first two principal components",
    "similarity_matrices.png": "cosine similarity of class means",
    "variance_explained.png": "variance by component",
    "class_precision.png": "precision@5 by class",
    "nn_queries.png": "neighbors of one image of each class, drawn by the seed",
    "nn_disagreement.png": "images whose first neighbor is right in only one model",
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

    `facts` are `dataset`, `models`, `run` and `settings` as in metrics.json, `files` the names of
    the written files.
    """
    names, data, described = comparison.names, facts["dataset"], []
    for role, model in facts["models"].items():
        title = ": ".join(filter(None, (capital(label(role)), names.get(role))))
        known = "; ".join(f"{name.lower()} {value}" for name, value in model_facts(model).items())
        described.append(f"- **{literal(title)}**: {literal(known)}")
    written = [f"- `{name}`: {what}" for name, what in FILES.items() if fnmatch.filter(files, name)]
    sections = {
        "Overview": [
            f"{data['n']:,} images of {literal(data['name'])} ({data['split']} split), "
            f"{counted(int(np.count_nonzero(data['per_class'])), 'class')}, embedded by:",
            "\n".join(described),
            protocol(comparison, facts),
        ],
        "Quantitative Results": [
            markdown_table(headline_table(comparison)),
            INTERVALS if comparison.num_halves else NO_INTERVALS,
        ],
        "Caveats": ["\n".join(f"- {literal(caveat)}" for caveat in caveats) or "None."],
        "Key Findings": key_findings(comparison, data["classes"], probe),
        "Conclusions": [
            "\n".join(f"- {x}" for x in narrative.conclusions(comparison, probe)) or "None."
        ],
        "Files Generated": ["\n".join(written)],
    }
    if command := facts["run"]["command"]:
        sections["Reproduction"] = [f"```bash\n{command}\n```"]
    parts = [f"# I-JEPA Embedding Analysis: {' vs '.join(map(literal, names.values()))}"]
    for heading, paragraphs in sections.items():
        parts += [f"## {heading}", *paragraphs]
    return "\n\n".join(parts) + "\n"


def key_findings(comparison: Comparison, classes: Sequence[str], probe: Any) -> list[str]:
    """The numbered subsections: sentences, then tables; those without either are left out."""
    tables = finding_tables(comparison, classes, probe)
    found = narrative.findings(comparison, [literal(name) for name in classes], probe)
    found[RETRIEVAL] = narrative.paragraph(narrative.answer(comparison), found[RETRIEVAL])
    parts: list[str] = []
    for title, sentences in found.items():
        below = [f"{x}:\n\n{markdown_table(rows)}" for x, rows in tables.get(title, {}).items()]
        if sentences or below:
            place = sum(part.startswith("###") for part in parts) + 1
            parts += [f"### {place}. {title}", *filter(None, [sentences]), *below]
    return parts


def protocol(comparison: Comparison, facts: Mapping[str, Any]) -> str:
    """What was done, for a paper."""
    run, models = facts["run"], facts["models"]
    vectors = "; ".join(
        f"{label(role)}: {models[role].get('pooling', 'pooling not recorded')}, "
        f"{models[role].get('dtype', 'dtype not recorded')}"
        for role in comparison.names
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    sizes = np.unique(comparison.analyses["local"].labels, return_counts=True)[1]
    each = counted(int(sizes.max()), "image")
    each = f"{sizes.min():,} to {each}" if sizes.min() < sizes.max() else each
    halves = f"Intervals use {comparison.num_halves} half-samples. " * bool(comparison.num_halves)
    return (
        f"*Protocol.* Frozen encoders give each image one vector ({vectors}). The sample has "
        f"{each} of each of {counted(len(sizes), 'class')}; seed {comparison.seed}. "
        "Neighbors are ranked by cosine similarity among all other images. Silhouettes use "
        f"Euclidean distance and the true labels. {halves}Versions: {versions}; "
        f"commit {run.get('git_commit') or 'unknown'}."
    )


def console_table(rows: list[list[str]]) -> str:
    """Cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown_table(rows: list[list[str]]) -> str:
    """Cells as a Markdown table, shown as they are."""
    lines = ["| " + " | ".join(map(literal, row)) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def literal(text: str) -> str:
    """Text inside Markdown: markup and cell borders are escaped, white space becomes one space."""
    single_line = " ".join(text.split())
    # A bracket is markup only as part of a link, an underscore only outside of a word.
    escaped = re.sub(r"([\\`*<>|#&~$]|\](?=[(\[:]))", r"\\\1", single_line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)


def caveats(
    comparison: Comparison, facts: Mapping[str, Any], maps: Maps, notes: Sequence[str] = ()
) -> list[str]:
    """A sentence each on what a reader must know; `notes` are of the data, cache and run."""
    models, data, n = facts["models"], facts["dataset"], count(comparison)
    dtypes, epochs = (unlike(comparison, models, key) for key in ("dtype", "epochs"))
    sizes = np.unique(comparison.analyses["local"].labels, return_counts=True)[1]
    single, small = int((sizes == 1).sum()), comparison.small_classes
    same = same_weights(comparison, models)
    limit = float(np.average(np.minimum(sizes - 1, 5) / 5, weights=sizes))
    seeds = "see the training seeds" if comparison.seeds else "one checkpoint is one draw"
    undefined = narrative.undefined(comparison)
    missing = [
        f"{ROWS[metric][0].lower()}{ROWS[metric][1:]} of {called(role)}"
        for role, values in comparison.metrics.items()
        for metric in HEADLINES
        if metric != P5 and math.isnan(values[metric].value)
    ]
    rules = {
        "Both sides hold the same weights or give the same embeddings.": same,
        f"The two sides differ in dtype: {dtypes}.": dtypes,
        f"The two sides differ in epochs of training: {epochs}.": epochs,
        "The checkpoint may have been trained on these images (train split): "
        "the intervals do not hold for new images.": data["split"] == "train",
        f"The intervals cover images, not training: {seeds}.": True,
        f"Precision@k and kNN accuracy depend on the number of images, here {n:,}.": True,
        "Explained variance and effective rank depend on n and on the embedding's width; "
        "they describe a shape, not quality.": True,
        undefined: undefined,
        f"Undefined for this sample: {listed(missing)}.": missing,
        f"Precision and silhouette count as 0 in {counted(single, 'class')} with one image.": single
        and not undefined,
        "Where a class has fewer than six images, some of five neighbors must be of other "
        f"classes: precision@5 cannot exceed {number(P5, limit)} here.": limit < 1
        and not undefined,
        NO_INTERVALS: not comparison.num_halves,
        f"Intervals leave out the spread within {counted(small, 'class')} of fewer than "
        f"{MIN_IMAGES_PER_CLASS} images, which all half-samples keep whole.": small
        and comparison.num_halves,
    }
    found = [note for model in models.values() for note in model.get("notes", ())]
    found += [*notes, *(sentence for sentence, holds in rules.items() if holds)]
    for role in comparison.analyses:
        found += model_caveats(comparison, role, models[role])
    if len(maps.rows) < n:
        found.append(f"Maps show {len(maps.rows):,} of {n:,} images; all numbers use all images.")
    if (used := maps.perplexity) and used < PERPLEXITY:
        found.append(f"The t-SNE perplexity is {used:.1f}, not {PERPLEXITY:.0f}.")
    return list(dict.fromkeys(found))


def unlike(comparison: Comparison, models: Mapping[str, Any], key: str) -> str:
    """Each model with its value, such as "local 300 and HF 47"; nothing if they have the same."""
    values = {role: models[role].get(key) for role in comparison.names}
    if None in values.values() or len(set(values.values())) == 1:
        return ""
    return listed([f"{label(role)} {value}" for role, value in values.items()])


def same_weights(comparison: Comparison, models: Mapping[str, Any]) -> bool:
    """Whether the two models come from the same file or give equal embeddings."""
    if len(comparison.analyses) < 2:
        return False
    files = [[models[role].get(key) for key in ("sha256", "weights")] for role in comparison.names]
    if files[0] == files[1] and files[0][0]:
        return True
    X, Y = (a.embeddings for a in comparison.analyses.values())
    alike = X.shape == Y.shape and np.abs(X - Y).max() <= 1e-4 * np.abs(X - X.mean(axis=0)).max()
    return bool(alike)


def model_caveats(comparison: Comparison, role: str, model: Mapping[str, Any]) -> list[str]:
    """What to know of one model: too few epochs, a rank without interval, ties, or collapse."""
    metrics, n, name = comparison.metrics[role], count(comparison), called(role)
    rank, precision = metrics["effective_rank"], metrics[P5].value
    few = 0.1 * min(n - 1, comparison.analyses[role].embeddings.shape[1])
    baseline = min((values[P5] for values in comparison.references.values()), default=-1.0)
    epochs, planned = model.get("epochs"), model.get("planned_epochs")
    no_interval = math.isfinite(rank.value) and not math.isfinite(rank.se)
    similarities = comparison.analyses[role].similarities
    tied = (similarities[:, 4:5] == similarities[:, 5:6]).mean() if n > 6 else 0.0
    low = rank.value < few and precision < 1 and precision <= baseline
    rules = {
        f"{capital(name)} had {epochs} of {planned} planned epochs.": planned not in (None, epochs),
        f"The effective rank of {name} is above n / 2, near its bound: no interval.": no_interval
        and comparison.num_halves
        and rank.value > n / 2,
        f"To {name} the fifth and the sixth neighbor of {number('share', tied)} of the images are "
        "equally similar up to a millionth, and the order of the images decides: numbers and "
        "verdicts on neighbors depend on it. Where the embeddings have a large mean, subtract "
        "it.": tied > MANY_TIED and math.isfinite(rank.value),
        f"All embeddings of {name} are the same: the model has collapsed.": math.isnan(rank.value),
        f"{capital(name)} looks collapsed: few dimensions, and no baseline retrieves worse.": low,
    }
    return [sentence for sentence, holds in rules.items() if holds]
