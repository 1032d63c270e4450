"""Pure functions from the embeddings of one model to the numbers that describe them.

Every function takes arrays and returns a number or one number per image; shares and precisions are
fractions in [0, 1]. Statistics run in float64 on float32 embeddings, because sums of thousands of
float32 products lose about three digits.

Dimension key: n images, d width of an embedding, k neighbours of an image, C classes,
b subsets of the images, t images of one tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ijepa.errors import UserError

# Entries of an n-column block computed at once: at most about 200 MB with its sort keys.
TILE_ENTRIES = 2**23


def validate_embeddings(X: Float[np.ndarray, "n d"], name: str) -> None:
    """Refuse embeddings that no metric is defined on.

    Raises:
        UserError: A row holds NaN or infinity, or is zero and so has no direction.
    """
    faults = {"NaN or infinity": ~np.isfinite(X).all(axis=1), "only zeros": ~X.any(axis=1)}
    for fault, rows in faults.items():
        if rows.any():
            problem = f"the {name} model gives {fault} for image {rows.argmax()}"
            hint = f"check the weights and preprocessing of the {name} model, or use float32"
            raise UserError(f"{problem} ({rows.sum()} of {len(X)} images)", hint=hint)


def unit_scale(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """The embeddings times a power of two, so that the largest number is at least 0.5 and below 1.

    That is exact and changes no metric; squares of very large or small numbers would leave float32.
    """
    return np.ldexp(X, -np.frexp(np.abs(X).max())[1])


def center_columns(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Float64 copy of the embeddings with zero column means."""
    wide = X.astype(np.float64)
    # Float64 sums of equal float32 values are exact: a constant column becomes exactly zero.
    wide -= wide.mean(axis=0)
    return wide


