"""The page's figures: panels with a title, a line on how to read them, and their numbers."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from ijepa.charts import NAMES, variance_panels
from ijepa.class_charts import difference_panel, matrix_panel, precision_panel
from ijepa.comparison import Comparison
from ijepa.markup import Markup, element, table
from ijepa.narrative import MISSING, interval
from ijepa.plots import class_similarity
from ijepa.projections import PcaProjection
from ijepa.uncertainty import Estimate

MAX_ROWS = 40
"""Classes in the bars; of more, those that differ most are shown."""
MAX_MATRIX = 40
"""Classes in a matrix; more give cells too small to see."""
MAX_TABLE = 20
RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Components whose variance the table tells."""


def figures(
    comparison: Comparison, spectra: Mapping[str, PcaProjection], classes: Sequence[str]
) -> list[Markup]:
    """Every figure in the order of the page; a new one is a function and a line here."""
    return [
        class_figure(comparison, classes),
        similarity_figure(comparison, classes),
        variance_figure(spectra),
    ]


def figure(name: str, title: str, reading: str, link: tuple[str, str], *content: str) -> Markup:
    """A figure with its caption above.

    Args:
        name: Its anchor.
        title: What is shown.
        reading: One line on how to read it.
        link: Anchor and name of the definition.
        *content: Panels and tables.
    """
    anchor, words = link
    return element(
        "figure",
        element(
            "figcaption",
            element("h3", title),
            element(
                "p",
                element("b", "How to read it. "),
                reading,
                " Definition: ",
                element("a", words, href=f"#{anchor}"),
                ".",
            ),
        ),
        *content,
        id=name,
    )


def panels(parts: Sequence[Markup]) -> Markup:
    """Drawings side by side where there is room."""
    return element("div", *parts, class_="panels")


def legend(looks: Mapping[str, str]) -> Markup:
    """How each model is drawn, in its colour and in words."""
    entries = [
        element("span", f"{NAMES[name]}: {look}", class_=name) for name, look in looks.items()
    ]
    return element("p", *entries, class_="legend")


def numbers(*tables: Markup) -> Markup:
    """A figure's numbers, folded."""
    return element("details", element("summary", "The numbers"), *tables)


def class_figure(comparison: Comparison, classes: Sequence[str]) -> Markup:
    """Precision@5 by class, and the differences with their intervals."""
    labels = next(iter(comparison.analyses.values())).labels
    present = np.unique(labels)
    found = {row["label"]: row["difference"] for row in comparison.per_class}
    order, note = shown_classes([found.get(int(label)) for label in present])
    names = [" ".join(classes[present[i]].split()) for i in order]
    bars = {
        name: [estimates[i] for i in order]
        for name, estimates in comparison.class_precision.items()
    }
    parts = [precision_panel("Precision@5 by class", names, bars)]
    rows = [["Class", *(NAMES[name] for name in bars)]]
    told = [
        [interval("precision_at_5", e) for e in line] for line in zip(*bars.values(), strict=True)
    ]
    body = [[name, *line] for name, line in zip(names, told, strict=True)]
    reading = "Longer bars are better; the thin line at a bar's end is its 95 % interval."
    if found:
        estimates = [found[int(present[i])] for i in order]
        parts.append(difference_panel("HF - local, points, 95 % interval", names, estimates))
        rows[0].append("HF - local [95 %]")
        for line, estimate in zip(body, estimates, strict=True):
            line.append(interval("precision_at_5", estimate, "+"))
        reading += " On the right, only an interval that leaves out 0 shows a difference."
    return figure(
        "by-class",
        "Retrieval by class",
        reading + note,
        ("def-precision", "precision@5"),
        legend({name: ("■ plain", "▨ hatched")[name == "hf"] for name in bars}),
        panels(parts),
        numbers(table(rows + body, "Precision@5 by class")),
    )


def shown_classes(differences: Sequence[Estimate | None]) -> tuple[list[int], str]:
    """Positions of the classes to show, all or those that differ most, and a note on it."""
    count = len(differences)
    if count <= MAX_ROWS:
        return list(range(count)), ""
    size = [-abs(d.value) if d else 0.0 for d in differences]
    most = sorted(np.argsort(size, kind="stable")[:MAX_ROWS].tolist())
    which = "that differ most" if differences[0] else "that come first"
    return most, f" Of {count} classes the {MAX_ROWS} {which} are shown."


