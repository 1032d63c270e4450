"""Write what a run found: figures, tables, `report.md`, and `metrics.json` last.

`metrics.json` has schema version 2: shares as fractions, null where a number is undefined. Except
for errors, intervals and the ratios of `differences` an entry in `caveats` names it. Version 1 had
`sign_flip_p`, and `holm_p` based on it, for `p`.
"""

import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass, replace
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from ijepa import markdown, plots
from ijepa.comparison import Comparison
from ijepa.data import Split
from ijepa.embeddings import save_embeddings
from ijepa.errors import git_commit
from ijepa.files import sha256, write_text
from ijepa.formats import NO_INTERVALS
from ijepa.images import shrink
from ijepa.metrics import KNN_K, TEMPERATURE
from ijepa.page import page
from ijepa.projections import PERPLEXITY, TSNE_WIDTH, Maps, make_maps
from ijepa.tables import HEADLINES, class_means, summary
from ijepa.uncertainty import LEVEL, MUTUAL_K, confusion

SCHEMA_VERSION = 2
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scipy", "scikit-learn", "matplotlib")
PACKAGES += ("Pillow", "huggingface_hub")
"""Packages whose version can change a number."""
MAX_QUERIES = 10
MAX_MATRIX = 300  # classes in the matrices of metrics.json; those of 1,000 would take 30 MB
SHOWN_SIDE = 224  # longest side of a neighbor's picture, in pixels
NUM_DISAGREEMENTS = 4  # queries shown in each direction of disagreement
ON_PAGE = ("class_precision.png", "similarity_matrices.png", "variance_explained.png")
"""Figures that `static/page.html` shows, each by a call of its own."""
OPTIONAL = ("embeddings_local.npz", "embeddings_hf.npz", "nn_queries.png", "nn_disagreement.png")
"""Files that need images, a second model, or images on which only one model is right."""


