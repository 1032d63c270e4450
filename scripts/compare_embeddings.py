"""Compare the embeddings of two frozen vision encoders on the same images.

By default: a small I-JEPA trained on CIFAR-10 and the Hugging Face ViT-Huge I-JEPA.
"""

import argparse
import errno
import gc
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ijepa import __version__
from ijepa.errors import (
    UserError,
    command_line,
    counted,
    flag_path,
    home_path,
    is_first_process,
    nonempty,
    whole,
)

if TYPE_CHECKING:
    from ijepa.data import Split
    from ijepa.embeddings import Embeddings

BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints_300ep"
HUB_MODEL = "facebook/ijepa_vith14_1k"
UNREAD = (errno.EPIPE, errno.EIO)
"""Errors of a pipe whose reader has left, as `| head` does, and of a terminal that is gone."""
SLOW_SECONDS = 2.0
"""A stage that takes longer than this says what it does."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; heavy imports come later so that usage errors are instant."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--local-checkpoint", metavar="SOURCE", action="append", type=nonempty,
        help="first model: a file of train_ijepa.py, of the I-JEPA authors or any state dict, "
        "an .npz of an earlier run, a Hugging Face directory or hub id; given again: more seeds of "
        f"the same training (default: {BUNDLED.name}/checkpoint_latest.pt)")
    add("--local-weights", choices=["target", "context"], default="target",
        help="which encoder of such a file (default: %(default)s)")
    add("--local-num-heads", type=whole(1), metavar="N",
        help="attention heads, for files that do not record them (default: by the width)")
    add("--hf-model", metavar="SOURCE", type=nonempty,
        help="second model, of the same kinds; none reports the first model only (default: "
        f"{HUB_MODEL}; with --offline the bundled {BUNDLED.name}/hf)")
    add("--hf-revision", metavar="NAME", help="branch, tag or commit of --hf-model; or id@revision")
    add("--hf-pooling", choices=["mean", "cls"], default="mean",
        help="of --hf-model: mean over patch tokens, or class token (default: %(default)s)")
    add("--output-dir", type=flag_path, default=Path("comparison_results"),
        help="for all files (default: %(default)s)")
    add("--max-samples", type=whole(0), default=2000, metavar="N",
        help="class-balanced; 0 = the whole split (default: %(default)s)")
    add("--probe-samples", type=lambda text: None if text == "all" else whole(0)(text), default=0,
        metavar="N", help="also report kNN and linear-probe accuracy with N images of the train "
        "split; 0 = no probe, all = the whole split (default: 0)")
    add("--dataset", type=nonempty,
        help="cifar10, digits, or a folder with one subfolder per class (default: cifar10; with "
        "--offline digits, unless --data-dir is given or ./data has CIFAR-10)")
    add("--split", choices=["test", "train", "val"], default="test",
        help="part of the data set (default: %(default)s)")
    add("--skip-unreadable", action="store_true",
        help="leave unreadable images out and list them; otherwise they are an error")
    add("--data-dir", type=flag_path, help="where CIFAR-10 is or will be put (default: data)")
    add("--offline", action="store_true", help="open no socket")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="of matrix products; auto: bfloat16 from 100 million parameters on where that is "
        "faster, else float32 (default: auto)")
    add("--batch-size", type=whole(1), metavar="N",
        help="images per forward pass (default: 16 on a CPU, else 64)")
    add("--seed", type=whole(0, 2**32 - 1), default=0,
        help="of every random choice: sample, bank, maps, intervals (default: %(default)s)")
    kept = parser.add_mutually_exclusive_group().add_argument
    kept("--cache-dir", type=flag_path,
        help="where embeddings and maps are kept between runs (default: ~/.cache/ijepa-compare)")
    kept("--no-cache", action="store_true", help="neither read nor keep embeddings and maps")
    add("--json", action="store_true", help="print the summary as JSON instead of the table")
    add("--debug", action="store_true", help="show the traceback behind an error")
    add("--version", action="version", version=f"ijepa-compare {__version__}")
    # fmt: on
    args = parser.parse_args(arguments)
    args.command = command_line(parser, "scripts/compare_embeddings.py", arguments)
    if args.hf_model == "none" and (args.hf_revision or args.hf_pooling != "mean"):
        parser.error("--hf-revision and --hf-pooling mean nothing with --hf-model none")
    if args.hf_model is None:
        args.hf_model = bundled("hf") if args.offline else HUB_MODEL
    if args.dataset is None:
        meant = args.data_dir or any(Path("data").glob("cifar-10-*"))
        args.dataset = "cifar10" if meant or not args.offline else "digits"
    args.data_dir = args.data_dir or Path("data")
    args.local_checkpoint = args.local_checkpoint or [bundled("checkpoint_latest.pt")]
    return args


def bundled(name: str) -> str:
    """The path of a shipped file, relative where it is below the working directory."""
    path = BUNDLED / name
    with suppress(FileNotFoundError, ValueError):  # no working directory, or not below it
        path = path.relative_to(Path.cwd())
    return str(path)


class Stages:
    """Times the stages of a run. A slow stage says on stderr what it does."""

    def __init__(self, talks: bool) -> None:
        self.talks = talks
        self.seconds: dict[str, float] = {}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())

    @contextmanager
    def __call__(self, name: str, doing: str) -> Iterator[None]:
        """Keep the seconds of a `with` body under `name`; after two, say on stderr what it does."""
        began = time.perf_counter()
        timer = threading.Timer(SLOW_SECONDS, say, [f"{doing} ..."])
        timer.daemon = True
        if self.talks:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.seconds[name] = round(time.perf_counter() - began, 3)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line on stderr or in another file; it is no error if nobody reads it any more.

    Raises:
        UserError: If the other file cannot be written, as on a full disk.
    """
    try:
        print(text, file=file or sys.stderr, flush=True)
    except OSError as error:
        if file and error.errno not in UNREAD:
            hint = "give it another place; the report in the output folder is complete"
            raise UserError(f"cannot print the summary: {error.strerror}", hint=hint) from error


