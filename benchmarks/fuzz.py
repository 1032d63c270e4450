"""Feed the comparison what nobody would write by hand, for as long as is wanted.

    make fuzz MINUTES=10
    python benchmarks/fuzz.py --minutes 10

Hypothesis makes checkpoints, model directories, images, folders, cached chunks and arguments; each
is read as a run reads it. An example must load or raise UserError (arguments: exit with 0, 1 or 2)
within `LIMIT` seconds, start no program, open no socket, and write nothing outside its own folder.
A failure is shrunk by Hypothesis and printed; exit code 1.
"""

import argparse
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from victims import COMPARE, print_table, run, tiny_models

from ijepa.checkpoint import load_checkpoint
from ijepa.data import Split, balanced_sample, fingerprint, load_split, read_image
from ijepa.embeddings import extract
from ijepa.encoders import load_encoder, pixel_encoder
from ijepa.errors import UserError

LIMIT = 30
CPU = torch.device("cpu")
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-"))
TINY, EXPORT = tiny_models(SCRATCH)
IMAGES = [torch.zeros(3, 32, 32, dtype=torch.uint8)]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "socket.", "webbrowser.")
counts: Counter[str] = Counter()
watched: list[Path] = []


class Forbidden(Exception):  # noqa: N818
    """An example did what no file may make a run do."""


class Hangs(Exception):  # noqa: N818
    """An example did not end in time."""


def watch(event: str, arguments: tuple) -> None:
    """Audit hook: nothing is written, started or connected while an example is read."""
    if not watched:
        return
    if event.startswith(FORBIDDEN):
        raise Forbidden(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & WRITES:
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100
        if not path.is_relative_to(watched[-1]) and str(path) != os.devnull:
            raise Forbidden(f"wrote {path}")


def too_late(*_: object) -> None:
    """End an example that hangs."""
    raise Hangs(f"over {LIMIT} s")


@contextmanager
def example(name: str) -> Iterator[Path]:
    """A folder of its own, a time limit, and eyes on what is written."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    counts[name] += 1
    signal.alarm(LIMIT)
    try:
        yield folder
    finally:
        signal.alarm(0)
        watched.clear()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """What may happen while a hostile file is read: success or UserError."""
    watched.append(folder)
    try:
        yield
        counts[f"{name}: loaded"] += 1
    except UserError as error:
        counts[f"{name}: refused"] += 1
        if not error.problem or not error.hint or "\n" in error.problem:
            raise Forbidden(f"says {error.problem!r}") from error
    finally:
        watched.clear()


# --- what to feed

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([0, -1, 1, 2, 16, 2**31, 2**40, "gelu", "F32", "../x", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def mutated(draw: Any, whole: bytes) -> bytes:
    """Bytes with parts changed, cut, repeated or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "delete", "repeat"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=20))
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 20))]
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 50))]
    return bytes(content)


@st.composite
def changed_settings(draw: Any, settings: dict) -> dict:
    """Settings with some values replaced, keys removed or added."""
    result = dict(settings)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(settings)) | st.text(max_size=12))
        if draw(st.booleans()):
            result[key] = draw(json_values)
        else:
            result.pop(key, None)
    return result


def parts_of(path: Path) -> dict[str, bytes]:
    """What a zip file holds."""
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


PARTS = parts_of(TINY)
PICKLE = next(content for name, content in PARTS.items() if name.endswith("data.pkl"))
CONTENT = torch.load(TINY, weights_only=True)
FILES = {path.name: path.read_bytes() for path in EXPORT.iterdir() if path.name != "SHA256SUMS"}


def encoded(kind: str) -> bytes:
    """A small picture as a file."""
    file, rng = io.BytesIO(), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 7, 4 if kind == "PNG" else 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP")}


# --- targets


def read_checkpoint(path: Path, folder: Path, name: str) -> None:
    """Load, build and use an encoder."""
    with reading(folder, name):
        load_checkpoint(path, "context")
        encoder = load_encoder(path, "local", device=CPU, dtype="float32")
        assert encoder.embed(IMAGES).shape == (1, encoder.embed_dim)


@hypothesis.given(mutated(TINY.read_bytes()))
def fuzz_checkpoint_bytes(content: bytes) -> None:
    """Files with damaged bytes."""
    with example("checkpoint, bytes") as folder:
        (folder / "c.pt").write_bytes(content)
        read_checkpoint(folder / "c.pt", folder, "checkpoint, bytes")


