"""A training run seen from outside: how it is monitored, and its folder.

The folder holds the resumable state, the log, and the checkpoint for others.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ijepa import plots
from ijepa.augmentation import standardize
from ijepa.checkpoint import load_checkpoint, read_torch_file, save_checkpoint
from ijepa.distributed import num_processes
from ijepa.errors import UserError, counted
from ijepa.files import write_atomically, write_text
from ijepa.metrics import all_pairs, covariance_spectrum, effective_rank, precision_at_k
from ijepa.model import VisionTransformer
from ijepa.training import TrainConfig, TrainState, check_finite, decay_start

CHECKPOINT, LOG = "checkpoint_latest.pt", "training_log.csv"
STATE, PREVIOUS = "state.pt", "state_previous.pt"
EARLY_EPOCHS = 5
FEW_IMAGES = 5000
"""With fewer, more images help most."""
NORMALIZATION = (0.5, 0.5)
"""Mean and deviation of every channel in `ijepa.augmentation.standardize`."""
CURVES = {
    "loss": "prediction loss",
    "matching_loss": "matching loss",
    "lr": "learning rate",
    "heldout_precision_at_5": "held-out precision@5",
    "effective_rank": "effective rank",
    "target_variance": "variance of held-out target embeddings",
}
"""Panels of the training curves: columns of the log and their titles."""


@dataclass
class Run:
    """One run: what it trains on, with which settings, and what it has logged so far."""

    folder: Path
    config: TrainConfig
    settings: dict[str, Any]
    """`config` as plain data, `recipe` and `init_from`."""
    images: dict[str, Any]
    """`dataset`, `num_images` and `sha256` of the pixels."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    epoch_seconds: float = 0.0  # of the epoch that has begun
    earlier_runs: list[dict[str, Any]] = field(default_factory=list)
    random_rank: float = 0.0
    """Effective rank of the held-out images before training."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about how it was begun or resumed."""

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one epoch."""
        return self.images["num_images"] // self.config.batch_size

    def resume(self, state: TrainState) -> bool:
        """Continue what is in the folder; False if there is nothing.

        Raises:
            UserError: If it cannot be read or has other settings or images, or if there is only the
                checkpoint of another run.
        """
        paths = [path for name in (STATE, PREVIOUS) if (path := self.folder / name).exists()]
        if not paths:
            self.check_vacant()
            return False
        try:
            saved = read_torch_file(paths[0])
        except UserError as error:
            if len(paths) == 1:
                raise
            self.notes.append(f"{error.problem}: going back to {PREVIOUS}")
            saved = read_torch_file(paths[1])
            paths.pop(0).unlink(missing_ok=True)  # it must not take the place of the previous one
        if not isinstance(saved, dict) or not saved.keys() >= {"settings", "images", "state"}:
            hint = "move it away, or give another --output-dir"
            raise UserError(f"{paths[0]} is no state of a training run", hint=hint)
        if changed := self.differences(saved):
            problem = f"the run in {self.folder} has other settings: {'; '.join(changed)}"
            hint = "repeat the command that began it, or give another --output-dir"
            hint += ", and --init-from with this folder to go on from it"
            raise UserError(problem, hint=hint)
        state.load_state_dict(saved["state"])
        for name in ("rows", "epoch_seconds", "earlier_runs"):
            setattr(self, name, saved[name])
        return True

    def check_vacant(self) -> None:
        """Raise UserError if this run would replace the checkpoint of another one."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        training = load_checkpoint(path).training
        old, images = (training.get(name, {}) for name in ("settings", "images"))
        changed = {**old, "epochs": None} != {**self.settings, "epochs": None}
        if changed or images.get("sha256") != self.images["sha256"]:
            problem = f"{path} is the checkpoint of another run, without a state to resume"
            hint = "give another --output-dir, and --init-from with this folder to go on from it"
            raise UserError(problem, hint=hint)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Why a saved state is not one of the run that these settings make from scratch."""
        old, step = saved["settings"], saved["state"]["step"]
        found = [
            f"{name} {old.get(name)}, not {value}"
            for name, value in self.settings.items()
            if name != "epochs" and old.get(name) != value
        ]
        if saved["images"]["sha256"] != self.images["sha256"]:
            before, now = (
                f"{counted(one['num_images'], 'image')} of {one['dataset']} "
                f"(sha256 {one['sha256'][:12]})"
                for one in (saved["images"], self.images)
            )
            found.append(f"{before}, not {now}")
        # Until the earlier of the two decays begins, runs of both lengths are the same.
        lengths = (self.config, replace(self.config, epochs=old["epochs"]))
        limit = min(decay_start(one, self.steps_per_epoch) for one in lengths)
        if old["epochs"] != self.config.epochs and step > limit:
            found.append(
                f"epochs {old['epochs']}, not {self.config.epochs}, which must not change after "
                f"update {limit}; it has had {step}"
            )
        return found

    def begin_from(self, folder: Path, state: TrainState) -> None:
        """Take over networks, log and provenance of the run that ended in another folder.

        Raises:
            UserError: If a file is missing or damaged, or another architecture or length is asked
                for.
        """
        path = folder / CHECKPOINT
        target, context = (load_checkpoint(path, which) for which in ("target", "context"))
        if target.config != self.config.vit:
            problem = f"the encoder in {folder} is {target.config}, not {self.config.vit}"
            raise UserError(problem, hint="give its --embed-dim, --depth and --patch-size")
        if target.epochs is None:
            hint = "give a folder that a run of scripts/train_ijepa.py ended in"
            raise UserError(f"{path} does not record its epochs", hint=hint)
        if self.config.epochs <= target.epochs:
            problem = f"the run in {folder} has had {counted(target.epochs, 'epoch')}"
            hint = f"give --epochs {target.epochs + 1} or more, the earlier ones included"
            raise UserError(f"{problem}: nothing is left to do", hint=hint)
        if len(rows := read_log(folder / LOG)) < target.epochs:
            found = f"{counted(len(rows), 'epoch')}, {CHECKPOINT} {target.epochs}"
            hint = "give the folder of a whole run: both files must be of it"
            raise UserError(f"{folder / LOG} has {found}", hint=hint)
        state.target_encoder.load_state_dict(target.state_dict)
        state.context_encoder.load_state_dict(context.state_dict)
        if target.predictor:
            try:
                state.predictor.load_state_dict(target.predictor)
            except RuntimeError as error:
                hint = "give the folder of a run with a predictor of the usual size"
                raise UserError(f"the predictor in {path} does not fit", hint=hint) from error
        else:
            self.notes.append(f"{path} has no predictor: a new one begins")
        state.step = state.start_step = target.epochs * self.steps_per_epoch
        facts = {k: v for k, v in target.training.items() if isinstance(v, str | int | float)}
        self.earlier_runs = [*target.training.get("earlier_runs", []), facts]
        self.rows = rows[: target.epochs]

    def log(self, row: dict[str, Any]) -> None:
        """Add the row of one epoch, with six significant digits."""
        self.epoch_seconds = 0.0
        shown = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(shown)

    def collapse_warning(self) -> str | None:
        """What to say and to do if the last epoch is the first one that looks collapsed."""
        ranks = [row["effective_rank"] for row in self.rows]
        if not collapses_now(ranks, self.random_rank):
            return None
        few = self.images["num_images"] < FEW_IMAGES
        advice = "train on more images" if few else "try a lower --lr or a larger --batch-size"
        other = ", or --recipe matched" if self.settings["recipe"] == "paper" else ""
        return (
            f"the embeddings may have collapsed: effective rank {ranks[-1]:.3g} after epoch "
            f"{len(ranks)}, {self.random_rank:.3g} before training; {advice}{other}"
        )

    def save(self, state: TrainState) -> None:
        """Write everything that `resume` needs, keeping the state before it."""
        check_finite(state)
        names = ("settings", "images", "rows", "epoch_seconds", "earlier_runs")
        content = {name: getattr(self, name) for name in names} | {"state": state.state_dict()}
        if (self.folder / STATE).exists():
            (self.folder / STATE).replace(self.folder / PREVIOUS)
        write_atomically(self.folder / STATE, lambda file: torch.save(content, file))

    def publish(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Write log and checkpoint of the epochs so far, with further facts about their origin."""
        columns = list(self.rows[-1])  # a log that was taken over may have others
        table = [columns, *([row.get(name) for name in columns] for row in self.rows)]
        lines = (",".join("" if cell is None else str(cell) for cell in row) for row in table)
        write_text(self.folder / LOG, "".join(f"{line}\n" for line in lines))
        names = ("settings", "images", "earlier_runs", "random_rank")
        own = self.rows[state.start_step // self.steps_per_epoch :]
        training = {name: getattr(self, name) for name in names} | {
            "seconds": sum(row["seconds"] for row in own),
            "epochs": self.rows[-1]["epoch"],
            "planned_epochs": self.config.epochs,
            "recipe": self.settings["recipe"],
            "dataset": self.images["dataset"],
            "num_images": self.images["num_images"],
            "device": state.loss_sums.device.type,
            "dtype": str(state.dtype).removeprefix("torch."),
            "processes": num_processes(),
            "torch": str(torch.__version__),
            **facts,
        }
        networks = {"target": state.target_encoder, "context": state.context_encoder}
        networks |= {"predictor": state.predictor}
        path = self.folder / CHECKPOINT
        save_checkpoint(path, self.config.vit, networks, NORMALIZATION, training)


@torch.no_grad()
def evaluate(
    encoder: VisionTransformer,
    images: UInt8[Tensor, "n 3 H W"],
    labels: Int[np.ndarray, " n"] | None,
    dtype: torch.dtype,
) -> dict[str, float | None]:
    """P@5, effective rank and mean variance of plain images' mean tokens; None if not defined.

    Raises:
        FloatingPointError: If they are not finite.
    """
    parts = []
    for batch in images.split(256):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            tokens = encoder(standardize(batch.float() / 255))
        parts.append(tokens.float().mean(dim=1).cpu())
    embeddings = torch.cat(parts).numpy()
    if not np.isfinite(embeddings).all():
        raise FloatingPointError("the embeddings are no longer numbers")
    precision = None
    if labels is not None:
        found = float(precision_at_k(all_pairs(embeddings, 5).neighbors, labels, 5).mean())
        precision = found if math.isfinite(found) else None  # no class has two images
    return {
        "heldout_precision_at_5": precision,
        "effective_rank": effective_rank(covariance_spectrum(embeddings)),
        "target_variance": float(embeddings.var(axis=0).mean()),
    }


def collapses_now(ranks: Sequence[float], random_rank: float) -> bool:
    """Whether the last effective rank is the first one that looks collapsed.

    A rank looks collapsed if it exceeds neither `random_rank`, that of the same images before
    training, nor the rank of `EARLY_EPOCHS` epochs before. The first `EARLY_EPOCHS` ranks never
    do: all runs start low.
    """
    pairs = zip(ranks, ranks[EARLY_EPOCHS:], strict=False)
    collapsed = [rank <= min(random_rank, before) for before, rank in pairs]
    return sum(collapsed) == 1 and collapsed[-1]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows that `Run.publish` wrote; values that were not measured are None.

    Raises:
        UserError: If there is no such file, or it cannot be read as such.
    """
    try:
        return [
            {name: float(value) if value else None for name, value in row.items()}
            | {"epoch": int(row["epoch"]), "effective_rank": float(row["effective_rank"])}
            for row in csv.DictReader(path.read_text("utf-8").splitlines())
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "give the folder that a run of scripts/train_ijepa.py ended in"
        raise UserError(f"cannot read the log {path} ({error})", hint=hint) from error


@matplotlib.rc_context(plots.STYLE)
def plot_training_curves(
    rows: Sequence[Mapping[str, float | int | None]], caption: plots.Caption
) -> Figure:
    """A small panel for each column of `CURVES` that the training log has, over the epochs.

    Each row of the log has its ``"epoch"``; a value that is absent, None or not finite was not
    measured in that epoch.
    """
    epochs = np.array([row["epoch"] for row in rows])
    # None becomes NaN, which is not drawn.
    values = {key: np.array([row.get(key) for row in rows], dtype=np.float64) for key in CURVES}
    curves = {key: y for key, y in values.items() if np.isfinite(y).any()}
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure, body = plots.new_figure(caption, 4 * columns + 0.2, 2.6 * lines + 0.7)
    axes = body.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for ax, (key, y) in zip(axes, curves.items(), strict=False):
        measured = np.isfinite(y)
        sparse = "." if measured.sum() <= 60 else ""
        ax.plot(epochs[measured], y[measured], color=plots.MODEL_COLORS["local"], marker=sparse)
        ax.set(title=CURVES[key], xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.grid()
        ax.tick_params(labelbottom=True)
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    return figure
