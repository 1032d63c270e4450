"""Images to compare on: uint8 pixels in the data set's own order, with labels and indices.

Sources are CIFAR-10 (Krizhevsky 2009), the 1,797 digit scans inside scikit-learn, and any folder
with one subfolder per class. Nothing is normalized or resized here: that belongs to each encoder.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from ijepa.errors import UserError, counted, home_path, printable
from ijepa.files import LOCK
from ijepa.images import FolderImages, check_mode, image_suffixes, read_image

SYSTEM_NAMES = {
    *("__macosx", "@eadir", "lost+found", "#recycle", "$recycle.bin"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
OUTPUTS = (("report.md", "per_image.csv"), ("training_log.csv", "checkpoint_latest.pt"))
"""A folder with both files of a pair is where a script wrote; its figures are no images."""
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SPLIT_NAMES = {name for names in SPLITS.values() for name in names}
SPLIT_WORD = re.compile(
    r"(?<![A-Za-z])(?i:(train|val|test)(ing|val|id|idation)?(set|data)?)(?![a-z]|[A-Z][A-Za-z])"
)
"""In names that are more often those of splits than of classes, as `seg_train` and `testB`."""
LAYOUT_NAMES = {"images", "imgs", "labels", "masks", "annotations"}
"""Folders of detection and segmentation data sets, which are no classes."""
MASKS = ("_mask", "_seg", "_gt", "_label")
LeftOut = defaultdict[str, Counter[str]]
"""What a folder holds besides images: counts by reason, whose first word is what is counted, and
by name or suffix."""


@dataclass(frozen=True)
class Split:
    """Labeled images in a fixed order; `load_split` finds them again by `name`.

    `images[i]` is a uint8 tensor of shape (3, height, width); folders decode it on demand, so sizes
    may differ. `images` is None where there are only labels. `indices` are positions in the whole
    data set and survive sampling. `paths` are relative to the folder; None for arrays. Each of the
    `notes` says what was left out or assumed. `unreadable` has the paths of the unreadable images
    that were left out.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    images: Tensor | FolderImages | None
    labels: Int[np.ndarray, " n"]
    indices: Int[np.ndarray, " n"]
    paths: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int[np.ndarray, " m"]) -> "Split":
        """The same data set, only these rows."""
        images = (
            self.images[torch.from_numpy(rows)]
            if isinstance(self.images, Tensor)
            else FolderImages(tuple(self.images.files[row] for row in rows))
        )
        paths = self.paths and tuple(self.paths[row] for row in rows)
        labels, indices = self.labels[rows], self.indices[rows]
        return replace(self, images=images, labels=labels, indices=indices, paths=paths)

    def readable(self, failures: Sequence[tuple[int, str]], skip: bool) -> "Split":
        """The split without the unreadable images of a folder, given as rows with reasons.

        Raises:
            UserError: If there are any and they must not be skipped.
        """
        if not failures:
            return self
        if not skip:
            raise UserError(
                f"cannot read {len(failures):,} of {len(self):,} images: {reasons(failures)}",
                hint="replace or remove them, or give --skip-unreadable: metrics.json then lists "
                "them all",
            )
        bad = [row for row, _ in failures]
        note = f"{counted(len(bad), 'unreadable image')} left out: {reasons(failures)}"
        rest = self.take(np.setdiff1d(np.arange(len(self)), bad))
        unreadable = (*self.unreadable, *self.take(np.array(bad)).paths)
        return replace(rest, notes=(*self.notes, note), unreadable=unreadable)

    @cached_property
    def image_keys(self) -> list[bytes]:
        """16 bytes per image: a hash of its file, or of pixels and shape; nothing is decoded.

        Raises:
            UserError: If a file cannot be read.
        """
        if isinstance(self.images, FolderImages):
            return self.images.keys
        contents = (str(tuple(x.shape)).encode() + x.numpy().tobytes() for x in self.images)
        return [hashlib.blake2b(content, digest_size=16).digest() for content in contents]


def find_unreadable(split: Split) -> list[tuple[int, str]]:
    """Rows of files that are no image or hold 32-bit values, with reasons; reads only headers."""
    failures = []
    for row, file in enumerate(getattr(split.images, "files", ())):
        try:
            read_image(file, check_mode)
        except UserError as error:
            failures.append((row, error.problem))
    return failures


def reasons(failures: Sequence[tuple[int, str]]) -> str:
    """The first five reasons, and how many more there are."""
    more = [f"and {len(failures) - 5:,} more"] if len(failures) > 5 else []
    return "; ".join([*(reason for _, reason in failures[:5]), *more])


