import hashlib
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from sklearn.datasets import load_digits as sklearn_digits
from torchvision.datasets import CIFAR10

from ijepa import data
from ijepa.data import Split, balanced_sample, find_unreadable, load_split, load_unlabeled
from ijepa.errors import UserError
from ijepa.files import LOCK
from ijepa.images import doubtful_pixels, read_image, shrink

NOWHERE = Path("does-not-exist")
GRAY, WHITE, CLEAR = np.uint8([[0, 9], [128, 255]]), [255] * 3, [206, 205, 204]
KEY = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
PALETTE = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
PALETTE.putpalette([9, 8, 7, 50, 60, 70, 1, 2, 3])


def write_cifar(folder, rows_per_file, monkeypatch):
    """Write a small archive of the real layout; torchvision checks it against its own checksums."""
    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files, checksums = {"batches.meta": {"label_names": ["plane", "car", "bird"]}}, {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        pixels = rng.integers(0, 256, (rows_per_file, 3072), dtype=np.uint8)
        files[name] = {"data": pixels, "labels": rng.integers(0, 3, rows_per_file).tolist()}
    for name, content in files.items():
        written = pickle.dumps(content)
        (base / name).write_bytes(written)
        checksums[name] = hashlib.md5(written).hexdigest()
    meta, *train, test = checksums.items()
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    facts = {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    monkeypatch.setattr(CIFAR10, "meta", facts)
    return files


def tensor_split(labels, num_classes, offset=0):
    labels = np.asarray(labels, dtype=np.int64)
    images = torch.arange(len(labels) * 12).reshape(-1, 3, 2, 2).to(torch.uint8)
    classes = tuple(f"class {number}" for number in range(num_classes))
    return Split("made", "all", classes, images, labels, np.arange(len(labels)) + offset)


def test_cifar_pixels_labels_and_order_are_those_of_the_files(tmp_path, monkeypatch):
    files = write_cifar(tmp_path, 7, monkeypatch)
    train = load_split("cifar10", tmp_path, "train", offline=True)
    test = load_split("cifar10", tmp_path, "test", offline=True)
    assert (train.name, train.split, test.split) == ("cifar10", "train", "test")
    assert train.classes == test.classes == ("plane", "car", "bird")
    assert train.images.dtype == torch.uint8
    assert test.images.shape == (7, 3, 32, 32)
    one, two = files["data_batch_1"], files["data_batch_2"]
    assert train.labels.tolist() == one["labels"] + two["labels"]
    assert train.indices.tolist() == list(range(14))
    # The files hold 1,024 red, then green, then blue values of each image, row by row.
    pixels = np.concatenate([one["data"], two["data"]])
    np.testing.assert_array_equal(train.images.reshape(14, 3072), pixels)


def test_cifar_that_is_missing_and_not_to_be_had_is_a_user_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--offline forbids the download") as caught:
        load_split("cifar10", tmp_path, "test", offline=True)
    assert "--data-dir" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    # Port 9 of this host: the connection is refused, no packet leaves.
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match="could not be downloaded"):
        load_split("cifar10", tmp_path, "test", offline=False)


@pytest.mark.parametrize("offline", [True, False])
def test_cifar_with_a_corrupt_or_missing_file_is_a_user_error(tmp_path, monkeypatch, offline):
    write_cifar(tmp_path, 2, monkeypatch)
    file = tmp_path / CIFAR10.base_folder / "test_batch"
    file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(UserError, match="incomplete or corrupt"):
            load_split("cifar10", tmp_path, "test", offline=offline)
        file.unlink(missing_ok=True)


def test_a_cifar_archive_is_unpacked_offline_unless_it_is_damaged(tmp_path, monkeypatch):
    files = write_cifar(tmp_path / "made", 3, monkeypatch)
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    with pytest.raises(UserError, match="--offline"):
        load_split("cifar10", tmp_path, "test", offline=True)  # it has not the right checksum
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    split = load_split("cifar10", tmp_path, "test", offline=True)
    np.testing.assert_array_equal(split.images.reshape(3, 3072), files["test_batch"]["data"])


def test_digits_are_scikit_learns_scans_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, "digits/report.md")
    assert load("digits").notes == ()
    folder_of(tmp_path, "digits/a/1.png", "digits/b/2.png")
    split = load_split("digits", NOWHERE, "test", offline=True)
    bunch = sklearn_digits()
    assert split.images.shape == (1797, 3, 32, 32)
    assert split.images.dtype == torch.uint8
    assert split.classes == tuple("0123456789")
    np.testing.assert_array_equal(split.labels, bunch.target)
    np.testing.assert_array_equal(split.indices, np.arange(1797))
    assert (split.images == split.images[:, :1]).all()  # gray
    assert "./digits" in split.notes[0]
    scans = torch.from_numpy(bunch.images * 255 / 16).round()[:, None]
    # With antialias PyTorch's bicubic kernel is Pillow's, which rounds to bytes after each axis.
    wide = F.interpolate(scans, (8, 32), mode="bicubic", antialias=True).round().clamp(0, 255)
    large = F.interpolate(wide, (32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(split.images[:, :1].double(), large, atol=2, rtol=0)


def folder_of(tmp_path, *names):
    """Files of these names, each a different small image if its suffix is one of an image."""
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            Image.new("RGB", (4, 5), (number, 1, 2)).save(path)
        else:
            path.write_text("no image")
    return str(tmp_path)


def load(folder, split="test"):
    return load_split(str(folder), NOWHERE, split, offline=True)


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_every_format_that_pillow_opens_counts_whatever_the_case_of_its_suffix(tmp_path):
    Image.init()
    formats = set(Image.SAVE) & set(Image.OPEN) | {"MPO"}
    formats -= {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5"}
    kinds = {s: f for s, f in Image.registered_extensions().items() if f in formats}
    assert {".tif", ".bmp", ".gif", ".jfif", ".jpe", ".avif", ".ppm", ".webp"} < kinds.keys()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for suffix, kind in kinds.items():
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        mode = {"BLP": "P", "MSP": "1", "XBM": "1", "PALM": "P"}.get(kind, "RGB")
        image.convert(mode).save(tmp_path / "a" / f"x{suffix}", kind)
        image.convert(mode).save(tmp_path / "b" / f"x{suffix.upper()}", kind)
    split = load(tmp_path)
    assert len(split) == 2 * len(kinds) == len(list(tmp_path.rglob("x.*")))
    assert split.notes == ()
    assert find_unreadable(split) == []
    for row in range(len(split)):
        assert len(split.images[row]) == 3, split.paths[row]


def test_what_is_left_out_is_counted_with_its_reason(tmp_path):
    used = ["a/1.png", "a/deep/er/2.PNG", "b/.png/../x y.png", "b/z.png"]
    unused = {
        "files of another kind": [
            *("a/notes.txt", "a/movie.mp4", "a/scan.pdf", "a/scan.eps", "a/photo.heic"),
            *("b/labels.csv", "b/more.zip", "b/README", "b/deep/model.pt", "empty class/x.txt"),
        ],
        "files outside the class folders": ["README.md", "9.png"],
        "files hidden or made by the operating system": [
            *("a/._1.png", "a/Thumbs.db", ".DS_Store", ".ipynb_checkpoints/1.png"),
            *("__MACOSX/a/1.png", "b/@eaDir/1.png", "lost+found/1.png"),
        ],
        "folder without images": ["empty class"],
        "files of an earlier run": [
            *("out/report.md", "out/per_image.csv", "out/pca_comparison.png"),
            *("run/training_log.csv", "run/checkpoint_latest.pt", "run/training_curves.png"),
        ],
    }
    names = (name for files in unused.values() for name in files if name != "empty class")
    folder_of(tmp_path, *used, *names)
    for name in ("a/loop", "ring"):
        (tmp_path / name).symlink_to(tmp_path)
    split = load(tmp_path)
    assert split.classes == ("a", "b")
    assert split.paths == ("a/1.png", "a/deep/er/2.PNG", "b/x y.png", "b/z.png")
    (note,) = split.notes
    for reason, files in unused.items():
        assert f"{len(files)} {reason} (" in note
    assert "2 links to a folder above (1 loop, 1 ring)" in note
    assert all(word in note for word in (".heic", "__MACOSX", "1 empty class"))


def test_files_are_found_at_any_depth_and_in_the_order_of_names(make_image_folder):
    folder = make_image_folder({"zebra": 2, "ant": 3})
    Image.new("RGB", (5, 4)).save(folder / "ant" / "0000.JPG", "JPEG")
    (folder / "ant" / "000b").mkdir()
    (folder / "ant" / "001.png").rename(folder / "ant" / "000b" / "z.png")
    (folder / "zebra" / "link.png").symlink_to(folder / "ant" / "000.png")
    split = load(folder)
    assert split.classes == ("ant", "zebra")
    assert split.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert split.indices.tolist() == list(range(7))
    assert split.paths == (
        *("ant/000.png", "ant/0000.JPG", "ant/000b/z.png", "ant/002.png"),
        *("zebra/000.png", "zebra/001.png", "zebra/link.png"),
    )
    assert [file.relative_to(folder).as_posix() for file in split.images.files] == [*split.paths]
    keys = split.image_keys
    assert keys[6] == keys[0]
    assert data.duplicates(keys, split.labels) == (2, 2)
    assert data.duplicates(keys, np.zeros(7, int)) == (2, 0)
    assert data.duplicates(keys[:6], split.labels[:6]) == (0, 0)


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("Train", "valid"), ("TRAIN", "Validation")]
)
def test_a_folder_of_nothing_but_splits_is_read_at_the_chosen_one(tmp_path, train, val):
    names = [f"{train}/a/1.png", f"{train}/b/2.png", f"{train}/b/3.png", f"{val}/a/4.png"]
    mine = (LOCK, f"out/{LOCK}", "out/tsne_comparison.png")  # of the run itself
    folder = folder_of(tmp_path, *names, f"{val}/b/5.png", "README.md", ".DS_Store", *mine)
    split = load(folder, "train")
    assert (split.split, split.classes, split.labels.tolist()) == ("train", ("a", "b"), [0, 1, 1])
    assert split.paths[0] == f"{train}/a/1.png"
    assert all(part in split.notes[0] for part in ("(1 .DS_Store)", "(1 .md)"))
    assert load(folder, "val").labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=f"it has {train}, {val}|it has {val}, {train}") as caught:
        load(folder, "test")
    assert "--split" in caught.value.hint
    for run in (("report.md", "per_image.csv"), ("training_log.csv", "checkpoint_latest.pt")):
        folder_of(tmp_path, *run, "figure.png", "hf/config.json")  # of a run beside them
        again = load(folder, "train")
        assert (again.split, again.paths) == ("train", split.paths)
        for name in run:
            (tmp_path / name).unlink()
    assert load(folder).split == "all"  # a figure of nobody
    (tmp_path / "figure.png").unlink()
    shutil.rmtree(tmp_path / "hf")
    folder_of(tmp_path, "test/6.png")
    with pytest.raises(UserError, match="0 class folders") as caught:
        load(folder, "test")
    assert "or choose another --split" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/1.png", "bus/2.png"], ("bus", "train")),
        (["train/1.png", "test/2.png"], ("test", "train")),
        (["train/x/1.png", "car/x/2.png"], ("car", "train")),
        (["train/x/1.png", "train/0.png", "test/2.png"], ("test", "train")),
    ],
)
def test_classes_may_have_names_of_splits(tmp_path, names, classes):
    split = load(folder_of(tmp_path, *names), "train")
    assert (split.classes, split.split) == (classes, "all")


