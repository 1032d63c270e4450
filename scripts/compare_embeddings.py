"""Compare the embeddings of a local I-JEPA encoder and a Hugging Face I-JEPA on the same images."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Figures need no display, and Matplotlib cannot even be imported with the backend of a notebook.
os.environ["MPLBACKEND"] = "agg"

BUNDLED = ROOT / "checkpoints_300ep"
HUB_MODEL = "facebook/ijepa_vith14_1k"
FULL_EPOCHS = 300
"""What the bundled checkpoint is meant to have."""
MANY_IMAGES = 10_000
"""From this many on a comparison may take over a minute, which is measured before it starts."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; heavy imports come later so that usage errors are instant."""
    from ijepa.provenance import command_line

    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--local-checkpoint",
        type=Path,
        action="append",
        help="file of scripts/train_ijepa.py, or a .pth.tar of the I-JEPA authors; given again, "
        f"other seeds of the same training (default: {BUNDLED.name}/checkpoint_latest.pt)",
    )
    add(
        "--local-weights",
        choices=["target", "context"],
        default="target",
        help="which encoder (default: %(default)s)",
    )
    add(
        "--hf-model",
        help="hub id or directory; none reports the local model alone (default: "
        f"{HUB_MODEL}; with --offline the bundled context encoder)",
    )
    add(
        "--output-dir",
        type=Path,
        default=Path("comparison_results"),
        help="for all files (default: %(default)s)",
    )
    add(
        "--max-samples",
        type=natural,
        default=2000,
        help="class-balanced; 0 = the whole split (default: %(default)s)",
    )
    add(
        "--dataset",
        help="cifar10, digits, or a folder with one sub-folder per class (default: cifar10; with "
        "--offline digits, unless --data-dir has CIFAR-10)",
    )
    add(
        "--split",
        choices=["test", "train"],
        default="test",
        help="part of the data set (default: %(default)s)",
    )
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="where CIFAR-10 is or will be put (default: %(default)s)",
    )
    add("--offline", action="store_true", help="open no socket")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="of matrix products; auto is bfloat16 where the hardware has it (default: auto)",
    )
    add(
        "--batch-size",
        type=positive,
        default=64,
        help="images per forward pass (default: %(default)s)",
    )
    add(
        "--seed",
        type=seed_number,
        default=0,
        help="of the sample, the maps and the intervals (default: %(default)s)",
    )
    add(
        "--no-cache",
        action="store_true",
        help="neither read nor keep what an earlier run has finished",
    )
    args = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        args.command = command_line("scripts/compare_embeddings.py", words)
    except ValueError as error:
        parser.error(str(error))
    if args.hf_model is None:
        args.hf_model = bundled("hf") if args.offline else HUB_MODEL
    args.local_checkpoint = args.local_checkpoint or [Path(bundled("checkpoint_latest.pt"))]
    return args


