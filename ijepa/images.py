"""Image files: what Pillow decodes, as uint8 tensors of RGB pixels."""

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from ijepa.errors import UserError

COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")
"""A file may hold any of these whatever its suffix; other formats only below their own suffix."""
REFUSED_FORMATS = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FLI")
"""Documents that Pillow gives to other programs, data that it only recognizes, and video."""
# What Pillow's decoders raise on damaged files.
BAD_IMAGES = (OSError, SyntaxError, ValueError, RuntimeError, AssertionError, LookupError)
BAD_IMAGES += (struct.error, Image.DecompressionBombError)


def has_damaged_exif(image: Image.Image) -> bool:
    """Whether nothing can be known of the image's orientation."""
    if image.format == "PNG":
        image.load()  # the block may follow the pixels, whose errors are others
    raw = image.info.get("exif")
    try:  # anew: on opening a JPEG Pillow may have hidden an error
        Image.Exif().load(raw) if raw else image.getexif()
    except (SyntaxError, ValueError, LookupError, struct.error):
        return True
    return False


DOUBTS: dict[str, Callable[[Image.Image], bool]] = {
    "several frames, of which one is used": lambda image: (
        image.format != "MPO" and getattr(image, "is_animated", False)
    ),
    "transparent, so shown on white": lambda image: (
        image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
    ),
    "16-bit gray without a value above 4,095, like 12-bit data, is read as 16 of 256 levels": (
        lambda image: image.mode.startswith("I") and bool(np.asarray(image).max() < 4096)
    ),
    "damaged EXIF, so perhaps not upright": has_damaged_exif,
}
"""What a reader may not expect, and whether it holds for a file."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class FolderImages:
    """Image files; indexing decodes one to RGB with `read_image`, which raises UserError."""

    files: tuple[Path, ...]

    @cached_property
    def keys(self) -> list[bytes]:
        """As `Split.image_keys`, of what the files held when this was first asked for."""
        found = []
        for file in self.files:
            try:
                found.append(blake2b(file.read_bytes(), digest_size=16).digest())
            except OSError as error:
                hint = "it could be read when the run began: leave the files alone, and run again"
                problem = f"cannot read {str(file)!r}: {error.strerror}"
                raise UserError(problem, hint=hint) from error
        return found

    def sizes(self) -> Int[np.ndarray, " n"]:
        """The bytes of each file; -1 of what cannot be read."""
        readable = [os.path.isfile(file) and os.access(file, os.R_OK) for file in self.files]
        found = zip(self.files, readable, strict=True)
        return np.array([file.stat().st_size if ok else -1 for file, ok in found], int)

    def __getitem__(self, row: int) -> UInt8[Tensor, "3 h w"]:
        return read_image(self.files[row])


def check_mode(image: Image.Image) -> None:
    """Raise ValueError for 32-bit and signed values, whose white is not defined."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"32-bit or signed values (mode {image.mode}); convert to 8 or 16 bits")


def to_rgb(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """Decoded pixels, upright by their EXIF orientation; transparency becomes white.

    Of 16-bit gray values the upper byte is kept, of several frames or pages the first.
    """
    check_mode(image)
    if not has_damaged_exif(image):
        exif = image.getexif()
        for tag in exif.keys() - {ExifTags.Base.Orientation}:  # odd ones could not be written again
            del exif[tag]
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
        high = (np.asarray(image) >> 8).astype(np.uint8)
        # A TIFF file may count from white to black, as X-rays do; Pillow turns only 8 bits.
        kind = getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        image = Image.fromarray(255 - high if kind == 0 else high)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_image(file: Path, use: Callable[[Image.Image], Result] = to_rgb) -> Result:
    """The pixels of an image file, or what another function makes of it once its header is read.

    Decoding takes up to 10 bytes per pixel, so at most 1.8 GB: Pillow refuses images above 179
    million pixels, twice Image.MAX_IMAGE_PIXELS. Above half of that it warns.

    Raises:
        UserError: If the file is no readable image, or `use` raises ValueError.
    """
    formats = (image_suffixes().get(file.suffix.lower(), "PNG"), *COMMON_FORMATS)
    try:
        if not file.is_file():  # a pipe would never end
            raise ValueError("no such file")
        try:
            with Image.open(file, formats=formats) as image:
                return use(image)
        except ValueError:  # among them Pillow's limit for texts and color profiles of PNG
            content = file.read_bytes()
            if not content.startswith(b"\x89PNG"):
                raise
            with Image.open(BytesIO(without_texts(content)), formats=("PNG",)) as image:
                return use(image)
    except BAD_IMAGES as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image, or damaged" if unknown else str(error) or repr(error)
        raise UserError(f"{reason}: {str(file)!r}", hint="replace or remove that file") from error


def doubtful_pixels(files: Sequence[Path], looked_at: int = 32) -> tuple[str, ...]:
    """Notes on files that may not mean what they are read as, found in evenly chosen ones."""
    seen = []
    for file in files[:: -(-len(files) // looked_at) or 1]:
        with suppress(UserError):  # reported where every image is read
            seen.append(read_image(file, lambda image: [holds(image) for holds in DOUBTS.values()]))
    counts = zip(DOUBTS, map(sum, zip(*seen, strict=True)), strict=False)
    return tuple(f"{what}: {n} of {len(seen)} files checked" for what, n in counts if n)


def without_texts(png: bytes) -> bytes:
    """A PNG file without its compressed texts and color profile, which do not change pixels."""
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] not in (b"iCCP", b"zTXt", b"iTXt"):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


@cache
def image_suffixes() -> dict[str, str]:
    """The format of each suffix that is taken for an image's."""
    Image.init()
    known = {s: "JPEG" if f == "MPO" else f for s, f in Image.registered_extensions().items()}
    return {s: f for s, f in known.items() if f in Image.OPEN and f not in REFUSED_FORMATS}


def shrink(image: UInt8[Tensor, "3 h w"], side: int) -> UInt8[np.ndarray, "3 H W"]:
    """The image as an array for display, neither side above `side`; a small one unchanged."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(picture).transpose(2, 0, 1)
