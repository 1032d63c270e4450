"""Train a small I-JEPA. Stop it at any time: the same command continues the run."""

import argparse
import hashlib
import itertools
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ijepa import __version__
from ijepa.errors import (
    UserError,
    command_line,
    counted,
    flag_path,
    git_commit,
    is_first_process,
    nonempty,
    whole,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; heavy imports come later so that usage errors are instant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    by_recipe = {"default": argparse.SUPPRESS}  # the recipe decides where they are not given
    add("--output-dir", type=flag_path, default=Path("runs/mine"), help="a run there is resumed")
    add("--resume", action="store_true", help="fail if there is no run to resume")
    add("--init-from", type=flag_path, help="begin with the weights and the log of the run there")
    add("--epochs", type=whole(1), default=300, help="passes over the images, in all runs")
    data = "cifar10, digits, or a folder of images"
    add("--dataset", type=nonempty, default="cifar10", help=data)
    add("--data-dir", type=flag_path, default=Path("data"), help="where CIFAR-10 is or will be put")
    recipe = "paper: only I-JEPA's loss; matched: with two more terms on the mean token"
    add("--recipe", choices=["matched", "paper"], default="matched", help=recipe)
    add("--batch-size", type=whole(1), help="images per update (256; paper 64)", **by_recipe)
    add("--lr", type=rate, help="peak learning rate (4e-3; paper 2e-3)", **by_recipe)
    add("--num-views", type=whole(1), help="crops of an image (3; paper 1)", **by_recipe)
    add("--embed-dim", type=whole(64), default=192, help="encoder width, a multiple of 64")
    add("--depth", type=whole(1), default=6, help="encoder blocks")
    add("--patch-size", type=int, choices=[1, 2, 4], default=4, help="side of a patch in pixels")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    how = "of matrix products; auto: bfloat16 where it is faster, else float32"
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help=how)
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of weights, order, crops and masks")
    add("--save-every", type=whole(1), default=1, metavar="N", help="epochs between checkpoints")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"ijepa-compare {__version__}")
    args = parser.parse_args(arguments)
    if args.embed_dim % 64:
        parser.error(f"argument --embed-dim: must be a multiple of 64, got {args.embed_dim}")
    if "num_views" in args and (args.num_views > 1) != (args.recipe == "matched"):
        parser.error("argument --num-views: must be at least 2 with --recipe matched, 1 with paper")
    if args.recipe == "matched" and vars(args).get("batch_size") == 1:
        parser.error("argument --batch-size: must be at least 2 with --recipe matched")
    args.command = command_line(parser, "scripts/train_ijepa.py", arguments)
    return args


def rate(text: str) -> float:
    """Parse a positive number."""
    if not 0 < float(text) <= 1e38:  # float32 ends soon after
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1e38, got {text}")
    return float(text)


def load_images(dataset: str, data_dir: Path, batch_size: int) -> tuple[Any, Any]:
    """Training and held-out split, each with its images as one tensor of 32 x 32 pixels."""
    import numpy as np
    import torch
    from torchvision.transforms.v2 import functional as transforms

    from ijepa.data import balanced_sample, load_split, reasons
    from ijepa.images import doubtful_pixels

    split = load_split(dataset, data_dir, "train", False, need_classes=False)
    count = num_held_out(len(split))
    if len(split) < count + batch_size:
        enough = next(n for n in itertools.count(batch_size) if n >= num_held_out(n) + batch_size)
        problem = f"too few images for batches of {batch_size}: there are {len(split)}"
        hints = [f"use at least {enough} images, or a smaller --batch-size", *split.notes]
        raise UserError(f"{problem}, and {count} must be held out", hint="; ".join(hints))
    if split.paths:
        bad, pixels = [], []
        for row in range(len(split)):
            try:
                pixels.append(transforms.resize(split.images[row], [32, 32]))
            except UserError as error:
                bad.append((row, error.problem))
        if bad:
            problem = f"cannot read {len(bad):,} of {len(split):,} images: {reasons(bad)}"
            raise UserError(problem, hint="remove or replace these files")
        notes = [*split.notes, *doubtful_pixels(split.images.files)]
        notes += ["only the split train is used"] * (split.split == "train")
        split = replace(split, images=torch.stack(pixels), notes=tuple(notes))
    held_out = balanced_sample(split, count, seed=0)
    sizes = np.bincount(held_out.labels)
    limit = float((sizes * np.minimum(sizes - 1, 5)).sum() / 5 / len(held_out))
    if held_out.classes and limit < 0.995:
        note = f"held-out P@5 can reach {limit:.0%}: classes have few held-out images"
        split = replace(split, notes=(*split.notes, note))
    return split.take(np.setdiff1d(np.arange(len(split)), held_out.indices)), held_out


