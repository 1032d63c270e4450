"""Flip single bits and cut files short: what is noticed, and what changes a number unseen.

    python benchmarks/bit_rot.py --times 200

Half of the damages are one flipped bit anywhere in the file, half a cut at any length. A damage is
`noticed` if the reader refuses the file, `harmless` if all that is read is as before (padding, and
what the zip format says twice), and lost otherwise. At the end ten whole runs over damaged caches
must print a line for each damaged chunk and give numbers and maps of the first. Exit code 1 if
anything is lost.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from victims import COMPARE, print_table, run, tiny_models

from ijepa import embeddings
from ijepa.checkpoint import load_checkpoint, read_torch_file
from ijepa.encoders import load_encoder
from ijepa.errors import UserError
from ijepa.files import read_sealed, sha256

BAD_NPZ = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
BAD_NPZ += (tokenize.TokenError,)
CPU = torch.device("cpu")


class Noticed(Exception):  # noqa: N818
    """The reader saw the damage."""


def damage(whole: bytes, rng: random.Random, number: int) -> bytes:
    """The file with one bit flipped or its end cut off."""
    if number % 2:
        return whole[: rng.randrange(len(whole))]
    changed = bytearray(whole)
    changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def read_chunk(path: Path) -> bytes:
    """A cached chunk as the comparison reads it: 64 images in 16 dimensions."""
    values = embeddings.read_chunk(path, 64, 16)
    if values is None:
        raise Noticed
    return values.tobytes()


def read_map(path: Path) -> bytes:
    """A kept map of 64 images."""
    return read_kept(path, 8 * (2 * 64 + 3))


def read_kept(path: Path, num_bytes: int) -> bytes:
    """The content of a file of the cache."""
    content = read_sealed(path, num_bytes)
    if content is None:
        raise Noticed
    return content


def read_checkpoint(path: Path) -> Any:
    """An encoder as the comparison reads it."""
    try:
        found = load_checkpoint(path)
    except UserError as error:
        raise Noticed from error
    weights = {name: value.numpy().tobytes() for name, value in found.state_dict.items()}
    return found.config, found.mean, found.std, found.training, weights


def read_state(path: Path) -> Any:
    """Plain tensors as the trainer reads its state."""
    try:
        return {name: value.numpy().tobytes() for name, value in read_torch_file(path).items()}
    except UserError as error:
        raise Noticed from error


def read_directory(path: Path) -> Any:
    """An exported directory as the comparison reads it; `path` is one of its files."""
    try:
        encoder = load_encoder(path.parent, "hf", device=CPU, dtype="float32")
    except UserError as error:
        raise Noticed from error
    image = torch.arange(3 * 32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8)
    return encoder.embed([image.reshape(3, 32, 32)]).numpy().tobytes()


def read_npz(path: Path) -> Any:
    """The embeddings that a run wrote, as numpy reads them."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name].tobytes() for name in arrays}
    except BAD_NPZ as error:
        raise Noticed from error


def listed(path: Path) -> str:
    """The same file against its SHA-256 in metrics.json."""
    artifacts = json.loads((path.parent / "metrics.json").read_text())["artifacts"]
    if sha256(path) not in {artifact["sha256"] for artifact in artifacts}:
        raise Noticed
    return "whole"


def try_file(path: Path, read: Callable[[Path], Any], times: int, rng: random.Random) -> Counter:
    """Damage one file again and again; how often it was noticed, harmless, lost."""
    whole, expected, seen = path.read_bytes(), read(path), Counter()
    for number in range(times):
        path.write_bytes(damage(whole, rng, number))
        try:
            seen["harmless" if read(path) == expected else "lost"] += 1
        except Noticed:
            seen["noticed"] += 1
    path.write_bytes(whole)
    return seen


def numbers(output: Path) -> Any:
    """What must not change."""
    content = json.loads((output / "metrics.json").read_text())
    parts = [content[name] for name in ("summary", "metrics", "comparison", "references", "models")]
    for model in parts[-1].values():
        del model["images_per_second"], model["from_cache"]
    return parts, (output / "per_image.csv").read_text()


def main() -> int:
    """Damage each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    scratch = Path(tempfile.mkdtemp(prefix="rot-"))
    tiny, hf = tiny_models(scratch)
    output = scratch / "out"
    flags = ["--offline", "--dataset", "digits", "--max-samples", 64, "--output-dir", output]
    flags += ["--local-checkpoint", tiny, "--hf-model", hf]
    first = run(COMPARE, flags, scratch / "log")
    assert first.code == 0, first.text
    state = scratch / "state.pt"
    torch.save({"a": torch.randn(4000), "b": torch.randn(30, 30)}, state)
    kept = output / ".cache"
    chunk, one_map = (next(kept.glob(name)) for name in ("local-*/*.chunk", "maps/*.map"))
    kinds = [
        ("cached chunk", chunk, read_chunk),
        ("kept map", one_map, read_map),
        ("checkpoint", tiny, read_checkpoint),
        ("state of a training", state, read_state),
        *((f"exported {file.name}", file, read_directory) for file in sorted(hf.glob("[cmp]*.*"))),
        ("embeddings_local.npz, by numpy", output / "embeddings_local.npz", read_npz),
        ("embeddings_local.npz, by metrics.json", output / "embeddings_local.npz", listed),
    ]
    rows: list[tuple] = [("file", "damaged", "noticed", "harmless", "lost")]
    for name, path, read in kinds:
        seen = try_file(path, read, args.times, rng)
        rows.append((name, args.times, seen["noticed"], seen["harmless"], seen["lost"]))
    expected, seen = numbers(output), Counter()
    cached = sorted(path for path in kept.rglob("*") if path.is_file())
    for number in range(10):
        path = rng.choice(cached)
        path.write_bytes(damage(path.read_bytes(), rng, number))
        again = run(COMPARE, flags, scratch / "log")
        told = again.text.count("were damaged and computed anew")
        told_of = path.suffix == ".chunk"
        good = again.code == 0 and told == told_of and numbers(output) == expected
        seen["noticed" if good else "lost"] += 1
    rows.append(("whole runs over a damaged cache", 10, seen["noticed"], 0, seen["lost"]))
    lost = sum(row[4] for row in rows[1:])
    shutil.rmtree(scratch)
    print_table(rows)
    print(f"\n{lost} lost")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
