"""Draw both models side by side: arrays in, one Matplotlib figure out.

Panels are mappings with the keys "local" and "hf", in the order of drawing; one of them is enough.
Labels index into ``classes``. Every name is drawn as it is, whatever characters it has.

Dimension key: n images, d width of an embedding, c classes, q queries, k neighbors of each.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ijepa.metrics import class_means, row_norms
from ijepa.projections import PcaProjection, TsneProjection, align

FONT = "DejaVu Sans"  # ships with Matplotlib, so a figure is the same on every machine
STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "font.size": 9,
    "axes.titlesize": 10,
    "text.usetex": False,
}
STYLE |= {"xtick.labelsize": 8, "ytick.labelsize": 8}
MODEL_NAMES = {"local": "Local model", "hf": "HF model"}
MODEL_COLORS = {"local": "#00607a", "hf": "#c2410c"}
MODEL_LINES = {"local": "-", "hf": "--"}
MODEL_MARKERS = {"local": "o", "hf": "s"}

# petroff10 (Petroff 2021, https://arxiv.org/abs/2107.02270), given out so that CIFAR-10's easily
# confused classes differ most.
PETROFF = [to_hex(color) for color in matplotlib.color_sequences["petroff10"]]
CIFAR10 = ["airplane", "deer", "bird", "dog", "cat", "automobile", "ship", "frog", "horse", "truck"]
CLASS_COLORS = dict(zip(CIFAR10, PETROFF, strict=True))
VEHICLES = {"airplane", "automobile", "ship", "truck"}
MARKERS = "o^sDvPX"
MAX_NAME = 14  # characters of a class name that fit under an image
MAX_LABELLED = 20  # classes; more numbers in a matrix or names in a cloud cannot be read
CURVES = {
    "loss": "prediction loss",
    "matching_loss": "matching loss",
    "lr": "learning rate",
    "precision_at_5": "held-out precision@5",
    "effective_rank": "effective rank",
    "target_variance": "variance of held-out target embeddings",
}


@dataclass(frozen=True)
class Caption:
    """The words around a figure.

    Args:
        title: What is shown: measure, dataset, split, number of images.
        footer: How it was made: seed and settings.
    """

    title: str
    footer: str


@dataclass(frozen=True)
class Neighbors:
    """The nearest images of each query, best first.

    Args:
        indices: Their positions among the n images.
        similarities: Their cosine similarities to the query, in [-1, 1].
    """

    indices: Int[np.ndarray, "q k"]
    similarities: Float[np.ndarray, "q k"]


def class_similarity(
    X: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, centered: bool
) -> Float[np.ndarray, "c c"]:
    """Cosine similarity of the means of the classes present, in ascending order of label.

    Args:
        X: Embeddings.
        labels: Class of each row.
        centered: Whether the mean of all embeddings is taken off first. A common offset brings
            all raw similarities near 1.

    A class whose mean vanishes has no direction: its row and column are NaN.
    """
    codes = np.unique(labels, return_inverse=True)[1]
    scale = row_norms(X).mean()
    means = class_means(X, codes)
    if centered:
        means -= class_means(X, np.zeros_like(codes))
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    unit = means / np.where(norms > 1e-9 * scale, norms, np.nan)
    # Rounding takes parallel means just beyond 1.
    return np.clip(unit @ unit.T, -1, 1)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


def literal(text: str, limit: int | None = None) -> str:
    r"""Text as Matplotlib must be given it to draw it as it is.

    Args:
        text: Any text. A character that the font lacks becomes its code, as in ``\u4e2d``.
        limit: Most characters to show. The middle goes, because names differ at their ends.
    """
    shown = "".join(c if ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in text)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[: limit // 2]}…{shown[len(shown) - (limit - 1) // 2 :]}"
    return shown.replace("$", r"\$")


def _short(classes: Sequence[str]) -> list[str]:
    """Class names cut to fit; those that look alike then are told apart by their number."""
    cut = [literal(name, MAX_NAME) for name in classes]
    return [
        name if cut.count(name) == 1 else literal(f"{i} {classes[i]}", MAX_NAME)
        for i, name in enumerate(cut)
    ]


def _wrap(text: str, inches: float, font_size: int) -> str:
    width = int(inches * 72 / (0.66 * font_size))  # bold letters are 0.66 of their height wide
    return "\n".join(literal(line) for line in textwrap.wrap(text, width))


def _figure(caption: Caption, width: float, height: float) -> tuple[Figure, SubFigure]:
    """A figure with its caption, and the part of it that the caption leaves free."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(_wrap(caption.title, width, 11), fontsize=11, fontweight="bold")
    footer = _wrap(caption.footer, width, 7)
    figure.supxlabel(footer, x=0.01, ha="left", fontsize=7, color="#555555")
    return figure, figure.subfigures()


