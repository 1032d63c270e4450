"""Train a small I-JEPA; stop it at any moment, the same command goes on."""

import argparse
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HELD_OUT = 2000
"""Training images kept aside to watch the run by; test images play no part."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; heavy imports come later so that usage errors are instant."""
    from ijepa.errors import command_line

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("runs/mine"), help="a run found there is resumed")
    add("--resume", action="store_true", help="fail where there is no run to go on with")
    add(
        "--init-from",
        type=Path,
        metavar="FOLDER",
        help="begin with the weights and the log of the run that ended there, not from scratch",
    )
    add("--epochs", type=positive, default=300, help="passes over the images, earlier ones too")
    add("--dataset", default="cifar10", help="cifar10, or a folder with one sub-folder per class")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is or will be put")
    add(
        "--recipe",
        choices=["matched", "paper"],
        default="matched",
        help="paper: the loss of I-JEPA alone; matched: with two more terms on the mean token",
    )
    # The recipe decides where these are not given.
    by_recipe = {"default": argparse.SUPPRESS}
    add("--batch-size", type=positive, help="images per update (256; paper 64)", **by_recipe)
    add("--lr", type=float, help="peak learning rate (4e-3; paper 2e-3)", **by_recipe)
    add("--num-views", type=positive, help="crops of an image (3; paper 1)", **by_recipe)
    add("--embed-dim", type=int, default=192, help="encoder width, a multiple of 64")
    add("--depth", type=int, default=6, help="encoder blocks")
    add("--patch-size", type=int, default=4, help="side of a patch in pixels")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="matrix products")
    add("--seed", type=natural, default=0, help="of weights, order, crops and masks")
    add(
        "--save-every",
        type=positive,
        default=1,
        metavar="EPOCHS",
        help="from one checkpoint and saved state to the next; more on a fast GPU",
    )
    args = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        args.command = command_line("scripts/train_ijepa.py", words)
    except ValueError as error:
        parser.error(str(error))
    return args