def duplicates(keys: Sequence[bytes], labels: Int[np.ndarray, " n"]) -> tuple[int, int]:
    """How many images have an exact copy in the sample, and how many one with another label."""
    groups = defaultdict(list)
    for key, label in zip(keys, labels.tolist(), strict=True):
        groups[key].append(label)
    copied = [group for group in groups.values() if len(group) > 1]
    return sum(map(len, copied)), sum(len(group) for group in copied if len(set(group)) > 1)


def load_cifar10(data_dir: Path, split: str, offline: bool) -> Split:
    """CIFAR-10, 32 x 32 RGB: 50,000 training or 10,000 test images.

    Raises:
        UserError: If it is missing and must not or cannot be downloaded, or a file is corrupt.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    if split not in ("train", "test"):
        raise UserError(f"CIFAR-10 has no split {split!r}", hint="choose --split train or test")
    present = os.path.isdir(data_dir / CIFAR10.base_folder)
    packed = check_integrity(str(data_dir / CIFAR10.filename), CIFAR10.tgz_md5)
    hint = f"put the folder cifar-10-batches-py into {data_dir}, or pass --data-dir with its parent"
    if offline and not (present or packed):
        problem = f"CIFAR-10 is not in {data_dir} and --offline forbids the download"
        raise UserError(problem, hint=hint)
    try:
        dataset = CIFAR10(str(data_dir), train=split == "train", download=not present)
    except RuntimeError as error:  # torchvision's for a wrong checksum or a missing file
        raise UserError(
            f"CIFAR-10 in {data_dir} is incomplete or corrupt: {error}",
            hint="delete the folder cifar-10-batches-py there and run again to download it",
        ) from error
    except OSError as error:
        problem = f"CIFAR-10 could not be downloaded or unpacked: {error}"
        raise UserError(problem, hint=hint) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    labels = np.asarray(dataset.targets, dtype=np.int64)
    return Split("cifar10", split, tuple(dataset.classes), images, labels, np.arange(len(labels)))


def load_digits() -> Split:
    """The 1,797 handwritten digits inside scikit-learn; it has no splits.

    The scans are 8 x 8 with 17 gray levels: values times 255 / 16, enlarged to 32 x 32 by bicubic
    interpolation, the same gray in all three channels.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    gray = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    large = [np.asarray(Image.fromarray(scan).resize((32, 32), Image.BICUBIC)) for scan in gray]
    images = torch.from_numpy(np.stack(large))[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = bunch.target.astype(np.int64)
    classes = tuple(str(name) for name in bunch.target_names)
    return Split("digits", "all", classes, images, labels, np.arange(len(labels)))


def load_folder(folder: Path, split: str, need_classes: bool = True) -> Split:
    """The images below each subfolder, which is a class; both in the order of their names.

    A folder of splits (see `choose_split`) is read at the chosen one. Without `need_classes`, a
    folder with fewer than two classes is read by `load_unlabeled`.

    Raises:
        UserError: If there are no images or too few classes, all names of classes are those of a
            layout, such as images and labels, or the split is missing.
    """
    beside: LeftOut = defaultdict(Counter)
    root = choose_split(folder, split, beside, need_classes)
    left_out = deepcopy(beside)
    classes, found = {}, entries(root, left_out)
    for path in (*found["image"], *found["file"]):
        left_out["file outside the class folders"][path.suffix.lower()] += 1
    for path in found["folder"]:
        if files := find_images(path, left_out, (root.resolve(),)):
            classes[path] = files
        elif path.name not in left_out.get("link to a folder above", ()):
            left_out["folder without images"][path.name] += 1
    if len(classes) < 2 and not need_classes:
        return replace(load_unlabeled(root, beside), split="all" if root == folder else split)
    if len(classes) < 2 or {path.name.lower() for path in classes} <= LAYOUT_NAMES:
        raise no_classes(folder, root, list(classes), left_out)
    result = folder_split(folder, "all" if root == folder else split, classes, left_out)
    return replace(result, notes=(*result.notes, *doubtful_classes(classes)))


def doubtful_classes(classes: dict[Path, list[Path]]) -> tuple[str, ...]:
    """Notes on classes that may be something else, such as splits of other names."""
    # The first folder of each path below the class; nothing for a file right in it.
    inner = [
        {file.relative_to(path).parts[:-1][:1] for file in files} for path, files in classes.items()
    ]
    if len(inner[0]) < 2 or () in inner[0] or any(one != inner[0] for one in inner):
        words = {path.name: SPLIT_WORD.search(path.name) for path in classes}
        named = {name: word[1].lower() for name, word in words.items() if word}
        note = printable(f"taken for classes, though named like splits: {', '.join(named)}")
        return (note,) * (len({*named.values()}) > 1)
    names = ", ".join(name for (name,) in sorted(inner[0])[:3])
    one, *_ = classes
    problem = f"every class has the folders {names}, and their images are mixed"
    return (printable(f"{problem}; if these folders are the classes, give {str(one)!r}"),)


def no_classes(folder: Path, root: Path, classes: Sequence[Path], left_out: LeftOut) -> UserError:
    """The error for a folder whose split in `root` lacks classes, and what would make it usable."""
    names = [path.name for path in classes]
    loose = left_out.get("file outside the class folders", Counter())
    loose_images = sum(loose[suffix] for suffix in image_suffixes())
    found = counted(len(names), "class folder")
    which = f" ({', '.join(names[:3])})" if names else ""
    problem = f"{str(root)!r} has {found} with images{which}, need 2"
    hint = "sort the images into one folder per class, as FOLDER/CLASS/IMAGE"
    wrapper, inner = root, list(classes)
    while len(inner) == 1:
        wrapper, inner = inner[0], entries(inner[0])["folder"]
        inner = [f for f in inner if not f.is_symlink() and find_images(f, defaultdict(Counter))]
    if wrapper != root and len(inner) > 1:
        both = f"{inner[0].name!r} and {inner[1].name!r}"
        hint = f"if {both} are classes or splits, give {str(wrapper)!r}"
    elif {name.lower() for name in names} & LAYOUT_NAMES:
        hint = f"folders of images and labels are not read; {hint}"
    elif loose_images:
        hint = f"{counted(loose_images, 'image')} outside of class folders; {hint}"
    other = ["or choose another --split"] if root != folder else []
    return UserError(problem, hint="; ".join([hint, *other, *left_out_note(left_out)]))


def load_unlabeled(folder: Path, left_out: LeftOut | None = None) -> Split:
    """All images at any depth below a folder, without classes: every label is 0.

    Raises:
        UserError: If there are none.
    """
    left_out = defaultdict(Counter) if left_out is None else left_out
    files = find_images(folder, left_out)
    if not files:
        hint = "".join(left_out_note(left_out)) or "the folder is empty"
        raise UserError(f"{str(folder)!r} has no images", hint=hint)
    return replace(folder_split(folder, "all", {folder: files}, left_out), classes=())


def folder_split(
    folder: Path, split: str, classes: dict[Path, list[Path]], left_out: LeftOut
) -> Split:
    """The split of these files, with its notes."""
    files = tuple(file for found in classes.values() for file in found)
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in classes.values()])
    try:  # whatever the locale says
        names = tuple(os.fsencode(path.name).decode() for path in classes)
    except UnicodeDecodeError as error:
        problem = f"the name of a class folder in {str(folder)!r} is not UTF-8: {error.object!r}"
        raise UserError(problem, hint="rename the folder") from error
    relative = (os.fsencode(file.relative_to(folder).as_posix()) for file in files)
    paths = tuple(path.decode(errors="backslashreplace") for path in relative)
    notes = left_out_note(left_out)
    stems = {path.rpartition(".")[0] for path in paths}
    masks = sum(stem.endswith(e) and stem.removesuffix(e) in stems for stem in stems for e in MASKS)
    if masks:
        found = counted(masks, "file")
        notes += (f"used as images, though named like masks of other images: {found}",)
    indices = np.arange(len(files))
    return Split(str(folder), split, names, FolderImages(files), labels, indices, paths, notes)