def bundled(name: str) -> str:
    """Path of a shipped file, as short as it can be seen from here."""
    path = BUNDLED / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def seed_number(text: str) -> int:
    """Parse a seed that every library takes."""
    value = natural(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2**32, got {value}")
    return value


def natural(text: str) -> int:
    """Parse a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def versions() -> dict[str, str]:
    """Of Python and the packages whose version can change a number."""
    import platform
    from importlib.metadata import version

    names = ("torch", "torchvision", "transformers", "numpy", "scikit-learn", "matplotlib")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


class Stopwatch:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)


def load_images(args: argparse.Namespace) -> Any:
    """The class-balanced sample to compare on."""
    from ijepa.data import balanced_sample, load_split
    from ijepa.errors import UserError

    dataset = args.dataset
    if dataset is None:
        present = (args.data_dir / "cifar-10-batches-py").is_dir()
        dataset = "digits" if args.offline and not present else "cifar10"
    split = load_split(dataset, args.data_dir, args.split, args.offline)
    sample = balanced_sample(split, args.max_samples, args.seed)
    if len(sample) < 4 or len(set(sample.labels.tolist())) < 2:
        raise UserError(
            f"{len(sample)} images are too few to compare", hint="raise --max-samples (at least 4)"
        )
    return sample


def load_encoders(args: argparse.Namespace, device: Any, cache: Path | None) -> list[Any]:
    """The local encoder, the other one if asked for, the two references, and other seeds."""
    from ijepa import encoders
    from ijepa.checkpoint import load_checkpoint
    from ijepa.devices import choose_dtype

    dtype = choose_dtype(args.dtype, device)
    local, *others = (
        encoders.load_local_encoder(path, args.local_weights, device, dtype)
        for path in args.local_checkpoint
    )
    check_seeds(local, others)
    checkpoint = load_checkpoint(args.local_checkpoint[0], args.local_weights)
    normalization = (checkpoint.mean, checkpoint.std)
    loaded = [local]
    if args.hf_model != "none":
        facts = cache and cache / "models"
        loaded.append(
            encoders.load_huggingface_encoder(args.hf_model, device, dtype, args.offline, facts)
        )
    random = encoders.random_encoder(checkpoint.config, normalization, args.seed, device, dtype)
    seeds = [replace(other, name=f"local_{row}") for row, other in enumerate(others, start=2)]
    return [*loaded, encoders.pixel_encoder(), random, *seeds]


def check_seeds(local: Any, others: list[Any]) -> None:
    """Raise UserError unless the checkpoints can be several seeds of one training."""
    from ijepa.errors import UserError

    seen = {local.description["sha256"]}
    for other in others:
        source = other.description["source"]
        if other.description["sha256"] in seen:
            raise UserError(
                f"checkpoint {source} is given twice",
                hint="every --local-checkpoint must be another seed of the same training",
            )
        seen.add(other.description["sha256"])
        for key in ("parameters", "input_size", "epochs"):
            if other.description[key] != local.description[key]:
                raise UserError(
                    f"checkpoint {source} has {key} {other.description[key]}, the first has "
                    f"{local.description[key]}",
                    hint="give checkpoints of the same training that differ in their seed",
                )


def extract_all(
    args: argparse.Namespace, loaded: list[Any], split: Any, split_hash: str, cache: Path | None
) -> dict[str, Any]:
    """Embed the sample with every encoder, through the cache unless it is off."""
    from functools import partial

    from tqdm import tqdm

    from ijepa.embeddings import cache_folder, extract
    from ijepa.parallel import process_rank

    first = process_rank() == 0
    progress = partial(tqdm, unit=" images", delay=2, file=sys.stderr, disable=not first)
    results = {}
    for encoder in loaded:
        folder = cache_folder(cache, encoder, split_hash) if cache else None
        old = folder and not folder.exists() and list(folder.parent.glob(f"{encoder.name}-*"))
        if old and first:
            print(
                f"cached {encoder.name} embeddings are of other weights, settings or images: "
                "computing anew",
                file=sys.stderr,
            )
        result = extract(encoder, split, args.batch_size, folder, progress, args.output_dir)
        if result.damaged:
            print(
                f"{len(result.damaged)} cached chunks of {encoder.name} embeddings were damaged "
                f"and computed anew: {', '.join(map(str, result.damaged[:3]))}",
                file=sys.stderr,
            )
        results[encoder.name] = result
    return results


def caveats(comparison: Any, loaded: list[Any], maps: Any) -> list[str]:
    """What a reader must know before believing a number."""
    from math import isfinite

    n = len(comparison.analyses["local"].labels)
    notes = [
        "the intervals cover images, not training: "
        + (
            "the spread over training seeds stands beside them"
            if comparison.seeds
            else "one checkpoint is one draw of the training seed"
        ),
        f"precision@k and kNN accuracy depend on the number of images searched, here n = {n}",
        "explained variance describes the shape of a cloud, not its quality",
    ]
    widths = {a.embeddings.shape[1] for a in comparison.analyses.values()}
    if len(widths) == 2:
        notes.append("the embedding dimensions differ: 10 PCs are another share of each")
    notes = training_caveats(loaded[0].description) + notes
    if len(comparison.analyses) == 2:
        other = Path(loaded[1].description["source"])
        if other.resolve() == (BUNDLED / "hf").resolve():
            notes.insert(
                0,
                "the HF side is the bundled export of our own training run's context encoder, not "
                "a ViT-Huge: this run compares the two encoders of one training",
            )
    if not comparison.num_halves:
        notes.append("fewer than 20 images in a class: no intervals")
    notes += map_caveats(maps, n)
    for name, analysis in comparison.analyses.items():
        rank = comparison.metrics[name]["effective_rank"]
        if comparison.num_halves and isfinite(rank.value) and not isfinite(rank.se):
            notes.append(
                f"the effective rank of the {name} embeddings is above half the number of images, "
                "which bounds it: no interval"
            )
        notes += collapse_warning(comparison, name, analysis.embeddings.shape[1])
    return notes


def map_caveats(maps: Any, n: int) -> list[str]:
    """What to know of the maps of n images."""
    from ijepa.projections import MAX_POINTS

    notes = []
    if n > MAX_POINTS:
        notes.append(
            f"maps show {MAX_POINTS:,} of {n:,} images, as many of each class as possible; "
            "all numbers are of all images"
        )
    if (perplexity := next(iter(maps.tsne.values())).perplexity) < 30:
        notes.append(f"t-SNE perplexity lowered from 30 to {perplexity:.1f} for {n} images")
    return notes


def training_caveats(facts: dict[str, Any]) -> list[str]:
    """What to know of a local checkpoint that had fewer epochs than it was meant to have."""
    epochs, planned = facts["epochs"], facts["planned_epochs"]
    shipped = (BUNDLED / "checkpoint_latest.pt").resolve()
    if Path(facts["source"]).resolve() == shipped and epochs < FULL_EPOCHS:
        return [
            f"the bundled checkpoint had {epochs} epochs of training, not {FULL_EPOCHS}: "
            "expect more of a finished one"
        ]
    if planned not in (None, epochs):
        return [f"the local checkpoint has {epochs} of {planned} epochs"]
    return []


def collapse_warning(comparison: Any, name: str, width: int) -> list[str]:
    """Say so in words when embeddings use few dimensions and retrieve no better than pixels."""
    from math import isnan

    metrics, n = comparison.metrics[name], len(comparison.analyses[name].labels)
    rank, precision = metrics["effective_rank"].value, metrics["precision_at_5"].value
    if isnan(rank):
        return [f"the {name} embeddings are all the same: the model has collapsed"]
    baseline = max(facts["precision_at_5"] for facts in comparison.references.values())
    if rank < 0.1 * min(n - 1, width) and precision < 1 and precision <= baseline:
        return [
            f"the {name} embeddings look collapsed: few dimensions, and retrieval no better than "
            "that of pixels or random weights"
        ]
    return []


def compare_run(args: argparse.Namespace) -> None:
    """Images, encoders, embeddings, comparison, report: the whole line of data."""
    watch = Stopwatch()
    cache = None if args.no_cache else args.output_dir / ".cache"
    with watch.stage("import"):
        import torch

        from ijepa.data import fingerprint
        from ijepa.devices import choose_device
        from ijepa.embeddings import save_embeddings
        from ijepa.narrative import console_table, headline_lines, table
        from ijepa.parallel import (
            first_process_first,
            join_processes,
            leave_processes,
            process_rank,
        )
        from ijepa.projections import make_maps
        from ijepa.report import write_report

        # A process whose chunks are all in the cache waits for those that compute theirs.
        device = join_processes(choose_device(args.device), "gloo", timedelta(days=7))
    with watch.stage("load_images"), first_process_first():
        split = load_images(args)
    with watch.stage("load_models"), first_process_first():
        loaded = load_encoders(args, device, cache)
    with watch.stage("extract"):
        split_hash = fingerprint(split)
        results = extract_all(args, loaded, split, split_hash, cache)
        reports = process_rank() == 0
        leave_processes()
    if not reports:
        return
    with watch.stage("compare"):
        models, comparison, pairs_device = compare_all(results, split, args.seed, device)
    with watch.stage("project"):
        embeddings = {name: a.embeddings for name, a in comparison.analyses.items()}
        maps = make_maps(embeddings, split.labels, args.seed, cache and cache / "maps")
    with watch.stage("write"):
        for name in models:
            save_embeddings(args.output_dir / f"embeddings_{name}.npz", models[name], split)
        facts = describe_run(args, watch, loaded, results, split, split_hash)
        facts["run"]["torch_threads"] = torch.get_num_threads()
        facts["run"]["pairs_device"] = pairs_device
        notes = caveats(comparison, loaded, maps)
        written = write_report(args.output_dir, comparison, maps, split, facts, notes)
    print(console_table(table(comparison)))
    for line in headline_lines(comparison):
        print(line)
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in watch.seconds.items())
    print(f"wrote {len(written) + len(models)} files to {args.output_dir} ({stages})")


def compare_all(
    results: dict[str, Any], split: Any, seed: int, device: Any
) -> tuple[dict[str, Any], Any, str]:
    """The embeddings of the models that are compared, all that was found, and on which device."""
    import torch

    from ijepa.comparison import compare
    from ijepa.devices import choose_pairs_device
    from ijepa.errors import UserError

    values = {name: result.values for name, result in results.items()}
    models = {name: values[name] for name in ("local", "hf") if name in values}
    references = {name: values[name] for name in ("pixels", "random_weights")}
    seeds = [values[name] for name in values if name not in {*models, *references}]
    widest = max(X.shape[1] for X in values.values())
    chosen = choose_pairs_device(device, len(split), widest)
    announce_wait(models, references, len(split.classes), chosen)
    try:
        return models, compare(models, references, split.labels, seed, seeds, chosen), chosen
    except torch.OutOfMemoryError as error:
        hint = "wait until nothing else uses it, give a smaller --max-samples, or --device cpu"
        raise UserError(f"{chosen} has too little free memory for all pairs", hint=hint) from error


def announce_wait(
    models: dict[str, Any], references: dict[str, Any], num_classes: int, device: str
) -> None:
    """Say how long all pairs of images will take where nobody would wait for them."""
    from ijepa.comparison import pairwise_seconds

    n = len(models["local"])
    if n < MANY_IMAGES:
        return
    seconds = pairwise_seconds(models, references, num_classes, device)
    if seconds > 60:
        wait = f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.0f} hours"
        print(
            f"comparing all pairs of {n:,} images will take about {wait}; "
            "--max-samples compares fewer",
            file=sys.stderr,
        )


def describe_run(
    args: argparse.Namespace,
    watch: Stopwatch,
    loaded: list[Any],
    results: Any,
    split: Any,
    split_hash: str,
) -> dict[str, Any]:
    """The provenance parts of metrics.json."""
    from ijepa.comparison import MUTUAL_K
    from ijepa.provenance import git_commit
    from ijepa.uncertainty import NUM_BLOCKS, NUM_HALVES

    counts = [int((split.labels == label).sum()) for label in range(len(split.classes))]
    return {
        "run": {
            "command": args.command,
            "seed": args.seed,
            "seconds": watch.seconds,
            "versions": versions(),
            "device": loaded[0].device.type,
            "dtype": loaded[0].description["dtype"],
            "git_commit": git_commit(),
        },
        "dataset": {
            "name": split.name,
            "split": split.split,
            "n": len(split),
            "per_class": counts,
            "classes": list(split.classes),
            "sha256": split_hash,
        },
        "models": {
            encoder.name: {
                **encoder.description,
                "embedding_dim": encoder.embed_dim,
                "images_per_second": results[encoder.name].images_per_second,
                "from_cache": results[encoder.name].from_cache,
            }
            for encoder in loaded
            if encoder.name not in ("pixels", "random_weights")
        },
        "settings": {
            "similarity": "cosine",
            "silhouette": "euclidean, true labels",
            "knn": {"k": 20, "temperature": 0.07, "leave_one_out": True},
            "mutual_k": MUTUAL_K,
            "intervals": {"level": 0.95, "halves": NUM_HALVES, "jackknife_blocks": NUM_BLOCKS},
            "tsne": {"pca": 50, "seed": args.seed},
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Compare; 0 done, 1 a mistake the user can mend, 2 wrong usage, 130 interrupted."""
    args = parse_arguments(arguments)
    from ijepa.errors import UserError
    from ijepa.files import own_folder

    # Importing torchvision asks for a folder for compiled code, of which there is none here. It
    # would look up the user's name, over a socket on some systems, and make one.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    try:
        # Of torchrun's processes the first holds the folder for all.
        first = os.environ.get("RANK", "0") == "0"
        with own_folder(args.output_dir) if first else nullcontext():
            compare_run(args)
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name} is not installed\n"
            "hint: run make setup, then use .venv/bin/python",
            file=sys.stderr,
        )
        return 1
    except MemoryError:
        print("error: out of memory\nhint: lower --max-samples or --batch-size", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error.problem}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "" if args.no_cache else "; finished embeddings are kept, run again to go on"
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    # Not by the interpreter's way out, which takes 2 s to collect the objects of the libraries and
    # which a thread of gloo aborts that still lets go of what it sent.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