def natural(text: str) -> int:
    """Parse a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    value = natural(text)
    if not value:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def load_images(args: argparse.Namespace, batch_size: int) -> tuple[Any, Any]:
    """Training and held-out splits; images of a folder are resized to 32 x 32 once."""
    import numpy as np
    import torch
    from torchvision.transforms.v2 import functional as transforms

    from ijepa.data import balanced_sample, load_split
    from ijepa.errors import UserError

    split = load_split(args.dataset, args.data_dir, "train", offline=False)
    held_out = balanced_sample(split, min(HELD_OUT, len(split) // 10), seed=0)
    rest = split.take(np.setdiff1d(np.arange(len(split)), held_out.indices))
    if len(rest) < batch_size or len(held_out) < 10:
        raise UserError(
            f"{len(split)} images are too few for batches of {batch_size}",
            hint="give more images or a smaller --batch-size",
        )

    def pixels(part: Any) -> Any:
        if isinstance(part.images, torch.Tensor):
            return part.images
        return torch.stack(
            [transforms.resize(part.images[row], [32, 32]) for row in range(len(part))]
        )

    return (pixels(rest), pixels(held_out)), held_out.labels


def identify_images(dataset: str, images: Any, held_out: Any) -> dict[str, Any]:
    """What makes these images the images of a run: their number and a hash of their pixels."""
    import hashlib

    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(held_out.numpy().tobytes())
    return {"dataset": dataset, "num_images": len(images), "sha256": digest.hexdigest()}


def build_config(args: argparse.Namespace) -> Any:
    """The settings of the run from the flags."""
    import torch

    from ijepa.errors import UserError
    from ijepa.masking import sample_masks
    from ijepa.model import ViTConfig
    from ijepa.training import recipe_config

    try:
        vit = ViTConfig(
            patch_size=args.patch_size,
            embed_dim=args.embed_dim,
            depth=args.depth,
            num_heads=max(args.embed_dim // 64, 1),
        )
        given = {name: getattr(args, name, None) for name in ("batch_size", "lr", "num_views")}
        config = recipe_config(args.recipe, epochs=args.epochs, seed=args.seed, vit=vit, **given)
        # Large patches make a grid without room for the blocks: say so before loading images.
        sample_masks(config.mask, vit.grid_size, 1, config.seed, torch.device("cpu"))
    except ValueError as error:
        raise UserError(
            str(error), hint="change --recipe, --num-views, --lr, --embed-dim or --patch-size"
        ) from error
    return config


class Run:
    """The folder of one run: resumable state, log, and the checkpoint that others load."""

    def __init__(
        self, args: argparse.Namespace, config: Any, images: dict[str, Any], writes: bool
    ) -> None:
        from dataclasses import asdict

        self.folder = folder = args.output_dir
        self.init_from = args.init_from
        self.save_every = args.save_every
        self.writes = writes  # one process of several
        self.state = folder / "state.pt"
        self.previous = folder / "state_previous.pt"
        self.config = config
        self.images = images
        self.settings = asdict(config) | {
            "recipe": args.recipe,
            "init_from": args.init_from and str(args.init_from),
        }
        self.rows: list[dict[str, float]] = []
        self.earlier_runs: list[dict[str, Any]] = []
        self.seconds = 0.0  # of whole epochs
        self.epoch_seconds = 0.0  # of the epoch that a signal cut off

    def say(self, text: str) -> None:
        """Tell the user, once for all processes."""
        if self.writes:
            print(text, file=sys.stderr)

    def begin(self, state: Any, num_images: int) -> None:
        """Take over networks and log of the run that ended in another folder."""
        from ijepa.errors import UserError
        from ijepa.runs import load_start
        from ijepa.training import start_from

        start = load_start(self.init_from)
        self.check_start(start)
        try:
            updates = len(start.rows) * (num_images // self.config.batch_size)
            start_from(state, start.weights, updates)
        except RuntimeError as error:  # the encoders are known to fit
            raise UserError(
                f"the predictor does not fit: {' '.join(str(error).split())[:200]}",
                hint="begin with a run of this trainer",
            ) from error
        if "predictor" not in start.weights:
            self.say(f"{self.init_from} holds no predictor: a new one begins")
        self.rows, self.earlier_runs = start.rows, start.earlier_runs

    def check_start(self, start: Any) -> None:
        """Raise UserError unless a run with these settings can begin there."""
        from dataclasses import asdict

        from ijepa.errors import UserError

        saved, asked = asdict(start.config), self.settings["vit"]
        if other := [name for name in saved if saved[name] != asked[name]]:
            differences = ", ".join(f"{name} {saved[name]}, not {asked[name]}" for name in other)
            raise UserError(
                f"the encoder in {self.init_from} is another one: {differences}",
                hint="give its --embed-dim, --depth and --patch-size; its other sizes are fixed",
            )
        epochs = len(start.rows)
        if self.config.epochs <= epochs:
            raise UserError(
                f"the run in {self.init_from} has had {epochs} epochs: nothing is left to do",
                hint=f"give --epochs {epochs + 1} or more, the earlier ones included",
            )

    def read_state(self) -> Any:
        """The last whole state of the folder, or None in a new one."""
        from ijepa.checkpoint import read_torch_file
        from ijepa.errors import UserError

        paths = [path for path in (self.state, self.previous) if path.exists()]
        for path in paths:
            try:
                return read_torch_file(path)
            except UserError as error:
                if path == paths[-1]:
                    raise
                self.say(f"{error.problem}: going back to {self.previous.name}")
        return None

    def resume(self, state: Any, num_images: int, required: bool) -> bool:
        """Take over a run found in the folder; whether there is one."""
        from ijepa.errors import UserError

        saved = self.read_state()
        if saved is None:
            if required:
                raise UserError(
                    f"there is no run in {self.folder} to resume",
                    hint="check --output-dir, or leave out --resume to begin a run there",
                )
            return False
        self.check_images(saved["images"])
        self.check_settings(saved["settings"], saved["state"]["step"], num_images)
        state.load_state_dict(saved["state"])
        self.rows, self.seconds = saved["rows"], saved["seconds"]
        # Not in states from before they were kept.
        self.earlier_runs = saved.get("earlier_runs", [])
        self.epoch_seconds = saved.get("epoch_seconds", 0.0)
        self.say(f"resuming {self.folder} after {state.step} updates")
        return True

    def check_images(self, saved: dict[str, Any]) -> None:
        """Raise UserError unless these are the images that the run began with."""
        from ijepa.errors import UserError

        if saved["sha256"] == self.images["sha256"]:
            return
        before, now = (
            f"{one['num_images']} images of {one['dataset']} (sha256 {one['sha256'][:12]})"
            for one in (saved, self.images)
        )
        raise UserError(
            f"the run in {self.folder} is trained on {before}, not on {now}",
            hint="give the same --dataset and --data-dir to resume it, or another --output-dir",
        )

    def check_settings(self, saved: dict[str, Any], step: int, num_images: int) -> None:
        """Raise UserError unless going on makes the run that these settings make from the start."""
        from dataclasses import replace

        from ijepa.errors import UserError
        from ijepa.training import decay_start

        changed = [key for key, value in self.settings.items() if saved.get(key) != value]
        if not changed:
            return
        hint = "give the same flags to resume it, or another --output-dir"
        if changed != ["epochs"]:
            raise UserError(
                f"the run in {self.folder} has other settings: {', '.join(changed)}", hint=hint
            )
        # The learning rate of the first updates is the same for every number of epochs.
        lengths = (self.config, replace(self.config, epochs=saved["epochs"]))
        limit = min(decay_start(one, num_images // self.config.batch_size) for one in lengths)
        if step > limit:
            raise UserError(
                f"the run in {self.folder} is of {saved['epochs']} epochs; after {step} updates "
                f"it cannot become one of {self.config.epochs}: the learning rate falls after "
                f"{limit}",
                hint=hint,
            )

    def save(self, state: Any) -> None:
        """Write everything that resuming needs, keeping the state before it."""
        import torch

        from ijepa.files import write_atomically
        from ijepa.training import check_finite

        check_finite(state)
        if not self.writes:
            return
        content = {
            "state": state.state_dict(),
            "settings": self.settings,
            "images": self.images,
            "rows": self.rows,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            "earlier_runs": self.earlier_runs,
        }
        if self.state.exists():
            self.state.replace(self.previous)
        write_atomically(self.state, lambda file: torch.save(content, file))

    def publish(self, state: Any, provenance: dict[str, Any]) -> None:
        """Write the log and the checkpoint of the epochs finished so far."""
        from ijepa.checkpoint import save_checkpoint
        from ijepa.runs import CHECKPOINT, LOG, NORMALIZATION, write_log

        write_log(self.folder / LOG, self.rows)
        training = {
            "epochs": self.rows[-1]["epoch"],
            "planned_epochs": self.config.epochs,
            "seconds": self.seconds,
            "settings": self.settings,
            "recipe": self.settings["recipe"],
            "terms": list(self.config.terms),
            "images": self.images,
            "earlier_runs": self.earlier_runs,
            **provenance,
        }
        networks = {
            "target": state.target_encoder,
            "context": state.context_encoder,
            "predictor": state.predictor,
        }
        path = self.folder / CHECKPOINT
        save_checkpoint(path, self.config.vit, networks, NORMALIZATION, training)

    def end_epoch(self, row: dict[str, float], state: Any, provenance: dict[str, Any]) -> None:
        """Log one epoch; write the checkpoint and the state where it is their turn."""
        from ijepa.training import collapse_warning

        self.seconds += row["seconds"]
        self.epoch_seconds = 0.0
        self.rows.append({key: round_digits(value) for key, value in row.items()})
        if row["epoch"] % self.save_every == 0 or row["epoch"] == self.config.epochs:
            # In this order: a kill in between repeats the epoch, never leaves out a checkpoint.
            if self.writes:
                self.publish(state, provenance)
            self.save(state)
        measured = {key: value for key, value in row.items() if value is not None}
        self.say(" ".join(f"{key}={value:.6g}" for key, value in measured.items()))
        if warning := collapse_warning(self.rows[-1], self.config):
            self.say(f"warning: {warning}")

    def finish(self) -> None:
        """Of the last checkpoint, draw the curves and export the context encoder for others."""
        from ijepa.checkpoint import load_checkpoint
        from ijepa.huggingface import export_huggingface
        from ijepa.plots import Caption, plot_training_curves
        from ijepa.report import save_figure
        from ijepa.runs import CHECKPOINT

        path = self.folder / CHECKPOINT
        if not self.writes or not path.exists():
            return  # another process does it, or no epoch was saved
        checkpoint = load_checkpoint(path, "context")
        epochs = checkpoint.epochs or 0
        taken_over = self.earlier_runs[-1]["epochs"] if self.earlier_runs else 0
        if not taken_over < epochs <= len(self.rows):
            return  # it lay there before this run
        title = f"I-JEPA training, {epochs} of {self.config.epochs} epochs"
        footer = f"Held-out images are {HELD_OUT} training images at most; seed {self.config.seed}."
        rows = [
            {**row, "precision_at_5": row["heldout_precision_at_5"]} for row in self.rows[:epochs]
        ]
        curves = plot_training_curves(rows, Caption(title, footer))
        save_figure(self.folder / "training_curves.png", curves)
        export_huggingface(checkpoint, self.folder / "hf")


def round_digits(value: float | None) -> float | None:
    """Six significant digits; a count stays one, and what was not measured stays None."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def describe(args: argparse.Namespace, device: str, dtype: Any, num_images: int) -> dict[str, Any]:
    """Where a checkpoint comes from."""
    import torch

    from ijepa.errors import git_commit

    return {
        "dataset": args.dataset,
        "num_images": num_images,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "git_commit": git_commit(),
        "command": args.command,
    }