def class_styles(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Color and marker of each class: CIFAR-10's own, petroff10 in order, or a wider map."""
    if set(classes) <= set(CLASS_COLORS):
        return [(CLASS_COLORS[name], "^" if name in VEHICLES else "o") for name in classes]
    colors = PETROFF
    if len(classes) > len(colors):
        wide = matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, len(classes)))
        colors = [to_hex(color) for color in wide]
    return [(colors[i], MARKERS[i % len(MARKERS)]) for i in range(len(classes))]


def _apart(
    centers: Float[np.ndarray, "c 2"],
    sizes: Float[np.ndarray, "c 2"],
    frame: Float[np.ndarray, "2 2"],
) -> Float[np.ndarray, "c 2"]:
    """Centers pushed from each other, along the shorter way, until boxes are apart."""
    order = np.sign(np.subtract.outer(np.arange(len(centers)), np.arange(len(centers))))[..., None]
    for _ in range(3000):  # names heaped up in a corner need them; others are done in a few
        centers = centers.clip(frame[0] + sizes / 2, frame[1] - sizes / 2)
        gaps = centers[:, None] - centers
        overlaps = (sizes[:, None] + sizes) / 2 - np.abs(gaps)
        overlaps = np.where((overlaps > 0).all(axis=-1, keepdims=True) & (order != 0), overlaps, 0)
        if overlaps.min(axis=-1).max() < 1:  # pixel
            break
        shorter = overlaps == overlaps.min(axis=-1, keepdims=True)
        push = overlaps * shorter * np.where(gaps == 0, order, np.sign(gaps))
        centers = centers + 0.3 * push.sum(axis=1)
    return centers


def _clouds(
    clouds: Mapping[str, Float[np.ndarray, "n 2"]],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
    caption: Caption,
) -> tuple[Figure, list[Axes]]:
    """One cloud of points per model, with a legend of the classes' colors and markers."""
    styles, names = class_styles(classes), _short(classes)
    width = 5.6 * len(clouds) + 0.4
    rows = math.ceil(len(names) * (5 * max(map(len, names)) + 25) / (width * 72))
    figure, body = _figure(caption, width, 6.3 + 0.17 * rows)
    axes = list(body.subplots(1, len(clouds), squeeze=False)[0])
    shapes = [MarkerStyle(marker) for _, marker in styles]
    paths = [shape.get_path().transformed(shape.get_transform()) for shape in shapes]
    order = np.random.default_rng(0).permutation(len(labels))  # no class lies on top of the others
    size = float(np.clip(20_000 / len(labels), 4, 40))
    for ax, points in zip(axes, clouds.values(), strict=True):
        colors = [styles[label][0] for label in labels[order]]
        dots = ax.scatter(*points[order].T, s=size, c=colors, alpha=0.8, linewidths=0)
        dots.set_paths([paths[label] for label in labels[order]])
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", markersize=5, label=name)
        for (color, marker), name in zip(styles, names, strict=True)
    ]
    look = {"fontsize": 8, "frameon": False, "handlelength": 1.2, "handletextpad": 0.1}
    look |= {"columnspacing": 1.2, "ncols": math.ceil(len(names) / rows)}
    body.legend(handles=handles, loc="outside lower center", **look)
    return figure, axes