def complete(comparison: Comparison, split: Split, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a run, completed by those that the arrays hold.

    Raises:
        ValueError: If split or facts are not those of the comparison.
    """
    labels = comparison.analyses["local"].labels
    if not np.array_equal(split.labels, labels) or len(split.classes) <= labels.max():
        raise ValueError("the split must have the labels of the comparison and a name for each")
    odd = [*(facts.keys() - {"run", "dataset", "models", "settings"})]
    known = facts.get("models", {})
    needed = {"source", "embedding_dim"}  # of other seeds of the local model
    odd += [role for role in known.keys() - comparison.names if not needed <= known[role].keys()]
    if odd:
        raise ValueError(f"facts are of run, dataset, settings and the models compared, not {odd}")
    halves = comparison.num_halves
    settings = {
        "similarity": "cosine",
        "silhouette": "euclidean, true labels",
        "knn": {"k": KNN_K, "temperature": TEMPERATURE, "leave_one_out": True},
        "mutual_k": MUTUAL_K,
        "intervals": {"level": LEVEL, "halves": halves, "spectrum": "influence functions"},
        "tsne": {"pca": TSNE_WIDTH, "perplexity": PERPLEXITY, "seed": comparison.seed},
    }
    data = {
        "name": split.name,
        "split": split.split,
        "n": len(split),
        "per_class": np.bincount(split.labels, minlength=len(split.classes)).tolist(),
        "classes": list(split.classes),
        "paths": split.paths and list(split.paths),
        "unreadable": list(split.unreadable),
        **facts.get("dataset", {}),
    }
    if [*map(str, data["classes"])] != [*split.classes]:
        raise ValueError(f"facts name other classes than the split: {data['classes']}")
    models = dict(known)  # perhaps with other seeds of the local model
    for role, name in comparison.names.items():
        width = comparison.analyses[role].embeddings.shape[1]
        found = {"source": name, "embedding_dim": width, "short_name": name}
        models[role] = found | {"notes": [], "losses": None} | models.get(role, {})
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    run = {"command": "", "seed": comparison.seed, "versions": versions}
    run |= {"git_commit": git_commit(), **facts.get("run", {})}
    settings |= facts.get("settings", {})
    return {"settings": settings, "run": run, "dataset": data, "models": models}


def draw(comparison: Comparison, maps: Maps, split: Split) -> Iterator[tuple[str, Figure]]:
    """Every figure of the report with its file name; `ijepa.markdown.FILES` describes each."""
    labels, classes = split.labels, split.classes
    names, seed = comparison.names, comparison.seed
    embeddings = {name: a.embeddings for name, a in comparison.analyses.items()}

    def caption(title: str, footer: str, shown: Sequence[str] = classes) -> plots.Caption:
        title = f"{title}: {split.name} {split.split}, n = {len(split):,}"
        return plots.Caption(title, footer, names, shown)

    part = f" {len(maps.rows):,} images shown, as many of each class as possible."
    part *= len(maps.rows) < len(split)
    used = "" if maps.perplexity is None else f" perplexity {maps.perplexity:.0f},"
    how = f"L2-normalized, PCA to {TSNE_WIDTH},{used} seed {seed}.{part} "
    how += "Distances between clusters and cluster sizes have no meaning."
    words = caption("t-SNE of the embeddings", how)
    yield "tsne_comparison.png", plots.plot_maps(maps.tsne, labels[maps.rows], words)
    how = f"Centered, not standardized; the largest loading is positive.{part}"
    if len(maps.pca) == 2:
        how += " The HF model's axes are flipped where that makes both maps more alike."
    words = caption("Principal components", how)
    yield "pca_comparison.png", plots.plot_maps(maps.pca, labels[maps.rows], words)
    how = "Raw: class means as they are. Centered: minus the mean of all images."
    words = caption("Cosine similarity of class means", how)
    yield "similarity_matrices.png", plots.plot_similarity_matrices(embeddings, labels, words)
    how = "Share of the total variance; marks at 10 and 50 components."
    words = caption("Explained variance", how)
    yield "variance_explained.png", plots.plot_variance_explained(maps.pca, words)
    how = "Intervals over images, from stratified half-samples."
    how = how if comparison.num_halves else NO_INTERVALS
    words = caption("Precision@5 by class", how, [classes[row] for row in np.unique(labels)])
    differences = [row["difference"] for row in comparison.per_class]
    figure = plots.plot_class_precision(comparison.class_precision, differences, words)
    yield "class_precision.png", figure

    if split.images is None:
        return
    how = f"Queries drawn by seed {seed}, one of each class (at most {MAX_QUERIES})."
    why = (
        "The nearest neighbor has the right class in only one model; at most "
        f"{NUM_DISAGREEMENTS} each way, by difference in precision@5, ties in an order drawn by "
        f"seed {seed}."
    )
    drawn, disputed = draw_queries(labels, seed), disagreements(comparison, seed)
    for name, queries, words in (
        ("nn_queries.png", drawn, caption("Nearest neighbors", how)),
        ("nn_disagreement.png", disputed, caption("Where only one model is right", why)),
    ):
        if len(queries):
            found = {
                role: (a.neighbors[queries, :5], a.similarities[queries, :5])
                for role, a in comparison.analyses.items()
            }
            yield (
                name,
                plots.plot_neighbors(
                    found, queries, labels, lambda row: shrink(split.images[row], SHOWN_SIDE), words
                ),
            )


def draw_queries(labels: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " q"]:
    """One image of each of the first classes, by the seed and never by its result."""
    rng = np.random.default_rng(seed)
    present = np.unique(labels)[:MAX_QUERIES]
    return np.array([rng.choice(np.flatnonzero(labels == label)) for label in present])


def disagreements(comparison: Comparison, seed: int) -> Int[np.ndarray, " q"]:
    """Images whose nearest neighbor has their class in only one model: in hf, then in local.

    Those whose precision@5 differs most come first, equals in an order drawn by the seed.
    """
    order = np.random.default_rng(seed).permutation(len(comparison.analyses["local"].labels))
    chosen: list[int] = []
    for winner, loser in permutations(reversed(comparison.analyses.values()), 2):
        only = order[winner.first_is_right()[order] & ~loser.first_is_right()[order]]
        gain = winner.precisions(5)[only] - loser.precisions(5)[only]
        chosen += only[np.argsort(-gain, kind="stable")][:NUM_DISAGREEMENTS].tolist()
    return np.array(chosen, dtype=np.int64)


def per_image_csv(comparison: Comparison, maps: Maps, split: Split, probe: Any = None) -> str:
    """One line per image: label, path, scores, neighbors (data set indices), places on the maps."""
    columns: dict[str, Sequence[Any]] = {
        "index": split.indices.tolist(),
        "label": split.labels.tolist(),
        "class": [quoted(split.classes[label]) for label in split.labels],
    }
    if split.paths:
        columns["path"] = [quoted(path) for path in split.paths]
    for name, analysis in comparison.analyses.items():
        places = np.full((len(split), 2), np.nan)
        places[maps.rows] = maps.tsne[name].coordinates
        for metric in ("precision_at_5", "silhouette", "silhouette_cosine"):
            columns[f"{metric}_{name}"] = blank_nan(analysis.scores[metric])
        lists = split.indices[analysis.neighbors[:, :5]].tolist()
        columns[f"neighbors_{name}"] = [" ".join(map(str, found)) for found in lists]
        columns[f"tsne_x_{name}"], columns[f"tsne_y_{name}"] = map(blank_nan, places.T)
    if comparison.mutual is not None:
        columns["mutual_knn"] = blank_nan(comparison.mutual)
    for name, correct in (probe.correct if probe else {}).items():
        for measure, right in correct.items():
            columns[f"{measure}_correct_{name}"] = right.astype(int).tolist()
    lines = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    return "\n".join([",".join(columns), *lines, ""])


def quoted(text: str) -> str:
    """A CSV cell for any text; the `csv` module leaves carriage returns bare before 3.11.9."""
    return '"' + text.replace('"', '""') + '"'


def blank_nan(values: Float[np.ndarray, " n"]) -> list[str]:
    """Six digits, or nothing where the value is not defined."""
    return [f"{value:.6g}" if math.isfinite(value) else "" for value in values]


def plain(value: Any, path: str, undefined: list[str]) -> Any:
    """Records and arrays as JSON values; NaN becomes null, and `undefined` gets its path."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{path}.{k}", undefined) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{path}[{i}]", undefined) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        undefined.append(path)
        return None
    return value


