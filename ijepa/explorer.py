"""What the maps and the neighbour browser know of each image: numbers as JSON, and its picture."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ijepa.comparison import Analysis, Comparison
from ijepa.data import Split
from ijepa.plots import MODEL_NAMES, class_styles, similarity_digits
from ijepa.projections import Maps, TsneProjection, align
from ijepa.uncertainty import MUTUAL_K

GRID = 10_000
"""Steps of a coordinate on the maps: finer than a pixel on any screen."""
TILE = 32
"""Side of an image in the sheet, in pixels."""
COLUMNS = 64
# CIFAR-10 takes 430 bytes an image at this quality (lossless 1,700) and shows no artefacts.
QUALITY = 90


def explorable(comparison: Comparison, maps: Maps, split: Split) -> dict[str, Any]:
    """What the scripts need to know of each image on the maps.

    A neighbour is given by its position among `index`; positions from the number of points on are
    images that lie on no map and have no picture.
    """
    rows, analyses = maps.rows, comparison.analyses
    listed = {name: a.neighbors[rows, :5] for name, a in analyses.items()}
    beyond = np.setdiff1d(np.concatenate([found.ravel() for found in listed.values()]), rows)
    order = np.concatenate([rows, beyond])
    position = np.zeros(len(split), dtype=np.int64)
    position[order] = np.arange(len(order))
    styles = class_styles(split.classes)
    first = next(iter(maps.tsne.values())).coordinates
    models = []
    for name, analysis in analyses.items():
        tsne, pca = maps.tsne[name], maps.pca[name]
        shares = [*pca.variance_shares[:2], 0.0]
        similarities = analysis.similarities[rows, :5]
        digits = similarity_digits(similarities)
        models.append(
            {
                "key": name,
                "name": MODEL_NAMES[name],
                "hits": hits(analysis, rows),
                "neighbors": position[listed[name]].tolist(),
                # In single precision each would be written with seventeen digits.
                "similarities": similarities.astype(np.float64).round(digits).tolist(),
                "digits": digits,
                "tsne": on_grid(align(first, tsne.coordinates)),
                "pca": on_grid(pca.scores[rows, :2]),
                "notes": {"tsne": tsne_note(tsne), "pca": pca_note(shares)},
            }
        )
    mutual = comparison.mutual
    return {
        "classes": [" ".join(name.split()) for name in split.classes],
        "colors": [color for color, _ in styles],
        "markers": [sign for _, sign in styles],
        "index": split.indices[order].tolist(),
        "label": split.labels[order].tolist(),
        "points": len(rows),
        "models": models,
        "mutual": None if mutual is None else np.rint(mutual[rows] * MUTUAL_K).astype(int).tolist(),
        "sprite": {"tile": TILE, "columns": COLUMNS},
    }


def hits(analysis: Analysis, rows: Int[np.ndarray, " m"]) -> list[int] | None:
    """How many of the five nearest share the class of each image; None where there are no five."""
    precision = analysis.precisions(5)[rows]
    return np.rint(5 * precision).astype(int).tolist() if np.isfinite(precision).all() else None


def on_grid(points: Float[np.ndarray, "m 2"]) -> list[list[int]]:
    """Points in a square of `GRID` steps, their shape kept, y downwards."""
    low, high = points.min(axis=0), points.max(axis=0)
    side = max(float((high - low).max()), np.finfo(np.float64).tiny)
    unit = (points - (low + high) / 2) / side * (1, -1) + 0.5
    return np.rint(GRID * unit).astype(int).tolist()


def tsne_note(tsne: TsneProjection) -> str:
    """How far a map can be believed."""
    if not np.isfinite(tsne.kl_divergence):
        return "no t-SNE of so few images: principal components"
    return f"KL {tsne.kl_divergence:.2f}, keeps {tsne.kept_neighbors:.0%} of the 10 nearest"


def pca_note(shares: Sequence[float]) -> str:
    """What the two axes hold."""
    return f"across: PC1 ({shares[0]:.1%}), up: PC2 ({shares[1]:.1%})"


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
