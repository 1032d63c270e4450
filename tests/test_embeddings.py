import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from ijepa.data import Split, load_split
from ijepa.embeddings import CHUNK, extract, save_embeddings, writable_cache
from ijepa.encoders import pixel_encoder
from ijepa.errors import UserError
from ijepa.files import read_arrays

PIXELS, NO_BAR = pixel_encoder(), partial(tqdm, disable=True)


def make_encoder(name, first):
    """24 of the pixels as embeddings."""
    facts = {"embed_dim": 24, "description": {"weights": f"pixels from {first}"}}
    return replace(PIXELS, name=name, network=lambda x: x[:, :1, first, :24], **facts)


ENCODER, OTHER = make_encoder("local", 0), make_encoder("hf", 1)


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

    return replace(encoder, preprocess=preprocess), asked


def embed(split, cache=None, encoder=ENCODER, batch_size=64):
    encoders = encoder if isinstance(encoder, list) else [encoder]
    found, failures = extract(encoders, split, cache=cache, batch_size=batch_size, progress=NO_BAR)
    assert failures == []
    return found if isinstance(encoder, list) else found[encoder.name]


def asked_for(split, cache):
    """How many images a run computes, which must give what one without a cache gives."""
    (encoder, asked), loaded = counted(), []
    found = embed(split, cache, replace(encoder, load=lambda: loaded.append(1)))
    np.testing.assert_allclose(found.values, embed(split).values, atol=1e-5)
    assert found.from_cache == (not asked) == (not loaded) == (found.images_per_second is None)
    return len(asked)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_every_encoder_gives_the_embedding_of_each_image_in_order(batch_size):
    split = make_split()
    found = embed(split, None, [ENCODER, PIXELS], batch_size)
    for encoder in (ENCODER, PIXELS):
        single = np.concatenate([encoder.embed([image]).numpy() for image in split.images])
        np.testing.assert_allclose(found[encoder.name].values, single, atol=1e-5)
        assert found[encoder.name].values.dtype == np.float32
        assert not found[encoder.name].from_cache
        assert found[encoder.name].images_per_second > 0


def test_encoders_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of their own"):
        embed(make_split(), None, [ENCODER, ENCODER])


def test_no_batch_is_larger_than_asked_for_and_large_images_make_smaller_ones():
    sizes = []

    def preprocess(images):
        sizes.append(len(images))
        return torch.zeros(len(images), 3, 32, 32)

    encoder = replace(PIXELS, preprocess=preprocess)
    for batch_size, expected in ((8, [8, 8, 5]), (None, [16, 5])):
        embed(make_split(), None, encoder, batch_size)
        assert sizes == expected
        sizes.clear()
    large = torch.zeros(1, 3, 10_000, 10_000, dtype=torch.uint8).expand(4, -1, -1, -1)
    split = Split("large", "all", ("a", "b"), large, np.arange(4) % 2, np.arange(4))
    # Hashing 300 MB four times takes its time.
    split.__dict__["image_keys"] = [bytes([row]) * 16 for row in range(4)]
    embed(split, None, encoder)
    assert sizes == [2, 2]


def test_the_next_batch_is_prepared_while_one_is_embedded():
    second, seen = threading.Event(), []

    def preprocess(images):
        seen.append(len(images))
        if len(seen) == 2:
            second.set()
        return ENCODER.preprocess(images)

    def network(pixels):
        assert second.wait(timeout=20), "the first batch is embedded before the second is prepared"
        return ENCODER.network(pixels)

    found = embed(make_split(), None, replace(ENCODER, preprocess=preprocess, network=network), 8)
    np.testing.assert_array_equal(found.values, embed(make_split(), batch_size=8).values)


def test_only_one_core_prepares_images_next_to_a_network_on_the_cpu():
    before, cores = torch.get_num_threads(), {}

    def preprocess(images):
        cores["preparing"] = torch.get_num_threads()
        return ENCODER.preprocess(images)

    def network(_):
        cores["embedding"] = torch.get_num_threads()
        raise KeyboardInterrupt

    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyboardInterrupt):
            embed(make_split(), None, replace(ENCODER, preprocess=preprocess, network=network))
        with ThreadPoolExecutor() as pool:
            cores["later"] = pool.submit(torch.get_num_threads).result()
    finally:
        torch.set_num_threads(before)
    assert cores == {"preparing": 1, "embedding": 3, "later": 3}


