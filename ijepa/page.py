"""`report.html`: one file, without server or network, in which both embeddings can be explored.

`static/` holds the template, the style sheet and the scripts that draw the maps. Without JavaScript
only the maps and the neighbor browser are missing. The page may load nothing, and run only the
script and the style sheet whose hashes its policy names.
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
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from ijepa import narrative, plots
from ijepa.comparison import Comparison
from ijepa.data import Split
from ijepa.formats import NO_INTERVALS, P5, capital, interval, label, number, similarity_digits
from ijepa.projections import Maps, class_similarity
from ijepa.tables import INTERVALS, Rows, finding_tables, headline_table, model_facts
from ijepa.uncertainty import MUTUAL_K

DARK = {plots.INK: "#e9e6df", plots.SOFT: "#aaa59b", plots.RULE: "#3a3f47"}
DARK |= {plots.GROUND: "#131519", plots.MODEL_COLORS["local"]: "#5cc6e2"}
DARK |= {plots.MODEL_COLORS["hf"]: "#ff9d69"}
"""What these colors of a figure become in dark mode; all others stay."""
SCRIPTS = ("state.js", "map.js", "neighbors.js", "page.js")  # in the order in which they run
GRID = 10_000  # steps of a coordinate on the maps: finer than a pixel on any screen
TILE = 32  # side of an image in the sheet of thumbnails, in pixels
COLUMNS = 64
QUALITY = 90  # 430 bytes per CIFAR-10 image (lossless 1,700) without visible artifacts
MAX_TABLE = 20  # classes in a table of similarities at most
RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # components in the table of variance


def page(  # noqa: PLR0913
    comparison: Comparison,
    maps: Maps,
    split: Split,
    facts: Mapping[str, Any],
    caveats: Sequence[str],
    metrics: str,
    figures: Mapping[str, Figure],
    probe: Any = None,
) -> str:
    """The whole file.

    `facts` are as in metrics.json, whose text `metrics` is, without this page among its artifacts.
    `figures` are those of the page, by file name.
    """
    static = files("ijepa") / "static"
    template = (static / "page.html").read_text(encoding="utf-8")
    style = (static / "page.css").read_text(encoding="utf-8")
    script = "".join((static / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"words": in_words, "breakable": breakable, "digest": digest}
    environment.filters |= {"titled": lambda role: capital(label(role))}
    precisions = narrative.precision_rows(comparison)
    title = "Precision@5 in percent" + ", 95% interval" * bool(comparison.num_halves)
    caption = plots.Caption(title, names=comparison.names)
    return environment.from_string(template).render(
        style=Markup(style),
        script=Markup(script),
        comparison=comparison,
        split=split,
        facts=facts,
        caveats=caveats,
        metrics=metrics,
        titles={name: plots.model_title(name, comparison.names) for name in comparison.names},
        answer=narrative.answer(comparison),
        findings=narrative.findings(comparison, split.classes, probe),
        headlines=headline_table(comparison),
        model_facts=model_facts,
        tables=finding_tables(comparison, split.classes, probe),
        brackets=INTERVALS if comparison.num_halves else NO_INTERVALS,
        precisions={name: interval(P5, found) for name, found in precisions.items()},
        strip=picture(plots.plot_precision(precisions, caption)),
        pictures={name.split(".")[0]: picture(figure) for name, figure in figures.items()},
        similarities=similarity_tables(comparison, split.classes),
        variances=variance_table(maps),
        max_table=MAX_TABLE,
        data=explorable(comparison, maps, split),
        sprite=sprite_sheet(maps, split),
    )


def digest(text: str) -> str:
    """The SHA-256 of a script or a style, as a Content-Security-Policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@matplotlib.rc_context(plots.STYLE)
