"""Extraction: the border between tensors and arrays, with a cache that survives interruption."""

import hashlib
import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ijepa.data import Split
from ijepa.distributed import gather_objects, num_processes, process_rank
from ijepa.encoders import FrozenEncoder
from ijepa.files import cannot_write, read_sealed, write_atomically, write_sealed

CHUNK = 128
"""Images per cache file: so many are lost with an interruption at most, on a GPU a batch more."""
BATCH_VALUES = 2**29
"""Bytes of decoded images at which a batch is closed: 0.5 GB."""
GPU_THREADS = 2
"""Threads that prepare batches for a GPU; one alone is slower than an H200 with a ViT-H."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[..., AbstractContextManager[Any]]
"""Makes a progress bar like `tqdm(total=..., initial=..., desc=...)`."""


@dataclass(frozen=True)
class Embeddings:
    """One model's embeddings of a split, row by row."""

    values: Float[np.ndarray, "n d"]
    """Mapped from a file without a name, which is gone with them: they may exceed the memory."""
    images_per_second: float | None
    """Of what was computed in this run; None when nothing was."""
    from_cache: bool
    """True when every row came from the cache."""
    damaged: tuple[Path, ...] = ()
    """Files of the cache that did not have their checksum; their rows were computed again."""


def cache_folder(root: Path, encoder: FrozenEncoder, split_hash: str) -> Path:
    """Where the chunks of this encoder on these images lie: weights, preprocessing and images."""
    key = hashlib.sha256(json.dumps([encoder.key, split_hash]).encode()).hexdigest()
    return root / f"{encoder.name}-{key[:16]}"


def extract(
    encoder: FrozenEncoder,
    split: Split,
    batch_size: int,
    cache: Path | None,
    progress: Progress,
    scratch: Path | None = None,
) -> Embeddings:
    """Embed every image of the split in order.

    Several processes take chunks in turn, each through the cache. Process 0 gets all rows, in the
    same bytes as one process would; the others get their own, and zeros in the place of the rest.

    Args:
        encoder: What to embed with.
        split: The images.
        batch_size: Images per forward pass, of which a chunk bounds the number; does not change the
            result beyond rounding.
        cache: Folder for finished chunks, which are read instead of computed; None for no cache.
        progress: See `Progress`.
        scratch: Folder with room for the embeddings while they are in use; None for the system's.

    Raises:
        UserError: If the cache or the scratch folder cannot be written, or another process ended.
    """
    shape = len(split), encoder.embed_dim
    starts = range(0, len(split), CHUNK)[process_rank() :: num_processes()]
    own = [range(start, min(start + CHUNK, len(split))) for start in starts]
    missing, damaged, seconds = [], [], 0.0
    with (
        scratch_file(scratch, 4 * math.prod(shape)) as stored,
        progress(total=sum(map(len, own)), desc=encoder.name) as bar,
    ):
        for rows in own:
            file = chunk_file(cache, rows)
            values = read_chunk(file, len(rows), encoder.embed_dim) if file else None
            if values is None:
                missing.append(rows)
                damaged += [file] if file and file.exists() else []
                continue
            store_rows(stored, rows.start, values)
            bar.update(len(rows))
        if missing:
            encoder.load()
        began = time.perf_counter()
        for rows, values in embed_chunks(encoder, split, missing, batch_size):
            seconds += time.perf_counter() - began
            if file := chunk_file(cache, rows):
                write_chunk(file, values)
            store_rows(stored, rows.start, values)
            bar.update(len(rows))
            began = time.perf_counter()
        everything = np.memmap(stored, np.float32, "r", shape=shape)
        gather_rows_of_others(stored, everything)
    found = gather_objects((sum(map(len, missing)), seconds, damaged))
    counts, times, all_damaged = zip(*found, strict=True)
    computed, seconds = sum(counts), max(times)
    return Embeddings(
        everything,
        computed / seconds if computed else None,
        not computed,
        tuple(chain.from_iterable(all_damaged)),
    )


