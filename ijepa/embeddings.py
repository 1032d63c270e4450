"""Extraction: the border between tensors and arrays, with a cache that all runs share."""

import os
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ijepa.data import Split
from ijepa.distributed import num_processes, process_rank, wait_for_all
from ijepa.encoders import FrozenEncoder
from ijepa.errors import UserError
from ijepa.files import read_arrays, write_atomically
from ijepa.metrics import SILENT, Progress

CHUNK = 128
"""Images per cache file: so many are lost by an interruption at most, on a GPU a batch more."""
CPU_BATCH, GPU_BATCH = 16, 64
"""Images per forward pass; more would not fit a processor's cache, fewer not fill a GPU."""
BATCH_VALUES = 2**29
"""Bytes of decoded images at which they are prepared, so that they can be dropped: 0.5 GB."""
GPU_THREADS = 2
"""Threads that prepare batches for a GPU; a single one is slower than an H200 with a ViT-H."""


@dataclass(frozen=True)
class Embeddings:
    """One model's embeddings of a split, row by row."""

    values: Float[np.ndarray, "n d"]
    images_per_second: float | None
    """Of the network, for what this process computed in this run; None when nothing was."""
    from_cache: bool
    """True when every row came from the cache or from a file."""
    damaged: tuple[Path, ...] = ()
    """Files of the cache that could not be read; they are removed, their rows computed again."""


def first_rows(keys: Sequence[bytes]) -> dict[bytes, int]:
    """The first row of each key."""
    return {keys[row]: row for row in reversed(range(len(keys)))}


class Table:
    """One encoder's embeddings of a split while they are collected, and their cache.

    Of images with the same key only the first has a value.
    """

    def __init__(self, encoder: FrozenEncoder, split: Split, cache: Path | None) -> None:
        self.encoder, self.keys = encoder, split.image_keys
        self.folder = cache / encoder.key if cache else None
        self.values = np.zeros((len(split), encoder.embed_dim), np.float32)
        self.done = np.zeros(len(split), bool)
        self.waiting: list[int] = []
        self.damaged: list[Path] = []
        self.computed, self.seconds = 0, 0.0
        self.read_cache()
        self.cached = self.done.copy()

    def read_cache(self) -> None:
        """Take what the cache has; files that cannot be read are removed and noted."""
        rows, width = first_rows(self.keys), self.encoder.embed_dim
        for file in sorted(self.folder.glob("*.npz")) if self.folder else ():
            try:
                chunk = read_arrays(file, "keys", "embeddings")
                keys, values = chunk["keys"], chunk["embeddings"]
                kinds = keys.dtype, keys.shape[1:], values.dtype, values.shape
                if kinds != (np.uint8, (16,), np.float32, (*keys.shape[:1], width)):
                    raise ValueError(f"no file of the cache: {kinds}")
            except (ValueError, KeyError):
                self.damaged += [file] * file.exists()  # another run may have removed it
                file.unlink(missing_ok=True)
                continue
            for key, value in zip(keys, values, strict=True):
                if (row := rows.get(key.tobytes())) is not None:
                    self.values[row], self.done[row] = value, True

    def launch(self, pixels: Tensor) -> Tensor:
        """Start embedding prepared images; a GPU may not have finished on return."""
        began = time.perf_counter()
        values = self.encoder.encode(pixels)
        self.seconds += time.perf_counter() - began
        return values

    def add(self, rows: Sequence[int], values: Tensor) -> None:
        """Wait for the embeddings of some rows; write a file when there are enough of them."""
        began = time.perf_counter()
        self.values[rows] = values.cpu().numpy()
        self.seconds += time.perf_counter() - began
        self.computed += len(rows)
        self.done[rows] = True
        self.waiting.extend(rows)
        while len(self.waiting) >= CHUNK:
            self.write(self.waiting[:CHUNK])
            del self.waiting[:CHUNK]

    def write(self, rows: Sequence[int]) -> None:
        """Store some rows in the cache.

        Raises:
            UserError: If it cannot be written.
        """
        if self.folder and rows:
            keys = np.frombuffer(b"".join(self.keys[row] for row in rows), np.uint8).reshape(-1, 16)
            values = self.values[list(rows)]
            path = self.folder / f"{secrets.token_hex(8)}.npz"
            write_atomically(path, lambda file: np.savez(file, keys=keys, embeddings=values))


