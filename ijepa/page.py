"""`report.html`: one file, without server or network, in which both embeddings can be explored.

`static/` holds the template, the style sheet and the scripts that draw the maps. Everything but
the maps is there without JavaScript. The page may load nothing, and run only the one script and
style sheet whose hashes its policy names.
"""

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from ijepa import narrative, plots
from ijepa.comparison import Comparison
from ijepa.data import Split
from ijepa.projections import Maps, class_similarity
from ijepa.uncertainty import MUTUAL_K, Estimate

DARK = {plots.INK: "#e9e6df", plots.SOFT: "#aaa59b", plots.RULE: "#3a3f47"}
DARK |= {plots.GROUND: "#131519", plots.MODEL_COLORS["local"]: "#5cc6e2"}
DARK |= {plots.MODEL_COLORS["hf"]: "#ff9d69"}
"""What these colors of a figure become in dark mode; all others stay."""
SCRIPTS = ("state.js", "map.js", "neighbors.js", "page.js")
"""In the order in which they run."""
GRID = 10_000
"""Steps of a coordinate on the maps: finer than a pixel on any screen."""
TILE = 32
"""Side of an image in the sheet of thumbnails, in pixels."""
COLUMNS = 64
QUALITY = 90  # 430 bytes per CIFAR-10 image (lossless 1,700) without visible artifacts
MAX_TABLE = 20
"""Classes in a table of similarities at most."""
RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Components in the table of variance."""


def page(  # noqa: PLR0913
    comparison: Comparison,
    maps: Maps,
    split: Split,
    facts: Mapping[str, Any],
    caveats: Sequence[str],
    metrics: str,
    figures: Mapping[str, Figure],
) -> str:
    """The whole file.

    Args:
        comparison: The numbers.
        maps: Where the images lie.
        split: The images.
        facts: `run`, `dataset`, `models` and `settings` as in metrics.json.
        caveats: Sentences that limit what the numbers mean.
        metrics: The text of metrics.json, without this page among its artifacts.
        figures: By file name; the page shows three of them.
    """
    static = files("ijepa") / "static"
    style = (static / "page.css").read_text(encoding="utf-8")
    script = "".join((static / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = Environment(
        loader=PackageLoader("ijepa", "static"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["words"] = in_words
    precisions = precision_rows(comparison)
    caption = plots.Caption("Precision@5 in percent, 95% interval", names=comparison.names)
    return environment.get_template("page.html").render(
        policy=policy(script, style),
        style=Markup(style),
        script=Markup(script),
        narrative=narrative,
        comparison=comparison,
        split=split,
        facts=facts,
        caveats=caveats,
        metrics=metrics,
        roles=plots.ROLES | plots.REFERENCES,
        titles={name: plots.model_title(name, comparison.names) for name in comparison.names},
        findings=findings(comparison, split.classes),
        precisions=precisions,
        strip=picture(plots.plot_precision(precisions, caption)),
        pictures={name.split(".")[0]: picture(figure) for name, figure in figures.items()},
        class_rows=class_rows(comparison, split.classes),
        similarities=similarity_cells(comparison),
        variance_rows=variance_rows(maps),
        max_table=MAX_TABLE,
        data=explorable(comparison, maps, split),
        sprite=sprite_sheet(maps, split),
    )


def policy(script: str, style: str) -> str:
    """The Content-Security-Policy: no network, and only exactly this script and this style."""
    script, style = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, style)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@matplotlib.rc_context(plots.STYLE)
def picture(figure: Figure) -> dict[str, Any]:
    """A figure as SVG in a data URI, with its size in pixels.

    Its ground is transparent and its colors follow the reader's light or dark mode.
    """
    file = io.BytesIO()
    figure.savefig(file, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    svg = file.getvalue().decode()
    for color in DARK:
        svg = svg.replace(f": {color}", f": var(--c{color[1:]})")
    light, dark = (
        "".join(f"--c{color[1:]}:{value};" for color, value in values)
        for values in (zip(DARK, DARK, strict=True), DARK.items())
    )
    modes = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    svg = svg.replace("<defs>", f"<defs><style>{modes}</style>", 1)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return {"uri": data_uri("svg+xml", svg.encode()), "width": width, "height": height}


def data_uri(kind: str, content: bytes) -> str:
    """A picture inside an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def precision_rows(comparison: Comparison) -> dict[str, Estimate]:
    """Precision@5 of the models, with intervals, then of the references and of chance."""
    rows = {name: metrics["precision_at_5"] for name, metrics in comparison.metrics.items()}
    others = {name: m["precision_at_5"] for name, m in comparison.references.items()}
    others["chance"] = comparison.chance_precision
    missing = (math.nan, math.nan)
    return rows | {name: Estimate(value, math.nan, missing) for name, value in others.items()}


def class_rows(comparison: Comparison, classes: Sequence[str]) -> list[list[str]]:
    """Precision@5 of each class, and the difference, with intervals; the first row is the head."""
    columns = {plots.ROLES[name]: found for name, found in comparison.class_precision.items()}
    cells = [["Class", *columns]]
    for position, label in enumerate(np.unique(comparison.analyses["local"].labels)):
        found = [narrative.interval("precision_at_5", e[position]) for e in columns.values()]
        cells.append([classes[label], *found])
    if comparison.per_class:
        cells[0].append("HF - local, points [95%]")
        for row, line in zip(comparison.per_class, cells[1:], strict=True):
            difference = narrative.interval("precision_at_5", row["difference"], "+")
            line.append(difference.replace("%", ""))
    return cells


