"""Feed the comparison what nobody would write by hand, for as long as is wanted.

    python benchmarks/fuzz.py --minutes 10

Hypothesis makes checkpoints, model directories, images, folders, embeddings of earlier runs, cached
chunks and arguments; each is read as a run reads it. An example must load or raise UserError
(arguments: exit with 0, 1 or 2) within `LIMIT` seconds and `MEMORY`; failures are shrunk and shown.

    python benchmarks/fuzz.py --flips 200

flips single bits, anywhere in a checkpoint, embeddings of an earlier run, and a cached chunk: the
file must be refused, or give the same numbers.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm
from victims import COMPARE, print_table, run, some_images, tiny_models

from ijepa.data import Split, balanced_sample, load_split
from ijepa.embeddings import extract, save_embeddings
from ijepa.encoders import load_encoder, pixel_encoder
from ijepa.errors import UserError

LIMIT = 30
MEMORY = 2**33  # bytes of the process: a file that claims more must be refused (SECURITY.md)
CPU = torch.device("cpu")
IMAGES = torch.arange(4 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(4, 3, 32, 32)
SPLIT = Split("x", "all", ("a", "b"), IMAGES, np.arange(4) % 2, np.arange(4))
FLIPPED = ("checkpoint, bytes", "npz", "cached chunk")
counts: Counter[str] = Counter()


def too_late(*_):
    """End an example that hangs."""
    raise AssertionError(f"over {LIMIT} s")


@contextmanager
def example(name):
    """A copy of the models in a folder of its own, a time limit, and success or UserError."""
    folder = Path("example").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("models", folder)
    counts[name] += 1
    signal.alarm(LIMIT)
    try:
        yield folder
        counts[f"{name}: loaded"] += 1
    except UserError as error:
        counts[f"{name}: refused"] += 1
        if not error.problem or not error.hint or "\n" in error.problem:
            raise AssertionError(f"says {error.problem!r}") from error
    finally:
        signal.alarm(0)


@st.composite
def mutated(draw, whole):
    """Bytes with parts flipped, cut, repeated, removed or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, width = draw(st.integers(0, len(content))), draw(st.integers(1, 40))
        part = bytes(content[at : at + width])
        flipped = bytes([part[0] ^ 1 << draw(st.integers(0, 7))]) + part[1:] if part else b"x"
        others = [flipped, b"", 2 * part, draw(st.binary(max_size=20)) + part]
        content[at : at + width] = draw(st.sampled_from(others))
        if draw(st.integers(0, 9)) == 0:
            del content[at:]
    return bytes(content)


odd = st.sampled_from([0, -1, 1, 2, 16, 2**31, 2**40, "gelu", "F32", "../x", "\0"])
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | odd
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@st.composite
def changed(draw, settings):
    """Settings with some values replaced, keys removed or added."""
    result = dict(settings)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(settings)) | st.text(max_size=12))
        result.pop(key, None)
        if draw(st.booleans()):
            result[key] = draw(values)
    return result


@st.composite
def other_content(draw):
    """Whole checkpoints that say something else, or hold a tensor of another shape or type."""
    content = torch.load("models/tiny.pt", weights_only=True)
    part = draw(st.sampled_from([*sorted(content), "top"]))
    if part == "weights":
        tensors = content["weights"]["target"]
        kinds = [torch.float16, torch.float32, torch.int64, torch.bfloat16, torch.bool]
        shape, dtype = draw(st.lists(st.integers(0, 5), max_size=4)), draw(st.sampled_from(kinds))
        tensors[draw(st.sampled_from(sorted(tensors)))] = torch.ones(shape, dtype=dtype)
    elif part != "top" and isinstance(content[part], dict):
        content[part] = draw(changed(content[part]))
    else:
        content = draw(changed(content))
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def is_large(value):
    """Whether a value is a number that takes a second to count to."""
    return isinstance(value, int | float) and value > 10_000