def extract(
    encoders: Sequence[Any],
    split: Split,
    *,
    cache: Path | None = None,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> tuple[dict[str, Embeddings], list[tuple[int, str]]]:
    """Embed every image of the split with every encoder; each image is decoded once at most.

    Images are identified by their keys: equal ones are embedded once, and a run computes only what
    the cache lacks. Each of several processes writes its share to the cache, where process 0 finds
    it; the others return an empty dict and an empty list.

    Args:
        encoders: `FrozenEncoder`s, or `PrecomputedEmbeddings`, which look their rows up.
        split: The images.
        cache: Folder that holds one folder per encoder; None keeps nothing. It must exist for
            several processes.
        batch_size: Images per forward pass, by default `CPU_BATCH` or `GPU_BATCH`; affects results
            only by rounding.
        progress: See `Progress`.

    Returns:
        The embeddings of all decoded images, by encoder; and the rows of the images that could not
        be decoded, with the reasons.

    Raises:
        UserError: If the cache cannot be written, memory runs out, another process ended, or stored
            embeddings lack an image.
        ValueError: If two encoders have the same name.
    """
    # This makes glibc keep up to 64 MB of freed memory (mallopt(3), M_MMAP_THRESHOLD); without it
    # each batch is zeroed again. Elsewhere nothing happens.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    keys = split.image_keys
    rows = first_rows(keys)  # of equal images the first stands for all
    source = np.array([rows[key] for key in keys], np.int64)
    if len({one.name for one in encoders}) < len(encoders):
        raise ValueError(f"encoders must have names of their own: {[one.name for one in encoders]}")
    networks = [one for one in encoders if isinstance(one, FrozenEncoder)]
    tables = {one.name: Table(one, split, cache) for one in networks}
    if num_processes() > 1:
        share = sorted(rows.values())[process_rank() :: num_processes()]
        compute([*tables.values()], split, share, batch_size, progress)
        wait_for_all()
        if process_rank():
            return {}, []
        for table in tables.values():
            table.read_cache()
    failures = compute([*tables.values()], split, sorted(rows.values()), batch_size, progress)
    unreadable = [(row, failures[one]) for row, one in enumerate(source) if one in failures]
    kept = [row for row, one in enumerate(source) if one not in failures]
    found = {}
    for encoder in encoders:
        if (table := tables.get(encoder.name)) is None:
            values = encoder.look_up([keys[row] for row in kept], split.indices[kept])
            found[encoder.name] = Embeddings(values, None, from_cache=True)
        else:
            rate = table.computed / table.seconds if table.seconds else None
            values, cached = table.values[source[kept]], bool(table.cached[source[kept]].all())
            found[encoder.name] = Embeddings(values, rate, cached, tuple(table.damaged))
    return found, unreadable


def compute(
    tables: Sequence[Table],
    split: Split,
    rows: Sequence[int],
    batch_size: int | None,
    progress: Progress,
) -> dict[int, str]:
    """Embed what the tables lack of some images; the rows that cannot be decoded, with reasons."""
    missing = [row for row in rows if not all(table.done[row] for table in tables)]
    if not missing:
        return {}
    for table in tables:
        if not table.done[missing].all():
            table.encoder.load()
    failures: dict[int, str] = {}
    devices = {table.encoder.device.type for table in tables}
    on_gpu, on_cpu = "cuda" in devices, devices == {"cpu"}
    size = batch_size or (CPU_BATCH if on_cpu else GPU_BATCH)
    # With more threads than cores, OpenMP puts those of a network on the CPU to sleep after each
    # product.
    cores = 1 if on_cpu else torch.get_num_threads()
    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    make = partial(prepare, tables, split, failures)
    work = prefetch(make, batches, GPU_THREADS if on_gpu else 1, cores)
    launched = ([(table, rows, table.launch(x)) for table, rows, x in one] for one in work)
    with progress(total=len(missing), desc="embedding") as bar:
        # A GPU is given a batch before the results of the one before are awaited.
        results = (one for one, _ in pairwise(chain(launched, [None]))) if on_gpu else launched
        for batch, found in zip(batches, results, strict=True):
            for table, done, values in found:
                table.add(done, values)
            bar.update(len(batch))
    for table in tables:
        table.write(table.waiting)
        table.waiting.clear()
    return failures


def prepare(
    tables: Sequence[Table], split: Split, failures: dict[int, str], rows: Sequence[int]
) -> list[tuple[Table, list[int], Tensor]]:
    """Decode images; for each table that lacks some of them, their rows and prepared pixels.

    Large images are prepared a part at a time, so that they can be dropped.
    """
    images: dict[int, Tensor] = {}
    prepared = []
    for row in rows:
        try:
            images[row] = split.images[row]
        except UserError as error:
            failures[row] = error.problem
        if row == rows[-1] or sum(image.numel() for image in images.values()) >= BATCH_VALUES:
            for table in tables:
                if lacking := [one for one in images if not table.done[one]]:
                    pixels = table.encoder.prepare([images[one] for one in lacking])
                    prepared.append((table, lacking, pixels))
            images = {}
    return prepared


def prefetch(
    make: Callable[[list[int]], Any], batches: Sequence[list[int]], threads: int, cores: int
) -> Iterator[Any]:
    """What `make` gives for each batch, made ahead in threads that compute with so many cores."""
    waiting, usual = iter(batches), torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(cores)) as pool:
            coming = deque(pool.submit(make, batch) for batch in islice(waiting, threads))
            while coming:
                item = coming.popleft().result()
                coming.extend(pool.submit(make, batch) for batch in islice(waiting, 1))
                yield item
    finally:
        torch.set_num_threads(usual)  # for threads that start later


def writable_cache(cache: Path | None, output: Path) -> tuple[Path, str | None]:
    """The folder for embeddings that all runs share, or one in the output folder with the reason.

    Without a choice it is `ijepa-compare` in $XDG_CACHE_HOME or ~/.cache.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = base if base.is_absolute() else Path.home() / ".cache"
        chosen = cache or base / "ijepa-compare"
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            return chosen, None
    except (OSError, RuntimeError) as error:  # pathlib finds no home folder
        own = output / ".cache"
        return own, f"the cache cannot be written ({error}): this run keeps its own in {own}"


def save_embeddings(path: Path, values: Float[np.ndarray, "n d"], split: Split) -> None:
    """Write one npz without pickles: `embeddings` (float32), `indices`, `labels`, `keys`, `paths`.

    `keys` (n x 16, uint8) are the images' (`Split.image_keys`); `paths` exist for folders.
    """
    keys = np.frombuffer(b"".join(split.image_keys), np.uint8).reshape(-1, 16)
    arrays = {"embeddings": values, "indices": split.indices, "labels": split.labels, "keys": keys}
    if split.paths is not None:
        arrays["paths"] = np.array(split.paths)
    write_atomically(path, lambda file: np.savez(file, **arrays))