def _name_clouds(
    ax: Axes,
    points: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
) -> None:
    """Write each class's name at its median, or near it with a line. Needs the final layout."""
    present = np.unique(labels)
    if len(present) > MAX_LABELLED:
        return
    names = _short(classes)
    medians = np.stack([np.median(points[labels == label], axis=0) for label in present])
    line = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    font = {"ha": "center", "va": "center", "fontsize": 8.5, "fontweight": "bold"}
    notes = [
        ax.annotate(
            names[label],
            tuple(median),
            (0, 0),
            textcoords="axes fraction",
            arrowprops=line,
            **font,
        )
        for label, median in zip(present, medians, strict=True)
    ]
    # Text's extent alone: an annotation's own would include its line.
    sizes = np.array([Text.get_window_extent(note).size for note in notes]) + 4
    pixels = ax.transData.transform(medians)
    places = _apart(pixels, sizes, ax.bbox.get_points())
    moved = (np.abs(places - pixels) > sizes / 2).any(axis=1)
    fractions = ax.transAxes.inverted().transform(places)
    for note, fraction, far in zip(notes, fractions, moved, strict=True):
        note.set(position=fraction, in_layout=False)
        note.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
        note.arrow_patch.set_visible(bool(far))


@matplotlib.rc_context(STYLE)
def plot_tsne(
    projections: Mapping[str, TsneProjection],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
    caption: Caption,
) -> Figure:
    """Both t-SNE maps, the second turned onto the first; the footer says how to read them."""
    first = next(iter(projections.values())).coordinates
    clouds = {key: align(first, map_.coordinates) for key, map_ in projections.items()}
    footer = f"{caption.footer} Distances between clusters and cluster sizes carry no meaning."
    figure, axes = _clouds(clouds, labels, classes, Caption(caption.title, footer))
    for ax, (key, map_) in zip(axes, projections.items(), strict=True):
        ax.set(aspect="equal", adjustable="datalim", xticks=[], yticks=[])
        quality = f"KL {map_.kl_divergence:.2f}, {map_.kept_neighbors:.0%} of the 10-NN kept"
        if np.isnan(map_.kl_divergence):
            quality = "no t-SNE, principal components instead"
        ax.set_title(f"{MODEL_NAMES[key]}: {quality}", color=MODEL_COLORS[key])
    figure.draw_without_rendering()
    for ax, points in zip(axes, clouds.values(), strict=True):
        _name_clouds(ax, points, labels, classes)
    return figure


@matplotlib.rc_context(STYLE)
def plot_pca(
    projections: Mapping[str, PcaProjection],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
    caption: Caption,
) -> Figure:
    """Scores on the first two components, whose shares of the variance the axes tell."""
    clouds = {key: pca.scores[:, :2] for key, pca in projections.items()}
    figure, axes = _clouds(clouds, labels, classes, caption)
    for ax, (key, pca) in zip(axes, projections.items(), strict=True):
        shares = [*pca.variance_shares[:2], 0.0]  # one-dimensional embeddings have no second
        ax.set(xlabel=f"PC1 ({shares[0]:.1%})", ylabel=f"PC2 ({shares[1]:.1%})")
        ax.set_title(MODEL_NAMES[key], color=MODEL_COLORS[key])
    figure.draw_without_rendering()
    for ax, points in zip(axes, clouds.values(), strict=True):
        _name_clouds(ax, points, labels, classes)
    return figure


def _matrix(ax: Axes, matrix: Float[np.ndarray, "c c"], names: list[str], **colors: Any) -> Any:
    """One matrix with its numbers as an image; ``colors`` are the map and its limits."""
    image = ax.imshow(matrix, **colors)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7.5)
    ax.set_yticks(range(len(names)), names, fontsize=7.5)
    if len(names) <= MAX_LABELLED:
        for row, column in np.argwhere(np.isfinite(matrix)):
            value = matrix[row, column]
            dark = np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)) < 0.5
            number = f"{round(value, 2) + 0.0:.2f}"  # + 0.0 makes -0.00 plain
            font = {"fontsize": min(6.5, 100 / len(names)), "color": "white" if dark else "black"}
            ax.text(column, row, number, ha="center", va="center", **font)
    return image


