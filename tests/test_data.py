import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torchvision.datasets import CIFAR10

from ijepa.data import (
    FolderImages,
    Split,
    balanced_rows,
    balanced_sample,
    fingerprint,
    load_split,
    read_image,
    shrink,
)
from ijepa.errors import UserError

NOWHERE = Path("does-not-exist")
CIFAR_CLASSES = ["plane", "car", "bird"]


def write_cifar(folder, rows_per_file, monkeypatch):
    """Write a small archive of the real layout; torchvision checks it against its own checksums."""
    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files, pixels, labels = {}, {}, {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        pixels[name] = rng.integers(0, 256, (rows_per_file, 3072), dtype=np.uint8)
        labels[name] = rng.integers(0, len(CIFAR_CLASSES), rows_per_file).tolist()
        files[name] = {"data": pixels[name], "labels": labels[name]}
    files["batches.meta"] = {"label_names": CIFAR_CLASSES}
    checksums = {}
    for name, content in files.items():
        written = pickle.dumps(content)
        (base / name).write_bytes(written)
        checksums[name] = hashlib.md5(written).hexdigest()
    monkeypatch.setattr(
        CIFAR10, "train_list", [[n, checksums[n]] for n in ("data_batch_1", "data_batch_2")]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return pixels, labels


def tensor_split(labels, num_classes, offset=0):
    labels = np.asarray(labels, dtype=np.int64)
    images = torch.arange(len(labels) * 12).reshape(-1, 3, 2, 2).to(torch.uint8)
    classes = tuple(f"class {number}" for number in range(num_classes))
    return Split("made", "all", classes, images, labels, np.arange(len(labels)) + offset)


# --- CIFAR-10


def test_cifar_pixels_labels_and_order_are_those_of_the_files(tmp_path, monkeypatch):
    pixels, labels = write_cifar(tmp_path, 7, monkeypatch)
    train = load_split("cifar10", tmp_path, "train", offline=True)
    test = load_split("cifar10", tmp_path, "test", offline=True)
    assert (train.name, train.split, test.split) == ("cifar10", "train", "test")
    assert train.classes == test.classes == tuple(CIFAR_CLASSES)
    assert (len(train), len(test)) == (14, 7)
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == labels["data_batch_1"] + labels["data_batch_2"]
    assert train.indices.tolist() == list(range(14))
    # The files hold 1,024 red, then green, then blue values of each image, row by row.
    for row in range(7):
        for channel in range(3):
            flat = pixels["data_batch_2"][row, 1024 * channel : 1024 * (channel + 1)]
            assert torch.equal(
                train.images[7 + row][channel], torch.from_numpy(flat.reshape(32, 32))
            )


def test_cifar_that_is_missing_offline_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--offline forbids the download") as caught:
        load_split("cifar10", tmp_path, "test", offline=True)
    assert "--data-dir" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_cifar_with_a_corrupt_or_missing_file_is_a_user_error(
    tmp_path, monkeypatch, damage, offline
):
    write_cifar(tmp_path, 2, monkeypatch)
    file = tmp_path / CIFAR10.base_folder / "test_batch"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="incomplete or corrupt"):
        load_split("cifar10", tmp_path, "test", offline=offline)


def test_cifar_that_cannot_be_downloaded_is_a_user_error(tmp_path, monkeypatch):
    # Port 9 of this host: the connection is refused, no packet leaves.
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match="could not be downloaded"):
        load_split("cifar10", tmp_path, "test", offline=False)


# --- digits