def tell(notes: Iterable[str]) -> None:
    """Print what was left out or assumed."""
    for note in notes:
        say(f"note: {note}")


class Lines:
    """A file for tqdm that shows what it writes as plain lines."""

    def write(self, text: str) -> None:
        """Print a line without tqdm's carriage returns."""
        if line := text.strip():
            say(line)

    def flush(self) -> None:
        """Nothing is held back."""


def make_progress(talks: bool) -> Any:
    """A maker of progress bars; where stderr is no terminal they are a line every ten seconds."""
    from tqdm import tqdm

    options: dict[str, Any] = {"disable": not talks, "delay": SLOW_SECONDS, "unit": " images"}
    if not sys.stderr.isatty():
        words = "{desc}: {n:,} of {total:,} images"
        options |= {"file": Lines(), "mininterval": 10, "leave": False, "bar_format": words}
    return partial(tqdm, **options)


def load_images(args: argparse.Namespace) -> "Split":
    """The class-balanced sample to compare on; bad headers are found before any model is loaded."""
    from ijepa.data import balanced_sample, find_unreadable, load_split
    from ijepa.images import doubtful_pixels

    split = load_split(args.dataset, args.data_dir, args.split, args.offline)
    if args.split not in ("test", split.split):
        note = f"{split.name} has no splits: all of its images are used, not {args.split}"
        split = replace(split, notes=(*split.notes, note))
    sample = balanced_sample(split, args.max_samples, args.seed)
    if len(sample) < len(split):
        all_classes, classes = (len(set(one.labels.tolist())) for one in (split, sample))
        which = f" and {classes:,} of {all_classes:,} classes" * (classes < all_classes)
        note = f"{len(sample):,} of {len(split):,} images{which} are compared: --max-samples 0 "
        note += "takes all"
        sample = replace(sample, notes=(*sample.notes, note))
    sample = sample.readable(find_unreadable(sample), args.skip_unreadable)
    check_size(sample)
    return replace(
        sample, notes=(*sample.notes, *doubtful_pixels(getattr(sample.images, "files", ())))
    )


def check_size(split: "Split") -> None:
    """Raise UserError unless there are enough images and classes to compare."""
    num_classes = len(set(split.labels.tolist()))
    if len(split) < 4 or num_classes < 2:
        found = f"{counted(len(split), 'image')} of {counted(num_classes, 'class')}"
        hint = "give at least 4 images of 2 classes: raise --max-samples or check --dataset"
        raise UserError(f"too few to compare: {found}", hint=hint)


def check_sources(args: argparse.Namespace) -> None:
    """Raise UserError if this run would replace or remove the embeddings that it is given."""
    written = [(args.output_dir / f"embeddings_{role}.npz").resolve() for role in ("local", "hf")]
    for source in (*args.local_checkpoint, args.hf_model):
        if home_path(source).resolve() in written:
            problem = f"{source} would be replaced by the embeddings of this run"
            raise UserError(problem, hint="give another --output-dir")