def metrics_content(
    comparison: Comparison, facts: Mapping[str, Any], caveats: Sequence[str], probe: Any = None
) -> dict[str, Any]:
    """The content of metrics.json without the artifacts, as JSON values."""
    undefined: list[str] = []
    num_classes = len(facts["dataset"]["classes"])
    matrices = {
        name: confusion(a.labels, a.labels[a.neighbors[:, :5]], num_classes).tolist()
        for name, a in (comparison.analyses.items() if num_classes <= MAX_MATRIX else ())
    }
    content = {
        "schema_version": SCHEMA_VERSION,
        "names": comparison.names,
        "summary": summary(comparison),
        "chance_precision": comparison.chance_precision,
        **facts,
        "metrics": comparison.metrics,
        "comparison": {
            "differences": comparison.differences,
            "per_class": comparison.per_class,
            "class_precision": comparison.class_precision,
            "class_mean_precision": class_means(comparison),
            "class_groups": comparison.class_groups,
            "rankings": comparison.rankings,
            "agreement": comparison.agreement,
            "neighbor_confusion": matrices,
        },
        "references": comparison.references,
        "gains": comparison.gains,
        "training_seeds": comparison.seeds,
        "probe": replace(probe, correct={}) if probe else None,
    }
    result = plain(content, "", undefined)
    expected = (".se", ".ci95[0]", ".ci95[1]", ".ratio.value")
    paths = [re.sub(r"\[\d+\]", "[...]", p[1:]) for p in undefined if not p.endswith(expected)]
    nulls = [f"{path} is undefined for this sample" for path in dict.fromkeys(paths)]
    left_out = f"comparison.neighbor_confusion leaves out matrices of {num_classes:,} classes"
    nulls += [left_out] * (num_classes > MAX_MATRIX)
    return result | {"caveats": [*caveats, *nulls]}