@hypothesis.given(mutated(PICKLE))
def fuzz_checkpoint_pickle(content: bytes) -> None:
    """Whole archives, true sums, another pickle."""
    with example("checkpoint, pickle") as folder:
        with zipfile.ZipFile(folder / "c.pt", "w") as archive:
            for name, part in PARTS.items():
                archive.writestr(name, content if name.endswith("data.pkl") else part)
        read_checkpoint(folder / "c.pt", folder, "checkpoint, pickle")


@hypothesis.given(st.data())
def fuzz_checkpoint_content(data: st.DataObject) -> None:
    """Whole files that say something else."""
    content = {**CONTENT, "weights": {k: dict(v) for k, v in CONTENT["weights"].items()}}
    part = data.draw(
        st.sampled_from(["architecture", "preprocessing", "training", "weights", "top"])
    )
    if part == "weights":
        name = data.draw(st.sampled_from(sorted(content["weights"]["target"])))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        kinds = [torch.float16, torch.float32, torch.int64, torch.bfloat16, torch.bool]
        content["weights"]["target"][name] = torch.ones(
            shape, dtype=data.draw(st.sampled_from(kinds))
        )
    elif part == "top":
        content = data.draw(changed_settings(content))
    else:
        content[part] = data.draw(changed_settings(content[part]))
    with example("checkpoint, content") as folder:
        torch.save(content, folder / "c.pt")
        read_checkpoint(folder / "c.pt", folder, "checkpoint, content")


def read_directory(folder: Path, name: str, changes: dict[str, bytes]) -> None:
    """Load a model directory with some files changed, and use it."""
    model = folder / "model"
    model.mkdir()
    for file, content in {**FILES, **changes}.items():
        (model / file).write_bytes(content)
    with reading(folder, name):
        encoder = load_encoder(model, "hf", device=CPU, dtype="float32")
        assert encoder.embed(IMAGES).shape == (1, encoder.embed_dim)


@hypothesis.given(st.sampled_from(["config.json", "preprocessor_config.json"]), st.data())
def fuzz_settings(file: str, data: st.DataObject) -> None:
    """Configurations with other values."""
    settings = data.draw(changed_settings(json.loads(FILES[file])))
    with example("directory, settings") as folder:
        read_directory(folder, "directory, settings", {file: json.dumps(settings).encode()})


@hypothesis.given(st.data())
def fuzz_safetensors(data: st.DataObject) -> None:
    """Weights with another header, or damaged bytes anywhere."""
    whole = FILES["model.safetensors"]
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(header)))
        header[name] = data.draw(changed_settings(header[name]))
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    else:
        content = data.draw(mutated(whole))
    with example("directory, weights") as folder:
        read_directory(folder, "directory, weights", {"model.safetensors": content})


@hypothesis.given(st.sampled_from(sorted(PICTURES)).flatmap(lambda kind: mutated(PICTURES[kind])))
def fuzz_image(content: bytes) -> None:
    """Damaged pictures."""
    with example("image") as folder:
        (folder / "x.png").write_bytes(content)
        with reading(folder, "image"):
            assert read_image(folder / "x.png").shape[0] == 3


names = st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=60)


@hypothesis.given(st.lists(names, min_size=1, max_size=4), st.lists(names, max_size=3))
def fuzz_folder(classes: list[str], files: list[str]) -> None:
    """Folders by any name, with other files in between."""
    with example("image folder") as folder:
        for name in classes:
            with suppress(OSError, UnicodeEncodeError):  # names that no file system takes
                (folder / name).mkdir()
                (folder / name / "0.png").write_bytes(PICTURES["PNG"])
                for file in files:
                    (folder / name / file).write_bytes(b"x")
        with reading(folder, "image folder"):
            split = balanced_sample(load_split(str(folder), folder, "test", True), 5, 0)
            assert len(fingerprint(split)) == 64


SPLIT = Split(
    "x", "all", ("a", "b"), IMAGES[0].expand(4, -1, -1, -1), np.arange(4) % 2, np.arange(4)
)
PIXELS = pixel_encoder()
EXPECTED = extract(PIXELS, SPLIT, 4, None, lambda **_: nullcontext(argparse.Namespace(update=int)))