def unit_rows(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Float64 copy of the embeddings with rows of length 1."""
    wide = X.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide


def gram_eigenvalues(gram: Float[np.ndarray, "m m"], n: int) -> Float[np.ndarray, " m"]:
    """Eigenvalues of X^T X or X X^T, descending; those below the rounding error are exactly 0.

    An entropy would count the rounding errors as dimensions. n is the longer side of X.
    """
    values = np.linalg.eigvalsh(gram)[::-1]
    floor = values[0] * max(n, len(gram)) * np.finfo(np.float64).eps
    return np.where(values > floor, values, 0.0)


def _squared_singular_values(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " rank"]:
    """Squared singular values, descending, from the smaller of the two Gram matrices."""
    n, d = X.shape
    return gram_eigenvalues(X.T @ X if d <= n else X @ X.T, max(n, d))


def covariance_spectrum(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " rank"]:
    """Eigenvalues of the covariance of the embeddings: min(n, d) of them, descending, >= 0.

    Columns are centred and not standardised. The divisor is n - 1.

    Raises:
        ValueError: Fewer than two images.
    """
    if len(X) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(X)}")
    return _squared_singular_values(center_columns(X)) / (len(X) - 1)


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
    matrix = center_columns(X) if centered else X.astype(np.float64)
    return effective_rank_of_spectrum(_squared_singular_values(matrix))


def effective_rank_of_spectrum(squares: Float[np.ndarray, " rank"]) -> float:
    """`effective_rank` from the squared singular values, or from a covariance's eigenvalues."""
    positive = np.sqrt(squares[squares > 0])
    if positive.size == 0:
        return float("nan")
    p = positive / positive.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def nearest_neighbors(
    X: Float[np.ndarray, "n d"], k: int
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Indices and cosine similarities (float32) of the k most similar other images, best first.

    An image is never its own neighbour. Ties go to the smaller index. Equal embeddings are tied
    exactly, and permuting the images permutes the result up to such ties.

    Raises:
        ValueError: k exceeds the number of other images.
    """
    n = len(X)
    if not 1 <= k <= n - 1:
        raise ValueError(f"k must be from 1 to the {n - 1} other images, got {k}")
    # The last bit of a matrix product depends on the position in the matrix. Products of distinct
    # rows in sorted order make it a function of the embeddings alone. Adding 0 removes -0.
    rows = unit_rows(X).astype(np.float32, order="C") + np.float32(0)
    row_bytes = rows.view(f"V{4 * rows.shape[1]}").ravel()
    _, first, group = np.unique(row_bytes, return_index=True, return_inverse=True)
    # One more than asked for: the image itself is among them and leaves at the end.
    keys = _search(rows[first], first, k + 1)
    if len(first) < n:
        keys = _with_duplicates(keys, group, k + 1)
    images = _positions(keys)[group]
    own = images == np.arange(n)[:, None]
    own[:, -1] |= ~own.any(axis=1)
    others = (n, k)
    return images[~own].reshape(others), _similarities(keys)[group][~own].reshape(others)


def _search(
    Z: Float[np.ndarray, "t d"], positions: Int[np.ndarray, " t"], k: int
) -> Int[np.ndarray, "t m"]:
    """Keys of the k largest products (or all, if fewer) of each row with all rows, best first."""
    best = np.full((len(Z), min(k, len(Z))), _NOTHING)
    for rows, columns in _tile_pairs(len(Z), math.isqrt(TILE_ENTRIES // 2)):
        tile = Z[rows] @ Z[columns].T
        best[rows] = _merge(best[rows], tile, positions[columns])
        if rows != columns:  # every product serves both of its images
            best[columns] = _merge(best[columns], tile.T, positions[rows])
    return best[:, ::-1]


def _tile_pairs(n: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Square tiles that cover a symmetric n x n matrix on and above its diagonal."""
    tiles = [slice(at, min(at + side, n)) for at in range(0, n, max(side, 1))]
    return ((rows, columns) for i, rows in enumerate(tiles) for columns in tiles[i:])


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
    votes = np.zeros((len(neighbors), len(classes)))
    # exp(s - 1) changes no order and cannot overflow at small temperatures.
    weights = np.exp((similarities[:, :k].astype(np.float64) - 1.0) / temperature)
    for rank in range(k):
        votes[np.arange(len(votes)), codes[neighbors[:, rank]]] += weights[:, rank]
    return classes[votes.argmax(axis=1)] == labels


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
    X: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], metric: str = "euclidean"
) -> Float[np.ndarray, " n"]:
    """Silhouette of each image in its own class, in [-1, 1]; higher is better.

    As `silhouette_of_subsets` for the one subset of all images.
    """
    codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    if metric != "euclidean" or len(counts) < 2:
        return silhouette_of_subsets(X, labels, np.ones((1, len(X)), bool), metric)[0]
    sums = _sum_distances(X, codes)
    return _silhouette(sums[:, :, None], counts[:, None, None].astype(np.float64), codes)[:, 0]