def json_text(content: Mapping[str, Any]) -> str:
    """JSON of this project's files."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summary_json(metrics: Path) -> str:
    """The headline numbers of a written metrics.json, for `--json`."""
    content = json.loads(metrics.read_text(encoding="utf-8"))
    keys = ("schema_version", "names", "summary", "chance_precision", "references", "gains")
    found = {key: content[key] for key in (*keys, "probe", "caveats")}
    differences = content["comparison"]["differences"]
    found["differences"] = {name: differences[name] for name in HEADLINES if name in differences}
    return json.dumps(found, indent=2, allow_nan=False) + "\n"  # ASCII, for any terminal


def unnamed(comparison: Comparison, classes: Iterable[str] | None = None) -> Split:
    """A split of arrays, without images; without names of classes, label 3 is `class 3`."""
    labels = comparison.analyses["local"].labels
    if classes is None:
        classes = [f"class {label}" for label in range(int(labels.max()) + 1)]
    names = tuple(map(str, classes))
    return Split("arrays", "given", names, None, labels, np.arange(len(labels)))


def write_report(
    folder: str | Path,
    comparison: Comparison,
    split: Split | None = None,
    facts: Mapping[str, Any] | None = None,
    maps: Maps | None = None,
    probe: Any = None,
) -> list[Path]:
    """The written files of a comparison; `metrics.json` comes last.

    Only the first two arguments are needed. A split with pictures adds figures of neighbors,
    `facts` (`run`, `dataset`, `models`, `settings`) what is known of the run. Maps are made unless
    they are given. Files of an earlier run that this one does not make are removed, but
    for embeddings where there are no pictures.

    Raises:
        UserError: If a file cannot be written.
        ValueError, TypeError: If split or facts are not those of the comparison, or no plain data.
    """
    began, folder = time.perf_counter(), Path(folder)
    given = facts or {}
    split = split or unnamed(comparison, given.get("dataset", {}).get("classes"))
    given = complete(comparison, split, given)
    facts = plain(given, "", [])
    json_text(facts)  # raises TypeError for what is no plain data, before a file is replaced
    X = {role: analysis.embeddings for role, analysis in comparison.analyses.items()}
    maps = maps or make_maps(X, split.labels, comparison.seed)
    shown = [split.name, *comparison.names.values(), *split.classes]
    notes = [*split.notes, *filter(None, [plots.font_note(shown)])]
    caveats = markdown.caveats(comparison, facts, maps, notes)
    artifacts: list[dict[str, Any]] = []
    with suppress(OSError):  # while it is missing, the report is unfinished
        (folder / "metrics.json").unlink()

    def write(name: str, how: Callable[..., None], *what: Any) -> None:
        path = folder / name
        how(path, *what)
        artifacts.append({"path": name, "sha256": sha256(path), "bytes": path.stat().st_size})

    for role, values in X.items() if split.images is not None else ():
        write(f"embeddings_{role}.npz", save_embeddings, values, split)
    figures = dict(draw(comparison, maps, split))
    for name, figure in figures.items():
        write(name, plots.save_figure, figure)
    write("per_image.csv", write_text, per_image_csv(comparison, maps, split, probe))
    files = [*(one["path"] for one in artifacts), "report.html", "metrics.json"]
    write("report.md", write_text, markdown.markdown(comparison, facts, caveats, files, probe))

    content = metrics_content(comparison, given, caveats, probe) | {"artifacts": artifacts}
    figures = {name: figures[name] for name in ON_PAGE}
    html = page(comparison, maps, split, facts, caveats, json_text(content), figures, probe)
    write("report.html", write_text, html)
    if "seconds" in content["run"]:
        content["run"]["seconds"]["write"] = round(time.perf_counter() - began, 3)
    write("metrics.json", write_text, json_text(content))
    written = [folder / one["path"] for one in artifacts]
    for left in {folder / name for name in OPTIONAL} - set(written):
        # Compared arrays may come from an earlier run's embeddings in this folder.
        if split.images is not None or left.suffix != ".npz":
            left.unlink(missing_ok=True)
    return written
