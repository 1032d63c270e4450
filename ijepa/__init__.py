"""Compare frozen vision encoders, and train a small I-JEPA to compare.

One line of data runs through the package::

    images -> encoders -> embeddings -> metrics, uncertainty, agreement -> comparison -> report

Five functions are enough to use it from Python: `load_split`, `load_encoder`, `extract`, `compare`
and `write_report`. They are imported when first used, so that `import ijepa` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ijepa.comparison import compare
    from ijepa.data import load_split
    from ijepa.embeddings import extract
    from ijepa.encoders import load_encoder
    from ijepa.report import write_report

__version__ = "0.2.0"
__all__ = ["compare", "extract", "load_encoder", "load_split", "write_report"]

MODULES = {
    "compare": "ijepa.comparison",
    "extract": "ijepa.embeddings",
    "load_encoder": "ijepa.encoders",
    "load_split": "ijepa.data",
    "write_report": "ijepa.report",
}
"""Where each exported function is defined."""


def __getattr__(name: str) -> Any:
    """Import an exported function when it is first used."""
    if name not in MODULES:
        raise AttributeError(f"module 'ijepa' has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