def test_digits_are_scikit_learns_scans_in_their_order():
    split = load_split("digits", NOWHERE, "test", offline=True)
    bunch = sklearn_digits()
    assert split.images.shape == (1797, 3, 32, 32)
    assert split.images.dtype == torch.uint8
    assert split.classes == tuple("0123456789")
    np.testing.assert_array_equal(split.labels, bunch.target)
    np.testing.assert_array_equal(split.indices, np.arange(1797))
    assert (split.images == split.images[:, :1]).all()  # grey
    scans = torch.from_numpy(bunch.images * 255 / 16).round()[:, None]
    # With antialias PyTorch's bicubic kernel is Pillow's, which rounds to bytes after each axis.
    wide = F.interpolate(scans, (8, 32), mode="bicubic", antialias=True).round().clamp(0, 255)
    large = F.interpolate(wide, (32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(split.images[:, :1].double(), large, atol=2, rtol=0)


def test_digits_have_no_splits():
    splits = [load_split("digits", NOWHERE, name, offline=True) for name in ("train", "test")]
    assert {split.split for split in splits} == {"all"}
    assert fingerprint(splits[0]) == fingerprint(splits[1])


# --- folders


def test_a_folder_is_read_in_sorted_order_without_what_is_hidden_or_no_image(make_image_folder):
    folder = make_image_folder({"zebra": 2, "ant": 3, ".cache": 2})
    for name in ("._000.png", "notes.txt", "model.pt"):
        (folder / "ant" / name).write_text("no image")
    (folder / "README.md").write_text("beside the classes")
    Image.new("RGB", (5, 4)).save(folder / "ant" / "0000.JPG", "JPEG")
    split = load_split(str(folder), folder, "test", offline=True)
    assert split.classes == ("ant", "zebra")
    assert split.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert split.indices.tolist() == list(range(6))
    assert split.split == "all"
    assert [path.name for path in split.images.paths] == [
        *("000.png", "0000.JPG", "001.png", "002.png"),
        *("000.png", "001.png"),
    ]
    shapes = [tuple(split.images[row].shape) for row in range(len(split))]
    assert shapes == [(3, 13, 14), (3, 4, 5), (3, 13, 14), (3, 13, 14), (3, 12, 14), (3, 12, 14)]


def test_a_folder_with_the_split_inside_is_read_there(make_image_folder):
    folder = make_image_folder({"test/a": 1, "test/b": 2, "train/a": 3, "train/b": 1})
    assert load_split(str(folder), folder, "test", offline=True).labels.tolist() == [0, 1, 1]
    train = load_split(str(folder), folder, "train", offline=True)
    assert (train.split, train.labels.tolist()) == ("train", [0, 0, 0, 1])


def test_rows_taken_from_a_folder_keep_their_images_labels_and_indices(make_image_folder):
    folder = make_image_folder({"a": 3, "b": 3})
    split = load_split(str(folder), folder, "test", offline=True)
    rows = np.array([4, 1])
    part = split.take(rows)
    assert (part.labels.tolist(), part.indices.tolist()) == ([1, 0], [4, 1])
    assert all(torch.equal(part.images[new], split.images[old]) for new, old in enumerate([4, 1]))
    assert part.take(np.array([1])).indices.tolist() == [1]


@pytest.mark.parametrize("counts", [{}, {"only": 3}])
def test_fewer_than_two_classes_are_a_user_error(tmp_path, make_image_folder, counts):
    folder = make_image_folder(counts) if counts else tmp_path
    with pytest.raises(UserError, match=rf"has {len(counts)} class folders, need at least 2"):
        load_split(str(folder), tmp_path, "test", offline=True)


def test_a_class_without_images_is_named(make_image_folder):
    folder = make_image_folder({"full": 2, "empty": 0})
    (folder / "empty" / "list.txt").write_text("")
    with pytest.raises(UserError, match=r"empty' has no images"):
        load_split(str(folder), folder, "test", offline=True)


def test_an_unknown_data_set_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="unknown data set 'cifar-11'") as caught:
        load_split("cifar-11", tmp_path, "test", offline=True)
    assert "cifar10, digits" in caught.value.hint


# --- decoding


def grey_ramp():
    return np.linspace(0, 255, 20 * 16).astype(np.uint8).reshape(20, 16)


def stored_mode(path):
    with Image.open(path) as image:
        return image.mode


def test_grey_is_the_same_in_all_channels_and_lossless(tmp_path):
    Image.fromarray(grey_ramp()).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert image.dtype == torch.uint8
    for channel in range(3):
        np.testing.assert_array_equal(image[channel], grey_ramp())


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path):
    deep = grey_ramp().astype(np.uint16) * 256 + 255
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert stored_mode(tmp_path / "deep.png").startswith("I;16")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[1], grey_ramp())