def _sum_distances(
    X: Float[np.ndarray, "n d"], codes: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "C n"]:
    """Sums of each image's Euclidean distances to the images of each class."""
    order = np.argsort(codes, kind="stable")
    points, codes = X[order].astype(np.float64), codes[order]
    # A shift leaves distances as they are and keeps a common offset out of the subtraction below.
    # By the median of a hundred rows, because one huge row would draw a mean away from all others.
    points -= np.median(X[:: max(1, len(X) // 100)], axis=0)
    squares = np.square(points).sum(axis=1)
    sums = np.zeros((codes[-1] + 1, len(X)))
    # Small tiles stay in the processor's cache through all the steps below.
    for rows, columns in _tile_pairs(len(X), math.isqrt(TILE_ENTRIES // 8)):
        distances = (-2.0 * points[rows]) @ points[columns].T
        distances += squares[columns]
        distances += squares[rows, None]
        np.sqrt(np.maximum(distances, 0.0, out=distances), out=distances)
        if rows == columns:
            np.fill_diagonal(distances, 0.0)
        else:  # every distance serves both of its images
            classes, starts = np.unique(codes[rows], return_index=True)
            # np.add.reduceat is forty times slower than this along the first axis.
            parts = np.split(distances, starts[1:])
            sums[classes, columns] += np.stack([part.sum(axis=0) for part in parts])
        classes, starts = np.unique(codes[columns], return_index=True)
        sums[classes, rows] += np.add.reduceat(distances, starts, axis=1).T
    return sums[:, np.argsort(order)]


def silhouette_of_subsets(
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
    metric: str = "euclidean",
) -> Float[np.ndarray, "b n"]:
    """Silhouette of each kept image among the kept images alone; NaN for the others.

    (b - a) / max(a, b), with a the mean distance to the rest of the own class and b the smallest
    mean distance to another class; 0 in a class of one image and where both distances are 0.
    Rousseeuw 1987, https://doi.org/10.1016/0377-0427(87)90125-7. The metric is "euclidean", or
    "cosine" for 1 - cosine similarity.

    Raises:
        ValueError: The metric is unknown or a subset holds fewer than two classes.
    """
    class_sums = {"euclidean": _euclidean_class_sums, "cosine": _cosine_class_sums}
    if metric not in class_sums:
        raise ValueError(f"unknown metric {metric!r}; choose from: {', '.join(class_sums)}")
    codes = np.unique(labels, return_inverse=True)[1]
    onehot = codes[:, None] == np.arange(codes.max() + 1)
    counts = (onehot.T.astype(np.float64) @ keep.T)[:, None]  # (C, 1, b)
    if ((counts > 0).sum(axis=0) < 2).any():
        raise ValueError("a silhouette needs at least 2 classes in every subset, got 1")
    scores = np.empty(keep.shape[::-1])
    step = max(1, TILE_ENTRIES // (2 * max(len(X), counts.size)))
    tiles = [slice(start, start + step) for start in range(0, len(X), step)]
    for tile, sums in zip(tiles, class_sums[metric](X, codes, keep, tiles), strict=True):
        scores[tile] = _silhouette(sums, counts, codes[tile])
    return np.where(keep, scores.T, np.nan)


def _silhouette(
    sums: Float[np.ndarray, "C t b"],
    counts: Float[np.ndarray, "C 1 b"],
    codes: Int[np.ndarray, " t"],
) -> Float[np.ndarray, "t b"]:
    """Silhouettes from the sums of an image's distances to the kept images of each class."""
    own = (codes, np.arange(len(codes)))
    own_counts = counts[codes, 0]
    inside = sums[own] / np.maximum(own_counts - 1, 1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.inf), where=counts > 0)
    means[own] = np.inf
    outside = means.min(axis=0)
    larger = np.maximum(inside, outside)
    defined = (own_counts > 1) & (larger > 0)
    return np.divide(outside - inside, larger, out=np.zeros_like(larger), where=defined)


def _euclidean_class_sums(
    X: Float[np.ndarray, "n d"],
    codes: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
    tiles: list[slice],
) -> Iterator[Float[np.ndarray, "C t b"]]:
    """Yield, tile by tile, the sums of Euclidean distances to the kept images of each class."""
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    weights = [keep[:, images].T.astype(np.float64) for images in members]
    # A shift leaves distances as they are and keeps a common offset out of the subtraction below.
    # By the median of a hundred rows, because one huge row would draw a mean away from all others.
    points = X.astype(np.float64) - np.median(X[:: max(1, len(X) // 100)], axis=0)
    squares = np.square(points).sum(axis=1)
    for tile in tiles:
        distances = squares[tile, None] + squares - 2.0 * (points[tile] @ points.T)
        np.sqrt(np.maximum(distances, 0.0, out=distances), out=distances)
        yield np.stack([distances[:, i] @ w for i, w in zip(members, weights, strict=True)])


def _cosine_class_sums(
    X: Float[np.ndarray, "n d"],
    codes: Int[np.ndarray, " n"],
    keep: Bool[np.ndarray, "b n"],
    tiles: list[slice],
) -> Iterator[Float[np.ndarray, "C t b"]]:
    """Yield the same for cosine distances: a class's sum of 1 - z.z_j is count - z.(sum of z_j)."""
    Z = unit_rows(X)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    totals = np.stack([keep[:, i].astype(np.float64) @ Z[i] for i in members])  # (C, b, d)
    counts = np.stack([keep[:, i].sum(axis=1) for i in members])[:, None]  # (C, 1, b)
    for tile in tiles:
        sums = counts - Z[tile] @ totals.transpose(0, 2, 1)
        # Equal directions leave only rounding error, whose quotient would be any number.
        yield np.where(sums < 1e-12 * counts, 0.0, sums)
