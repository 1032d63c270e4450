"""Matplotlib figures: arrays in, one figure out, the same for the PNG files and for the page.

Mappings have the keys "local" and "hf", which decide colors and markers; one is enough. Labels
index into the classes of the caption. Names appear verbatim.

Dimension key: n images, c classes, q queries, k neighbors of each.
"""

import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import PercentFormatter
from PIL import Image

from ijepa.errors import counted
from ijepa.files import write_atomically
from ijepa.formats import P5, capital, label, number, similarity_digits
from ijepa.metrics import Labels
from ijepa.projections import PcaProjection, TsneProjection, class_similarity
from ijepa.uncertainty import Estimate

FONT = "DejaVu Sans"  # ships with Matplotlib, so a figure is the same on every machine
# The page turns these four and the models' colors into others in dark mode.
INK, SOFT, RULE, GROUND = "#1d1c1a", "#5b5851", "#dedad2", "#fefefe"
MODEL_COLORS = {"local": "#00607a", "hf": "#c2410c"}
MODEL_LINES = {"local": "-", "hf": "--"}
MODEL_MARKERS = {"local": "o", "hf": "s", "pixels": "D", "random_weights": "^", "chance": "v"}
STYLE: dict[Any, Any] = {"font.family": FONT, "font.size": 9, "axes.titlesize": 10}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"axes.facecolor": "none", "axes.edgecolor": SOFT, "grid.color": RULE}
STYLE |= {"grid.linewidth": 0.6, "xtick.labelsize": 8, "ytick.labelsize": 8}
STYLE |= {"svg.hashsalt": "ijepa", "text.parse_math": False, "text.usetex": False}
HALO = patheffects.withStroke(linewidth=2.5, foreground=GROUND)  # keeps words readable on marks
LEGEND: dict[str, Any] = {"loc": "outside lower center", "fontsize": 8, "frameon": False}

# petroff10 (Petroff 2021, https://arxiv.org/abs/2107.02270), assigned so that CIFAR-10's easily
# confused classes differ most.
PETROFF = [to_hex(color) for color in matplotlib.color_sequences["petroff10"]]
CIFAR10 = ["airplane", "deer", "bird", "dog", "cat", "automobile", "ship", "frog", "horse", "truck"]
CLASS_COLORS = dict(zip(CIFAR10, PETROFF, strict=True))
VEHICLES = {"airplane", "automobile", "ship", "truck"}
MARKERS = "o^sDvPX"
MAX_NAME = 14  # characters of a class name that fit under an image
MAX_LABELED = 20  # classes; more numbers in a matrix or names in a cloud cannot be read
MAX_LISTED = 40  # classes in a legend, along a matrix, or with a bar each


@dataclass(frozen=True)
class Caption:
    """The words of a figure: what is shown, how it was made, the models and the classes."""

    title: str
    footer: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    classes: Sequence[str] = ()

    def add(self, sentence: str) -> "Caption":
        """This caption with another sentence in the footer."""
        return replace(self, footer=f"{self.footer} {sentence}")


@cache
def _characters(file: str) -> frozenset[int]:
    return frozenset(get_font(file).get_charmap())


@cache
def _font_of(character: str) -> str | None:
    """The font that has a character: DejaVu Sans, else an installed one; None if none has it."""
    # Last Resort fonts have a box for every character.
    fonts = [font for font in fontManager.ttflist if "Last Resort" not in font.name]
    fonts.sort(key=lambda font: (font.name != FONT, font.name, font.style, str(font.weight)))
    found = (font.name for font in fonts if ord(character) in _characters(font.fname))
    return next(found, None) if character.isprintable() else None


def font_note(texts: Iterable[str]) -> str | None:
    """A sentence on the characters that figures cannot show; None if they show all."""
    missing = {character for character in "".join(texts) if _font_of(character) is None}
    found = counted(len(missing), "character")
    return f"no installed font has {found}: figures show the code" if missing else None


def readable(text: str, limit: int | None = None) -> str:
    r"""Text with the characters that no font has as their code, such as ``\u4e2d``.

    Of a text over ``limit`` characters the middle is left out, because names differ at their ends.
    """
    shown = "".join(c if _font_of(c) else c.encode("unicode_escape").decode() for c in text)
    if limit and any(unicodedata.east_asian_width(c) in "WF" for c in shown):
        limit = limit * 4 // 7  # these are nearly twice as wide
    if limit and len(shown) > limit:
        shown = f"{shown[: limit // 2]}…{shown[len(shown) - (limit - 1) // 2 :]}"
    return shown


