"""Write what a run found: figures, tables, `report.md`, and `metrics.json` last of all.

`metrics.json` follows schema version 1, only ever added to: fractions in [0, 1], null where
a number is not defined, with an entry in `caveats` saying which.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from ijepa import plots
from ijepa.comparison import Comparison, neighbor_confusion
from ijepa.data import Split, shrink
from ijepa.files import sha256, write_atomically, write_text
from ijepa.markdown import markdown
from ijepa.narrative import summary
from ijepa.page import page
from ijepa.projections import Maps

SCHEMA_VERSION = 1
CSV_ROWS = 10_000
"""Lines of `per_image.csv` made at once."""
MAX_QUERIES = 10
SHOWN_SIDE = 224
"""Sides of a neighbour's picture in pixels at most."""
NUM_DISAGREEMENTS = 4
"""Queries shown in each direction of disagreement."""
ON_PAGE = ("class_precision.png", "similarity_matrices.png", "variance_explained.png")
"""Figures that the page shows."""
NOT_ALWAYS_MADE = ("embeddings_hf.npz", "nn_disagreement.png")
"""Files that need two models, the second one also an image on which they disagree."""

Figures = Iterator[tuple[str, Figure]]


def draw(comparison: Comparison, maps: Maps, split: Split, seed: int) -> Figures:
    """Every figure of the report with its file name; a new one is a line here."""
    labels, classes, names = split.labels, split.classes, comparison.names
    where = f"{split.name} {split.split}, n = {len(split)}"
    embeddings = {name: a.embeddings for name, a in comparison.analyses.items()}
    on_maps = labels[maps.rows]

    def caption(title: str, footer: str) -> plots.Caption:
        return plots.Caption(f"{title}: {where}", footer)

    shown = ""
    if len(maps.rows) < len(split):
        shown = f" {len(maps.rows):,} images shown, equally many of each class."

    perplexity = next(iter(maps.tsne.values())).perplexity
    how = f"L2-normalized, PCA to 50, perplexity {perplexity:.0f}, seed {seed}.{shown} "
    how += "Distances between clusters and cluster sizes have no meaning."
    figure = plots.plot_maps(
        maps.tsne, on_maps, classes, names, caption("t-SNE of the embeddings", how)
    )
    yield "tsne_comparison.png", figure

    how = f"Centered, not standardized; the largest loading is positive.{shown}"
    if len(maps.pca) == 2:
        how += " The HF model's axes are flipped where that makes both maps more alike."
    figure = plots.plot_maps(
        maps.pca, on_maps, classes, names, caption("Principal components", how)
    )
    yield "pca_comparison.png", figure

    how = "Raw: class means as they are. Centered: minus the mean of all images."
    figure = plots.plot_similarity_matrices(
        embeddings, labels, classes, names, caption("Cosine similarity of class means", how)
    )
    yield "similarity_matrices.png", figure

    how = "Share of the total variance; marks at 10 and 50 components."
    figure = plots.plot_variance_explained(maps.pca, names, caption("Explained variance", how))
    yield "variance_explained.png", figure

    how = "Intervals over images, from stratified half-samples."
    figure = plots.plot_class_precision(
        comparison.class_precision,
        [row["difference"] for row in comparison.per_class],
        [classes[label] for label in np.unique(labels)],
        names,
        caption("Precision@5 by class", how),
    )
    yield "class_precision.png", figure

    how = f"Queries drawn by seed {seed}, one of each class (at most {MAX_QUERIES})."
    queries = draw_queries(labels, seed)
    yield (
        "nn_queries.png",
        draw_neighbors(comparison, queries, split, caption("Nearest neighbors", how)),
    )

    queries = disagreements(comparison, seed)
    if len(queries):
        how = (
            f"The nearest neighbor has the right class in one model only; at most "
            f"{NUM_DISAGREEMENTS} each way, by difference in precision@5, ties in an order drawn "
            f"by seed {seed}."
        )
        yield (
            "nn_disagreement.png",
            draw_neighbors(
                comparison, queries, split, caption("Where only one model is right", how)
            ),
        )


def draw_queries(labels: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " q"]:
    """One image of each of the first classes, by the seed and never by its result."""
    rng = np.random.default_rng(seed)
    present = np.unique(labels)[:MAX_QUERIES]
    return np.array([rng.choice(np.flatnonzero(labels == label)) for label in present])


def disagreements(comparison: Comparison, seed: int) -> Int[np.ndarray, " q"]:
    """Images on which one model alone is right: first those of hf, then those of local.

    Right is a nearest neighbour of the same class. Chosen are those whose P@5 differs most, among
    equals in an order drawn by the seed.
    """
    if len(comparison.analyses) < 2:
        return np.array([], dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(comparison.analyses["local"].labels))
    chosen: list[int] = []
    for better, worse in (("hf", "local"), ("local", "hf")):
        winner, loser = (comparison.analyses[name] for name in (better, worse))
        alone = order[winner.first_is_right()[order] & ~loser.first_is_right()[order]]
        gain = winner.precisions(5)[alone] - loser.precisions(5)[alone]
        chosen += alone[np.argsort(-gain, kind="stable")][:NUM_DISAGREEMENTS].tolist()
    return np.array(chosen, dtype=np.int64)


