"""Images to compare on: uint8 pixels in the data set's own order, with labels and indices.

Sources are CIFAR-10 (Krizhevsky 2009), the 1,797 digit scans inside scikit-learn, and any folder
with one sub-folder per class. Nothing is normalised or resized here: that belongs to each encoder.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ijepa.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# A file is taken for what its content says: without this list also for PostScript, which Pillow
# hands to another program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
# Images are decoded beside other work, and all threads share their warnings' filters: `check_size`
# refuses what this warns of. Twice as many pixels are an error of Pillow's own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow keeps large images in blocks of 16 MB, whose memory does not all go back to the system when
# a thread frees them: an image of 89 megapixels held 3.5 GB. In one block each, it holds 1.9.
Image.core.set_block_size(2**30)
# What Pillow raises on damaged and hostile files.
BAD_IMAGES = (
    *(OSError, SyntaxError, ValueError),
    *(Image.DecompressionBombWarning, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class Split:
    """Labelled images in a fixed order.

    `images[i]` is a uint8 tensor of shape (3, height, width); folders decode it on demand, so sizes
    may differ. `indices` are the positions in the whole data set, kept through sampling.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    images: Sequence[Tensor] | Tensor
    labels: Int[np.ndarray, " n"]
    indices: Int[np.ndarray, " n"]
    paths: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int[np.ndarray, " m"]) -> "Split":
        """The same data set, only these rows."""
        images = (
            self.images[torch.from_numpy(rows)]
            if isinstance(self.images, Tensor)
            else FolderImages(tuple(self.images.paths[row] for row in rows))
        )
        return Split(
            self.name, self.split, self.classes, images, self.labels[rows], self.indices[rows]
        )


@dataclass(frozen=True)
class FolderImages(Sequence[Tensor]):
    """Image files, decoded to RGB when asked for."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> UInt8[Tensor, "3 h w"]:
        return read_image(self.paths[row])


def read_image(path: Path) -> UInt8[Tensor, "3 h w"]:
    """Decode one file to RGB, upright by its EXIF orientation; transparency becomes white.

    Raises:
        UserError: If the file is no readable image or has over 89 million pixels (Pillow's limit).
    """
    hint = "replace or remove that file"
    if not path.is_file():  # a pipe would never end
        raise UserError(f"cannot read image {str(path)!r}: no such file", hint=hint)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            check_size(*opened.size)
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                # Pillow clips 16-bit grey values at 255; keep the upper byte instead.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                )
            pixels = np.array(image.convert("RGB"))
    except BAD_IMAGES as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a PNG, JPEG or WebP image" if unknown else str(error)
        raise UserError(f"cannot read image {str(path)!r}: {reason}", hint=hint) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_size(width: int, height: int) -> None:
    """Raise ValueError for more pixels than Pillow takes without a warning, before decoding."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ValueError(f"{width} x {height} pixels exceed the limit of {limit}")


def shrink(image: UInt8[Tensor, "3 h w"], side: int) -> UInt8[np.ndarray, "3 H W"]:
    """The image as an array for looking at, neither side above `side`; a small one as it is."""
    factor = max(image.shape[1:]) / side
    if factor <= 1:
        return image.numpy()
    height, width = (max(1, round(length / factor)) for length in image.shape[1:])
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX)).transpose(2, 0, 1)


def load_cifar10(data_dir: Path, split: str, offline: bool) -> Split:
    """CIFAR-10, 32 x 32 RGB: 50,000 training or 10,000 test images.

    Raises:
        UserError: If it is missing and must not or cannot be downloaded, or a file is corrupt.
    """
    from torchvision.datasets import CIFAR10

    present = (data_dir / CIFAR10.base_folder).is_dir()
    hint = f"put the folder cifar-10-batches-py into {data_dir}, or pass --data-dir with its parent"
    if offline and not present:
        raise UserError(
            f"CIFAR-10 is not in {data_dir} and --offline forbids the download", hint=hint
        )
    try:
        dataset = CIFAR10(str(data_dir), train=split == "train", download=not present)
    except RuntimeError as error:  # torchvision's word for a wrong checksum or a missing file
        raise UserError(
            f"CIFAR-10 in {data_dir} is incomplete or corrupt: {error}",
            hint="delete the folder cifar-10-batches-py there and run again to download it",
        ) from error
    except OSError as error:
        raise UserError(f"CIFAR-10 could not be downloaded: {error}", hint=hint) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    labels = np.asarray(dataset.targets, dtype=np.int64)
    return Split("cifar10", split, tuple(dataset.classes), images, labels, np.arange(len(labels)))