def _short(classes: Sequence[str]) -> list[str]:
    """Class names cut to fit; names that are then equal get the number of their class."""
    cut = [readable(name, MAX_NAME) for name in classes]
    return [
        name if cut.count(name) == 1 else readable(f"{i} {classes[i]}", MAX_NAME)
        for i, name in enumerate(cut)
    ]


def model_title(role: str, names: Mapping[str, str], limit: int = 40) -> str:
    """A model's role and short name, such as "HF: ijepa_vith14_1k"."""
    name, title = readable(names[role], limit), capital(label(role))
    return name if name.startswith(title) else f"{title}: {name}"


def _wrap(text: str, inches: float, font_size: int) -> str:
    width = int(inches * 72 / (0.66 * font_size))  # bold letters are 0.66 of their height wide
    return "\n".join(readable(line) for line in textwrap.wrap(text, width))


def new_figure(caption: Caption, width: float, height: float) -> tuple[Figure, SubFigure]:
    """A figure with its caption, and the part that the caption leaves free.

    Sets the fonts that the caption's words need in the style that surrounds the caller.
    """
    texts = [caption.title, caption.footer, *caption.names.values(), *caption.classes]
    fonts = map(_font_of, sorted(set("".join(texts))))
    matplotlib.rcParams["font.family"] = list(dict.fromkeys([FONT, *filter(None, fonts)]))
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # texts are measured on it; without one, each on a new empty picture
    figure.suptitle(_wrap(caption.title, width, 11), fontsize=11, fontweight="bold")
    figure.supxlabel(_wrap(caption.footer, width, 7), x=0.01, ha="left", fontsize=7, color=SOFT)
    return figure, figure.subfigures()


@matplotlib.rc_context(STYLE)
def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG; the same figure gives the same bytes."""
    figure.canvas.draw()  # once; `savefig` would lay it out and draw it separately
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    write_atomically(path, lambda file: image.save(file, "PNG", dpi=(figure.dpi, figure.dpi)))
    figure.set_layout_engine("none")  # nothing moves when it is drawn again, and that is faster


def class_styles(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Color and marker of each class.

    Classes of CIFAR-10 have fixed colors, with triangles for vehicles. Others take petroff10 in
    order, or `turbo` where there are more classes than colors.
    """
    if set(classes) <= set(CLASS_COLORS):
        return [(CLASS_COLORS[name], "^" if name in VEHICLES else "o") for name in classes]
    colors = PETROFF
    if len(classes) > len(colors):
        wide = matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, len(classes)))
        colors = [to_hex(color) for color in wide]
    return [(colors[i], MARKERS[i % len(MARKERS)]) for i in range(len(classes))]


