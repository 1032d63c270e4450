import contextlib
import io
import os
import pathlib
import resource
import subprocess
import sys
import threading
import types
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ijepa import embeddings
from ijepa.data import Split
from ijepa.embeddings import (
    cache_folder,
    embed_chunks,
    extract,
    map_ahead,
    read_chunk,
    save_embeddings,
)
from ijepa.encoders import FrozenEncoder, pixel_encoder, random_encoder
from ijepa.errors import UserError
from ijepa.files import SEAL_BYTES
from ijepa.model import ViTConfig

CHUNK = 8
ENCODER = random_encoder(
    ViTConfig(16, 4, 24, 1, 2), ((0.5,) * 3, (0.5,) * 3), 0, torch.device("cpu"), torch.float32
)


class Bar:
    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def __call__(self, **facts):
        self.facts = facts
        yield self

    def update(self, count):
        self.seen.append(count)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", CHUNK)


def make_split(n=21, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Split("toy", "all", ("a", "b"), images, np.arange(n) % 2, np.arange(n) * 3 + 1)


def counted(encoder=ENCODER, fail_after=None):
    """The same encoder, with a list of the images it was asked for, failing after so many."""
    asked = []

    def preprocess(images):
        if fail_after is not None and len(asked) >= fail_after:
            raise KeyboardInterrupt
        asked.extend(images)
        return encoder.preprocess(images)

    fields = {**vars(encoder), "preprocess": preprocess}
    return FrozenEncoder(**fields), asked


def test_extraction_gives_the_embedding_of_each_image_in_order():
    split = make_split()
    found = extract(ENCODER, split, 3, None, Bar())
    single = np.concatenate([ENCODER.embed([image]).numpy() for image in split.images])
    np.testing.assert_allclose(found.values, single, atol=1e-5)
    assert found.values.dtype == np.float32
    assert not found.from_cache
    assert found.images_per_second > 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 100])
def test_the_batch_size_does_not_change_the_embeddings(batch_size):
    split = make_split()
    found = extract(ENCODER, split, batch_size, None, Bar()).values
    np.testing.assert_allclose(found, extract(ENCODER, split, 7, None, Bar()).values, atol=1e-5)


def test_embeddings_are_mapped_from_a_file_that_leaves_nothing_behind(tmp_path):
    scratch = tmp_path / "made" / "anew"
    found = extract(ENCODER, make_split(), 3, None, Bar(), scratch).values
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert list(scratch.iterdir()) == []
    np.testing.assert_array_equal(found, extract(ENCODER, make_split(), 3, None, Bar()).values)


def test_rows_are_stored_whole_however_little_the_system_takes_at_once(tmp_path):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[:10])

    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    with Slow(tmp_path / "rows", "w") as file:
        embeddings.store_rows(file, 2, values[2:])
        embeddings.store_rows(file, 0, values[:2])
    assert (tmp_path / "rows").read_bytes() == values.tobytes()