def test_transparency_shows_white_behind(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., :3] = (200, 100, 0)
    pixels[0, :, 3] = (0, 255, 51)
    pixels[1, :, 3] = 255
    for name in ("rgba.png", "rgba.webp"):
        Image.fromarray(pixels, "RGBA").save(tmp_path / name, lossless=True)
        seen = read_image(tmp_path / name).permute(1, 2, 0).numpy().astype(int)
        alpha = pixels[..., 3:] / 255
        np.testing.assert_allclose(seen, pixels[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_grey_with_transparency_shows_white_behind(tmp_path):
    pixels = np.array([[[10, 0], [10, 255], [10, 51]]], np.uint8)
    Image.fromarray(pixels, "LA").save(tmp_path / "la.png")
    seen = read_image(tmp_path / "la.png")
    np.testing.assert_allclose(seen[:, 0].T.numpy(), [[255] * 3, [10] * 3, [206] * 3], atol=1)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_palette_with_a_transparent_entry_shows_white_there(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([9, 8, 7, 50, 60, 70, 1, 2, 3])
    image.save(tmp_path / "palette.png", transparency=transparency)
    assert stored_mode(tmp_path / "palette.png") == "P"
    assert read_image(tmp_path / "palette.png")[:, 0].T.tolist() == [
        [9, 8, 7],
        [255, 255, 255],
        [1, 2, 3],
    ]


def test_a_colour_declared_transparent_shows_white(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    image.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert read_image(tmp_path / "key.png")[:, 0].T.tolist() == [[255, 255, 255], [4, 5, 6]]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "png"])
def test_every_format_decodes_to_nearly_the_same_colours(tmp_path, suffix):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16], pixels[16:] = (220, 40, 60), (30, 90, 200)
    Image.fromarray(pixels).save(tmp_path / f"image.{suffix}", quality=95)
    seen = read_image(tmp_path / f"image.{suffix}").permute(1, 2, 0).numpy()
    assert abs(seen[2:14].astype(int) - pixels[2:14]).max() <= 6
    assert abs(seen[18:30].astype(int) - pixels[18:30]).max() <= 6


def test_cmyk_becomes_rgb(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan.save(tmp_path / "cyan.jpg", quality=95)
    mean = read_image(tmp_path / "cyan.jpg").float().mean(dim=(1, 2))
    torch.testing.assert_close(mean, torch.tensor([0.0, 255.0, 255.0]), atol=4, rtol=0)


def test_black_and_white_uses_the_full_range(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "one_bit.png")
    assert read_image(tmp_path / "one_bit.png").tolist() == [[[255, 0]]] * 3


# How a file must be turned to be upright, by its EXIF orientation (Exif 2.32, table 4).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientation_turns_images_upright(tmp_path, orientation, mode):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if mode == "RGB":
        stored = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        expected = UPRIGHT[orientation](stored)
    else:
        stored = rng.integers(0, 65536, (4, 6), dtype=np.uint16)
        expected = np.repeat(UPRIGHT[orientation](stored >> 8)[..., None], 3, axis=2)
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png").permute(1, 2, 0), expected)


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "odd name.png").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read image .*odd name\.png'") as caught:
        read_image(tmp_path / "odd name.png")
    assert "remove" in caught.value.hint


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot read image"):
        read_image(path)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "PPM", "SVG"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, kind):
    path = tmp_path / "named.png"
    if kind == "SVG":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    else:
        Image.new("RGB", (9, 9)).save(path, format=kind)
    with pytest.raises(UserError, match="not a PNG, JPEG or WebP image"):
        read_image(path)


def test_a_pipe_is_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="cannot read image"):
        read_image(tmp_path / "pipe.png")