def load_digits(data_dir: Path, split: str, offline: bool) -> Split:  # noqa: ARG001
    """The 1,797 handwritten digits inside scikit-learn; it has no splits, so both names mean all.

    The scans are 8 x 8 with 17 grey levels: values times 255 / 16, enlarged to 32 x 32 by bicubic
    interpolation, the same grey in all three channels.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    grey = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(scan).resize((32, 32), Image.Resampling.BICUBIC))
        for scan in grey
    ]
    images = torch.from_numpy(np.stack(large))[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = bunch.target.astype(np.int64)
    classes = tuple(str(name) for name in bunch.target_names)
    return Split("digits", "all", classes, images, labels, np.arange(len(labels)))


def load_folder(folder: Path, data_dir: Path, split: str, offline: bool) -> Split:  # noqa: ARG001
    """A folder with one sub-folder of PNG, JPEG or WebP files per class, both in sorted order.

    If the folder has a sub-folder named like the split, that one is read.

    Raises:
        UserError: If there are fewer than two classes or a class has no image.
    """
    root = folder / split if (folder / split).is_dir() else folder
    hint = "expected FOLDER/CLASS/IMAGE with at least two classes, images as png, jpg, jpeg or webp"
    classes = sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    files = [
        sorted(
            path
            for path in one.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        for one in classes
    ]
    if len(classes) < 2:
        raise UserError(
            f"{str(root)!r} has {len(classes)} class folders, need at least 2", hint=hint
        )
    for one, found in zip(classes, files, strict=True):
        # Python decodes bytes that are not UTF-8 to these characters, which no file takes.
        if any("\udc80" <= character <= "\udcff" for character in one.name):
            raise UserError(
                f"class folder {str(one)!r} has a name that is not UTF-8", hint="rename the folder"
            )
        if not found:
            raise UserError(f"class folder {str(one)!r} has no images", hint=hint)
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    images = FolderImages(tuple(path for found in files for path in found))
    return Split(
        str(folder),
        split if root != folder else "all",
        tuple(one.name for one in classes),
        images,
        labels,
        np.arange(len(labels)),
    )


DATASETS: dict[str, Callable[[Path, str, bool], Split]] = {
    "cifar10": load_cifar10,
    "digits": load_digits,
}


def load_split(dataset: str, data_dir: Path, split: str, offline: bool) -> Split:
    """Load a data set by name, or a folder of images by path.

    Raises:
        UserError: If the name is unknown and no such folder exists, or loading fails.
    """
    if dataset in DATASETS:
        return DATASETS[dataset](data_dir, split, offline)
    folder = Path(dataset)
    if not folder.is_dir():
        names = ", ".join(DATASETS)
        raise UserError(
            f"no such folder: {dataset!r}",
            hint=f"choose from {names}, or give a folder with one sub-folder per class",
        )
    return partial(load_folder, folder)(data_dir, split, offline)


def load_unlabeled(folder: Path) -> Split:
    """All images at any depth below a folder, without classes: every label is 0."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    labels = np.zeros(len(files), dtype=np.int64)
    images = FolderImages(tuple(files))
    return Split(str(folder), "all", (), images, labels, np.arange(len(labels)))


def find_unreadable(split: Split) -> list[tuple[int, str]]:  # noqa: ARG001
    """Rows of files without a valid header, with the reasons."""
    return []


def balanced_rows(
    labels: Int[np.ndarray, " n"], num_classes: int, max_samples: int, seed: int
) -> Int[np.ndarray, " m"]:
    """At most `max_samples` positions in ascending order, as many of each class as possible.

    Classes get equal shares. Where a class has fewer images the others fill up, and a remainder
    goes to classes drawn by the seed. Samples of the same seed are nested: a smaller one is part of
    every larger one.
    """
    if max_samples >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=num_classes)
    take = np.zeros_like(counts)
    priority = rng.permutation(len(counts))
    while (left := max_samples - take.sum()) > 0:
        open_classes = [c for c in priority if take[c] < counts[c]]
        share = left // len(open_classes)
        if share == 0:
            take[open_classes[:left]] += 1
        else:
            take[open_classes] = np.minimum(take[open_classes] + share, counts[open_classes])
    rows = [rng.permutation(np.flatnonzero(labels == c))[: take[c]] for c in range(len(counts))]
    return np.sort(np.concatenate(rows))


def balanced_sample(split: Split, max_samples: int, seed: int) -> Split:
    """At most `max_samples` images as of `balanced_rows`; 0 keeps every image."""
    if max_samples == 0 or max_samples >= len(split):
        return split
    return split.take(balanced_rows(split.labels, len(split.classes), max_samples, seed))


def fingerprint(split: Split) -> str:
    """SHA-256 over the indices, shapes and pixels of every image, in order."""
    digest = hashlib.sha256(split.indices.astype("<i8").tobytes())
    for row in range(len(split)):
        image = split.images[row]
        digest.update(np.asarray(image.shape, dtype="<i8").tobytes())
        digest.update(image.numpy().tobytes())
    return digest.hexdigest()