def similarity_cells(comparison: Comparison) -> dict[str, list[list[str]]]:
    """The matrices of class similarity, by caption; none of more than `MAX_TABLE` classes."""
    if len(np.unique(comparison.analyses["local"].labels)) > MAX_TABLE:
        return {}
    return {
        f"{plots.ROLES[name]}, {kind}": [
            [narrative.number("similarity", value) for value in line]
            for line in class_similarity(
                analysis.embeddings, analysis.labels, centered=kind == "centered"
            ).tolist()
        ]
        for kind in ("centered", "raw")
        for name, analysis in comparison.analyses.items()
    }


def variance_rows(maps: Maps) -> list[list[str]]:
    """Shares of the variance in component k and in the first k; the first row is the head."""
    shares = {plots.ROLES[name]: pca.variance_shares for name, pca in maps.pca.items()}
    cells = [["Components"]]
    for name in shares:
        cells[0] += [f"{name}: this one", f"{name}: up to here"]
    for k in RANKS:
        if k <= max(map(len, shares.values())):
            line = [str(k)]
            for y in shares.values():
                known = k <= len(y)
                line += [f"{y[k - 1]:.2%}", f"{y[:k].sum():.1%}"] if known else ["n/a", "n/a"]
            cells.append(line)
    return cells


def findings(comparison: Comparison, classes: Sequence[str]) -> dict[str, str]:
    """The sentences of the report by heading, chosen by rules from the numbers."""
    confusions = narrative.confusion_finding(comparison, classes)
    sections = {
        "Retrieval": narrative.retrieval_finding(comparison),
        "Separability": narrative.separability_finding(comparison),
        "Variance": narrative.variance_finding(comparison),
        # Made for Markdown: without the backslashes that keep names from being markup there.
        "Confusions": re.sub(r"\\(.)", r"\1", confusions),
    }
    if "hf" in comparison.metrics:
        sections["Efficiency"] = narrative.efficiency_finding(comparison)
        sections["Agreement"] = narrative.agreement_finding(comparison)
    if comparison.seeds:
        sections["Training seeds"] = narrative.seeds_finding(comparison)
    return sections


def in_words(value: Any) -> str:
    """A value of metrics.json in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def explorable(comparison: Comparison, maps: Maps, split: Split) -> dict[str, Any]:
    """What the scripts need to know of each image on the maps.

    A neighbor is given by its position in `index`; positions from `points` on are images that are
    on no map and have no picture.
    """
    rows, analyses = maps.rows, comparison.analyses
    listed = {name: a.neighbors[rows, :5] for name, a in analyses.items()}
    beyond = np.setdiff1d(np.concatenate([found.ravel() for found in listed.values()]), rows)
    order = np.concatenate([rows, beyond])
    position = np.zeros(len(split), dtype=np.int64)
    position[order] = np.arange(len(order))
    models = []
    for name, analysis in analyses.items():
        tsne, pca, precisions = maps.tsne[name], maps.pca[name], analysis.precisions(5)[rows]
        similarities = analysis.similarities[rows, :5]
        digits = plots.similarity_digits(similarities)
        hits = np.rint(5 * precisions) if np.isfinite(precisions).all() else None
        models.append(
            {
                "key": name,
                "name": comparison.names[name],
                "hits": None if hits is None else hits.astype(int).tolist(),
                "neighbors": position[listed[name]].tolist(),
                # In single precision each would be written with seventeen digits.
                "similarities": similarities.astype(np.float64).round(digits).tolist(),
                "digits": digits,
                "tsne": on_grid(tsne.coordinates),
                "pca": on_grid(pca.coordinates),
                "notes": {"tsne": tsne.note, "pca": pca.note},
            }
        )
    styles, mutual = plots.class_styles(split.classes), comparison.mutual
    paths = getattr(split, "paths", None)
    return {
        "classes": split.classes,
        "colors": [color for color, _ in styles],
        "markers": [marker for _, marker in styles],
        "index": split.indices[order].tolist(),
        "label": split.labels[order].tolist(),
        "paths": [paths[row] for row in order] if paths else None,
        "points": len(rows),
        "models": models,
        "mutual": None if mutual is None else np.rint(mutual[rows] * MUTUAL_K).astype(int).tolist(),
        "sprite": {"tile": TILE, "columns": COLUMNS},
    }


def on_grid(points: Float[np.ndarray, "m 2"]) -> list[list[int]]:
    """Points in a square of `GRID` steps, their shape kept, y downwards."""
    low, high = points.min(axis=0), points.max(axis=0)
    side = max(float((high - low).max()), np.finfo(np.float64).tiny)
    unit = (points - (low + high) / 2) / side * (1, -1) + 0.5
    return np.rint(GRID * unit).astype(int).tolist()


def thumbnail(image: UInt8[np.ndarray, "3 h w"]) -> Image.Image:
    """The image in a square tile: enlarged by whole factors or shrunk, centered on gray."""
    made = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    longest = max(made.size)
    factor = TILE // longest or TILE / longest
    how = Image.Resampling.NEAREST if longest <= TILE else Image.Resampling.LANCZOS
    made = made.resize([max(1, round(side * factor)) for side in made.size], how)
    tile = Image.new("RGB", (TILE, TILE), (128, 128, 128))
    tile.paste(made, tuple((TILE - side) // 2 for side in made.size))
    return tile


def sprite_sheet(maps: Maps, split: Split) -> str:
    """Thumbnails of the images on the maps, `COLUMNS` in a line, as WebP in a data URI."""
    lines = math.ceil(len(maps.rows) / COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, lines * TILE))
    for position, row in enumerate(maps.rows.tolist()):
        line, column = divmod(position, COLUMNS)
        sheet.paste(thumbnail(split.images[row].numpy()), (TILE * column, TILE * line))
    file = io.BytesIO()
    sheet.save(file, format="WEBP", quality=QUALITY)
    return data_uri("webp", file.getvalue())