@contextmanager
def scratch_file(folder: Path | None, num_bytes: int) -> Iterator[IO[bytes]]:
    """A file of zeros without a name: its space is free again when nothing maps it any more.

    Raises:
        UserError: If the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            file.truncate(num_bytes)
        except OSError as error:
            raise cannot_write(folder or tempfile.gettempdir(), error) from error
        yield file


def store_rows(file: IO[bytes], start: int, values: Float[np.ndarray, "b d"]) -> None:
    """Put rows in their place.

    Raises:
        UserError: If the disk is full. Writing to a map of the file would end the process instead.
    """
    try:
        file.seek(start * values.itemsize * values.shape[1])
        left = memoryview(np.ascontiguousarray(values)).cast("B")
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise cannot_write("the embeddings beside the results", error) from error


def gather_rows_of_others(file: IO[bytes], mapped: Float[np.ndarray, "n d"]) -> None:
    """Store what other processes have computed in process 0, chunk by chunk."""
    rank, step = process_rank(), num_processes()
    starts = range(0, len(mapped), CHUNK)
    for turn in range(0, len(starts), step) if step > 1 else ():
        own = starts[turn + rank : turn + rank + 1]
        mine = [(start, np.array(mapped[start : start + CHUNK])) for start in own]
        for start, values in chain.from_iterable(gather_objects(mine)[1:]):
            store_rows(file, start, values)


def embed_chunks(
    encoder: FrozenEncoder, split: Split, chunks: Sequence[range], batch_size: int
) -> Iterator[tuple[range, Float[np.ndarray, "b d"]]]:
    """Each chunk of rows with its embeddings; a batch is prepared while the one before is embedded.

    No batch holds images of two chunks, so that chunks are the same whichever are missing. A GPU is
    given a batch before the results of the one before are awaited, so that it never waits for us.
    """
    on_gpu = encoder.device.type == "cuda"
    every_batch = chain.from_iterable(batches(split, rows, batch_size) for rows in chunks)
    preparing = partial(map_ahead, threads=GPU_THREADS) if on_gpu else map
    encoded = map(encoder.encode, one_ahead(preparing(encoder.prepare, every_batch)))
    results = one_behind(encoded) if on_gpu else encoded
    for rows in chunks:
        parts: list[Float[np.ndarray, "b d"]] = []
        while sum(map(len, parts)) < len(rows):
            parts.append(next(results).cpu().numpy())
        yield rows, np.concatenate(parts)


def batches(split: Split, rows: range, batch_size: int) -> Iterator[list[Tensor]]:
    """The images of some rows, `batch_size` at a time, or fewer where they are large."""
    batch: list[Tensor] = []
    values = 0
    for row in rows:
        batch.append(split.images[row])
        values += batch[-1].numel()
        if len(batch) == batch_size or values >= BATCH_VALUES or row == rows[-1]:
            yield batch
            batch, values = [], 0


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in a thread of its own while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def map_ahead(
    function: Callable[[Item], Result], items: Iterator[Item], threads: int
) -> Iterator[Result]:
    """Like `map`, with as many of the next results being made beside, each in a thread."""
    with ThreadPoolExecutor(threads) as pool:
        coming = deque(pool.submit(function, item) for item in islice(items, threads))
        while coming:
            result = coming.popleft().result()
            coming.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result


def one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each given when the one after it has been made."""
    for item, _ in pairwise(chain(items, [None])):
        yield cast(Item, item)


def chunk_file(cache: Path | None, rows: range) -> Path | None:
    """Where the cache has a chunk; None without a cache."""
    return cache / f"{rows.start:09d}.chunk" if cache else None


def write_chunk(file: Path, values: Float[np.ndarray, "b d"]) -> None:
    """Store one chunk: little-endian float32 numbers row by row."""
    write_sealed(file, values.astype("<f4").tobytes())


def read_chunk(file: Path, num_rows: int, embed_dim: int) -> Float[np.ndarray, "b d"] | None:
    """A finished chunk, or None if there is none or it is damaged."""
    content = read_sealed(file, 4 * num_rows * embed_dim)
    if content is None:
        return None
    return np.frombuffer(content, "<f4").astype(np.float32, copy=False).reshape(num_rows, embed_dim)


def save_embeddings(path: Path, values: Float[np.ndarray, "n d"], split: Split) -> None:
    """Write `embeddings` (float32), `indices` and `labels` as one npz without pickles."""
    write_atomically(
        path,
        lambda file: np.savez(file, embeddings=values, indices=split.indices, labels=split.labels),
    )