def test_classes_and_images_that_may_be_something_else_are_noted(tmp_path):
    names = ["a/1.png", "a/1_mask.png", "train/who_seg.png", "val/2.png"]
    split = load(folder_of(tmp_path / "flat", *names))
    assert len(split) == 4
    assert split.notes == (
        "used as images, though named like masks of other images: 1 file",
        "taken for classes, though named like splits: train, val",
    )
    names = [f"{split}/{name}/1.png" for split in ("testing", "training") for name in "ab"]
    (note,) = load(folder_of(tmp_path / "mnist", *names)).notes
    assert note.startswith("every class has the folders a, b, and their images are mixed; if these")
    assert note.endswith("mnist/testing'")
    for number, (names, noted) in enumerate(
        (
            (("training/a/1.png", "testing/2.png"), True),
            (("seg_train/seg_train/a/1.png", "seg_test/seg_test/a/2.png", "seg_pred/3.png"), True),
            (("trainA/1.png", "testA/2.png", "trainB/3.png"), True),
            (("TestData/1.png", "trainval/2.png"), True),
            (("bullet_train/1.png", "freight train/2.png"), False),
            (("latest/1.png", "trainer/2.png"), False),
            (("TRAIN/1.png", "VALVE/2.png"), False),
        )
    ):
        notes = load(folder_of(tmp_path / str(number), *names)).notes
        assert any("named like splits" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        ([], "0 class folders", "FOLDER/CLASS"),
        (["only/1.png", "only/2.png", "none/x.heic"], r"1 class folder with.*only", ".heic"),
        (["1.png", "labels.csv"], "0 class folders", "1 image outside of class folders"),
        (
            ["wrap/a/1.png", "wrap/b/1.png"],
            "1 class folder ",
            "if 'a' and 'b' are classes or splits, give",
        ),
        (["w/x/a/1.png", "w/x/b/1.png"], "1 class folder ", "w/x'"),
        (["images/1.png", "labels/1.txt"], "1 class folder ", "images and labels"),
        (["images/1.png", "masks/2.png"], "images.*masks", "images and labels"),
    ],
)
def test_a_folder_without_two_classes_is_refused_with_what_it_holds(tmp_path, names, words, hint):
    with pytest.raises(UserError, match=words) as caught:
        load(folder_of(tmp_path, *names))
    assert hint in caught.value.hint