def log_row(config: Any, log: Any, losses: tuple[float, float], seconds: float) -> dict[str, Any]:
    """What the log says of an epoch, before the evaluation is added."""
    return {
        "epoch": log.epoch,
        "loss": losses[0],
        "matching_loss": losses[1] if config.matching_weight else None,
        "lr": log.lr,
        "momentum": log.momentum,
        "weight_decay": log.weight_decay,
        "seconds": seconds,
    }


def progress_bar(run: Run, step: int, num_images: int) -> Any:
    """Images done, images/s and the time left of the whole run; silent without a terminal."""
    from tqdm import tqdm

    config = run.config
    return tqdm(
        total=config.epochs * (num_images // config.batch_size) * config.batch_size,
        initial=step * config.batch_size,
        unit="img",
        unit_scale=True,
        mininterval=5,
        disable=None if run.writes else True,
    )


def check_batch(batch_size: int) -> None:
    """Raise UserError unless the processes can share a batch evenly."""
    from ijepa.errors import UserError
    from ijepa.parallel import num_processes

    if batch_size % num_processes():
        raise UserError(
            f"a batch of {batch_size} cannot be shared by {num_processes()} processes",
            hint="give a --batch-size that is a multiple of their number",
        )


def train_run(args: argparse.Namespace) -> int:
    """Load, resume, train, save; the exit code."""
    from ijepa.devices import choose_device, choose_dtype
    from ijepa.errors import UserError
    from ijepa.parallel import join_processes, leave_processes, num_processes, process_rank
    from ijepa.training import init_state

    device = choose_device(args.device)
    device = join_processes(device, "nccl" if device.type == "cuda" else "gloo")
    dtype = choose_dtype(args.dtype, device)
    config = build_config(args)
    check_batch(config.batch_size)
    (images, held_out), labels = load_images(args, config.batch_size)
    identity = identify_images(args.dataset, images, held_out)
    images = images.to(device)
    state = init_state(config, device, dtype)
    run = Run(args, config, identity, writes=process_rank() == 0)
    if not run.resume(state, len(images), args.resume) and args.init_from:
        run.begin(state, len(images))
    provenance = describe(args, device.type, state.dtype, len(images))
    provenance["processes"] = num_processes()
    held_out = (held_out.to(device), labels)
    try:
        code = train_and_save(run, state, images, held_out, provenance)
    except FloatingPointError as error:
        raise UserError(
            f"{error}; the last saved state is kept", hint="try a lower --lr or --dtype float32"
        ) from error
    leave_processes()
    return code


def train_and_save(
    run: Run, state: Any, images: Any, held_out: Any, provenance: dict[str, Any]
) -> int:
    """Train to the end or to a signal, log and save each epoch; the exit code."""
    from ijepa.parallel import any_process
    from ijepa.training import evaluate, mean_losses, train

    config = run.config
    stop: list[int] = []
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda number, _: stop.append(number))
    began = time.monotonic() - run.epoch_seconds
    with progress_bar(run, state.step, len(images)) as bar:
        for log in train(state, config, images):
            bar.update(config.batch_size)
            if log.end_of_epoch:
                losses = mean_losses(state, config, len(images))
                row = log_row(config, log, losses, time.monotonic() - began)
                row |= evaluate(state.target_encoder, *held_out, state.dtype)
                run.end_epoch(row, state, provenance)
                bar.set_description(f"epoch {log.epoch}/{config.epochs} loss {losses[0]:.4f}")
                began = time.monotonic()
            if any_process(bool(stop), images.device):
                run.epoch_seconds = time.monotonic() - began
                run.save(state)
                run.finish()
                run.say(f"stopped and saved after {state.step} updates")
                return 130
    run.finish()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Train; 0 done, 1 a mistake the user can mend, 130 stopped by a signal and saved."""
    args = parse_arguments(arguments)
    from ijepa.errors import UserError
    from ijepa.files import own_folder

    try:
        # Of torchrun's processes the first holds the folder for all.
        first = os.environ.get("RANK", "0") == "0"
        with own_folder(args.output_dir) if first else nullcontext():
            return train_run(args)
    except UserError as error:
        print(f"error: {error.problem}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training began; later a signal stops and saves
        print("stopped before the first update", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = main()
    # Not by the interpreter's way out, which takes 2 s to collect the objects of the libraries and
    # which a thread of gloo aborts that still lets go of what it sent.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
