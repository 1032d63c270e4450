"""Pure functions from the embeddings of one model to the numbers that describe them.

Every function takes arrays and returns a number or one number per image; shares and precisions are
fractions in [0, 1]. Statistics run in float64 on float32 embeddings, because sums of thousands of
float32 products lose about three digits. Embeddings may be mapped from a file larger than memory:
only blocks of rows and tiles of pairs are ever copied.

Dimension key: n images, d width of an embedding, k neighbours of an image, C classes,
b subsets of the images, t images of one tile.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ijepa.errors import UserError

# Numbers in what is computed at once, a block of rows or the keys of a tile: about 200 MB at most.
TILE_ENTRIES = 2**23

Rows = slice | Int[np.ndarray, " t"]


def row_blocks(n: int, d: int) -> Iterator[slice]:
    """Slices that cover n rows of d numbers, each small enough for float64 copies of its rows."""
    step = max(1, TILE_ENTRIES // d)
    return (slice(at, min(at + step, n)) for at in range(0, n, step))


def validate_embeddings(X: Float[np.ndarray, "n d"], name: str) -> None:
    """Refuse embeddings that no metric is defined on.

    Raises:
        UserError: A row holds NaN or infinity, or is zero and so has no direction.
    """
    broken: dict[str, list[Bool[np.ndarray, " t"]]] = {"NaN or infinity": [], "only zeros": []}
    for rows in row_blocks(*X.shape):
        broken["NaN or infinity"].append(~np.isfinite(X[rows]).all(axis=1))
        broken["only zeros"].append(~X[rows].any(axis=1))
    for fault, blocks in broken.items():
        found = np.concatenate(blocks)
        if found.any():
            problem = f"the {name} model gives {fault} for image {found.argmax()}"
            hint = f"check the weights and preprocessing of the {name} model, or use float32"
            raise UserError(f"{problem} ({found.sum()} of {len(X)} images)", hint=hint)


def class_means(
    X: Float[np.ndarray, "n d"], codes: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "C d"]:
    """Float64 mean embedding of each class, numbered from 0."""
    # Float64 sums of equal float32 values are exact: so is the mean of a constant column.
    sums = np.zeros((codes.max() + 1, X.shape[1]))
    for rows in row_blocks(*X.shape):
        order = np.argsort(codes[rows], kind="stable")
        present, starts = np.unique(codes[rows][order], return_index=True)
        for code, part in zip(present, np.split(X[rows][order], starts[1:]), strict=True):
            sums[code] += part.astype(np.float64).sum(axis=0)
    return sums / np.bincount(codes)[:, None]


@dataclass(frozen=True)
class Residuals:
    """Embeddings less the mean of their class, in float64, made anew of the rows asked for."""

    X: Float[np.ndarray, "n d"]
    means: Float[np.ndarray, "C d"]
    codes: Int[np.ndarray, " n"]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return self.X.shape

    def __getitem__(self, rows: Rows) -> Float[np.ndarray, "t d"]:
        return self.X[rows] - self.means[self.codes[rows]]


def residuals(
    X: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"] | None = None
) -> Residuals:
    """Embeddings with zero column means, with labels also in each class."""
    codes = np.zeros(len(X), np.int64)
    if labels is not None:
        codes = np.unique(labels, return_inverse=True)[1]
    return Residuals(X, class_means(X, codes), codes)


def cross_product(
    X: Float[np.ndarray, "n d"] | Residuals, Y: Float[np.ndarray, "n e"] | Residuals
) -> Float[np.ndarray, "d e"]:
    """X^T Y in float64."""
    total = np.zeros((X.shape[1], Y.shape[1]))
    for rows in row_blocks(X.shape[0], max(total.shape)):
        x = X[rows].astype(np.float64, copy=False)
        y = x if Y is X else Y[rows].astype(np.float64, copy=False)
        total += x.T @ y
    return total


def gram(X: Float[np.ndarray, "n d"] | Residuals) -> Float[np.ndarray, "m m"]:
    """The smaller one of X^T X and X X^T in float64."""
    n, d = X.shape
    if d <= n:
        return cross_product(X, X)
    rows = X[:].astype(np.float64, copy=False)
    return rows @ rows.T


def row_norms(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Float64 lengths of the embeddings."""
    blocks = row_blocks(*X.shape)
    return np.concatenate([np.linalg.norm(X[rows].astype(np.float64), axis=1) for rows in blocks])