def load_encoders(args: argparse.Namespace, cache: Path | None) -> list[Any]:
    """The models, the references that show what a number is worth, and other training seeds."""
    from ijepa.encoders import check_seeds, load_encoder, pixel_encoder, random_encoder
    from ijepa.model import VisionTransformer

    common = {"device": args.device, "dtype": args.dtype, "offline": args.offline, "cache": cache}
    file = {"weights": args.local_weights, "num_heads": args.local_num_heads}
    local, *seeds = (
        load_encoder(source, f"local_{row}" if row > 1 else "local", **file, **common)
        for row, source in enumerate(args.local_checkpoint, 1)
    )
    check_seeds(local, seeds)
    loaded = [local]
    if args.hf_model != "none":
        chosen = {"revision": args.hf_revision, "pooling": args.hf_pooling}
        loaded.append(load_encoder(args.hf_model, "hf", **chosen, **common))
    loaded.append(pixel_encoder())
    # Of other networks there is no untrained twin.
    if isinstance(getattr(local, "network", None), VisionTransformer):
        loaded.append(random_encoder(local, args.seed))
    return [*loaded, *seeds]


def extract_all(
    args: argparse.Namespace, loaded: list[Any], split: "Split", cache: Path | None, talks: bool
) -> tuple["Split", dict[str, "Embeddings"]]:
    """Embed the readable images with every encoder; unreadable ones raise unless skipped."""
    from ijepa.embeddings import extract

    options = {"cache": cache, "batch_size": args.batch_size, "progress": make_progress(talks)}
    results, failures = extract(loaded, split, **options)
    split = split.readable(failures, args.skip_unreadable)
    for name, result in results.items():
        if result.damaged:
            shown = ", ".join(map(str, result.damaged[:3]))
            files = counted(len(result.damaged), "damaged file")
            say(f"replaced {files} of cached {name} embeddings by embedding again: {shown}")
    return split, results


@dataclass
class Inputs:
    """What a comparison is made of: images and their embeddings by every model."""

    split: "Split"
    loaded: list[Any]
    results: dict[str, "Embeddings"]
    notes: list[str]
    copies: tuple[int, int]
    """Images with an exact copy, and with one of another label."""
    bank: "Split | None" = None
    bank_results: "dict[str, Embeddings]" = field(default_factory=dict)

    @property
    def compared(self) -> list[Any]:
        """The encoders without further training seeds."""
        return [one for one in self.loaded if not one.name.startswith("local_")]


def load_bank(args: argparse.Namespace, inputs: Inputs) -> "Split | str":
    """The labeled images for the probe, or why there are none; notes say what to know."""
    from ijepa.data import find_unreadable, load_split
    from ijepa.formats import listed
    from ijepa.probe import select_bank

    split = inputs.split
    try:
        train = load_split(args.dataset, args.data_dir, "train", args.offline)
        if train.split != "train":
            raise UserError(f"{split.name} has no train split", hint="")
    except UserError as error:
        return error.problem
    found, compared = ({s.classes[i] for i in s.labels} for s in (train, split))
    if found.isdisjoint(compared):
        return f"no compared class is in the train split ({listed(sorted(found))})"
    bank, excluded = select_bank(train, split, args.probe_samples or 0, args.seed)
    bank = bank.readable(find_unreadable(bank), args.skip_unreadable)
    for file in (one for one in inputs.compared if "matched_by" in one.description):
        if file.description["matched_by"] == "index":
            source = file.description["source"]
            return f"{source} has no image keys, and splits share their indices"
        try:
            file.look_up(bank.image_keys, bank.indices)
        except UserError as error:
            return f"{error.problem} of the bank"
    if excluded:
        left_out = f"{counted(excluded, 'training image')} found among the compared images"
        inputs.notes.append(f"The probe's bank leaves out {left_out}.")
    return bank