@matplotlib.rc_context(STYLE)
def plot_maps(
    maps: Mapping[str, TsneProjection | PcaProjection], labels: Labels, caption: Caption
) -> Figure:
    """One cloud of points per model, with the classes' names at their medians and a legend."""
    styles, shown = class_styles(caption.classes), _short(caption.classes)
    width, listed = 5.6 * len(maps) + 0.4, len(shown) <= MAX_LISTED
    if not listed:
        caption = caption.add(f"The legend of {len(shown)} classes is left out.")
    figure, body = new_figure(caption, width, 6.3)
    axes = body.subplots(1, len(maps), squeeze=False)[0]
    shapes = [MarkerStyle(marker) for _, marker in styles]
    paths = [shape.get_path().transformed(shape.get_transform()) for shape in shapes]
    order = np.random.default_rng(0).permutation(len(labels))  # no class covers the others
    size = float(np.clip(20_000 / len(labels), 4, 40))
    for ax, (role, projection) in zip(axes, maps.items(), strict=True):
        colors = [styles[label][0] for label in labels[order]]
        points = projection.coordinates[order, :2]
        dots = ax.scatter(*points.T, s=size, c=colors, alpha=0.8, linewidths=0)
        dots.set_paths([paths[label] for label in labels[order]])
        ax.set(aspect="equal", adjustable="datalim", xticks=[], yticks=[])
        title = f"{model_title(role, caption.names)}\n{projection.note}"
        ax.set_title(title, color=MODEL_COLORS[role])
    if listed:
        handles = [
            Line2D([], [], color=color, marker=marker, label=name, linestyle="", markersize=5)
            for (color, marker), name in zip(styles, shown, strict=True)
        ]
        widest = max(TextPath((0, 0), name or "x", size=8).get_extents().width for name in shown)
        rows = math.ceil(len(shown) / max((width * 72 - 20) // (widest + 25), 1))
        figure.set_figheight(6.3 + 0.17 * rows)
        look = {"columnspacing": 1.2, "handlelength": 1.2, "handletextpad": 0.1}
        body.legend(handles=handles, ncols=math.ceil(len(shown) / rows), **look, **LEGEND)
    figure.draw_without_rendering()  # names are placed in the final layout
    for ax, projection in zip(axes, maps.values(), strict=True):
        _name_classes(ax, projection.coordinates[:, :2], labels, shown)
    return figure


def _name_classes(
    ax: Axes, points: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, " n"], names: list[str]
) -> None:
    """Write each class's name at its median, or a line or two above or below; else nowhere."""
    present, taken = np.unique(labels), []
    for row in present if len(present) <= MAX_LABELED else ():
        place = np.median(points[labels == row], axis=0)
        font = {"ha": "center", "va": "center", "fontsize": 8.5, "fontweight": "bold"}
        note = ax.text(*place, names[row], path_effects=[HALO], in_layout=False, **font)
        box = note.get_window_extent()
        places = [box.translated(0, lines * box.height) for lines in (0, 1, -1, 2, -2)]
        free = [p for p in places if ax.bbox.count_contains(p.corners()) == 4]
        free = [p for p in free if not any(p.overlaps(other) for other in taken)]
        if free:
            taken.append(free[0])
            note.set_position(ax.transData.inverted().transform(free[0].corners().mean(axis=0)))
        else:
            note.remove()


def _matrix(ax: Axes, matrix: Float[np.ndarray, "c c"], names: list[str], **colors: Any) -> Any:
    """One matrix with its numbers; ``colors`` are the map and its limits."""
    count = len(names)
    # Squares stay sharp at any zoom; many of them are one picture.
    mesh = ax.pcolormesh(np.ma.masked_invalid(matrix), rasterized=count > MAX_LISTED, **colors)
    ax.set(aspect="equal", ylim=(count, 0))
    shown = names if count <= MAX_LISTED else []
    ax.set_xticks(np.arange(len(shown)) + 0.5, shown, rotation=90, fontsize=7.5)
    ax.set_yticks(np.arange(len(shown)) + 0.5, shown, fontsize=7.5)
    if count > MAX_LABELED:
        return mesh
    digits = 2 if np.nan_to_num(np.abs(matrix)).max() >= 0.1 else 3
    look = {"ha": "center", "va": "center", "in_layout": False}  # in its cell; measuring takes time
    look["fontsize"] = min(6.5 if digits == 2 else 5.5, 100 / count)
    inks = np.where(mesh.to_rgba(matrix)[..., :3] @ (0.299, 0.587, 0.114) < 0.5, "white", "black")
    for row, column in np.argwhere(np.isfinite(matrix)):
        text = number("similarity", matrix[row, column], extra=digits - 3)
        ax.text(column + 0.5, row + 0.5, text, color=inks[row, column], **look)
    return mesh


@matplotlib.rc_context(STYLE)
def plot_similarity_matrices(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]], labels: Labels, caption: Caption
) -> Figure:
    """Cosine similarity of class means, raw above and centered below; then HF - local."""
    shown = np.array(_short(caption.classes))[np.unique(labels)].tolist()
    if len(shown) > MAX_LISTED:
        caption = caption.add(f"{len(shown)} classes, in the order of their labels.")
    side, columns = float(np.clip(0.33 * len(shown), 2.6, 5)), 2 * len(embeddings) - 1
    figure, body = new_figure(caption, columns * side + 2.4, 2 * side + 2.0)
    axes = body.subplots(2, columns, squeeze=False, sharex=True, sharey=True)
    for line, kind in zip(axes, ("raw", "centered"), strict=True):
        centered = kind == "centered"
        matrices = [class_similarity(X, labels, centered=centered) for X in embeddings.values()]
        low = -1 if centered else min(np.nan_to_num(matrix, nan=1).min() for matrix in matrices)
        colors = {"cmap": "RdBu_r" if centered else None, "vmin": low, "vmax": 1}
        for ax, role, matrix in zip(line, embeddings, matrices, strict=False):
            mesh = _matrix(ax, matrix, shown, **colors)
            ax.set_title(f"{model_title(role, caption.names)}\n{kind}", color=MODEL_COLORS[role])
        body.colorbar(mesh, ax=list(line[: len(matrices)]), shrink=0.9)
        if len(matrices) == 2:
            difference = matrices[1] - matrices[0]
            largest = max(np.nan_to_num(np.abs(difference)).max(), 0.01)
            mesh = _matrix(line[2], difference, shown, cmap="PuOr_r", vmin=-largest, vmax=largest)
            line[2].set_title(f"HF - local\n{kind}")
            body.colorbar(mesh, ax=line[2], shrink=0.9)
    return figure