def picture(figure: Figure) -> dict[str, Any]:
    """A figure as SVG in a data URI that follows light or dark mode, with its size in pixels."""
    file = io.StringIO()
    figure.set_facecolor("none")
    # `savefig` would draw it twice.
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<!--.*?-->|\s*\n\s*", " ", file.getvalue())  # a tenth of the bytes
    svg = re.sub(r"(\d\d\.\d\d)\d+", r"\1", svg)  # an eighth; a hundredth of a point is not seen
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


def similarity_tables(comparison: Comparison, classes: Sequence[str]) -> dict[str, Rows]:
    """The matrices of class similarity, by caption; none of more than `MAX_TABLE` classes."""
    shown = [classes[row] for row in np.unique(comparison.analyses["local"].labels)]
    tables = {}
    for kind in ("centered", "raw") if len(shown) <= MAX_TABLE else ():
        for role, a in comparison.analyses.items():
            matrix = class_similarity(a.embeddings, a.labels, centered=kind == "centered")
            cells = [[number("similarity", x) for x in line] for line in matrix.tolist()]
            rows = [[name, *line] for name, line in zip(shown, cells, strict=True)]
            tables[f"{capital(label(role))}, {kind}"] = [["Class", *shown], *rows]
    return tables


def variance_table(maps: Maps) -> Rows:
    """Shares of the variance in component k and in the first k."""
    shares = {role: pca.variance_shares[: pca.rank] for role, pca in maps.pca.items()}
    ends = ("this one", "up to here")
    rows = [["Components", *(f"{capital(label(role))}: {end}" for role in shares for end in ends)]]
    for k in RANKS:
        if k <= max(map(len, shares.values())):
            rows.append([str(k)])
            for y in shares.values():
                one, sums = (y[k - 1], y[:k].sum()) if k <= len(y) else (math.nan, math.nan)
                rows[-1] += [number(P5, one, extra=1), number(P5, sums)]
    return rows


def breakable(text: str) -> Markup:
    """Text whose lines may break after the marks inside of names, but not inside intervals."""
    words = re.sub("([/_])", r"\1<wbr>", str(escape(text)))
    return Markup(re.sub(r"(\[[^]]*\])", r'<span class="whole">\1</span>', words))


def in_words(value: Any) -> str:
    """A value of metrics.json as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def explorable(comparison: Comparison, maps: Maps, split: Split) -> dict[str, Any]:
    """The data of the scripts, for each image on the maps.

    A neighbor is given by its position in `index`; positions from `points` on are images that are
    on no map and have no picture.
    """
    rows, analyses = maps.rows, comparison.analyses
    listed = {name: a.neighbors[rows, :5] for name, a in analyses.items()}
    beyond = np.setdiff1d([*listed.values()], rows)
    order = np.concatenate([rows, beyond])
    position = np.zeros(len(split), dtype=np.int64)
    position[order] = np.arange(len(order))
    models = []
    for name, analysis in analyses.items():
        tsne, pca, precisions = maps.tsne[name], maps.pca[name], analysis.precisions(5)[rows]
        similarities = analysis.similarities[rows, :5]
        digits = similarity_digits(similarities)
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
    mutual = comparison.mutual
    return {
        "classes": split.classes,
        "signs": [[marker, color] for color, marker in plots.class_styles(split.classes)],
        "index": split.indices[order].tolist(),
        "label": split.labels[order].tolist(),
        "paths": [split.paths[row] for row in order] if split.paths else None,
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
    """Thumbnails of the images on the maps, gray without pictures, as WebP in a data URI."""
    lines = math.ceil(len(maps.rows) / COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, lines * TILE), (128, 128, 128))
    for position, row in enumerate(maps.rows.tolist() if split.images is not None else ()):
        line, column = divmod(position, COLUMNS)
        sheet.paste(thumbnail(split.images[row].numpy()), (TILE * column, TILE * line))
    file = io.BytesIO()
    sheet.save(file, format="WEBP", quality=QUALITY)
    return data_uri("webp", file.getvalue())