def test_what_is_no_data_set_is_refused_and_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path, "set/a/1.png", "set/b/2.png", "set.zip")
    assert len(load("~/set")) == 2
    for dataset, words in (
        ("cifar-11", "unknown data set.*cifar-11"),
        ("/no/such", "^no such folder: '/no/such'"),
        ("~/no/such", "no such folder: '~/no/such'"),
        ("x" * 300, "no such folder"),
        ("~/set.zip", r"set\.zip' is a file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load(dataset)
        assert "cifar10, digits" in caught.value.hint
    assert "unpack" in caught.value.hint
    with pytest.raises(UserError, match=str(tmp_path / "data")):
        load_split("cifar10", Path("~/data"), "test", offline=True)


@pytest.fixture
def guarded():
    """A folder with two classes and two folders that may not be entered, seen by no root."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own may not be entered either
        folder, is_root = Path(name), os.geteuid() == 0
        folder_of(folder, "a/1.png", "b/2.png", "lost+found/x", "c/3.png")
        for path, mode in ((folder, 0o755), (folder / "lost+found", 0), (folder / "c", 0)):
            path.chmod(mode)
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)


def test_what_may_not_be_entered_is_refused_and_a_system_folder_left_out(guarded):
    with pytest.raises(UserError, match=r"cannot read folder '.*/c': Permission denied"):
        load(guarded)
    for path in (guarded / "c" / "deeper", guarded / "c" / "3.png"):
        with pytest.raises(UserError, match="no such folder"):
            load(path)


def test_names_are_kept_and_only_those_that_are_not_utf8_refused(tmp_path):
    names = ("e\u0301", "\u00e9", "a b", "<script>", "\u540d\u524d", "x\ry")
    split = load(folder_of(tmp_path, *(f"{name}/1.png" for name in names)))
    assert split.classes == tuple(sorted(names))
    long = tmp_path / "a b" / f"{'x' * 196}.png"
    long.symlink_to("1.png")
    assert f"a b/{long.name}" in load(tmp_path).paths
    odd = os.fsdecode(b"\xff.png")
    (tmp_path / "a b" / odd).write_bytes((tmp_path / "a b" / "1.png").read_bytes())
    assert "a b/\\xff.png" in load(tmp_path).paths
    (tmp_path / "a b" / os.fsdecode(b"x.\xff")).touch()
    assert load(tmp_path).notes[0].encode().endswith(b"(1 .\\udcff)")
    (tmp_path / "a b").rename(tmp_path / os.fsdecode(b"\xff"))
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path)


def test_images_without_classes_are_found_flat_and_nested(tmp_path):
    folder_of(tmp_path, "2.png", "deep/er/1.png", "x.txt", "train/1.png")
    split = load_unlabeled(tmp_path)
    assert (split.classes, split.labels.tolist()) == ((), [0, 0, 0])
    assert split.paths == ("2.png", "deep/er/1.png", "train/1.png")
    assert split.notes == ("not used: 1 file of another kind (1 .txt)",)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no images"):
        load_unlabeled(tmp_path / "none")


def test_all_files_without_a_valid_header_are_found_before_any_is_decoded(tmp_path):
    folder_of(tmp_path, "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    (tmp_path / "a" / "empty.jpg").touch()
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "self.jpg").symlink_to(tmp_path / "a" / "self.jpg")
    (tmp_path / "b" / "text.tif").write_text("plain text")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    split = load(tmp_path)
    failures = find_unreadable(split)
    assert {split.paths[row] for row, _ in failures} == {
        *("a/empty.jpg", "a/gone.jpg", "a/self.jpg", "b/text.tif", "b/pipe.png")
    }
    assert all(split.paths[row] in reason for row, reason in failures)


def test_twelve_bit_data_transparency_and_several_frames_are_noted(tmp_path):
    frames = [Image.new("L", (4, 4), color) for color in (1, 99)]
    for name, largest in (("a", 4095), ("b", 4096)):
        (tmp_path / name).mkdir()
        deep = np.linspace(0, largest, 16).astype(np.uint16).reshape(4, 4)
        Image.fromarray(deep).save(tmp_path / name / "deep.png")
        frames[0].save(tmp_path / name / "x.gif", save_all=True, append_images=frames[1:])
        Image.new("LA", (4, 4), (9, largest % 256)).save(tmp_path / name / "x.png")  # 255 and 0
    assert read_image(tmp_path / "a" / "x.gif").unique().tolist() == [1]
    several, clear, dark = doubtful_pixels(load(tmp_path).images.files)
    assert several == "several frames, of which one is used: 2 of 6 files checked"
    assert clear == "transparent, so shown on white: 1 of 6 files checked"
    assert dark.startswith("16-bit gray without a value above 4,095")
    assert dark.endswith(": 1 of 6 files checked")
    assert doubtful_pixels(()) == ()


def test_a_file_that_ends_in_its_second_frame_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    first, second = (Image.fromarray(frame) for frame in noise)
    whole = tmp_path / "whole.gif"
    first.save(whole, save_all=True, append_images=[second])
    content = whole.read_bytes()
    start = content.rindex(b"\x2c\0\0\0\0")  # of the second frame's header
    cut = tmp_path / "cut.gif"
    for end in range(start, start + 12):
        cut.write_bytes(content[:end])
        assert torch.equal(read_image(cut), read_image(whole))
        assert all(note.endswith(": 1 of 1 files checked") for note in doubtful_pixels([cut]))


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (GRAY, {}, np.repeat(GRAY[..., None], 3, axis=2)),
        (np.array([[True, False]]), {}, [[[255] * 3, [0] * 3]]),
        (KEY, {"transparency": (1, 2, 3)}, [[WHITE, [4, 5, 6]]]),
        (PALETTE, {"transparency": 1}, [[[9, 8, 7], WHITE, [1, 2, 3]]]),
        (PALETTE, {"transparency": bytes([255, 0])}, [[[9, 8, 7], WHITE, [1, 2, 3]]]),
        (np.uint8([[[10, 0], [10, 255], [10, 51]]]), {}, [[WHITE, [10] * 3, [206] * 3]]),
        (np.uint8([[[9, 5, 0, 255], [9, 5, 0, 51]]]), {}, [[[9, 5, 0], CLEAR]]),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), {"format": "TIFF"}, [[[0, 255, 255]]]),
    ],
    ids=["L", "1", "a color as transparent", "palette", "palette of bytes", "LA", "RGBA", "CMYK"],
)
def test_pixels_of_every_mode_are_rgb_on_white(tmp_path, image, options, expected):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(tmp_path / "x.png", **options)
    seen = read_image(tmp_path / "x.png").permute(1, 2, 0)
    np.testing.assert_allclose(seen, expected, atol=1 if image.mode.endswith("A") else 0)


def test_exif_orientation_turns_images_upright_whatever_is_next_to_it(tmp_path):
    entries = struct.pack("<HHII", 0x112, 3, 1, 6) + struct.pack("<HHI4s", 0x11A, 2, 3, b"72")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)  # a text for a number
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, (8, 9), dtype=np.uint16)
    for stored, seen in ((colors, colors), (deep, np.repeat(deep[..., None] >> 8, 3, axis=2))):
        Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
        with pytest.raises(TypeError), Image.open(tmp_path / "a.png") as opened:
            ImageOps.exif_transpose(opened)
        found = read_image(tmp_path / "a.png").permute(1, 2, 0)
        np.testing.assert_array_equal(found, np.rot90(seen, -1))


def test_keys_are_those_of_the_files_when_first_read(tmp_path):
    split = load(folder_of(tmp_path, "a/1.png", "b/2.png"))
    keys = split.image_keys
    (tmp_path / "a" / "1.png").unlink()
    assert replace(split, notes=("changed",)).image_keys == keys
    with pytest.raises(UserError, match=r"cannot read .*1\.png"):
        split.take(np.arange(2)).image_keys  # noqa: B018


def test_what_is_cut_a_document_or_of_another_format_than_its_suffix_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        Image.fromarray(noise).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    path = tmp_path / "named.png"
    for kind in ("SVG", "EPS", "TGA"):
        if kind == "SVG":
            path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
        else:
            Image.new("RGB", (9, 9)).save(path, format=kind)
        with pytest.raises(UserError, match=r"not an image.*named\.png"):
            read_image(path)


def test_sixteen_bit_values_keep_their_upper_byte_and_floats_are_refused(tmp_path):
    ramp = np.linspace(0, 255, 20 * 16).astype(np.uint8).reshape(20, 16)
    deep = ramp.astype(np.uint16) * 256 + 255
    for name in ("deep.png", "deep.tif", "deep.pgm", "deep.jp2"):
        Image.fromarray(deep).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name)[1], ramp)
    inverted = (tmp_path / "deep.tif").read_bytes()
    white_is = [struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0)]
    assert white_is[0] in inverted
    (tmp_path / "negative.tif").write_bytes(inverted.replace(*white_is))
    np.testing.assert_array_equal(read_image(tmp_path / "negative.tif")[1], 255 - ramp)
    for kind in (np.float32, np.int32):
        Image.fromarray(deep.astype(kind)).save(tmp_path / "wide.tif")
        with pytest.raises(UserError, match="32-bit"):
            read_image(tmp_path / "wide.tif")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_profiles_and_texts_above_pillows_limit_and_a_cut_exif_hide_no_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("x", "y" * 2_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.fromarray(pixels)
    image.save(tmp_path / "profile.png", icc_profile=bytes(2_000_000), exif=exif)
    image.save(tmp_path / "text.png", pnginfo=texts, exif=exif)
    for name in ("profile.png", "text.png"):
        with pytest.raises(ValueError, match="too large"), Image.open(tmp_path / name) as opened:
            opened.load()
        seen = read_image(tmp_path / name).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(seen, pixels[::-1, ::-1])
    for damaged in (exif.tobytes()[:14], *(b"Exif\0\0" + one for one in (bytes(20), b"II", b""))):
        image.save(tmp_path / "cut.png", exif=damaged)
        np.testing.assert_array_equal(read_image(tmp_path / "cut.png").permute(1, 2, 0), pixels)
        image.save(tmp_path / "cut.jpg", exif=damaged, dpi=(72, 72))  # without dpi Pillow reads it
        assert read_image(tmp_path / "cut.jpg").shape == (3, 9, 7)
    for name in ("cut.png", "cut.jpg"):
        image.save(tmp_path / name, exif=b"Exif\0\0II")
        assert doubtful_pixels([tmp_path / name])[0].startswith("damaged EXIF, so perhaps not")
    # An orientation after the pixels and after what is left out.
    parts, at = (tmp_path / "text.png").read_bytes(), []
    for name in (b"IHDR", b"zTXt", b"eXIf", b"IDAT", b"IEND"):
        start = parts.index(name) - 4
        at.append(parts[start : start + 12 + int.from_bytes(parts[start : start + 4])])
    header, text, turn, data, end = at
    (tmp_path / "late.png").write_bytes(b"".join([parts[:8], header, data, text, turn, end]))
    late = read_image(tmp_path / "late.png").permute(1, 2, 0)
    np.testing.assert_array_equal(late, pixels[::-1, ::-1])


def test_an_enormous_photo_is_refused_by_its_header(tmp_path):
    (tmp_path / "bomb.ppm").write_bytes(b"P5 20000 20000 255\n")
    with pytest.raises(UserError, match="exceeds limit"):
        read_image(tmp_path / "bomb.ppm")


def test_a_large_image_is_shrunk_for_looking_and_a_small_one_is_left():
    image = torch.arange(3 * 40 * 20, dtype=torch.int64).reshape(3, 40, 20).to(torch.uint8)
    assert (shrink(image, 40) == image.numpy()).all()
    assert shrink(image, 20).shape == (3, 20, 10)
    means = image.float().reshape(3, 20, 2, 10, 2).mean(dim=(2, 4)).numpy()
    assert np.abs(shrink(image, 20) - means).max() <= 0.5
    assert shrink(torch.zeros(3, 1, 900, dtype=torch.uint8), 30).shape == (3, 1, 30)


@pytest.mark.parametrize("sizes", [(2, 50, 9, 100), (1, 1, 1, 40), (5, 0, 7, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_small_classes_are_whole_others_fill_up_equally_and_samples_are_nested(sizes, seed):
    split = tensor_split(np.repeat(np.arange(4), sizes), 4)
    smaller = set()
    for max_samples in range(1, len(split)):
        part = balanced_sample(split, max_samples, seed)
        assert len(part) == max_samples
        # No class may have two fewer than another unless it has given all of its images.
        counts = np.bincount(part.labels, minlength=4)
        for count, size in zip(counts, sizes, strict=True):
            assert count == size or count >= counts.max() - 1
        assert smaller <= set(part.indices)
        smaller = set(part.indices)


def test_fewer_images_than_classes_come_from_classes_drawn_by_the_seed():
    split = tensor_split(np.arange(100) % 10, 10)
    samples = [set(balanced_sample(split, 3, seed).labels) for seed in range(30)]
    assert {len(labels) for labels in samples} == {3}
    assert set.union(*samples) == set(range(10))


def test_a_sample_keeps_order_original_indices_and_pixels_and_may_be_the_whole_split():
    split = tensor_split(np.random.default_rng(0).integers(0, 3, 60), 3, offset=1000)
    part = balanced_sample(split, 20, seed=1)
    assert (np.diff(part.indices) > 0).all()
    for row, index in enumerate(part.indices):
        assert part.labels[row] == split.labels[index - 1000]
        assert torch.equal(part.images[row], split.images[int(index) - 1000])
    assert (part.name, part.split, part.classes) == (split.name, split.split, split.classes)
    for enough in (0, 60, 1000):
        assert balanced_sample(split, enough, seed=0) is split