@matplotlib.rc_context(STYLE)
def plot_variance_explained(projections: Mapping[str, PcaProjection], caption: Caption) -> Figure:
    """Variance per component, cumulative, and cumulative against the share of d."""
    figure, body = new_figure(caption, 12.5, 4.6)
    axes = body.subplots(1, 3)
    for role, pca in projections.items():
        shares, d = pca.variance_shares, len(pca.variance_shares)
        ranks, sums = np.arange(1, d + 1), np.cumsum(shares)
        marks = [k for k in (10, 50) if k <= pca.rank]
        words = f"{model_title(role, caption.names)} (d = {d})"
        words += "".join(f", {number('share', sums[k - 1], extra=1)} in {k} PCs" for k in marks)
        look = {"color": MODEL_COLORS[role], "linestyle": MODEL_LINES[role], "label": words}
        look |= {"marker": MODEL_MARKERS[role], "markevery": [k - 1 for k in marks] or [0]}
        for ax, x, y in zip(axes, (ranks, ranks, ranks / d), (shares, sums, sums), strict=True):
            ax.plot(x, y, **look)
    titles = ("Each component", "Cumulative", "Cumulative, by share of d")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, ylabel="share of the variance", ylim=(0, None))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        ax.grid()
    for ax in axes[:2]:
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 2000) if k <= ax.dataLim.x1]
        ax.set(xscale="log", xlabel="principal components (log scale)")
        ax.set_xticks(ticks, map(str, ticks))
        ax.set_xticks([], minor=True)
    axes[2].xaxis.set_major_formatter(PercentFormatter(1))
    axes[2].set_xlabel("principal components / d")
    body.legend(*axes[0].get_legend_handles_labels(), **LEGEND)
    return figure


def _intervals(
    ax: Axes, estimates: Sequence[Estimate], heights: Sequence[Any], key: str, name: str = ""
) -> None:
    """Marks with 95% intervals and numbers in percent; ``key`` is a model or a reference."""
    color, sign = MODEL_COLORS.get(key, INK), "" if key in MODEL_MARKERS else "+"
    look = {"textcoords": "offset points", "va": "center_baseline", "fontsize": 7}
    look |= {"color": color, "path_effects": [HALO]}
    for estimate, y in zip(estimates, heights, strict=True):
        ends = [x for x in (*estimate.ci95, estimate.value) if np.isfinite(x)]
        ax.plot(estimate.ci95, [y, y], color=color, linewidth=1.6)  # NaN is not drawn
        text = number(P5, estimate.value, sign).rstrip("%")
        ax.annotate(text, (max(ends, default=0), y), (5, 0), **look)
    fill = color if key in MODEL_COLORS or sign else GROUND
    look = {"color": color, "markerfacecolor": fill, "markersize": 5, "label": name}
    values = [estimate.value for estimate in estimates]
    ax.plot(values, heights, MODEL_MARKERS.get(key, "o"), **look)