def test_a_full_disk_under_the_embeddings_is_a_user_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24 * 4 * 10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large"):
            extract(ENCODER, make_split(), 3, None, Bar(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with (
        pathlib.Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(UserError, match=r"cannot write the embeddings .*: No space left"),
    ):
        embeddings.store_rows(full, 0, np.ones((2, 3), np.float32))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file"):
        extract(ENCODER, make_split(), 3, None, Bar(), tmp_path / "file")


def test_no_batch_is_larger_than_asked_for():
    sizes = []
    fields = {**vars(ENCODER)}
    fields["preprocess"] = lambda images: (sizes.append(len(images)), ENCODER.preprocess(images))[1]
    extract(FrozenEncoder(**fields), make_split(), 3, None, Bar())
    assert sizes == [3, 3, 2, 3, 3, 2, 3, 2]


def test_large_images_make_small_batches(monkeypatch):
    monkeypatch.setattr(embeddings, "BATCH_VALUES", 2 * 3 * 16 * 16)
    found = list(embeddings.batches(make_split(), range(3, 10), 5))
    assert [len(batch) for batch in found] == [2, 2, 2, 1]
    expected = list(make_split().images[3:10])
    assert all(map(torch.equal, [one for batch in found for one in batch], expected))


@pytest.mark.parametrize("batch_size", [4, 8])  # the second batch in the same chunk and the next
def test_the_next_batch_is_prepared_while_one_is_embedded(batch_size):
    second = threading.Event()
    seen = []

    def preprocess(images):
        seen.append(len(images))
        if len(seen) == 2:
            second.set()
        return ENCODER.preprocess(images)

    def network(pixels):
        assert second.wait(timeout=20), "the first batch is embedded before the second is prepared"
        return ENCODER.network(pixels)

    fields = {**vars(ENCODER), "preprocess": preprocess, "network": network}
    found = extract(FrozenEncoder(**fields), make_split(), batch_size, None, Bar()).values
    np.testing.assert_array_equal(
        found, extract(ENCODER, make_split(), batch_size, None, Bar()).values
    )


class Files(Sequence):
    """Twelve images, one of which cannot be decoded."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        if row == 10:
            raise UserError("cannot read image", hint="remove it")
        return torch.full((3, 2, 2), row, dtype=torch.uint8)


def test_an_image_that_cannot_be_decoded_ends_the_extraction_and_its_threads(monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 12)
    before = threading.active_count()
    split = make_split(12)
    object.__setattr__(split, "images", Files())
    with pytest.raises(UserError, match="cannot read image"):
        extract(ENCODER, split, 2, None, Bar())
    assert threading.active_count() == before


def test_the_progress_bar_hears_of_every_image(tmp_path):
    for _ in range(2):
        bar = Bar()
        extract(ENCODER, make_split(), 4, tmp_path, bar)
        assert bar.facts["total"] == sum(bar.seen) == 21


def test_a_cache_hit_equals_the_miss_bit_for_bit_and_computes_nothing(tmp_path):
    encoder, asked = counted()
    miss = extract(encoder, make_split(), 4, tmp_path, Bar())
    assert len(asked) == 21
    hit = extract(encoder, make_split(), 4, tmp_path, Bar())
    assert len(asked) == 21
    assert hit.values.tobytes() == miss.values.tobytes()
    assert hit.values.dtype == np.float32
    assert hit.from_cache
    assert hit.images_per_second is None


def test_a_network_is_loaded_only_for_missing_images_and_not_in_the_time_of_extraction(
    tmp_path, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr(embeddings.time, "perf_counter", lambda: clock[0])

    def pass_time(seconds):
        clock[0] += seconds

    def network(pixels):
        pass_time(1)
        return ENCODER.network(pixels)

    fields = {**vars(ENCODER), "network": network, "load": lambda: pass_time(1000)}
    slow = FrozenEncoder(**fields)
    found = extract(slow, make_split(), CHUNK, tmp_path, Bar())
    assert found.images_per_second == 7  # 21 images in three batches
    assert clock == [1003]
    assert extract(slow, make_split(), CHUNK, tmp_path, Bar()).from_cache
    assert clock == [1003]


@pytest.mark.parametrize("finished", [0, 8, 16])
def test_an_interrupted_extraction_goes_on_from_its_last_finished_chunk(tmp_path, finished):
    broken, asked = counted(fail_after=finished + 4)
    with pytest.raises(KeyboardInterrupt):
        extract(broken, make_split(), 4, tmp_path, Bar())
    assert len(asked) == finished + 4
    encoder, asked = counted()
    found = extract(encoder, make_split(), 4, tmp_path, Bar())
    assert len(asked) == 21 - finished
    assert not found.from_cache
    expected = extract(ENCODER, make_split(), 4, None, Bar()).values
    assert found.values.tobytes() == expected.tobytes()


def cut(data):
    return data[:-40]


def flip_first_number(data):
    changed = bytearray(data)
    changed[SEAL_BYTES] ^= 1
    return bytes(changed)


def replace_by_nothing(data):
    return data[:0]


def replace_by_text(data):
    return b"x" * len(data)


@pytest.mark.parametrize("damage", [cut, flip_first_number, replace_by_nothing, replace_by_text])
def test_a_damaged_chunk_is_computed_again_and_named(tmp_path, damage):
    miss = extract(ENCODER, make_split(), 4, tmp_path, Bar())
    assert miss.damaged == ()
    expected = miss.values
    file = sorted(tmp_path.iterdir())[1]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    encoder, asked = counted()
    found = extract(encoder, make_split(), 4, tmp_path, Bar())
    assert len(asked) == CHUNK
    assert found.values.tobytes() == expected.tobytes()
    assert found.damaged == (file,)
    assert file.read_bytes() == whole


def test_a_chunk_in_the_place_of_another_is_computed_again(tmp_path):
    expected = extract(ENCODER, make_split(), 4, tmp_path, Bar()).values
    first, second, _ = sorted(tmp_path.iterdir())
    second.write_bytes(first.read_bytes())
    found = extract(ENCODER, make_split(), 4, tmp_path, Bar())
    assert found.damaged == (second,)
    assert found.values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(CHUNK, 23), (CHUNK - 1, 24), (CHUNK, 48)])
def test_a_chunk_of_another_shape_is_computed_again(tmp_path, shape):
    extract(ENCODER, make_split(), 4, tmp_path, Bar())
    embeddings.write_chunk(tmp_path / "000000000.chunk", np.zeros(shape, np.float32))
    encoder, asked = counted()
    found = extract(encoder, make_split(), 4, tmp_path, Bar())
    assert len(asked) == CHUNK
    assert np.abs(found.values[:CHUNK]).max() > 0


def test_what_is_no_chunk_is_not_read(tmp_path):
    assert read_chunk(tmp_path / "absent.chunk", 2, 3) is None
    assert read_chunk(tmp_path, 2, 3) is None
    os.mkfifo(tmp_path / "pipe")
    assert read_chunk(tmp_path / "pipe", 2, 3) is None


def test_every_flipped_byte_and_every_cut_of_a_chunk_is_seen(tmp_path):
    file = tmp_path / "000000000.chunk"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    embeddings.write_chunk(file, values)
    whole = file.read_bytes()
    assert len(whole) == SEAL_BYTES + 24
    np.testing.assert_array_equal(read_chunk(file, 2, 3), values)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        for content in (damaged, whole[:place]):
            file.write_bytes(content)
            assert read_chunk(file, 2, 3) is None


def test_an_interrupted_write_leaves_nothing_that_looks_like_a_chunk(tmp_path, monkeypatch):
    def interrupt(_):
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract(ENCODER, make_split(), 4, tmp_path, Bar())
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        extract(ENCODER, make_split(), 4, tmp_path / "file", Bar())


def described(**changes):
    return FrozenEncoder(**{**vars(ENCODER), "description": {**ENCODER.description, **changes}})


def test_the_cache_folder_changes_with_everything_that_decides_an_embedding(tmp_path):
    config = ViTConfig(16, 4, 24, 1, 2)
    half = ((0.5,) * 3, (0.5,) * 3)
    cpu = torch.device("cpu")
    variants = [
        ENCODER,
        random_encoder(config, half, 1, cpu, torch.float32),
        random_encoder(config, half, 0, cpu, torch.bfloat16),
        random_encoder(config, ((0.5,) * 3, (0.25,) * 3), 0, cpu, torch.float32),
        random_encoder(config, ((0.4,) * 3, (0.5,) * 3), 0, cpu, torch.float32),
        random_encoder(ViTConfig(32, 8, 24, 1, 2), half, 0, cpu, torch.float32),
        FrozenEncoder(**{**vars(ENCODER), "device": torch.device("meta")}),
        described(sha256="a"),
        described(sha256="b"),
        described(revision="c"),
        described(weights="context"),
        described(preprocessing="bicubic"),
        pixel_encoder(),
    ]
    folders = {cache_folder(tmp_path, encoder, "images") for encoder in variants}
    folders.add(cache_folder(tmp_path, ENCODER, "other images"))
    assert len(folders) == len(variants) + 1
    again = random_encoder(config, half, 0, cpu, torch.float32)
    assert cache_folder(tmp_path, again, "images") == cache_folder(tmp_path, ENCODER, "images")
    assert {folder.parent for folder in folders} == {tmp_path}


def on_gpu(events):
    """Stands in for an encoder on a GPU and notes what it is asked for, in which order."""
    preparing = threading.Barrier(2, timeout=20)

    class Encoder(FrozenEncoder):
        def prepare(self, images):
            preparing.wait()  # for a second batch that is prepared at the same time
            return ENCODER.prepare(images)

        def encode(self, pixels):
            number = sum(event == "launch" for event, _ in events)
            events.append(("launch", number))
            result = ENCODER.encode(pixels)
            cpu = lambda: events.append(("await", number)) or result  # noqa: E731
            return types.SimpleNamespace(cpu=cpu)

    return Encoder(**{**vars(ENCODER), "device": torch.device("cuda")})


def test_a_gpu_has_its_next_batch_before_the_result_of_one_is_awaited():
    split, events, chunks = make_split(16), [], [range(8), range(8, 16)]
    found = list(embed_chunks(on_gpu(events), split, chunks, 4))
    assert [rows for rows, _ in found] == chunks
    expected = ENCODER.embed(list(split.images)).numpy()
    np.testing.assert_allclose(np.concatenate([x for _, x in found]), expected, atol=1e-5)
    first = [("launch", 0), ("launch", 1), ("await", 0), ("launch", 2), ("await", 1)]
    assert events == [*first, ("launch", 3), ("await", 2), ("await", 3)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_map_ahead_is_the_map_and_ends_with_the_first_error(threads):
    assert list(map_ahead(lambda x: 10 // x, iter([1, 2, 5]), threads)) == [10, 5, 2]
    assert list(map_ahead(str, iter([]), threads)) == []
    before, found = threading.active_count(), []
    with pytest.raises(ZeroDivisionError):
        found.extend(map_ahead(lambda x: 10 // x, iter([1, 2, 0, 5]), threads))
    assert found == [10, 5]
    assert threading.active_count() == before


def test_rows_are_embedded_in_the_order_asked_for():
    split = make_split()
    chunks = [range(5, 12), range(0, 4), range(12, 13)]
    found = list(embed_chunks(ENCODER, split, chunks, 3))
    assert [rows for rows, _ in found] == chunks
    for rows, values in found:
        expected = ENCODER.embed(list(split.images[rows.start : rows.stop]))
        np.testing.assert_allclose(values, expected.numpy(), atol=1e-5)
        assert values.shape == (len(rows), 24)


def test_the_file_of_embeddings_holds_rows_indices_and_labels_without_pickles(tmp_path):
    split = make_split(5)
    values = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    path = tmp_path / "out" / "embeddings_local.npz"
    save_embeddings(path, values, split)
    with np.load(path, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["embeddings", "indices", "labels"]
        assert arrays["embeddings"].dtype == np.float32
        np.testing.assert_array_equal(arrays["embeddings"], values)
        np.testing.assert_array_equal(arrays["indices"], split.indices)
        np.testing.assert_array_equal(arrays["labels"], split.labels)
        assert arrays["indices"].dtype == arrays["labels"].dtype == np.int64
    assert list(path.parent.iterdir()) == [path]


# --- several processes

# Each process extracts twice, the second time from the cache, or fails if it is told to.
WORKER = """
import os, sys
from pathlib import Path
import numpy as np
from torch import distributed
sys.path[:0] = [{root!r}, {tests!r}]
from ijepa.errors import UserError
from ijepa.parallel import leave_processes
from test_embeddings import CHUNK, Bar, counted, embeddings, extract, make_split
cache, failing = Path(sys.argv[1]), sys.argv[2]
embeddings.CHUNK = CHUNK
distributed.init_process_group("gloo")
rank = distributed.get_rank()
encoder, asked = counted()
bar = Bar()
if failing == str(rank):
    print("error: no such luck", file=sys.stderr)
    sys.exit(1)
try:
    found = extract(encoder, make_split(), 3, cache / "chunks", bar)
except UserError as error:
    print(error.problem, file=sys.stderr)
    sys.exit(1)
assert bar.facts["total"] == sum(bar.seen) == len(asked), (bar.facts, bar.seen)
np.save(cache / f"{{rank}}.npy", found.values)
again = extract(encoder, make_split(), 3, cache / "chunks", bar)
assert again.values.tobytes() == found.values.tobytes() and again.from_cache
leave_processes()
os._exit(0)  # as the scripts do
"""


def torchrun(processes, cache, failing="none"):
    root = str(pathlib.Path(embeddings.__file__).parents[1])
    worker = cache / "worker.py"
    worker.write_text(WORKER.format(root=root, tests=str(pathlib.Path(__file__).parent)))
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(worker), str(cache), failing),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_bytes_of_one(tmp_path, processes):
    result = torchrun(processes, tmp_path)
    assert result.returncode == 0, result.stderr
    expected = extract(ENCODER, make_split(), 3, None, Bar()).values
    assert np.load(tmp_path / "0.npy").tobytes() == expected.tobytes()
    owner = np.arange(len(expected)) // CHUNK % processes
    for rank in range(1, processes):
        own = np.where((owner == rank)[:, None], expected, np.float32(0))
        assert np.load(tmp_path / f"{rank}.npy").tobytes() == own.tobytes()
    assert len(list((tmp_path / "chunks").iterdir())) == -(-len(expected) // CHUNK)


def test_a_failing_process_ends_the_run_with_its_own_error(tmp_path):
    result = torchrun(2, tmp_path, failing="1")
    assert result.returncode != 0
    assert "error: no such luck" in result.stderr
    assert "RuntimeError" not in result.stderr
    assert not (tmp_path / "0.npy").exists()
