"""All images of a page in one picture, so that a file with thousands of them stays small."""

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

TILE = 32
"""Side of an image in the sheet, in pixels."""
COLUMNS = 64
# CIFAR-10 takes 430 bytes an image at this quality (lossless 1,700) and shows no artefacts.
QUALITY = 90


def thumbnail(image: UInt8[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "side side 3"]:
    """The image in a square tile: enlarged by whole factors or shrunk, centred on grey."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    longest = max(picture.size)
    if longest <= TILE:
        picture = picture.resize(
            [side * (TILE // longest) for side in picture.size], Image.Resampling.NEAREST
        )
    else:
        picture = picture.resize(
            [max(1, round(side * TILE / longest)) for side in picture.size],
            Image.Resampling.LANCZOS,
        )
    tile = Image.new("RGB", (TILE, TILE), (128, 128, 128))
    tile.paste(picture, tuple((TILE - side) // 2 for side in picture.size))
    return np.asarray(tile)


def sprite_sheet(
    rows: Sequence[int], image_of: Callable[[int], UInt8[np.ndarray, "3 h w"]]
) -> UInt8[np.ndarray, "height width 3"]:
    """Thumbnails of these images, `COLUMNS` in a line, in order."""
    lines = -(-len(rows) // COLUMNS)
    sheet = np.zeros((lines * TILE, COLUMNS * TILE, 3), dtype=np.uint8)
    for position, row in enumerate(rows):
        top, left = (TILE * part for part in divmod(position, COLUMNS))
        sheet[top : top + TILE, left : left + TILE] = thumbnail(image_of(row))
    return sheet


def data_uri(sheet: UInt8[np.ndarray, "height width 3"]) -> str:
    """The sheet as a WebP picture inside an address."""
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, format="WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
