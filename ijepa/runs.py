"""What a training run leaves in its folder for others, and how another run begins there."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa.checkpoint import WEIGHTS, StateDict, load_checkpoint, load_predictor
from ijepa.errors import UserError
from ijepa.files import write_text
from ijepa.model import ViTConfig

CHECKPOINT, LOG = "checkpoint_latest.pt", "training_log.csv"
NORMALIZATION = (0.5, 0.5)
"""Mean and deviation of every channel that `ijepa.augmentation.standardize` takes."""
COLUMNS = (
    *("epoch", "loss", "matching_loss", "lr", "momentum", "weight_decay", "seconds"),
    *("heldout_precision_at_5", "effective_rank", "target_variance"),
)
# Above these a log is none of ours.
LARGEST_LOG, LARGEST_VALUE = 2**24, 1e9
FACTS = (
    *("epochs", "seconds", "dataset", "num_images", "device", "dtype", "processes", "torch"),
    *("git_commit", "command", "recipe"),
)
"""What a checkpoint keeps of the runs before its own."""
HINT = "give the folder that a run of scripts/train_ijepa.py ended in"

Rows = list[dict[str, int | float]]


@dataclass(frozen=True)
class Start:
    """Where a run begins that goes on from another."""

    config: ViTConfig
    weights: dict[str, StateDict]
    """`context`, `target` and, where the checkpoint has it, `predictor`."""
    rows: Rows
    """The log so far, one row per epoch."""
    earlier_runs: list[dict[str, Any]]
    """`FACTS` of the runs that made the weights, oldest first."""


def load_start(folder: Path) -> Start:
    """The networks, the log and the provenance of the run that ended in a folder.

    Raises:
        UserError: If checkpoint or log are missing, damaged, of other kinds, or not of one run.
    """
    path = folder / CHECKPOINT
    try:
        encoders = {which: load_checkpoint(path, which) for which in WEIGHTS}
        predictor = load_predictor(path)
    except UserError as error:
        raise UserError(error.problem, hint=HINT) from error
    weights = {which: encoder.state_dict for which, encoder in encoders.items()}
    if predictor is not None:
        weights["predictor"] = predictor
    target, rows = encoders["target"], read_log(folder / LOG)
    if {target.mean, target.std} != {(value,) * 3 for value in NORMALIZATION}:
        raise UserError(
            f"the encoder in {folder} takes pixels of mean {target.mean} and deviation "
            f"{target.std}, not {NORMALIZATION}",
            hint=HINT,
        )
    numbers = [row["epoch"] for row in rows]
    if len(rows) != (target.epochs or 0) or numbers != list(range(1, len(rows) + 1)):
        raise UserError(
            f"{folder / LOG} has not one row for each of the {target.epochs} epochs of {path.name}",
            hint="give the folder of a whole run: both files have to be of it",
        )
    return Start(target.config, weights, rows, earlier_runs(target.training))


def earlier_runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts of the run of a checkpoint and of those before it."""
    before = training.get("earlier_runs")
    runs = [*(before if isinstance(before, list) else []), training]
    return [
        {name: run[name] for name in FACTS if isinstance(run.get(name), str | int | float)}
        for run in runs
        if isinstance(run, dict)
    ]


def write_log(path: Path, rows: Rows) -> None:
    """Write one row per epoch as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_log(path: Path) -> Rows:
    """The rows that `write_log` wrote.

    Raises:
        UserError: If they cannot be read, or hold what no run logs.
    """
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_LOG:
            raise ValueError("it is no file of at most 16 MiB")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            return [read_row(row) for row in reader]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"cannot read the log {path} ({error})", hint=HINT) from error


def read_row(row: dict[str, str]) -> dict[str, int | float]:
    """The numbers of one epoch."""
    values = {name: float(value) for name, value in row.items() if value != ""}
    if not all(abs(value) <= LARGEST_VALUE for value in values.values()):  # NaN is not, either
        raise ValueError(f"it has values beyond {LARGEST_VALUE:g}")
    return {**values, "epoch": int(row["epoch"])}