def choose_split(folder: Path, split: str, left_out: LeftOut, need_classes: bool) -> Path:
    """The subfolder of a split, or the folder itself where it has no splits.

    A folder has splits if all its subfolders have names of splits, no image lies next to them but
    those of a run, and the same holds inside of one of them, if classes are needed.

    Raises:
        UserError: If it has splits, but not this one, or more than one of that name.
    """
    seen: LeftOut = defaultdict(Counter)
    found = entries(folder, seen)
    folders = found["folder"]
    named = all(path.name.lower() in SPLIT_NAMES for path in folders) and holds_classes(folder)
    chosen = [path for path in folders if path.name.lower() in SPLITS.get(split, (split,))]
    if not (named and (any(map(holds_classes, folders)) if need_classes else chosen)):
        return folder
    if len(chosen) != 1:
        names = ", ".join(path.name for path in folders)
        problem = f"{str(folder)!r} has {counted(len(chosen), 'folder')} for the split {split!r}"
        hint = "choose one of its splits with --split; training reads train"
        hint = "; ".join([hint, *left_out_note(seen)])
        raise UserError(f"{problem}; it has {names}", hint=hint)
    left_out.update(seen)
    for path in (*found["image"], *found["file"]):
        left_out["file outside the splits"][path.suffix.lower()] += 1
    return chosen[0]


def holds_classes(folder: Path) -> bool:
    """Whether a folder has subfolders, and no images next to them but those of a run."""
    found = entries(folder)
    return bool(found["folder"]) and (is_output(folder) or not found["image"])