def embed(args: argparse.Namespace, stages: Stages, cache: Path | None) -> Inputs:
    """Load images and models, and embed the sample and the probe's bank."""
    from ijepa.data import duplicates
    from ijepa.distributed import first_process_first, num_processes

    with stages("load_images", "reading the images"), first_process_first():
        split = load_images(args)
    with stages("load_models", "loading the models"), first_process_first():
        loaded = load_encoders(args, cache)
    with stages("extract", "embedding the images"):
        split, results = extract_all(args, loaded, split, cache, stages.talks)
        check_size(split)
    copied, relabeled = duplicates(split.image_keys, split.labels)
    inputs = Inputs(split, loaded, results, list(split.notes), (copied, relabeled))
    if copied:
        other = f", {relabeled:,} of them one with another label" if relabeled else ""
        note = f"{copied:,} images have an exact copy in the sample{other}."
        inputs.notes.append(f"{note} Copies are neighbors and make the intervals too narrow.")
    with stages("extract_bank", "embedding the probe's bank"):
        if args.probe_samples == 0:
            return inputs
        if isinstance(bank := load_bank(args, inputs), str):
            inputs.notes.append(f"There is no probe: {bank}.")
            return inputs
        for name in (one.name for one in inputs.compared if one.name in results):
            rate = num_processes() * (results[name].images_per_second or math.inf)
            if (minutes := len(bank) / rate / 60) > 1:
                images = counted(len(bank), "bank image")
                say(f"embedding {images} with {name} takes about {minutes:.0f} min")
        bank, inputs.bank_results = extract_all(args, inputs.compared, bank, cache, stages.talks)
        inputs.notes += [f"The probe's bank: {note}" for note in bank.notes]
        inputs.split = replace(split, unreadable=(*split.unreadable, *bank.unreadable))
        if len(bank):
            inputs.bank = bank
        else:
            inputs.notes.append("There is no probe: no training image is left for its bank.")
    return inputs


def run(args: argparse.Namespace, talks: bool) -> None:
    """Images, encoders, embeddings, comparison, report: the whole line of data."""
    if sys.flags.optimize > 1:
        problem = "python -OO removes the docstrings that transformers reads"
        raise UserError(problem, hint="run without -OO and PYTHONOPTIMIZE=2")
    check_sources(args)
    stages = Stages(talks)
    with stages("import", "importing the libraries"):
        from ijepa.devices import choose_device, memory_errors
        from ijepa.distributed import join_processes, leave_processes, num_processes
        from ijepa.embeddings import writable_cache

        # A process whose images are all in the cache waits for those that compute theirs.
        args.device = join_processes(choose_device(args.device), "gloo", timedelta(days=7))
        # All pairs of images are compared there; Apple's GPUs have no float64.
        args.pairs_device = str(args.device) if args.device.type == "cuda" else "cpu"
    cache, note = (None, None) if args.no_cache else writable_cache(args.cache_dir, args.output_dir)
    # Processes meet in the cache; without one that is kept they need one for this run.
    passing = args.output_dir / ".cache-of-this-run"
    exhausted = f"out of memory on {args.device}", "try --device cpu, or lower --max-samples"
    try:
        with memory_errors(*exhausted):
            shared = passing if args.no_cache and num_processes() > 1 else cache
            inputs = embed(args, stages, shared)
        leave_processes()
    finally:
        if talks:
            shutil.rmtree(passing, ignore_errors=True)
    if not talks:
        return
    inputs.notes += filter(None, [note])
    sources = [Path(one.description["source"]).resolve() for one in inputs.loaded[:2]]
    if sources == [BUNDLED / "checkpoint_latest.pt", BUNDLED / "hf"]:
        note = "The second model is bundled, trained with the paper's loss; it is no ViT-Huge."
        inputs.notes.append(note)
    assumed = [text for one in inputs.loaded for text in one.description.get("notes", ())]
    tell([*assumed, *inputs.notes])
    with memory_errors(*exhausted):
        report(args, stages, inputs, cache)