def test_a_gpu_has_its_next_batch_before_the_result_of_one_is_awaited():
    events, preparing = [], threading.Barrier(2, timeout=20)

    class Awaited(torch.Tensor):
        def cpu(self):
            events.append(("await", self.number))
            return self.as_subclass(torch.Tensor)

    class OnGpu(type(ENCODER)):
        def prepare(self, images):
            preparing.wait()  # for a second batch that is prepared at the same time
            return ENCODER.prepare(images)

        def encode(self, pixels):
            result = ENCODER.encode(pixels).as_subclass(Awaited)
            result.number = sum(event == "launch" for event, _ in events)
            events.append(("launch", result.number))
            return result

    encoder = OnGpu(**{**vars(ENCODER), "device": torch.device("cuda")})
    found = embed(make_split(16), None, encoder, batch_size=4)
    np.testing.assert_allclose(found.values, embed(make_split(16)).values, atol=1e-5)
    first = [("launch", 0), ("launch", 1), ("await", 0), ("launch", 2), ("await", 1)]
    assert events == [*first, ("launch", 3), ("await", 2), ("await", 3)]


def test_each_file_is_decoded_once_for_all_that_lack_it(tmp_path, make_image_folder, monkeypatch):
    folder, opened = make_image_folder({"a": 5, "b": 6}), Mock(wraps=Image.open)
    monkeypatch.setattr(Image, "open", opened)
    first = [ENCODER, PIXELS]
    for encoders, expected in ((first, 11), (first, 0), ([*first, OTHER], 11)):
        split = load_split(str(folder), folder, "test", offline=True)
        opened.reset_mock()
        embed(split, tmp_path, encoders, batch_size=4)
        assert opened.call_count == expected
    assert {path.name for path in tmp_path.iterdir()} == {ENCODER.key, PIXELS.key, OTHER.key}


def test_images_that_fail_when_decoded_come_back_and_others_are_kept(tmp_path, make_image_folder):
    folder = make_image_folder({"a": 5, "b": 6})
    for name in ("a/001.png", "b/003.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    split = load_split(str(folder), folder, "test", offline=True)
    readable = split.take(np.array([0, 2, 3, 4, 5, 6, 7, 9, 10]))
    expected = embed(readable).values  # the first progress bar of a process begins a thread
    before = threading.active_count()
    for cached in (False, True):
        found, failures = extract([ENCODER, PIXELS], split, cache=tmp_path, progress=NO_BAR)
        assert [row for row, _ in failures] == [1, 8]
        assert "a/001.png" in failures[0][1]
        np.testing.assert_allclose(found[ENCODER.name].values, expected, atol=1e-5)
        assert found[ENCODER.name].from_cache == cached
        assert (found[ENCODER.name].images_per_second is None) == cached
    assert threading.active_count() == before
    assert asked_for(readable, tmp_path) == 0


def test_another_run_computes_only_what_no_run_before_it_has(tmp_path):
    split = make_split(40)
    assert asked_for(split.take(np.arange(0, 40, 2)), tmp_path) == 20
    assert asked_for(split.take(np.arange(0, 40, 2)), tmp_path) == 0
    assert asked_for(split.take(np.array([7, 4, 1])), tmp_path) == 2
    assert asked_for(split, tmp_path) == 18
    assert asked_for(replace(split, name="else", indices=split.indices[::-1].copy()), tmp_path) == 0


def test_identical_images_are_embedded_once_wherever_they_lie(tmp_path, make_image_folder):
    folder = make_image_folder({"a": 3, "b": 3})
    (folder / "b" / "copy.png").write_bytes((folder / "a" / "000.png").read_bytes())
    split = load_split(str(folder), folder, "test", offline=True)
    assert asked_for(split, tmp_path) == 6
    folder = folder.rename(tmp_path / "moved")
    (folder / "b").rename(folder / "c")
    assert asked_for(load_split(str(folder), folder, "test", offline=True), tmp_path) == 0


def test_an_interruption_loses_less_than_a_chunk_and_a_batch(tmp_path):
    split = make_split(300)
    broken, asked = counted(fail_after=256)
    with pytest.raises(KeyboardInterrupt):
        embed(split, tmp_path, broken, batch_size=32)
    assert len(asked) == 256
    assert asked_for(split, tmp_path) <= 300 - CHUNK
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert all(file.suffix == ".npz" for file in files)


def test_damaged_chunks_are_named_and_computed_again(tmp_path):
    split = make_split(300)
    embed(split, tmp_path)
    file, *_ = sorted(tmp_path.rglob("*.npz"))
    lost = len(read_arrays(file, "keys")["keys"])
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    encoder, asked = counted()
    found = embed(split, tmp_path, encoder)
    assert (found.damaged, len(asked)) == ((file,), lost)
    assert not file.exists()
    np.testing.assert_allclose(found.values, embed(split).values, atol=1e-5)
    assert asked_for(split, tmp_path) == 0


def test_every_flipped_byte_and_every_cut_of_a_chunk_is_harmless_or_seen(tmp_path):
    embed(make_split(2), tmp_path)
    (file,) = tmp_path.rglob("*.npz")
    whole, names = file.read_bytes(), ("keys", "embeddings")
    expected = read_arrays(file, *names)
    assert [key.tobytes() for key in expected["keys"]] == make_split(2).image_keys
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with suppress(ValueError, KeyError):  # none for dates and permissions of the archive
            found = read_arrays(file, *names)
            for name in names:
                np.testing.assert_array_equal(found[name], expected[name])
    for place in range(0, len(whole), 29):
        file.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"\w"):
            read_arrays(file, *names)


