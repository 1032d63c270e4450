"""The figures of the page as SVG: numbers in, markup out, colours left to the style sheet.

Every panel is 400 units wide, so that its words stay readable on a telephone and several fit side
by side on a desk. A number that is not defined is left out or shown as a dash.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from ijepa.comparison import Comparison
from ijepa.markup import Markup, Number, attribute, element, join
from ijepa.narrative import interval, number
from ijepa.projections import PcaProjection
from ijepa.uncertainty import Estimate

WIDTH = 400
NAMES = {"local": "Local", "hf": "HF"}
REFERENCES = {"pixels": "Raw pixels", "random_weights": "Random weights"}
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
"""Steps of an axis of shares."""


def drawing(name: str, height: Number, *content: str) -> Markup:
    """An SVG of the panels' width with its name for those who cannot see it."""
    return element(
        "svg",
        element("title", name),
        *content,
        viewBox=f"0 0 {WIDTH} {attribute(height)}",
        role="img",
        aria_label=name,
    )


def text(x: Number, y: Number, words: str, class_: str = "", anchor: str = "start") -> Markup:
    """Words with their baseline at a point."""
    return element("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def marker(model: str, x: Number, y: Number, size: Number = 5) -> Markup:
    """A model's or a reference's sign: its shape tells it apart without colour."""
    if model == "local":
        return element("circle", cx=x, cy=y, r=size, class_="fill local")
    path = {
        "hf": f"M{x - size:.1f} {y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z",
        "pixels": f"M{x:.1f} {y - 1.3 * size:.1f}l{1.3 * size} {1.3 * size}"
        f"l{-1.3 * size} {1.3 * size}l{-1.3 * size} {-1.3 * size}z",
    }.get(model, f"M{x:.1f} {y - 1.2 * size:.1f}l{1.2 * size} {2.1 * size}h{-2.4 * size}z")
    return element("path", d=path, class_=f"fill {model}" if model == "hf" else "open")


def retrieval_strip(comparison: Comparison) -> Markup:
    """Precision@5 of the models, with intervals, over those of the references and of chance."""
    rows: list[tuple[str, str, Estimate]] = []
    for name, metrics in comparison.metrics.items():
        rows.append((name, NAMES[name], metrics["precision_at_5"]))
    missing = (math.nan, math.nan)
    for name, values in comparison.references.items():
        value = Estimate(values["precision_at_5"], math.nan, missing)
        rows.append((name, REFERENCES[name], value))
    rows.append(("chance", "Chance", Estimate(comparison.chance_precision, math.nan, missing)))
    left, right, step = 126, 338, 27
    scale = right - left
    bottom = step * len(rows) + 4
    marks = [
        join(
            line(left + scale * share, 2, left + scale * share, bottom, "grid"),
            text(left + scale * share, bottom + 15, f"{share:.0%}", "tick", "middle"),
        )
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    for position, (name, title, estimate) in enumerate(rows):
        y = step * (position + 0.5) + 2
        class_ = f"label {name}" if name in NAMES else "label"
        marks.append(text(left - 12, y + 4.5, title, class_, "end"))
        shown = number("precision_at_5", estimate.value)
        marks.append(text(WIDTH, y + 4.5, shown, "value", "end"))
        if not math.isfinite(estimate.value):
            continue
        if math.isfinite(estimate.se):
            low, high = (left + scale * float(np.clip(bound, 0, 1)) for bound in estimate.ci95)
            marks.append(line(low, y, high, y, f"whisker {name}"))
        marks.append(marker(name, left + scale * estimate.value, y))
    said = "; ".join(f"{title} {interval('precision_at_5', value)}" for _, title, value in rows)
    return drawing(f"Precision@5: {said}", bottom + 20, *marks)


def curve_panel(
    title: str,
    axis: str,
    curves: Mapping[str, tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]],
    *,
    logarithmic: bool,
) -> Markup:
    """One curve of shares per model, with signs and numbers at 10 and 50 components."""
    left, right, top, bottom = 46, 388, 34, 236
    end = max(float(x[-1]) for x, _ in curves.values())
    start = 1.0 if logarithmic else 0.0
    largest = max(float(y.max()) for _, y in curves.values())
    step = next(size for size in TICKS if largest <= 5 * size)
    ticks = np.arange(math.ceil(max(largest, step) / step - 1e-6) + 1) * step
    highest = float(ticks[-1])

    rising = all(y[-1] > y[0] for _, y in curves.values())

    def place(x: Number, y: Number) -> tuple[Number, Number]:
        part = math.log(x) / math.log(max(end, 2)) if logarithmic else x / max(end, 1e-9)
        return left + (right - left) * part, bottom - (bottom - top) * y / highest

    marks = [text(left, 18, title, "panel"), text(right, bottom + 34, axis, "tick", "end")]
    for share in ticks:
        y = place(1, float(share))[1]
        marks.append(line(left, y, right, y, "grid"))
        marks.append(text(left - 6, y + 4, f"{100 * share:g}%", "tick", "end"))
    marks += [
        text(place(x, 0)[0], bottom + 17, f"{x:g}" if logarithmic else f"{x:.0%}", "tick", "middle")
        for x in ((1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if logarithmic else (0, 0.5, 1))
        if start <= x <= end
    ]
    for name, (x, y) in curves.items():
        keep = np.unique(np.geomspace(1, len(x), 160).round().astype(int)) - 1
        points = " ".join("{:.1f},{:.1f}".format(*place(float(x[i]), float(y[i]))) for i in keep)
        marks.append(element("polyline", points=points, class_=f"curve {name}"))
    for k in (10, 50):
        spots = {
            n: place(float(x[k - 1]), float(y[k - 1]))
            for n, (x, y) in curves.items()
            if k <= len(x)
        }
        marks += [marker(name, *spot, 4) for name, spot in spots.items()]
        if logarithmic:
            told = {name: f"{100 * curves[name][1][k - 1]:.1f}%" for name in spots}
            marks += curve_numbers(spots, told, rising, bottom - 4)
    return drawing(f"{title}; {axis}", bottom + 42, *marks)


def curve_numbers(
    spots: Mapping[str, tuple[Number, Number]],
    told: Mapping[str, str],
    rising: bool,
    lowest: Number,
) -> list[Markup]:
    """Numbers beside the curves: the upper curve's on their upper side, the other's below."""
    upper = min(spots, key=lambda name: spots[name][1], default="")
    marks = []
    for name, (x, y) in spots.items():
        side = -1 if (name == upper) == rising else 1
        height = y - 7 if name == upper else min(y + 15, lowest)
        anchor = "end" if side < 0 else "start"
        marks.append(text(x + 7 * side, height, told[name], f"at {name}", anchor))
    return marks


def variance_panels(spectra: Mapping[str, PcaProjection]) -> list[Markup]:
    """Variance by component, cumulative, and cumulative against the share of all dimensions."""
    shares = {name: pca.variance_shares for name, pca in spectra.items()}
    ranks = {name: np.arange(1, len(y) + 1, dtype=np.float64) for name, y in shares.items()}
    sums = {name: np.cumsum(y) for name, y in shares.items()}
    log = "principal components (log scale)"
    widths = {name: x / len(x) for name, x in ranks.items()}
    return [
        curve_panel("Each component", log, paired(ranks, shares), logarithmic=True),
        curve_panel("Cumulative", log, paired(ranks, sums), logarithmic=True),
        curve_panel(
            "Cumulative, by share of d",
            "principal components / d",
            paired(widths, sums),
            logarithmic=False,
        ),
    ]


def paired(
    first: Mapping[str, Float[np.ndarray, " _"]], second: Mapping[str, Float[np.ndarray, " _"]]
) -> dict[str, tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]]:
    """Both values of each key."""
    return {name: (first[name], second[name]) for name in first}
