"""HTML and SVG as text, in which nothing but `Markup` is taken as it is."""

import html
import math

Number = float | int
"""Places and sizes in a drawing."""


class Markup(str):
    """Text that is markup already; any other string is escaped when it enters an element."""

    __slots__ = ()


VOID = {"input", "img", "meta", "br"}


def element(tag: str, *content: str, **attributes: str | Number) -> Markup:
    """One element.

    Args:
        tag: Its name.
        *content: Text, which is escaped, and `Markup`, which is not.
        **attributes: Values are escaped. Names are given with `_` for `-`, and `class_` for class.

    Raises:
        ValueError: If an attribute is a number that is not finite.
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{attribute(value)}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{named}>") if tag in VOID else _closed(tag, named, join(*content))


def _closed(tag: str, attributes: str, content: Markup) -> Markup:
    return Markup(f"<{tag}{attributes}>{content}</{tag}>")


def attribute(value: str | Number) -> str:
    """An attribute's value, escaped; numbers with at most two decimals."""
    if isinstance(value, str):
        return html.escape(value)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number for an attribute, got {value}")
    return f"{value:.2f}".rstrip("0").rstrip(".")


def join(*content: str) -> Markup:
    """Contents one after the other, escaped where they are not markup."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in content))


def breakable(text: str) -> Markup:
    """Text, escaped, that a narrow column breaks after a slash, as one reads paths."""
    return Markup(html.escape(text).replace("/", "/<wbr>"))


def table(rows: list[list[str]], caption: str) -> Markup:
    """Cells as a table, its header first; the first cell of a row is the row's header."""
    head = [element("th", cell, scope="col") for cell in rows[0]]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows[1:]
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", *head)),
            element("tbody", *body),
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=caption,
    )