def report(args: argparse.Namespace, stages: Stages, inputs: Inputs, cache: Path | None) -> None:
    """Compare the embeddings, write every file and print the summary."""
    with stages("import_report", "importing the libraries of the report"):
        from ijepa.comparison import compare
        from ijepa.markdown import console_table, model_caveats
        from ijepa.narrative import conclusions
        from ijepa.projections import make_maps
        from ijepa.report import summary_json, write_report
        from ijepa.tables import headline_table

    split, loaded, seed = inputs.split, inputs.loaded, args.seed
    X = {name: result.values for name, result in inputs.results.items()}
    models = {name: X[name] for name in ("local", "hf") if name in X}
    references = {name: X[name] for name in ("pixels", "random_weights") if name in X}
    seeds = [X[name] for name in X if name.startswith("local_")]
    names = table_names([one for one in loaded if one.name in models])
    progress = make_progress(stages.talks)
    with stages("compare", "comparing all pairs of images"):
        found = compare(
            models, references, split.labels, seed, seeds, args.pairs_device, names, progress
        )
    probe = None
    with stages("probe", "fitting the probes"):
        if inputs.bank is not None:
            from ijepa.probe import probe as measure_probe

            banks = {name: result.values for name, result in inputs.bank_results.items()}
            queries = {name: X[name] for name in banks}
            labels = inputs.bank.labels, split.labels
            probe = measure_probe(banks, queries, *labels, seed, progress)
            tell(probe.notes)
            inputs.notes += probe.notes
    with stages("project", "making the maps"):
        maps = make_maps(models, split.labels, seed, cache and cache / "maps")
    with stages("write", "drawing and writing the report"):
        split, facts = replace(split, notes=tuple(inputs.notes)), describe_run(args, stages, inputs)
        for role in models:
            tell(model_caveats(found, role, facts["models"][role]))
        written = write_report(args.output_dir, found, split, facts, maps, probe)
    if args.json:
        say(summary_json(args.output_dir / "metrics.json").rstrip(), sys.stdout)
    else:
        table = console_table(headline_table(found))
        say("\n".join([table, *conclusions(found, probe)]), sys.stdout)
    say(f"{len(written)} files in {args.output_dir} ({stages})")
    say(f"open {args.output_dir / 'report.html'}")


def table_names(compared: list[Any]) -> dict[str, str]:
    """Names of the models for tables; where two are equal, with their folders or their roles."""
    names = {one.name: one.description["short_name"] for one in compared}
    if len(set(names.values())) == len(names):
        return names
    folders = [Path(one.description["source"]).absolute().parent.name for one in compared]
    marks = folders if len(set(folders)) == len(folders) else ["Local", "HF"]
    return {role: f"{names[role]} ({mark})" for role, mark in zip(names, marks, strict=True)}


def describe_run(args: argparse.Namespace, stages: Stages, inputs: Inputs) -> dict[str, Any]:
    """What metrics.json says of the run, the data and the models, beyond the numbers."""
    import hashlib

    import torch

    return {
        "run": {
            "command": args.command,
            "seconds": stages.seconds,
            "device": args.device.type,
            "dtype": inputs.loaded[0].description.get("dtype"),
            "torch_threads": torch.get_num_threads(),
            "pairs_device": args.pairs_device,
        },
        "dataset": {
            "sha256": hashlib.sha256(b"".join(inputs.split.image_keys)).hexdigest(),
            "duplicates": dict(zip(("images", "with_two_labels"), inputs.copies, strict=True)),
        },
        "models": {
            one.name: {
                **one.description,
                "embedding_dim": one.embed_dim,
                "images_per_second": inputs.results[one.name].images_per_second,
                "from_cache": inputs.results[one.name].from_cache,
            }
            for one in inputs.loaded
            if one.name not in ("pixels", "random_weights")
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Compare; 0 done, 1 a user error, 2 wrong usage, 130 interrupted."""
    args = parse_arguments(arguments)
    # Figures need no display; a notebook's backend may not even import outside of it.
    os.environ["MPLBACKEND"] = "agg"
    # Pillow refuses what is twice as large as what it warns of.
    warnings.filterwarnings("ignore", ".*could be decompression bomb")
    # torchvision asks for a folder for compiled code when it is imported. Without this it would
    # look up the user's name, over a socket on some systems.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    # Of torchrun's processes the first one holds the folder, speaks and reports.
    first = is_first_process()
    try:
        from ijepa.files import own_folder

        with own_folder(args.output_dir) if first else nullcontext():
            run(args, talks=first)
        return 0
    except UserError as error:
        problem = error
    except ModuleNotFoundError as error:
        hint = "run make setup, then use .venv/bin/python or activate it: . .venv/bin/activate"
        problem = UserError(f"the package {error.name} is not installed", hint=hint)
    except KeyboardInterrupt:
        kept = "" if args.no_cache else "; finished embeddings are kept, run again to continue"
        say(f"interrupted{kept}")
        return 130
    if args.debug:
        traceback.print_exception(problem)
    say(f"error: {problem.problem}\nhint: {problem.hint}")
    return 1


if __name__ == "__main__":
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  closed by the caller
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    # The libraries make a million objects that stay, and by default Python looks for garbage at
    # every 700th: half a second of each run.
    gc.set_threshold(50_000)
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # Interpreter shutdown takes seconds to collect the objects of the libraries.
    os._exit(code)