def test_an_archive_of_other_arrays_is_no_chunk(tmp_path):
    split = make_split()
    expected, (whole,) = embed(split, tmp_path).values, tmp_path.rglob("*.npz")
    keys, values = read_arrays(whole, "keys", "embeddings").values()
    for arrays in (
        {"keys": keys, "embeddings": values[:, :1]},
        {"keys": keys, "embeddings": values[:5] + 1},
        {"keys": keys[:, 1:], "embeddings": values},
        {"keys": keys, "embeddings": values.astype(float) + 1},
        {"embeddings": values},
        {"keys": np.array([{}]), "embeddings": values[:1]},
    ):
        (file,) = tmp_path.rglob("*.npz")
        np.savez(file, **arrays)
        found = embed(split, tmp_path)
        assert (found.damaged, file.exists()) == ((file,), False)
        np.testing.assert_array_equal(found.values, expected)


def test_the_cache_is_the_users_or_where_that_cannot_be_written_the_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert writable_cache(None, tmp_path) == (tmp_path / "xdg" / "ijepa-compare", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable_cache(None, tmp_path) == (tmp_path / ".cache" / "ijepa-compare", None)
    assert writable_cache(tmp_path / "mine", tmp_path) == (tmp_path / "mine", None)
    (tmp_path / "file").touch()
    folder, note = writable_cache(tmp_path / "file" / "inner", tmp_path / "out")
    assert folder == tmp_path / "out" / ".cache"
    assert str(folder) in note
    with pytest.raises(UserError, match="cannot write"):
        embed(make_split(), tmp_path / "file")


def test_a_file_of_embeddings_finds_images_again_without_pickles(tmp_path, make_image_folder):
    folder = make_image_folder({"a": 2, "b": 3})
    split = load_split(str(folder), folder, "test", offline=True)
    values = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    path = tmp_path / "out" / "embeddings_local.npz"
    save_embeddings(path, values, split)
    expected = {"embeddings": values, "indices": split.indices, "labels": split.labels}
    with np.load(path, allow_pickle=False) as arrays:
        assert {*arrays} == {*expected, "keys", "paths"}
        for name in expected:
            np.testing.assert_array_equal(arrays[name], expected[name])
        assert [key.tobytes() for key in arrays["keys"]] == split.image_keys
        assert tuple(arrays["paths"]) == split.paths
    save_embeddings(path, values, make_split(5))
    with np.load(path) as arrays:
        assert "paths" not in arrays