def num_held_out(num_images: int) -> int:
    """How many images the run is watched on."""
    return min(2000, max(num_images // 10, 10))


def build_config(args: argparse.Namespace) -> Any:
    """The settings of the run: the recipe's, changed by the flags."""
    from ijepa.model import ViTConfig
    from ijepa.training import RECIPES

    sizes = {"patch_size": args.patch_size, "embed_dim": args.embed_dim, "depth": args.depth}
    vit = ViTConfig(**sizes, num_heads=args.embed_dim // 64)
    given = {name: vars(args)[name] for name in ("batch_size", "lr", "num_views") if name in args}
    return replace(RECIPES[args.recipe], epochs=args.epochs, seed=args.seed, vit=vit, **given)


def say(text: str) -> None:
    """Print a line on stderr, once for all processes and above the progress bar."""
    from tqdm import tqdm

    if is_first_process():
        with suppress(OSError):  # its reader has left, as `head` does, or a terminal is gone
            tqdm.write(text, file=sys.stderr)


def train_run(args: argparse.Namespace) -> int:
    """Load images, begin or resume a run, train it; the exit code."""
    from ijepa import distributed
    from ijepa.checkpoint import losses_of
    from ijepa.devices import choose_device, choose_dtype
    from ijepa.runs import Run, evaluate
    from ijepa.training import init_state

    device = choose_device(args.device)
    device = distributed.join_processes(device, "nccl" if device.type == "cuda" else "gloo")
    dtype, config = choose_dtype(args.dtype, device), build_config(args)
    if config.batch_size % (count := distributed.num_processes()):
        raise UserError(
            f"{count} processes cannot share a batch of {config.batch_size} evenly",
            hint="give a --batch-size that is a multiple of their number",
        )
    if device.type == "mps" and count > 1:
        raise UserError("processes cannot train together on mps", hint="use --device cpu")
    with distributed.first_process_first():  # which may download them
        split, held_out = load_images(args.dataset, args.data_dir, config.batch_size)
    hashed = hashlib.sha256(split.images.numpy().tobytes())
    hashed.update(held_out.images.numpy().tobytes())
    images = {"dataset": args.dataset, "num_images": len(split), "sha256": hashed.hexdigest()}
    origin = args.init_from and str(args.init_from)
    settings = asdict(config) | {"recipe": args.recipe, "init_from": origin}
    run, state = Run(args.output_dir, config, settings, images), init_state(config, device, dtype)
    watched = (held_out.images.to(device), held_out.labels if held_out.classes else None, dtype)
    run.random_rank = evaluate(state.target_encoder, *watched)["effective_rank"]
    resumed = run.resume(state)
    if args.resume and not resumed:
        raise UserError(
            f"there is no run in {args.output_dir} to resume",
            hint="check --output-dir, or leave out --resume to begin a run there",
        )
    if args.init_from and not resumed:
        run.begin_from(args.init_from, state)
    terms, classes = losses_of({"settings": settings}), len(split.classes)
    labels = f"P@5 by {classes} classes" if classes else "without class folders there is no P@5"
    say(
        f"recipe {args.recipe} ({terms}); {counted(len(split), 'image')}; "
        f"{len(held_out)} held out, {labels}"
    )
    for note in (*split.notes, *run.notes):
        say(note)
    if resumed:
        say(f"resuming {args.output_dir} after {counted(state.step, 'update')}")
    try:
        stopped = train_epochs(args, run, state, split.images.to(device), watched)
    except FloatingPointError as error:
        hint = "try a lower --lr or --dtype float32; a state saved before is kept"
        raise UserError(str(error), hint=hint) from error
    distributed.leave_processes()
    return 130 if stopped else 0


def train_epochs(args: argparse.Namespace, run: Any, state: Any, images: Any, watched: Any) -> bool:
    """Train to the end or to a signal, log and save each epoch; whether a signal came."""
    from tqdm import tqdm

    from ijepa.distributed import any_process
    from ijepa.runs import evaluate
    from ijepa.training import log_row, train

    config, stop, stopped = run.config, catch_signals(), False
    began = time.monotonic() - run.epoch_seconds
    per_epoch = run.steps_per_epoch * config.batch_size
    hidden = None if is_first_process() else True  # None: shown only on a terminal
    size = {"total": config.epochs * per_epoch, "initial": state.step * config.batch_size}
    with tqdm(**size, unit="img", unit_scale=True, mininterval=5, disable=hidden) as bar:
        for ends_epoch in train(state, config, images):
            bar.update(config.batch_size)
            run.epoch_seconds = time.monotonic() - began
            if ends_epoch:
                row = log_row(state, config, len(images)) | {"seconds": run.epoch_seconds}
                end_epoch(args, run, state, row | evaluate(state.target_encoder, *watched))
                began = time.monotonic()
            if stopped := any_process(bool(stop), images.device):
                break
    if is_first_process():
        if stopped:
            run.save(state)
        finish(run)
    updates = counted(state.step, "update")
    say(f"stopped and saved after {updates}" if stopped else f"done: {run.folder}")
    return stopped


def catch_signals() -> list[int]:
    """From now on, collect the first Ctrl-C or termination; the second one acts at once."""
    from ijepa.distributed import num_processes

    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        if num_processes() == 1:  # torchrun passes on what the terminal has sent already
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            text = "stopping after this update; press Ctrl-C again to quit without saving\n"
            with suppress(OSError):  # its reader has got the signal too, as `tee` does
                os.write(sys.stderr.fileno(), text.encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def end_epoch(args: argparse.Namespace, run: Any, state: Any, row: dict[str, Any]) -> None:
    """Log one epoch; write the checkpoint and the state where it is their turn."""
    run.log(row)
    due = row["epoch"] % args.save_every == 0 or row["epoch"] == args.epochs
    if due and is_first_process():
        # In this order: a kill in between repeats the epoch.
        run.publish(state, {"git_commit": git_commit(), "command": args.command})
        run.save(state)
    say(" ".join(f"{name}={value:g}" for name, value in run.rows[-1].items() if value is not None))
    if warning := run.collapse_warning():
        say(f"warning: {warning}")


def finish(run: Any) -> None:
    """Draw the curves of this run's last checkpoint and export its target encoder."""
    from ijepa.checkpoint import export_huggingface, load_checkpoint
    from ijepa.plots import Caption, save_figure
    from ijepa.runs import CHECKPOINT, plot_training_curves

    path = run.folder / CHECKPOINT
    checkpoint = load_checkpoint(path, "target") if path.exists() else None
    if checkpoint is None or checkpoint.training.get("settings") != run.settings:
        return  # this run has not finished an epoch
    title = f"I-JEPA training, {checkpoint.epochs} of {run.config.epochs} epochs"
    caption = Caption(title, f"On training images that were held out; seed {run.config.seed}.")
    curves = plot_training_curves(run.rows[: checkpoint.epochs], caption)
    save_figure(run.folder / "training_curves.png", curves)
    export_huggingface(checkpoint, run.folder / "hf")


def main(arguments: list[str] | None = None) -> int:
    """Train; 0 done, 1 a user error, 2 wrong usage, 130 stopped by a signal."""
    args = parse_arguments(arguments)
    os.environ["MPLBACKEND"] = "agg"  # figures need no display, whatever the user's setting
    # Pillow refuses what is twice as large as what it warns of.
    warnings.filterwarnings("ignore", ".*could be decompression bomb")
    try:
        from ijepa.devices import memory_errors
        from ijepa.files import own_folder

        # Of torchrun's processes the first holds the folder for all.
        memory = memory_errors("out of memory", "try a smaller --batch-size, or --device cpu")
        with memory, own_folder(args.output_dir) if is_first_process() else nullcontext():
            return train_run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error.problem}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is not installed", file=sys.stderr)
        print("hint: run make setup, then use .venv/bin/python", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; a state saved before is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  closed by the caller
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.exit(main())