@matplotlib.rc_context(STYLE)
def plot_similarity_matrices(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
    caption: Caption,
) -> Figure:
    """Cosine similarity of class means, raw above and centered below; then HF - local."""
    names = [_short(classes)[label] for label in np.unique(labels)]
    side, columns = float(np.clip(0.33 * len(names), 2.6, 5)), 2 * len(embeddings) - 1
    figure, body = _figure(caption, columns * side + 2.4, 2 * side + 1.6)
    axes = body.subplots(2, columns, squeeze=False, sharex=True, sharey=True)
    for row, centered in enumerate((False, True)):
        matrices = [class_similarity(X, labels, centered=centered) for X in embeddings.values()]
        low = min(np.nan_to_num(matrix, nan=1).min() for matrix in matrices)
        colors = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if centered else {"vmin": low, "vmax": 1}
        for ax, key, matrix in zip(axes[row], embeddings, matrices, strict=False):
            image = _matrix(ax, matrix, names, **colors)
            ax.set_title(f"{MODEL_NAMES[key]}, {'centred' if centered else 'raw'}")
            ax.title.set_color(MODEL_COLORS[key])
        body.colorbar(image, ax=list(axes[row, : len(matrices)]), shrink=0.9)
        if len(matrices) == 2:
            difference = matrices[1] - matrices[0]
            largest = max(np.nan_to_num(np.abs(difference)).max(), 0.01)
            limits = {"cmap": "PuOr_r", "vmin": -largest, "vmax": largest}
            image = _matrix(axes[row, 2], difference, names, **limits)
            axes[row, 2].set_title(f"HF - local, {'centred' if centered else 'raw'}")
            body.colorbar(image, ax=axes[row, 2], shrink=0.9)
    return figure


@matplotlib.rc_context(STYLE)
def plot_variance_explained(projections: Mapping[str, PcaProjection], caption: Caption) -> Figure:
    """Variance per component, cumulative, and cumulative against the share of d."""
    figure, body = _figure(caption, 12.5, 5.0)
    axes = body.subplots(1, 3)
    for key, pca in projections.items():
        shares, d = pca.variance_shares, len(pca.variance_shares)
        ranks, sums = np.arange(1, d + 1), np.cumsum(shares)
        marks = [k for k in (10, 50) if k <= d]
        told = "".join(f", {sums[k - 1]:.1%} in {k} PCs" for k in marks)
        labels = (f"{MODEL_NAMES[key]} (d = {d})", MODEL_NAMES[key] + told, MODEL_NAMES[key])
        curves = ((ranks, shares), (ranks, sums), (ranks / d, sums))
        for ax, (x, y), label in zip(axes, curves, labels, strict=True):
            (line,) = ax.plot(x, y, MODEL_LINES[key], color=MODEL_COLORS[key], label=label)
            line.set(marker=MODEL_MARKERS[key], markevery=[k - 1 for k in marks] or [0])
    titles = ("Each component", "Cumulative", "Cumulative, by share of d")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, ylabel="share of the variance", ylim=(0, None))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False)
    for ax in axes[:2]:
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 2000) if k <= ax.dataLim.x1]
        ax.set(xscale="log", xlabel="principal components (log scale)")
        ax.set_xticks(ticks, map(str, ticks))
        ax.set_xticks([], minor=True)
    axes[2].xaxis.set_major_formatter(PercentFormatter(1))
    axes[2].set_xlabel("principal components / d")
    return figure


def _picture(ax: Axes, image: UInt8[np.ndarray, "3 h w"], left: float, top: float) -> Rectangle:
    """An image on the ground of a unit square, its pixels as squares; gives its frame."""
    _, height, width = image.shape
    w, h = width / max(height, width), height / max(height, width)
    left, top = left + (1 - w) / 2, top + 1 - h
    # Photographs are shrunk, where the nearest pixel would flicker.
    smooth = "nearest" if max(height, width) <= 128 else "auto"
    extent = (left, left + w, top + h, top)
    ax.imshow(image.transpose(1, 2, 0), extent=extent, interpolation=smooth)
    return ax.add_patch(Rectangle((left, top), w, h, fill=False, linewidth=0))