def is_output(folder: Path) -> bool:
    """Whether a run of the scripts has written its files there."""
    return any(all(os.path.isfile(folder / name) for name in pair) for pair in OUTPUTS)


def entries(folder: Path, left_out: LeftOut | None = None) -> dict[str, list[Path]]:
    """The `folder`s, `image`s and other `file`s in a folder, each kind in the order of names.

    An image is known by its suffix. Hidden and system files and earlier runs are counted in
    `left_out`; the folder that this run writes to is not looked at.
    """
    left_out = defaultdict(Counter) if left_out is None else left_out
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        problem = f"cannot read folder {str(folder)!r}: {error.strerror}"
        raise UserError(problem, hint="check its permissions") from error
    found: dict[str, list[Path]] = {"folder": [], "image": [], "file": []}
    for path in paths:
        holds_files = os.path.isdir(path)
        if path.name == LOCK or (holds_files and os.path.isfile(path / LOCK)):
            continue
        if holds_files and (is_output(path) or (path.name == "hf" and is_output(folder))):
            left_out["file of an earlier run"][path.name] += len(list(path.iterdir()))
        elif path.name.startswith(".") or path.name.lower() in SYSTEM_NAMES:
            inside = sum(len(files) for _, _, files in os.walk(path)) if holds_files else 1
            left_out["file hidden or made by the operating system"][path.name] += inside
        else:
            is_image = path.suffix.lower() in image_suffixes()
            found["folder" if holds_files else "image" if is_image else "file"].append(path)
    return found


def find_images(folder: Path, left_out: LeftOut, above: tuple[Path, ...] = ()) -> list[Path]:
    """The images at any depth in the order of names; other files are counted in `left_out`.

    Links are followed, except those to a folder in which they lie.
    """
    own = folder.resolve()
    if any(one.is_relative_to(own) for one in above):
        left_out["link to a folder above"][folder.name] += 1
        return []
    found = entries(folder, left_out)
    for path in found["file"]:
        left_out["file of another kind"][path.suffix.lower()] += 1
    inside = [find_images(path, left_out, (*above, own)) for path in found["folder"]]
    return sorted(chain(found["image"], *inside))


def left_out_note(left_out: LeftOut) -> tuple[str, ...]:
    """One sentence on what was not used, or nothing."""
    parts = []
    for reason, names in left_out.items():
        most = ", ".join(f"{count:,} {name or 'no suffix'}" for name, count in names.most_common(5))
        noun, which = reason.split(" ", 1)
        rest = ", ..." if len(names) > 5 else ""
        parts.append(f"{counted(names.total(), noun)} {which} ({most}{rest})")
    return (printable(f"not used: {'; '.join(parts)}"),) if parts else ()


DATASETS: dict[str, Callable[[Path, str, bool], Split]] = {
    "cifar10": load_cifar10,
    "digits": lambda *_: load_digits(),
}


def load_split(
    dataset: str, data_dir: Path, split: str, offline: bool, need_classes: bool = True
) -> Split:
    """Load a data set by name, or a folder of images by path; `~` is the home folder.

    A folder may lack classes only without `need_classes`.

    Raises:
        UserError: If the name is unknown and no such folder exists, or loading fails.
    """
    if dataset in DATASETS:
        found = DATASETS[dataset](home_path(data_dir), split, offline)
        if len([*Path(dataset).glob("*/")]) > 1:
            note = f"the folder {dataset} is not used: --dataset ./{dataset} reads it"
            found = replace(found, notes=(*found.notes, note))
        return found
    folder = home_path(dataset)
    if os.path.isdir(folder):
        return load_folder(folder, split, need_classes)
    hint = f"choose from {', '.join(DATASETS)}, or give a folder with one subfolder per class"
    if os.path.isfile(folder):
        raise UserError(f"{dataset!r} is a file", hint=f"unpack it; {hint}")
    unknown = "" if len(Path(dataset).parts) > 1 else "unknown data set, and "
    raise UserError(f"{unknown}no such folder: {dataset!r}", hint=hint)


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
    priority = np.argsort(rng.permutation(len(np.bincount(labels, minlength=num_classes))))
    rank = np.empty(len(labels), np.int64)  # of each image in its class
    for label in range(len(priority)):
        members = rng.permutation(np.flatnonzero(labels == label))
        rank[members] = np.arange(len(members))
    # The first image of every class, classes in the order drawn, then the second ones, and so on.
    return np.sort(np.lexsort((priority[labels], rank))[:max_samples])


def balanced_sample(split: Split, max_samples: int, seed: int) -> Split:
    """At most `max_samples` images as of `balanced_rows`; 0 keeps every image."""
    if max_samples == 0 or max_samples >= len(split):
        return split
    return split.take(balanced_rows(split.labels, len(split.classes), max_samples, seed))