def held():
    """Bytes of this process's own memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_a_thread_keeps_no_memory_of_a_large_image(tmp_path):
    Image.new("RGBA", (5000, 5000), (200, 10, 10, 128)).save(tmp_path / "x.png", compress_level=1)
    before = held()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(read_image, tmp_path / "x.png").result().shape == (3, 5000, 5000)
    # The thread lets go of its result a moment after it is asked for.
    assert held() - before < 100e6


def test_a_large_image_is_shrunk_for_looking_and_a_small_one_is_left():
    image = torch.arange(3 * 40 * 20, dtype=torch.int64).reshape(3, 40, 20).to(torch.uint8)
    assert (shrink(image, 40) == image.numpy()).all()
    assert shrink(image, 20).shape == (3, 20, 10)
    means = image.float().reshape(3, 20, 2, 10, 2).mean(dim=(2, 4)).numpy()
    assert np.abs(shrink(image, 20) - means).max() <= 0.5
    assert shrink(torch.zeros(3, 1, 900, dtype=torch.uint8), 30).shape == (3, 1, 30)


def test_an_image_that_vanished_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")


def test_an_enormous_image_is_refused(tmp_path, monkeypatch):
    # Pillow only warns up to twice its limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    Image.new("L", (9, 9)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="could be decompression bomb"):
        read_image(tmp_path / "bomb.png")


# --- sampling


@pytest.mark.parametrize("max_samples", [1, 3, 10, 39, 40])
def test_a_sample_is_balanced_to_within_one_image(max_samples):
    split = tensor_split(np.arange(200) % 4, 4)
    counts = np.bincount(balanced_sample(split, max_samples, seed=3).labels, minlength=4)
    assert counts.sum() == max_samples
    assert counts.max() - counts.min() <= (max_samples % 4 > 0)


@pytest.mark.parametrize("sizes", [(2, 50, 9, 100), (1, 1, 1, 40), (5, 0, 7, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_small_classes_are_taken_whole_and_the_others_fill_up_equally(sizes, seed):
    split = tensor_split(np.repeat(np.arange(4), sizes), 4)
    for max_samples in range(1, len(split)):
        counts = np.bincount(balanced_sample(split, max_samples, seed).labels, minlength=4)
        assert counts.sum() == max_samples
        # No class may have two fewer than another unless it has given all of its images.
        for count, size in zip(counts, sizes, strict=True):
            assert count == size or count >= counts.max() - 1


def test_fewer_images_than_classes_come_from_classes_drawn_by_the_seed():
    split = tensor_split(np.arange(100) % 10, 10)
    seen = set()
    for seed in range(30):
        labels = balanced_sample(split, 3, seed).labels.tolist()
        assert len(set(labels)) == 3
        seen.update(labels)
    assert seen == set(range(10))


def test_a_sample_keeps_order_original_indices_and_pixels():
    split = tensor_split(np.random.default_rng(0).integers(0, 3, 60), 3, offset=1000)
    part = balanced_sample(split, 20, seed=1)
    assert (np.diff(part.indices) > 0).all()
    for row, index in enumerate(part.indices):
        assert part.labels[row] == split.labels[index - 1000]
        assert torch.equal(part.images[row], split.images[int(index) - 1000])
    assert (part.name, part.split, part.classes) == (split.name, split.split, split.classes)


def test_a_sample_is_decided_by_its_seed():
    split = tensor_split(np.arange(90) % 3, 3)
    drawn = [balanced_sample(split, 12, seed).indices.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_image_of_a_class_can_be_drawn():
    split = tensor_split(np.arange(20) % 2, 2)
    seen = {i for seed in range(60) for i in balanced_sample(split, 4, seed).indices}
    assert seen == set(range(20))


@pytest.mark.parametrize("max_samples", [0, 12, 1000])
def test_zero_or_enough_samples_mean_the_whole_split(max_samples):
    split = tensor_split(np.arange(12) % 3, 3)
    assert balanced_sample(split, max_samples, seed=0) is split


# --- fingerprints


def test_a_fingerprint_changes_with_a_pixel_an_index_and_the_order():
    split = tensor_split([0, 1, 0], 2)
    pixel = split.images.clone()
    pixel[2, 1, 0, 1] += 1
    variants = [
        split,
        Split("made", "all", split.classes, pixel, split.labels, split.indices),
        Split("made", "all", split.classes, split.images, split.labels, split.indices + 1),
        Split("made", "all", split.classes, split.images.flip(0), split.labels, split.indices),
        split.take(np.array([2, 1, 0])),
        split.take(np.array([0, 1])),
        Split(
            "made",
            "all",
            split.classes,
            split.images.reshape(3, 3, 1, 4),
            split.labels,
            split.indices,
        ),
    ]
    assert len({fingerprint(one) for one in variants}) == len(variants)


def test_a_fingerprint_depends_on_pixels_alone_not_on_where_they_lie(make_image_folder):
    folder = make_image_folder({"a": 1, "b": 1})
    split = load_split(str(folder), folder, "test", offline=True)
    assert isinstance(split.images, FolderImages)
    paths = [path.rename(path.with_name(f"new{path.name}")) for path in split.images.paths]
    renamed = Split(
        "else", "x", split.classes, FolderImages(tuple(paths)), split.labels, split.indices
    )
    assert fingerprint(renamed) == fingerprint(
        load_split(str(folder), folder, "test", offline=True)
    )
    expected = hashlib.sha256(np.arange(2).astype("<i8").tobytes())
    for path in paths:
        pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
        expected.update(np.array(pixels.shape, "<i8").tobytes() + pixels.tobytes())
    assert fingerprint(renamed) == expected.hexdigest()


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_smaller_sample_is_part_of_every_larger_one(seed):
    labels = np.random.default_rng(seed).choice(5, 300, p=[0.5, 0.2, 0.2, 0.07, 0.03])
    smaller = set()
    for size in range(1, 301):
        rows = balanced_rows(labels, 5, size, seed)
        assert len(rows) == size
        assert smaller <= set(rows.tolist())
        smaller = set(rows.tolist())