def picture(kind):
    """A small picture as a file."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((9, 7)).convert("RGB").save(file, format=kind)
    return file.getvalue()


def use(source, role):
    """Load an encoder and embed with it."""
    encoder = load_encoder(source, role, device=CPU, dtype="float32", offline=True)
    if hasattr(encoder, "look_up"):
        return encoder.look_up(SPLIT.image_keys, SPLIT.indices)
    return encoder.embed(list(IMAGES)).numpy()


def read_folder(folder):
    """Sample a folder of images and decode them."""
    split = balanced_sample(load_split(str(folder / "images"), folder, "test", True), 5, 0)
    return [split.images[row].shape for row in range(len(split))]


def pixels(cache):
    """Embeddings from the cache, in which what is missing or damaged is computed again."""
    found, _ = extract([pixel_encoder()], SPLIT, cache=cache, progress=partial(tqdm, disable=True))
    return found["pixels"].values


def read_chunk(folder):
    """The embeddings of the cache are those without a cache."""
    found = pixels(folder / "cache")
    assert np.array_equal(found, pixels(None))
    return found


def file_targets():
    """What to feed: a name, the file, its contents, how it is read, and how often in a round."""
    checkpoint, old = Path("models/tiny.pt").read_bytes(), Path("models/old.npz").read_bytes()
    chunk = next(Path("models/cache").rglob("*.npz"))
    weights = Path("models/hf/model.safetensors").read_bytes()
    pictures = st.sampled_from(["PNG", "JPEG", "WEBP"]).map(picture).flatmap(mutated)
    local, hf = (lambda f: use(f / "tiny.pt", "local")), (lambda f: use(f / "hf", "hf"))
    yield "checkpoint, bytes", "tiny.pt", mutated(checkpoint), local, 15
    yield "checkpoint, content", "tiny.pt", other_content(), local, 25
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads(Path("models/hf", name).read_text())
        # Layers that a file claims take the time that they claim (SECURITY.md).
        few = changed(content).filter(lambda new: not is_large(new.get("num_hidden_layers")))
        others = few.map(lambda new: json.dumps(new).encode())
        yield f"directory, {name}", f"hf/{name}", others, hf, 10
    yield "directory, weights", "hf/model.safetensors", mutated(weights), hf, 15
    yield "image", "images/a/000.png", pictures, read_folder, 50
    yield "npz", "old.npz", mutated(old), lambda f: use(f / "old.npz", "hf"), 15
    chunks = st.binary(max_size=100) | mutated(chunk.read_bytes())
    yield "cached chunk", str(chunk.relative_to("models")), chunks, read_chunk, 15


def fuzz_file(name, file, contents, read):
    """A function that feeds one file of any content."""

    @hypothesis.given(contents)
    def target(content):
        with example(name) as folder:
            (folder / file).write_bytes(content)
            read(folder)

    return target


names = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=60)


@hypothesis.given(st.lists(names, min_size=1, max_size=4), st.lists(names, max_size=3))
def fuzz_names(classes, files):
    """Class folders by any name, with other files in between."""
    with example("names") as folder:
        for name in classes:
            with suppress(OSError, UnicodeEncodeError):  # names that no file system takes
                shutil.copytree(folder / "images" / "a", folder / "images" / name)
                for file in files:
                    (folder / "images" / name / file).write_bytes(b"x")
        read_folder(folder)


WORDS = """local-checkpoint local-weights local-num-heads hf-model hf-revision hf-pooling dataset
split max-samples probe-samples skip-unreadable cache-dir no-cache data-dir offline device dtype
batch-size seed json debug x"""
VALUES = """0 1 -1 5 4294967296 1e9 nan none all target cls cpu cuda:9 meta auto float32 digits
cifar10 images ../out tiny.pt hf old.npz /dev/null . ~ a@b"""
given = st.sampled_from([*VALUES.split(), "", " ", "a b", "\udcff", "ä\n", "x" * 300]) | st.text()
words = st.sampled_from(WORDS.split()).flatmap(
    lambda flag: st.just(f"--{flag}") | given.map(lambda value: f"--{flag}={value}")
)


@hypothesis.given(st.lists(words, max_size=5))
def fuzz_arguments(extra):
    """Whole runs in a process of their own, offline and small unless the words say otherwise."""
    with example("arguments") as folder:
        base = ["--local-checkpoint", "tiny.pt", "--hf-model", "none", "--dataset", "images"]
        base += ["--max-samples", "6", "--output-dir", "out", "--cache-dir", "cache", "--offline"]
        outcome = run(COMPARE, [*base, *extra], Path("log"), lambda: os.chdir(folder))
        good = outcome.refused or (outcome.code in (0, 2) and "Traceback" not in outcome.text)
        assert good, (extra, outcome.text[-3000:])


def flip(times):
    """A table of flipped bits; fails if a number changes."""
    rng, rows = random.Random(0), [("file", "flips", "refused", "same numbers", "other numbers")]
    for name, file, _, read, _ in file_targets():
        if name not in FLIPPED:
            continue
        whole, expected = Path("models", file).read_bytes(), read(Path("models"))
        for _ in range(times):
            content = bytearray(whole)
            content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            with example(name) as folder:
                (folder / file).write_bytes(content)
                counts[f"{name}: lost"] += not np.array_equal(read(folder), expected)
        lost, refused = counts[f"{name}: lost"], counts[f"{name}: refused"]
        rows.append((name, times, refused, times - refused - lost, lost))
    print_table(rows)
    return any(row[4] for row in rows[1:])


def fuzz(ends, turn):
    """Round after round until the time is over."""
    checks = list(hypothesis.HealthCheck)
    usual = hypothesis.settings(deadline=None, database=None, suppress_health_check=checks)
    targets = [(fuzz_file(*parts), often) for *parts, often in file_targets()]
    targets += [(fuzz_names, 15), (fuzz_arguments, 2)]
    targets = [hypothesis.settings(usual, max_examples=often)(one) for one, often in targets]
    for number, target in enumerate(cycle(targets), turn + 1):
        if time.monotonic() > ends:
            break
        hypothesis.seed(number)(target)()
    fed = [name for name in counts if ":" not in name]
    rows = [(n, counts[n], counts[f"{n}: loaded"], counts[f"{n}: refused"]) for n in fed]
    print_table([("fed", "examples", "loaded", "refused"), *rows])
    print(f"\n{sum(counts[name] for name in fed)} examples, nothing failed")


def main():
    """Fuzz, or flip bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--flips", type=int, help="flipped bits for each kind of file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_late)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        models = Path("models")
        some_images(models / "images", 6, 9)
        tiny_models(models)
        save_embeddings(models / "old.npz", pixels(models / "cache"), SPLIT)
        if args.flips:
            return flip(args.flips)
        print(f"seed {args.seed}", flush=True)
        return fuzz(time.monotonic() + 60 * args.minutes, args.seed)


if __name__ == "__main__":
    sys.exit(main())
