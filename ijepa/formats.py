"""Numbers and names as they are printed. Every number that is read is rounded here."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ijepa.uncertainty import MIN_HALVED, MIN_IMAGES_PER_CLASS, Estimate

P5 = "precision_at_5"
PERCENT = {"variance_10pc", "variance_50pc", "precision_at_1", P5, "mutual_knn", "ratio"}
PERCENT |= {"linear", "knn", "share"}
DIGITS = {"embedding_dim": 0, "components_80": 0, "ratio": 0, "share": 0, "effective_rank": 1}
DIGITS |= {"quotient": 2}
"""Decimals of metrics with neither one (percentages) nor three (all others)."""
MISSING = "n/a"
NO_INTERVALS = (
    "Neighbors, silhouettes and spectrum have no intervals and no verdicts: they need two classes "
    f"and {MIN_HALVED:.0%} of the images in classes of at least {MIN_IMAGES_PER_CLASS}."
)
MAX_NAMES = 6  # in a sentence


def number(metric: str, value: float, sign: str = "", extra: int = 0) -> str:
    """A value with the decimals and the percent sign of its metric.

    A `sign` of "+" prints that of positive values too; `extra` decimals come after the usual ones.
    """
    if not math.isfinite(value):
        return MISSING
    percent = metric in PERCENT
    digits = DIGITS.get(metric, 1 if percent else 3) + extra
    # Halves round up, as in page.js, whatever the last bit of a mean is. Adding 0 turns a negative
    # zero, left by rounding, into a plain one.
    value = round((100 * value if percent else value) + 1e-9, digits) + 0.0
    return f"{value:{sign},.{digits}f}" + "%" * percent


def interval(metric: str, estimate: Estimate, sign: str = "") -> str:
    """The value and its 95% interval, if any.

    A small error gets up to three more digits, and so does a signed bound that would read as 0.
    """
    if not math.isfinite(estimate.se):
        return number(metric, estimate.value, sign)
    percent = metric in PERCENT
    usual, unit = DIGITS.get(metric, 1 if percent else 3), 100 if percent else 1
    small = [unit * abs(x) for x in (estimate.se, *(estimate.ci95 if sign else ())) if x]
    digits = math.ceil(-math.log10(min(small))) if small else 0
    extra = min(max(digits - usual, 0), 3)
    low, high = (number(metric, bound, sign, extra).rstrip("%") for bound in estimate.ci95)
    return f"{number(metric, estimate.value, sign, extra)} [{low}, {high}]"


def gap(metric: str, difference: Estimate) -> str:
    """A difference with its interval; percentages differ by points."""
    return in_points(interval(metric, difference, "+"))


def in_points(shown: str) -> str:
    """A printed percentage as points, for differences and deviations."""
    return shown.replace("%", " points")


def p_value(p: float) -> str:
    """A p-value with two significant digits."""
    return f"{p:.2g}" if math.isfinite(p) else MISSING


def label(role: str) -> str:
    """The word for a model or reference, such as "HF" or "random weights"."""
    return "HF" if role == "hf" else role.replace("_", " ")


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def listed(names: Sequence[str]) -> str:
    """Names as `a, b and c`, at most `MAX_NAMES` of them."""
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        shown[-1] = f"{len(names) - MAX_NAMES + 1} more"
    return " and ".join(part for part in (", ".join(shown[:-1]), *shown[-1:]) if part)


def similarity_digits(similarities: Float[np.ndarray, "m k"]) -> int:
    """Decimals to print of neighbors' cosines: two, or four where most would print as 1.00."""
    return 4 if similarities.size and np.median(similarities) > 0.98 else 2