def unit_rows(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Float64 copy of the embeddings with rows of length 1."""
    return X / row_norms(X)[:, None]


def gram_eigenvalues(gram: Float[np.ndarray, "m m"], n: int) -> Float[np.ndarray, " m"]:
    """Eigenvalues of X^T X or X X^T, descending; those below the rounding error are exactly 0.

    An entropy would count the rounding errors as dimensions. n is the longer side of X.
    """
    values = np.linalg.eigvalsh(gram)[::-1]
    floor = values[0] * max(n, len(gram)) * np.finfo(np.float64).eps
    return np.where(values > floor, values, 0.0)


def covariance_spectrum(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " rank"]:
    """Eigenvalues of the covariance of the embeddings: min(n, d) of them, descending, >= 0.

    Columns are centred and not standardised. The divisor is n - 1.

    Raises:
        ValueError: Fewer than two images.
    """
    if len(X) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(X)}")
    return gram_eigenvalues(gram(residuals(X)), max(X.shape)) / (len(X) - 1)


def explained_variance(eigenvalues: Float[np.ndarray, " rank"], k: int) -> float:
    """Share of the total variance along the first k principal components, in [0, 1].

    A shape and not a quality: few strong directions raise it, useful or not. It is 1 for k beyond
    the number of components, and NaN where nothing varies.
    """
    total = eigenvalues.sum()
    return float(eigenvalues[:k].sum() / total) if total > 0 else float("nan")


def num_components(eigenvalues: Float[np.ndarray, " rank"], share: float) -> int:
    """Smallest number of principal components that explain at least this share of the variance.

    Where nothing varies it is 0.
    """
    cumulative = np.cumsum(eigenvalues)
    # Rounding of the sum must not ask for a component more; 1e-12 is far below what is shown.
    reached = cumulative >= (share - 1e-12) * cumulative[-1]
    return int(np.argmax(reached)) + 1 if cumulative[-1] > 0 else 0


def participation_ratio(eigenvalues: Float[np.ndarray, " rank"], n: int) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of a covariance from n images, at least 1.

    A finite sample spreads its eigenvalues, which lowers the plain ratio; 1/n is therefore taken
    from its inverse. At most n - 1 eigenvalues differ from zero, so that the result is positive.
    It is NaN where nothing varies.
    """
    total = eigenvalues.sum()
    if total == 0:
        return float("nan")
    return float(1.0 / (np.square(eigenvalues / total).sum() - 1.0 / n))


def effective_rank(X: Float[np.ndarray, "n d"], centered: bool = True) -> float:
    """Effective number of dimensions, exp of the entropy of p = singular values / their sum.

    In [1, min(n, d)]; NaN where nothing varies. RankMe, Garrido et al. 2023,
    https://arxiv.org/abs/2210.02885, without the paper's epsilon, which adds 9 % at 1280 columns.
    The paper does not centre; a common offset then hides all other directions.
    """
    squares = gram(residuals(X) if centered else X)
    return effective_rank_of_spectrum(gram_eigenvalues(squares, max(X.shape)))


def effective_rank_of_spectrum(squares: Float[np.ndarray, " rank"]) -> float:
    """`effective_rank` from the squared singular values, or from a covariance's eigenvalues."""
    positive = np.sqrt(squares[squares > 0])
    if positive.size == 0:
        return float("nan")
    p = positive / positive.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def nearest_neighbors(
    X: Float[np.ndarray, "n d"], k: int, device: str = "cpu"
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Indices and cosine similarities (float32) of the k most similar other images, best first.

    An image is never its own neighbour. Ties go to the smaller index. Equal embeddings are tied
    exactly, and permuting the images permutes the result up to such ties. Any device but "cpu" is
    PyTorch's of that name: the last bit of a similarity may be another there.

    Raises:
        ValueError: k exceeds the number of other images.
    """
    n = len(X)
    if not 1 <= k <= n - 1:
        raise ValueError(f"k must be from 1 to the {n - 1} other images, got {k}")
    norms = row_norms(X)

    def unit(rows: Rows) -> Float[np.ndarray, "t d"]:
        # Adding 0 removes -0.
        return (X[rows] / norms[rows, None]).astype(np.float32, order="C") + np.float32(0)

    # The last bit of a matrix product depends on the position in the matrix. Products of distinct
    # rows in a fixed order make it a function of the embeddings alone.
    names = _row_names(unit, X.shape)
    _, first, group = np.unique(names, return_index=True, return_inverse=True)
    # One more than asked for: the image itself is among them and leaves at the end.
    keys = _search_on(device)(lambda rows: unit(first[rows]), first, k + 1)
    if len(first) < n:
        keys = _with_duplicates(keys, group, k + 1)
    neighbors, similarities = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    for rows in row_blocks(n, k + 1):
        lists = keys[group[rows]]
        images = _positions(lists)
        own = images == np.arange(n)[rows, None]
        own[:, -1] |= ~own.any(axis=1)
        neighbors[rows] = images[~own].reshape(-1, k)
        similarities[rows] = _similarities(lists)[~own].reshape(-1, k)
    return neighbors, similarities


def _row_names(
    make: Callable[[Rows], Float[np.ndarray, "t d"]], shape: tuple[int, int]
) -> Shaped[np.ndarray, " n"]:
    """Equal for equal rows alone and ordered for others: first numbers, then 128 bits of a hash."""
    lines = (line for rows in row_blocks(*shape) for line in make(rows))
    names = [line[:4].tobytes() + hashlib.blake2b(line, digest_size=16).digest() for line in lines]
    return np.frombuffer(b"".join(names), f"V{len(names[0])}")


def _search_on(device: str) -> Callable[..., Int[np.ndarray, "t m"]]:
    """The search for a processor or for a GPU."""
    if device == "cpu":
        return _search
    from ijepa.gpu_pairs import largest_keys

    return partial(largest_keys, device=device)


def _search(
    make: Callable[[Rows], Float[np.ndarray, "t d"]], positions: Int[np.ndarray, " t"], k: int
) -> Int[np.ndarray, "t m"]:
    """Keys of the k largest products (or all, if fewer) of each row with all rows, best first."""
    n = len(positions)
    best = np.full((n, min(k, n)), _NOTHING)
    for rows, left, columns, right in _tile_pairs(make, n, math.isqrt(TILE_ENTRIES // 2)):
        tile = left @ right.T
        best[rows] = _merge(best[rows], tile, positions[columns])
        if rows != columns:  # every product serves both of its images
            best[columns] = _merge(best[columns], tile.T, positions[rows])
    return best[:, ::-1]


def _tile_pairs(
    make: Callable[[Rows], Float[np.ndarray, "t d"]], n: int, side: int
) -> Iterator[tuple[slice, Float[np.ndarray, "t d"], slice, Float[np.ndarray, "u d"]]]:
    """Square tiles that cover a symmetric n x n matrix on and above its diagonal.

    Each comes as the positions and the rows that it multiplies, of both sides.
    """
    tiles = [slice(at, min(at + side, n)) for at in range(0, n, max(side, 1))]
    for row, rows in enumerate(tiles):
        left = make(rows)
        yield rows, left, rows, left
        yield from ((rows, left, columns, make(columns)) for columns in tiles[row + 1 :])


def _merge(
    best: Int[np.ndarray, "t m"], tile: Float[np.ndarray, "t u"], positions: Int[np.ndarray, " u"]
) -> Int[np.ndarray, "t m"]:
    """The largest keys, ascending, of those found so far and those of a tile of similarities."""
    worst = best[:, 0]
    if worst[0] == _NOTHING:
        found = _keys(tile, positions)
    else:
        # Only what reaches the worst one so far can enter, and after a few tiles that is little.
        rows, columns = _where(tile >= _similarities(worst)[:, None])
        found = _padded(_keys(tile[rows, columns], positions[columns]), rows, len(tile))
    return np.sort(np.concatenate([best, found], axis=1), axis=1)[:, -best.shape[1] :]


def _where(mask: Bool[np.ndarray, "t u"]) -> tuple[Int[np.ndarray, " f"], Int[np.ndarray, " f"]]:
    """Rows and columns that are True, in order of rows; `np.nonzero` is five times slower."""
    if mask.flags.c_contiguous:
        rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
        return rows, columns
    columns, rows = np.divmod(np.flatnonzero(mask.T), mask.shape[0])
    order = np.argsort(rows, kind="stable")
    return rows[order], columns[order]


# A similarity and a position in one integer, ordered by (similarity, -position): the float's bits
# in numeric order above, the position counted backwards below. Sorting by value alone would order
# ties at random.
_NOTHING = np.iinfo(np.int64).min
_LAST = 2**32 - 1


def _keys(
    similarities: Float[np.ndarray, "*shape"], positions: Int[np.ndarray, "*#shape"]
) -> Int[np.ndarray, "*shape"]:
    """Keys of float32 similarities to the images at these positions."""
    bits = _ordered_bits(similarities.view(np.int32)).astype(np.int64) << 32
    bits |= _LAST - positions
    return bits


def _similarities(keys: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Float32 similarities of keys."""
    return _ordered_bits((keys >> 32).astype(np.int32)).view(np.float32)


def _positions(keys: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Positions of the images of keys."""
    return _LAST - (keys & _LAST)


def _ordered_bits(bits: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Map float32 bit patterns to integers of the same order; the map is its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _padded(
    keys: Int[np.ndarray, " f"], rows: Int[np.ndarray, " f"], num_rows: int
) -> Int[np.ndarray, "t w"]:
    """Keys in one line per row, given in order of rows; the rest of each line is `_NOTHING`."""
    counts = np.bincount(rows, minlength=num_rows)
    lines = np.full((num_rows, counts.max(initial=0)), _NOTHING)
    lines[rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]] = keys
    return lines


def _with_duplicates(
    keys: Int[np.ndarray, "t m"], group: Int[np.ndarray, " n"], k: int
) -> Int[np.ndarray, "t k"]:
    """From the best groups of equal images to the k best images; keys name a group's first image.

    Equal images are equally similar to anything: k images of a group are always enough.
    """
    members, sizes = np.argsort(group, kind="stable"), np.bincount(group)
    starts, sizes = np.cumsum(sizes) - sizes, np.minimum(sizes, k)
    result = np.empty((len(keys), k), np.int64)
    step = max(1, TILE_ENTRIES // (k * keys.shape[1]))
    for at in range(0, len(keys), step):
        part = keys[at : at + step]
        groups = group[_positions(part)].ravel()
        repeats = sizes[groups]
        ends = np.cumsum(repeats)
        nth = np.arange(ends[-1]) - np.repeat(ends - repeats, repeats)
        images = members[np.repeat(starts[groups], repeats) + nth]
        rows = np.repeat(np.arange(len(part)).repeat(part.shape[1]), repeats)
        similarities = np.repeat(_similarities(part).ravel(), repeats)
        lines = np.sort(_padded(_keys(similarities, images), rows, len(part)), axis=1)
        result[at : at + step] = lines[:, : -k - 1 : -1]
    return result


def precision_at_k(
    neighbors: Int[np.ndarray, "n m"], labels: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    """Share of each image's first k neighbours that have its label, in [0, 1]; higher is better.

    The mean over images is the metric. It depends on n: a smaller gallery lowers it.

    Raises:
        ValueError: k exceeds the number of neighbours given.
    """
    if k > neighbors.shape[1]:
        raise ValueError(f"k must be at most the {neighbors.shape[1]} neighbours, got {k}")
    return (labels[neighbors[:, :k]] == labels[:, None]).mean(axis=1)


def chance_precision(labels: Int[np.ndarray, " n"]) -> float:
    """Expected precision of random neighbours, (n_c - 1) / (n - 1) averaged over images."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1.0)).sum() / (len(labels) * (len(labels) - 1.0)))


def knn_correct(
    neighbors: Int[np.ndarray, "n m"],
    similarities: Float[np.ndarray, "n m"],
    labels: Int[np.ndarray, " n"],
    k: int = 20,
    temperature: float = 0.07,
) -> Bool[np.ndarray, " n"]:
    """Whether the k neighbours of each image, left out itself, vote for its label.

    The mean is the kNN accuracy. A neighbour's vote weighs exp(similarity / temperature): the rule
    of DINO's evaluation (Caron et al. 2021, https://arxiv.org/abs/2104.14294). Other rules go by
    the same name, with weights softmax(s / T) or 1 / distance. Ties go to the lowest label.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    winners = []
    for rows in row_blocks(len(neighbors), max(len(classes), k)):
        # exp(s - 1) changes no order and cannot overflow at small temperatures.
        weights = np.exp((similarities[rows, :k].astype(np.float64) - 1.0) / temperature)
        votes = np.zeros((len(weights), len(classes)))
        for rank in range(k):
            votes[np.arange(len(votes)), codes[neighbors[rows, rank]]] += weights[:, rank]
        winners.append(votes.argmax(axis=1))
    return classes[np.concatenate(winners)] == labels


@dataclass(frozen=True)
class Hubness:
    """How unevenly images serve as neighbours: statistics of the number of lists each is in."""

    skew: float  # 0 for even counts, NaN if all are equal
    maximum: int
    anti_hub_share: float  # images in no list, in [0, 1]


def hubness(neighbors: Int[np.ndarray, "n m"], k: int = 10) -> Hubness:
    """Skew, maximum and anti-hubs of the k-occurrence counts.

    Radovanović et al. 2010, "Hubs in Space", Journal of Machine Learning Research 11.
    """
    counts = np.bincount(neighbors[:, :k].ravel(), minlength=len(neighbors))
    deviations = counts - counts.mean()
    variance = np.square(deviations).mean()
    skew = (deviations**3).mean() / variance**1.5 if variance > 0 else float("nan")
    return Hubness(float(skew), int(counts.max()), float((counts == 0).mean()))


def silhouette_samples(
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    metric: str = "euclidean",
    device: str = "cpu",
) -> Float[np.ndarray, " n"]:
    """Silhouette of each image in its own class, in [-1, 1]; higher is better.

    As `silhouette_of_subsets` for the one subset of all images.
    """
    codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    # The sums that let each distance serve both images are one for each class and image: 0.5 GB.
    many = len(counts) * len(X) > 8 * TILE_ENTRIES
    if metric != "euclidean" or len(counts) < 2 or many or device != "cpu":
        return silhouette_of_subsets(X, labels, np.ones((1, len(X)), bool), metric, device)[0]
    order = np.argsort(codes, kind="stable")
    sums, codes = _sum_distances(X, codes, order), codes[order]
    scores = np.empty(len(X))
    for rows in row_blocks(len(X), len(counts)):
        part = _silhouette(sums[:, rows, None], counts[:, None], codes[rows])
        scores[order[rows]] = part[:, 0]
    return scores


def _distance_side() -> int:
    """Side of a tile of distances that stays in the processor's cache through all its steps."""
    return math.isqrt(TILE_ENTRIES // 8)


def _rows_at_once(device: str) -> int:
    """Rows whose distances are asked for together."""
    if device == "cpu":
        return _distance_side()
    from ijepa.gpu_pairs import SIDE

    return SIDE


def _center(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    """The float64 median of a hundred rows: one huge row would draw a mean away from all others."""
    return np.median(X[:: max(1, len(X) // 100)].astype(np.float64), axis=0)


def _shifted(X: Float[np.ndarray, "n d"]) -> Callable[[Rows], Float[np.ndarray, "t d"]]:
    """Float64 copies of rows, so shifted that few digits are lost in differences of squares."""
    center = _center(X)
    return lambda rows: X[rows] - center


def _squares(
    points: Callable[[Rows], Float[np.ndarray, "t d"]], shape: tuple[int, int]
) -> Float[np.ndarray, " n"]:
    """Squares of the lengths of all rows."""
    return np.concatenate([np.square(points(rows)).sum(axis=1) for rows in row_blocks(*shape)])


def _distances(
    left: Float[np.ndarray, "t d"],
    right: Float[np.ndarray, "u d"],
    left_squares: Float[np.ndarray, " t"],
    right_squares: Float[np.ndarray, " u"],
) -> Float[np.ndarray, "t u"]:
    """Euclidean distances from rows and the squares of their lengths."""
    distances = (-2.0 * left) @ right.T
    distances += right_squares
    distances += left_squares[:, None]
    return np.sqrt(np.maximum(distances, 0.0, out=distances), out=distances)


def _sum_distances(
    X: Float[np.ndarray, "n d"], codes: Int[np.ndarray, " n"], order: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "C n"]:
    """Sums of each image's Euclidean distances to the images of each class, which order sorts."""
    codes, points = codes[order], _shifted(X)
    squares = _squares(points, X.shape)[order]
    sums = np.zeros((codes[-1] + 1, len(X)))
    side = _distance_side()
    for rows, left, columns, right in _tile_pairs(lambda t: points(order[t]), len(X), side):
        distances = _distances(left, right, squares[rows], squares[columns])
        if rows == columns:
            np.fill_diagonal(distances, 0.0)
        else:  # every distance serves both of its images
            classes, starts = np.unique(codes[rows], return_index=True)
            # np.add.reduceat is forty times slower than this along the first axis.
            parts = np.split(distances, starts[1:])
            sums[classes, columns] += np.stack([part.sum(axis=0) for part in parts])
        classes, starts = np.unique(codes[columns], return_index=True)
        sums[classes, rows] += np.add.reduceat(distances, starts, axis=1).T
    return sums


def silhouette_of_subsets(
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
    metric: str = "euclidean",
    device: str = "cpu",
) -> Float[np.ndarray, "b n"]:
    """Silhouette of each kept image among the kept images alone; NaN for the others.

    (b - a) / max(a, b), with a the mean distance to the rest of the own class and b the smallest
    mean distance to another class; 0 in a class of one image and where both distances are 0.
    Rousseeuw 1987, https://doi.org/10.1016/0377-0427(87)90125-7. The metric is "euclidean", or
    "cosine" for 1 - cosine similarity. The device is where Euclidean distances are computed, as in
    `nearest_neighbors`.

    Raises:
        ValueError: The metric is unknown or a subset holds fewer than two classes.
    """
    scores = np.full(keep.shape, np.nan)
    for subsets, rows, tile in _silhouette_tiles(X, labels, keep, metric, device):
        scores[subsets, rows] = np.where(keep[subsets, rows], tile.T, np.nan)
    return scores


def mean_silhouettes(
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
    metric: str = "euclidean",
    device: str = "cpu",
) -> Float[np.ndarray, " b"]:
    """Mean over the kept images of `silhouette_of_subsets`, without a number for each of them."""
    sums = np.zeros(len(keep))
    for subsets, rows, tile in _silhouette_tiles(X, labels, keep, metric, device):
        sums[subsets] += (tile.T * keep[subsets, rows]).sum(axis=1)
    return sums / keep.sum(axis=1)


def _silhouette_tiles(
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
    metric: str,
    device: str,
) -> Iterator[tuple[slice, slice, Float[np.ndarray, "t b"]]]:
    """Yield some subsets, some rows, and the silhouettes of these rows in these subsets."""
    euclidean = partial(_euclidean_class_sums, device=device)
    class_sums = {"euclidean": euclidean, "cosine": _cosine_class_sums}
    if metric not in class_sums:
        raise ValueError(f"unknown metric {metric!r}; choose from: {', '.join(class_sums)}")
    codes = np.unique(labels, return_inverse=True)[1]
    counts = np.stack([keep[:, codes == code].sum(axis=1) for code in range(codes.max() + 1)])
    if ((counts > 0).sum(axis=0) < 2).any():
        raise ValueError("a silhouette needs at least 2 classes in every subset, got 1")
    side, at_once = _rows_at_once(device), len(keep)
    if metric == "cosine":  # there is a vector for each class and subset
        at_once = max(1, TILE_ENTRIES // (len(counts) * X.shape[1]))
    for at in range(0, len(keep), at_once):
        subsets = slice(at, at + at_once)
        sums_of = class_sums[metric](X, codes, keep[subsets])
        for start in range(0, len(X), side):
            rows = slice(start, start + side)
            yield subsets, rows, _silhouette(sums_of(rows), counts[:, subsets], codes[rows])


def _silhouette(
    class_sums: Iterable[Float[np.ndarray, "t b"]],
    counts: Int[np.ndarray, "C b"],
    codes: Int[np.ndarray, " t"],
) -> Float[np.ndarray, "t b"]:
    """Silhouettes from the sums of an image's distances to the kept images, class by class."""
    inside = np.zeros((len(codes), counts.shape[1]))
    outside = np.full_like(inside, np.inf)
    for code, sums in enumerate(class_sums):
        own, count = codes == code, counts[code]
        inside[own] = sums[own] / np.maximum(count - 1, 1)
        means = np.divide(sums, count, out=np.full_like(sums, np.inf), where=count > 0)
        means[own] = np.inf
        np.minimum(outside, means, out=outside)
    larger = np.maximum(inside, outside)
    defined = (counts[codes] > 1) & (larger > 0)
    return np.divide(outside - inside, larger, out=np.zeros_like(larger), where=defined)


ClassSums = Callable[[slice], Iterable[Float[np.ndarray, "t b"]]]
"""Sums of the distances of some rows to the kept images of each class in turn."""


def _euclidean_class_sums(
    X: Float[np.ndarray, "n d"],
    codes: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
    device: str,
) -> ClassSums:
    """Sums of Euclidean distances."""
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    if device != "cpu":
        from ijepa.gpu_pairs import distance_sums

        return distance_sums(X, _center(X), members, keep, device)
    points = _shifted(X)
    squares = _squares(points, X.shape)
    side = _distance_side()

    def sums_of(rows: slice) -> Iterator[Float[np.ndarray, "t b"]]:
        left = points(rows)
        for images in members:
            total = np.zeros((len(left), len(keep)))
            for at in range(0, len(images), side):
                part = images[at : at + side]
                distances = _distances(left, points(part), squares[rows], squares[part])
                total += distances @ keep[:, part].T.astype(np.float64)
            yield total

    return sums_of


def _cosine_class_sums(
    X: Float[np.ndarray, "n d"],
    codes: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
) -> ClassSums:
    """Sums of 1 - cosine similarity: for a class they are count - z.(sum of z_j)."""
    counts = np.zeros((codes.max() + 1, len(keep)))
    totals = np.zeros((*counts.shape, X.shape[1]))
    for rows in row_blocks(*X.shape):
        Z = unit_rows(X[rows])
        for code in np.unique(codes[rows]):
            own = codes[rows] == code
            kept = keep[:, rows][:, own].astype(np.float64)
            counts[code] += kept.sum(axis=1)
            totals[code] += kept @ Z[own]

    def sums_of(rows: slice) -> Iterator[Float[np.ndarray, "t b"]]:
        products = unit_rows(X[rows]) @ totals.reshape(-1, X.shape[1]).T
        for count, part in zip(counts, np.split(products, len(counts), axis=1), strict=True):
            sums = count - part
            # Equal directions leave only rounding error, whose quotient would be any number.
            yield np.where(sums < 1e-12 * count, 0.0, sums)

    return sums_of