def draw_neighbors(
    comparison: Comparison, queries: Int[np.ndarray, " q"], split: Split, caption: plots.Caption
) -> Figure:
    """The five nearest images of each query in each model."""
    found = {
        name: (a.neighbors[queries, :5], a.similarities[queries, :5])
        for name, a in comparison.analyses.items()
    }
    return plots.plot_neighbors(
        found,
        queries,
        split.labels,
        split.classes,
        lambda row: shrink(split.images[row], SHOWN_SIDE),
        comparison.names,
        caption,
    )


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG; the same figure gives the same bytes."""
    write_atomically(path, lambda file: plots.save_png(figure, file))


def per_image_csv(comparison: Comparison, maps: Maps, split: Split) -> Iterator[str]:
    """One line per image: label, both models' scores, neighbours (data set indices), map.

    In pieces of `CSV_ROWS` lines, below a line of names.
    """
    places = {name: np.full((len(split), 2), np.nan) for name in comparison.analyses}
    for name, points in places.items():
        points[maps.rows] = maps.tsne[name].coordinates
    precisions = {name: analysis.precisions(5) for name, analysis in comparison.analyses.items()}
    for start in range(0, len(split), CSV_ROWS):
        rows = slice(start, start + CSV_ROWS)
        columns: dict[str, Sequence[Any]] = {
            "index": split.indices[rows].tolist(),
            "label": split.labels[rows].tolist(),
            "class": [split.classes[label] for label in split.labels[rows]],
        }
        for name, analysis in comparison.analyses.items():
            columns[f"precision_at_5_{name}"] = blank_nan(precisions[name][rows])
            columns[f"silhouette_{name}"] = blank_nan(analysis.silhouettes["euclidean"][rows])
            columns[f"silhouette_cosine_{name}"] = blank_nan(analysis.silhouettes["cosine"][rows])
            columns[f"neighbors_{name}"] = [
                " ".join(map(str, split.indices[found])) for found in analysis.neighbors[rows, :5]
            ]
            columns[f"tsne_x_{name}"] = blank_nan(places[name][rows, 0])
            columns[f"tsne_y_{name}"] = blank_nan(places[name][rows, 1])
        if comparison.mutual is not None:
            columns["mutual_knn"] = blank_nan(comparison.mutual[rows])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if start == 0:
            writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        yield text.getvalue()


def write_pieces(path: Path, pieces: Iterator[str]) -> None:
    """Write a text that need not be in memory as a whole."""
    write_atomically(path, lambda file: file.writelines(piece.encode() for piece in pieces))


def blank_nan(values: Float[np.ndarray, " n"]) -> list[str]:
    """Six digits, or nothing where the value is not defined."""
    return [f"{value:.6g}" if math.isfinite(value) else "" for value in values]


def plain(value: Any, path: str, undefined: list[str]) -> Any:
    """Turn records and arrays into JSON values; NaN becomes null and its path is noted."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{path}.{k}", undefined) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{path}[{i}]", undefined) for i, v in enumerate(value)]
    if isinstance(value, float | np.floating):
        if math.isfinite(value):
            return float(value)
        undefined.append(path)
        return None
    return int(value) if isinstance(value, np.integer) else value


def metrics_json(
    comparison: Comparison,
    facts: Mapping[str, Any],
    caveats: Sequence[str],
    artifacts: Sequence[Mapping[str, Any]],
) -> str:
    """The text of metrics.json."""
    undefined: list[str] = []
    content = {
        "schema_version": SCHEMA_VERSION,
        "summary": summary(comparison),
        **facts,
        "metrics": comparison.metrics,
        "comparison": {
            "differences": comparison.differences,
            "per_class": comparison.per_class,
            "class_precision": comparison.class_precision,
            "agreement": comparison.agreement,
            "neighbor_confusion": {
                name: neighbor_confusion(analysis, len(facts["dataset"]["classes"])).tolist()
                for name, analysis in comparison.analyses.items()
            },
        },
        "references": comparison.references,
        "gains": comparison.gains,
        "training_seeds": comparison.seeds,
    }
    result = plain(content, "", undefined)
    result["caveats"] = [
        *caveats,
        *(
            f"{path.removeprefix('.')} is not defined for this sample"
            for path in undefined
            if not path.endswith(("se", "ci95[0]", "ci95[1]", "ratio.value"))
        ),
    ]
    result["artifacts"] = list(artifacts)
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def artifact(path: Path) -> dict[str, Any]:
    """How metrics.json names a file."""
    return {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}


def write_report(
    folder: Path,
    comparison: Comparison,
    maps: Maps,
    split: Split,
    facts: Mapping[str, Any],
    caveats: Sequence[str],
) -> list[Path]:
    """Write every file of a comparison except the embeddings; `metrics.json` comes last.

    What an earlier run left in the folder and this one does not make is removed.

    Raises:
        UserError: If a file cannot be written.
    """
    written: list[Path] = []

    def write(name: str, how: Callable[[Path], None]) -> None:
        how(folder / name)
        written.append(folder / name)

    caveats = [*caveats, *filter(None, [plots.font_note([split.name, *split.classes])])]
    figures = {}
    for name, figure in draw(comparison, maps, split, comparison.seed):
        write(name, lambda path, figure=figure: save_figure(path, figure))
        if name in ON_PAGE:
            figures[name] = figure
    pieces = per_image_csv(comparison, maps, split)
    write("per_image.csv", lambda path: write_pieces(path, pieces))
    text = markdown(comparison, facts, caveats)
    write("report.md", lambda path: write_text(path, text))

    # The caller has saved these.
    saved = [folder / f"embeddings_{name}.npz" for name in comparison.analyses]

    def metrics() -> str:
        files = [*(path for path in saved if path.exists()), *written]
        return metrics_json(comparison, facts, caveats, [artifact(path) for path in files])

    html = page(comparison, maps, split, facts, caveats, metrics(), figures)
    write("report.html", lambda path: write_text(path, html))
    content = metrics()
    write("metrics.json", lambda path: write_text(path, content))
    for name in NOT_ALWAYS_MADE:
        if folder / name not in [*saved, *written]:
            (folder / name).unlink(missing_ok=True)
    return written
