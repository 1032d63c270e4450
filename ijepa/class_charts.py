"""Panels in which every class has a place: matrices, bars, and differences with intervals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from ijepa.charts import WIDTH, drawing, line, text
from ijepa.markup import Markup, Number, element
from ijepa.narrative import number
from ijepa.uncertainty import Estimate

MAX_NAME = 13
"""Characters of a class name beside a row."""
BAR = 250
"""Length of a bar of 100 %."""
MAX_NUMBERED = 12
"""Classes whose numbers fit into the cells of a matrix."""


def short(name: str) -> str:
    """A class name cut in the middle, because names differ at their ends."""
    name = " ".join(name.split())
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2) :]}"


def shade(value: float, limit: float) -> tuple[str, str]:
    """Fill, from blue over white to red, and the colour of a number that can be read on it."""
    part = min(abs(value) / limit, 1.0)
    far = np.array([178, 56, 42]) if value >= 0 else np.array([36, 93, 166])
    rgb = np.array([250, 249, 246]) * (1 - part) + far * part
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "#{:02x}{:02x}{:02x}".format(*rgb.round().astype(int)), (
        "#000000" if luminance > 0.18 else "#ffffff"
    )


def matrix_panel(
    title: str,
    matrix: Float[np.ndarray, "c c"],
    names: Sequence[str],
    limits: tuple[float, float],
    digits: int,
) -> Markup:
    """A matrix with the numbers in its cells where they fit.

    Args:
        title: Words above it.
        matrix: Its values; NaN cells get a dash.
        names: Of rows and columns.
        limits: The value drawn white, and the distance from it that has the full colour.
        digits: Of the numbers in the cells, which are in hundredths.
    """
    left, top = 96, 120
    cell = (WIDTH - left - 2) / len(names)
    middle, span = limits
    marks = [text(0, 16, title, "panel")]
    for position, name in enumerate(names):
        centre = cell * (position + 0.5)
        marks.append(text(left - 6, top + centre + 4, short(name), "tick", "end"))
        turned = element("text", short(name), transform="rotate(-90)", class_="tick")
        marks.append(
            element("g", turned, transform=f"translate({left + centre + 4:.1f} {top - 6})")
        )
    for (row, column), value in np.ndenumerate(matrix):
        x, y = left + cell * column, top + cell * row
        known = math.isfinite(value)
        fill, ink = shade(value - middle, span) if known else ("none", "")
        marks.append(element("rect", x=x, y=y, width=cell, height=cell, fill=fill, class_="cell"))
        if len(names) <= MAX_NUMBERED:
            shown = f"{round(100 * value, digits) + 0.0:.{digits}f}" if known else "–"
            font = min(11.5, cell * 0.4)
            look = {"fill": ink} if known else {"class_": "tick"}
            marks.append(
                element(
                    "text",
                    shown.replace("-", "−"),
                    x=x + cell / 2,
                    y=y + cell / 2 + font * 0.36,
                    font_size=font,
                    text_anchor="middle",
                    **look,
                )
            )
    return drawing(title, top + cell * len(names) + 4, *marks)


def precision_panel(
    title: str, names: Sequence[str], estimates: Mapping[str, Sequence[Estimate]]
) -> Markup:
    """A bar per class and model, with interval and number at its end; HF's bars are hatched."""
    left, step = 100, 17 * len(estimates) + 9
    bottom = 30 + step * len(names)
    marks = [text(0, 16, title, "panel")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + BAR * share
        marks.append(line(x, 26, x, bottom - 6, "grid" if share else "axis"))
        marks.append(text(x, bottom + 10, f"{share:.0%}", "tick", "middle"))
    for position, name in enumerate(names):
        top = 30 + step * position
        marks.append(text(left - 8, top + step / 2 - 2, short(name), "label small", "end"))
        for offset, model in enumerate(estimates):
            marks += bar(model, estimates[model][position], left, top + 17 * offset)
    return drawing(title, bottom + 16, *marks)


def bar(model: str, estimate: Estimate, left: Number, top: Number) -> list[Markup]:
    """A bar of a share; the interval has a halo, because half of it lies on the bar."""
    width = BAR * estimate.value if math.isfinite(estimate.value) else 0
    marks = [element("rect", x=left, y=top, width=width, height=13, class_=f"bar {model}")]
    if model == "hf":
        hatch = {"fill": "url(#hatch)", "class_": "hatch"}
        marks.append(element("rect", x=left, y=top, width=width, height=13, **hatch))
    end = left + width
    if math.isfinite(estimate.se):
        low, end = (left + BAR * min(max(bound, 0.0), 1.0) for bound in estimate.ci95)
        marks += [line(low, top + 6.5, end, top + 6.5, look) for look in ("halo", "span")]
    shown = number("precision_at_5", estimate.value)
    return [*marks, text(end + 6, top + 11, shown, f"at {model}")]


def difference_panel(title: str, names: Sequence[str], estimates: Sequence[Estimate]) -> Markup:
    """HF - local of each class with its 95 % interval about the line of no difference."""
    left, right, step = 100, 318, 43
    reach = [abs(bound) for e in estimates for bound in (e.value, *e.ci95) if math.isfinite(bound)]
    limit = math.ceil(20 * max([*reach, 0.05])) / 20
    middle, scale = (left + right) / 2, (right - left) / 2 / limit
    bottom = 30 + step * len(names)
    marks = [text(0, 16, title, "panel")]
    for bound in (-limit, 0, limit):
        x = middle + scale * bound
        marks.append(line(x, 26, x, bottom - 6, "axis" if bound == 0 else "grid"))
        words = f"{100 * bound:+.0f}" if bound else "0"
        marks.append(text(x, bottom + 10, words, "tick", "middle"))
    for position, (name, estimate) in enumerate(zip(names, estimates, strict=True)):
        y = 30 + step * position + 15.5
        marks.append(text(left - 8, y + 4, short(name), "label small", "end"))
        shown = number("precision_at_5", estimate.value, "+").rstrip("%")
        if math.isfinite(estimate.se):
            low, high = (middle + scale * bound for bound in estimate.ci95)
            marks.append(line(low, y, high, y, "whisker"))
            low_high = [number("precision_at_5", bound, "+").rstrip("%") for bound in estimate.ci95]
            marks.append(text(WIDTH, y + 14, f"[{', '.join(low_high)}]", "tick", "end"))
        if math.isfinite(estimate.value):
            diamond = middle + scale * estimate.value
            marks.append(element("circle", cx=diamond, cy=y, r=4.5, class_="fill ink"))
        marks.append(text(WIDTH, y, shown, "value small", "end"))
    return drawing(title, bottom + 16, *marks)


def hatching() -> Markup:
    """The pattern on HF's bars, defined once for the page."""
    stripe = element("path", d="M0 5L5 0", class_="stripe")
    pattern = element(
        "pattern", stripe, id="hatch", width=5, height=5, patternUnits="userSpaceOnUse"
    )
    return element("svg", element("defs", pattern), class_="defs", aria_hidden="true")