def similarity_figure(comparison: Comparison, classes: Sequence[str]) -> Markup:
    """Cosine similarity of class means: raw and centred; local, HF and the difference."""
    analyses = comparison.analyses
    labels = next(iter(analyses.values())).labels
    names = [" ".join(classes[label].split()) for label in np.unique(labels)]
    reading = (
        "A cell compares the mean embeddings of two classes, in hundredths: 100 is the same "
        "direction (red), negative is opposed (blue). Centred matrices tell classes apart; raw "
        "ones are near 100 everywhere. Differences have a colour scale of their own."
    )
    link = ("def-similarity", "class similarity")
    title = "Which classes lie close together"
    if len(names) > MAX_MATRIX:
        return figure(
            "similarity",
            title,
            f"{len(names)} classes are too many for cells that can be seen here; the picture "
            "similarity_matrices.png beside this file shows them.",
            link,
        )
    rows, tables = [], []
    for centered in (True, False):
        matrices = {
            name: class_similarity(analysis.embeddings, labels, centered=centered)
            for name, analysis in analyses.items()
        }
        rows.append(panels(matrix_row(matrices, names, centered=centered)))
        tables += [
            table(matrix_rows(matrix, names), f"{NAMES[name]}, {kind(centered=centered)}")
            for name, matrix in matrices.items()
        ]
    content = [*rows, numbers(*tables)] if len(names) <= MAX_TABLE else rows
    return figure("similarity", title, reading, link, *content)


def kind(*, centered: bool) -> str:
    """Word for a matrix."""
    return "centred" if centered else "raw"


def matrix_row(
    matrices: Mapping[str, Float[np.ndarray, "c c"]], names: Sequence[str], *, centered: bool
) -> list[Markup]:
    """The models' matrices on one scale, and their difference on its own."""
    low = min(float(np.nan_to_num(matrix, nan=1).min()) for matrix in matrices.values())
    limits = (0.0, 1.0) if centered else (low, max(1 - low, 0.01))
    parts = [
        matrix_panel(f"{NAMES[name]}, {kind(centered=centered)}", matrix, names, limits, 0)
        for name, matrix in matrices.items()
    ]
    if len(matrices) == 2:
        difference = matrices["hf"] - matrices["local"]
        largest = max(float(np.nan_to_num(np.abs(difference)).max()), 0.01)
        title = f"HF - local, {kind(centered=centered)}"
        digits = 0 if largest >= 0.1 else 1
        parts.append(matrix_panel(title, difference, names, (0.0, largest), digits))
    return parts


def matrix_rows(matrix: Float[np.ndarray, "c c"], names: Sequence[str]) -> list[list[str]]:
    """A matrix as the cells of a table."""
    cells = [[f"{v + 0.0:.3f}" if np.isfinite(v) else MISSING for v in line] for line in matrix]
    return [
        ["Class", *names],
        *([name, *line] for name, line in zip(names, cells, strict=True)),
    ]


def variance_figure(spectra: Mapping[str, PcaProjection]) -> Markup:
    """How the variance is spread over principal components."""
    shares = {name: pca.variance_shares for name, pca in spectra.items()}
    longest = max(len(y) for y in shares.values())
    rows = [["Components"]]
    for name in shares:
        rows[0] += [f"{NAMES[name]}: this one", f"{NAMES[name]}: up to here"]
    for k in (k for k in RANKS if k <= longest):
        line = [str(k)]
        for y in shares.values():
            known = k <= len(y)
            line += [f"{y[k - 1]:.2%}" if known else MISSING]
            line += [f"{y[:k].sum():.1%}" if known else MISSING]
        rows.append(line)
    looks = {"local": "● solid", "hf": "■ dashed"}
    signs = {name: f"{looks[name]}, d = {len(y)}" for name, y in shares.items()}
    return figure(
        "variance",
        "How the variance is spread",
        "A curve that rises early puts its variance into few components; that is a shape, not a "
        "quality. Signs and numbers stand at 10 and 50 components.",
        ("def-variance", "explained variance"),
        legend(signs),
        panels(variance_panels(spectra)),
        numbers(table(rows, "Share of the variance by number of components")),
    )