@matplotlib.rc_context(STYLE)
def plot_neighbors(
    neighbors: Mapping[str, Neighbors],
    queries: Int[np.ndarray, " q"],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
    image_of: Callable[[int], UInt8[np.ndarray, "3 h w"]],
    caption: Caption,
) -> Figure:
    """One row per query: the image, then the nearest images of each model.

    Args:
        neighbors: What each model found for the queries.
        queries: Positions of the queries among the n images.
        labels: Class of each image.
        classes: Names of the classes.
        image_of: The pixels of the image at a position.
        caption: Words around the figure.
    """
    gap, step = 0.3, 1.45  # inches: before each model's images, and from one row to the next
    widths = [found.indices.shape[1] * 1.06 + gap for found in neighbors.values()]
    figure, body = _figure(caption, max(1 + sum(widths), 4) + 0.2, step * len(queries) + 1.1)
    ax = body.subplots()
    names = _short(classes)
    ax.text(0.5, -0.12, "query", ha="center", fontweight="bold")
    for row, query in enumerate(queries):
        _picture(ax, image_of(int(query)), 0.0, step * row)
        ax.text(0.5, step * row + 1.05, names[labels[query]], ha="center", va="top", fontsize=7.5)
    for left, (key, found) in zip(np.cumsum([1, *widths]) + gap, neighbors.items(), strict=False):
        title = f"{MODEL_NAMES[key]}: nearest by cosine similarity"
        digits = similarity_digits(found.similarities)
        ax.text(left, -0.12, title, color=MODEL_COLORS[key], fontweight="bold")
        for (row, rank), index in np.ndenumerate(found.indices):
            x, y = left + 1.06 * rank, step * row
            same = labels[index] == labels[queries[row]]
            color, sign = ("#1a7f37", "✓") if same else ("#b3261e", "✗")
            _picture(ax, image_of(int(index)), x, y).set(edgecolor=color, linewidth=2.5)
            words = f"{sign} {found.similarities[row, rank]:.{digits}f}\n{names[labels[index]]}"
            ax.text(x + 0.5, y + 1.05, words, ha="center", va="top", fontsize=7.5, color=color)
    ax.set(xlim=(-0.05, 1 + sum(widths) + 0.05), ylim=(step * len(queries), -0.35), aspect="equal")
    ax.set_axis_off()
    return figure


def similarity_digits(similarities: Float[np.ndarray, "m k"]) -> int:
    """Decimals to print of neighbors' cosines: two, or four where most would print as 1.00."""
    return 4 if similarities.size and np.median(similarities) > 0.98 else 2


@matplotlib.rc_context(STYLE)
def plot_training_curves(
    rows: Sequence[Mapping[str, float | int | None]], caption: Caption
) -> Figure:
    """A small panel for each column of `CURVES` that the training log has, over the epochs.

    Args:
        rows: The log, one mapping per epoch, each with ``"epoch"``. A value that is absent, None
            or not finite was not measured in that epoch.
        caption: Words around the figure.
    """
    epochs = np.array([row["epoch"] for row in rows])
    # None becomes NaN, which is not drawn.
    values = {key: np.array([row.get(key) for row in rows], dtype=np.float64) for key in CURVES}
    curves = {key: y for key, y in values.items() if np.isfinite(y).any()}
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure, body = _figure(caption, 4 * columns + 0.2, 2.6 * lines + 0.7)
    axes = body.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for ax, (key, y) in zip(axes, curves.items(), strict=False):
        measured = np.isfinite(y)
        sparse = "." if measured.sum() <= 60 else ""
        ax.plot(epochs[measured], y[measured], color=MODEL_COLORS["local"], marker=sparse)
        ax.set(title=CURVES[key], xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.tick_params(labelbottom=True)
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    return figure