@hypothesis.given(st.data())
def fuzz_cache(data: st.DataObject) -> None:
    """Cached chunks of any content give the embeddings all the same."""
    with example("cached chunk") as folder:
        bar = lambda **_: nullcontext(argparse.Namespace(update=int))  # noqa: E731
        extract(PIXELS, SPLIT, 4, folder / "cache", bar)
        chunk = folder / "cache" / "000000000.chunk"
        chunk.write_bytes(data.draw(st.binary(max_size=100) | mutated(chunk.read_bytes())))
        with reading(folder, "cached chunk"):
            found = extract(PIXELS, SPLIT, 4, folder / "cache", bar)
            assert found.values.tobytes() == EXPECTED.values.tobytes()


flags = ["local-checkpoint", "local-weights", "hf-model", "output-dir", "max-samples", "dataset"]
flags += ["split", "data-dir", "offline", "device", "dtype", "batch-size", "seed", "no-cache", "x"]
VALUES = """0 1 -1 5 4294967295 4294967296 1e9 nan none target cpu cuda cuda:9 meta auto float32
bfloat16 digits cifar10 images out ../out tiny.pt hf /dev/null ."""
values = st.sampled_from([*VALUES.split(), "", " ", "a b", "\udcff", "ä\n", "x" * 300]) | st.text(
    max_size=12
)
words = st.sampled_from(flags).flatmap(
    lambda flag: st.just([f"--{flag}"]) | values.map(lambda value: [f"--{flag}={value}"])
)


@hypothesis.given(st.lists(words, max_size=5))
def fuzz_arguments(groups: list[list[str]]) -> None:
    """Whole runs in a process of their own, offline and small unless the words say otherwise."""
    given = [word for group in groups for word in group]
    hypothesis.assume(not any(word.startswith("--output-dir") for word in given))
    with example("arguments, whole runs") as folder:
        for part in (TINY, EXPORT):
            (folder / part.name).symlink_to(part)
        base = ["--local-checkpoint", "tiny.pt", "--hf-model", "none", "--dataset", "digits"]
        base += ["--max-samples", "6", "--output-dir", "out", "--offline"]
        outcome = run(COMPARE, [*base, *given], folder / "log", prepare=lambda: os.chdir(folder))
        counts[f"arguments, whole runs: {'loaded' if outcome.code == 0 else 'refused'}"] += 1
        assert outcome.code in (0, 1, 2), (given, outcome.text[-3000:])
        assert "Traceback" not in outcome.text, (given, outcome.text[-3000:])
        assert outcome.code != 1 or outcome.refused, (given, outcome.text[-3000:])
        assert {path.name for path in folder.iterdir()} <= {"tiny.pt", "hf", "out", "log"}


TARGETS: list[tuple[Callable[[], None], int]] = [
    (fuzz_checkpoint_bytes, 60),
    (fuzz_checkpoint_pickle, 100),
    (fuzz_checkpoint_content, 100),
    (fuzz_settings, 60),
    (fuzz_safetensors, 60),
    (fuzz_image, 300),
    (fuzz_folder, 100),
    (fuzz_cache, 100),
    (fuzz_arguments, 6),
]


def limited(target: Callable[[], None], number: int) -> Callable[[], None]:
    """A target that is fed so many examples at each call; `example` limits their time."""
    checks = list(hypothesis.HealthCheck)
    return hypothesis.settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=checks
    )(target)


def main() -> int:
    """Round after round until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, too_late)
    targets = [limited(target, number) for target, number in TARGETS]
    ends, turn = time.monotonic() + 60 * args.minutes, args.seed
    print(f"seed {args.seed}", flush=True)
    while time.monotonic() < ends:
        for target in targets:
            turn += 1
            hypothesis.seed(turn)(target)()
            if time.monotonic() > ends:
                break
    shutil.rmtree(SCRATCH, ignore_errors=True)
    fed = [name for name in counts if ":" not in name]
    rows = [(n, counts[n], counts[f"{n}: loaded"], counts[f"{n}: refused"]) for n in fed]
    print_table([("fed", "examples", "loaded", "refused"), *rows])
    print(f"\n{sum(counts[name] for name in fed)} examples, nothing failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
