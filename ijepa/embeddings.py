"""Extraction: the border between tensors and arrays, with a cache that survives interruption."""

import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ijepa.data import Split
from ijepa.encoders import FrozenEncoder
from ijepa.files import write_atomically
from ijepa.parallel import gather_objects, num_processes, process_rank

CHUNK = 128
"""Images per cache file: at most this many are computed again after an interruption."""

# What reading an npz file raises when any of its bytes is changed or cut off.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

Progress = Callable[..., AbstractContextManager[Any]]
"""Makes a progress bar like `tqdm(total=..., initial=..., desc=...)`."""


@dataclass(frozen=True)
class Embeddings:
    """One model's embeddings of a split, row by row."""

    values: Float[np.ndarray, "n d"]
    images_per_second: float | None
    """Of what was computed in this run; None when nothing was."""
    from_cache: bool
    """True when every row came from the cache."""


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
) -> Embeddings:
    """Embed every image of the split in order.

    Several processes take chunks in turn, each through the cache. Process 0 gets all rows, in the
    same bytes as one process would; the others get their own.

    Args:
        encoder: What to embed with.
        split: The images.
        batch_size: Images per forward pass, of which a chunk bounds the number; does not change the
            result beyond rounding.
        cache: Folder for finished chunks, which are read instead of computed; None for no cache.
        progress: See `Progress`.
    """
    chunks: list[np.ndarray] = []
    computed, seconds = 0, 0.0
    own = range(0, len(split), CHUNK)[process_rank() :: num_processes()]
    num_images = sum(min(CHUNK, len(split) - start) for start in own)
    with progress(total=num_images, desc=encoder.name) as bar:
        for start in own:
            rows = range(start, min(start + CHUNK, len(split)))
            file = cache / f"{start:09d}.npz" if cache else None
            values = read_chunk(file, len(rows), encoder.embed_dim) if file else None
            if values is None:
                began = time.perf_counter()
                values = embed_rows(encoder, split, rows, batch_size)
                seconds += time.perf_counter() - began
                computed += len(rows)
                if file:
                    write_chunk(file, values)
            chunks.append(values)
            bar.update(len(rows))
    shares, counts, times = zip(*gather_objects((chunks, computed, seconds)), strict=True)
    turns = chain.from_iterable(zip_longest(*shares))
    # The empty start is all there is for a process without a chunk.
    nothing = np.empty((0, encoder.embed_dim), np.float32)
    computed, seconds = sum(counts), max(times)
    return Embeddings(
        np.concatenate([nothing, *(chunk for chunk in turns if chunk is not None)]),
        computed / seconds if computed else None,
        not computed,
    )


def embed_rows(
    encoder: FrozenEncoder, split: Split, rows: range, batch_size: int
) -> Float[np.ndarray, "b d"]:
    """Embed some rows of the split in batches."""
    parts = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return np.concatenate(
        [encoder.embed([split.images[row] for row in part]).numpy() for part in parts]
    )


def write_chunk(file: Path, values: Float[np.ndarray, "b d"]) -> None:
    """Store one chunk; the zip format checks its bytes on reading."""
    write_atomically(file, lambda opened: np.savez(opened, embeddings=values))


def read_chunk(file: Path, num_rows: int, embed_dim: int) -> Float[np.ndarray, "b d"] | None:
    """A finished chunk, or None if there is none or it is damaged."""
    try:
        # Opened here, because np.load leaves a file open that it cannot read.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            values = arrays["embeddings"]
    except DAMAGED:
        return None
    whole = values.shape == (num_rows, embed_dim) and values.dtype == np.float32
    return values if whole else None


def save_embeddings(path: Path, values: Float[np.ndarray, "n d"], split: Split) -> None:
    """Write `embeddings` (float32), `indices` and `labels` as one npz without pickles."""
    write_atomically(
        path,
        lambda file: np.savez(file, embeddings=values, indices=split.indices, labels=split.labels),
    )