def _share_axis(ax: Axes, names: list[str]) -> None:
    """Shares from 0 to 1 across, one name to each row from the top down."""
    ax.set(xlim=(-0.02, 1.12), ylim=(len(names) - 0.5, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_yticks(range(len(names)), names)
    ax.grid(axis="x")
    ax.set_axisbelow(True)


@matplotlib.rc_context(STYLE)
def plot_class_precision(
    precisions: Mapping[str, Sequence[Estimate]], differences: Sequence[Estimate], caption: Caption
) -> Figure:
    """Precision@5 of each class with 95% intervals, and HF - local unless that is empty."""
    order = np.arange(len(caption.classes))
    if len(caption.classes) > MAX_LISTED:
        sizes = [-abs(d.value) for d in differences] or np.zeros(len(caption.classes))
        order = np.sort(np.argsort(sizes, kind="stable")[:MAX_LISTED])
        which = "that differ most" if differences else "that come first"
        caption = caption.add(f"Of {len(caption.classes)} classes, the {MAX_LISTED} {which}.")
    shown = np.array(_short(caption.classes))[order].tolist()
    rows, columns = range(len(order)), 2 if differences else 1
    figure, body = new_figure(caption, 4.6 * columns + 0.6, 0.34 * len(order) + 1.6)
    axes = body.subplots(1, columns, squeeze=False, sharey=True)[0]
    for role, estimates in precisions.items():
        shift = {"local": -0.16, "hf": 0.16}[role] * (columns - 1)
        found, heights = [estimates[i] for i in order], [row + shift for row in rows]
        _intervals(axes[0], found, heights, role, model_title(role, caption.names))
    _share_axis(axes[0], shown)
    measured = any(np.isfinite(one.se) for found in precisions.values() for one in found)
    with_intervals = " with 95% interval" * measured
    axes[0].set_title(f"Precision@5{with_intervals}")
    body.legend(*axes[0].get_legend_handles_labels(), **LEGEND, ncols=2)
    if differences:
        axes[1].axvline(0, color=SOFT, linewidth=1)
        _intervals(axes[1], [differences[i] for i in order], rows, "difference")
        limit = 1.15 * max(map(abs, axes[1].get_xlim()))
        axes[1].set(title=f"HF - local{with_intervals}, points", xlim=(-limit, limit))
        axes[1].xaxis.set_major_formatter(lambda x, _: f"{100 * x:+.3g}" if x else "0")
        axes[1].grid(axis="x")
    return figure


@matplotlib.rc_context(STYLE)
def plot_precision(precisions: Mapping[str, Estimate], caption: Caption) -> Figure:
    """Precision@5 of the models with 95% intervals, then of references and chance."""
    figure, body = new_figure(caption, 3.8, 0.28 * len(precisions) + 0.9)
    ax = body.subplots()
    for y, (key, estimate) in enumerate(precisions.items()):
        _intervals(ax, [estimate], [y], key)
    names = (model_title(key, {key: "", **caption.names}, 20) for key in precisions)
    _share_axis(ax, [name.removesuffix(": ") for name in names])
    ax.spines[:].set_visible(False)
    return figure


def _picture(ax: Axes, image: UInt8[np.ndarray, "3 h w"], left: float, top: float) -> Rectangle:
    """Draw an image at the bottom of a unit square, its pixels as squares; returns its frame."""
    _, height, width = image.shape
    w, h = width / max(height, width), height / max(height, width)
    left, top = left + (1 - w) / 2, top + 1 - h
    # Photographs are shrunk, where single pixels would flicker.
    smooth = "nearest" if max(height, width) <= 128 else "auto"
    extent = (left, left + w, top + h, top)
    ax.imshow(image.transpose(1, 2, 0), extent=extent, interpolation=smooth, aspect="equal")
    return ax.add_patch(Rectangle((left, top), w, h, fill=False, linewidth=0))


@matplotlib.rc_context(STYLE)
def plot_neighbors(
    neighbors: Mapping[str, tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]],
    queries: Int[np.ndarray, " q"],
    labels: Int[np.ndarray, " n"],
    image_of: Callable[[int], UInt8[np.ndarray, "3 h w"]],
    caption: Caption,
) -> Figure:
    """One row per query: the image, then the nearest images of each model.

    ``neighbors`` holds positions and cosine similarities, best first, ``queries`` positions;
    ``image_of`` gives the pixels of the image at a position.
    """
    gap, step = 0.3, 1.45  # inches: before each model's images, and from one row to the next
    widths = [indices.shape[1] * 1.06 + gap for indices, _ in neighbors.values()]
    shown = _short(caption.classes)
    figure, body = new_figure(caption, max(1 + sum(widths), 4) + 0.2, step * len(queries) + 1.1)
    ax = body.subplots()
    ax.set(xlim=(-0.05, 1 + sum(widths) + 0.05), ylim=(step * len(queries), -0.35))
    ax.set_axis_off()  # with limits set, pictures do not move them one by one
    ax.text(0.5, -0.12, "query", ha="center", fontweight="bold")
    for row, query in enumerate(queries):
        _picture(ax, image_of(int(query)), 0.0, step * row)
        ax.text(0.5, step * row + 1.05, shown[labels[query]], ha="center", va="top", fontsize=7.5)
    for left, (role, (indices, cosines)) in zip(
        np.cumsum([1, *widths]) + gap, neighbors.items(), strict=False
    ):
        title = f"{model_title(role, caption.names)}, nearest by cosine similarity"
        digits = similarity_digits(cosines)
        ax.text(left, -0.12, title, color=MODEL_COLORS[role], fontweight="bold")
        for (row, rank), index in np.ndenumerate(indices):
            x, y = left + 1.06 * rank, step * row
            same = labels[index] == labels[queries[row]]
            color, sign = ("#1a7f37", "✓") if same else ("#b3261e", "✗")
            _picture(ax, image_of(int(index)), x, y).set(edgecolor=color, linewidth=2.5)
            words = f"{sign} {cosines[row, rank]:.{digits}f}\n{shown[labels[index]]}"
            ax.text(x + 0.5, y + 1.05, words, ha="center", va="top", fontsize=7.5, color=color)
    return figure
