"""Pure functions from the embeddings of one model to the numbers that describe them.

Every function takes arrays and returns a number or one number per image; shares and precisions are
fractions in [0, 1]. Statistics run in float64 on float32 embeddings, because sums of thousands of
float32 products lose about three digits. Only pairs of images are float32: see `all_pairs`.

Dimension key: n images, d width of an embedding, k neighbors of an image, C classes,
b subsets of the images, t images of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ijepa.errors import UserError

NAN = float("nan")
BLOCK_ENTRIES = 2**24
"""Pairs in memory at once: 64 MB of similarities and 128 MB of keys."""
BLOCK_ROWS = 256
"""More rows at once would not fit the cache of a processor and gain nothing on a GPU."""
ROUNDING = 1e6
"""Similarities are compared in steps of a millionth: float32 products are exact to about 2e-7."""
GROUP = 16
"""The k largest of many numbers are in the k groups with the largest maxima: faster to find."""
KNN_K, TEMPERATURE = 20, 0.07


def validate_embeddings(X: Float[np.ndarray, "n d"], name: str) -> None:
    """Raise UserError where a row is not finite, or zero and so has no direction."""
    faults = {"NaN or infinity": ~np.isfinite(X).all(axis=1), "only zeros": ~X.any(axis=1)}
    for fault, found in faults.items():
        if found.any():
            problem = f"the {name} model gives {fault} for image {found.argmax()}"
            hint = f"check the weights and preprocessing of the {name} model, or use float32"
            raise UserError(f"{problem} ({found.sum()} of {len(X)} images)", hint=hint)


def class_means(
    X: Float[np.ndarray, "n d"], codes: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "C d"]:
    """Float64 mean embedding of each class, numbered from 0 without gaps."""
    # Float64 sums of equal float32 values are exact: so is the mean of a constant column.
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return np.stack([X[images].mean(axis=0, dtype=np.float64) for images in members])


def row_norms(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Float64 lengths of the embeddings."""
    return np.sqrt(np.einsum("ij,ij->i", X, X, dtype=np.float64))


def unit_rows(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Float64 copy of the embeddings with rows of length 1."""
    return X / row_norms(X)[:, None]


def centered_gram(
    X: Float[np.ndarray, "n d"], centered: bool = True
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m m"]]:
    """Float64 embeddings, less their mean, and the smaller one of X^T X and X X^T."""
    rows = X.astype(np.float64)
    if centered:
        rows -= rows.mean(axis=0)
    return rows, rows.T @ rows if X.shape[1] <= len(X) else rows @ rows.T


def without_rounding_errors(
    values: Float[np.ndarray, " m"], longer: int
) -> Float[np.ndarray, " m"]:
    """Ascending eigenvalues of X^T X in descending order; rounding errors become exactly 0.

    An entropy would count them as dimensions. Their size depends on the longer side of X.
    """
    floor = values[-1] * longer * np.finfo(np.float64).eps
    return np.where(values > floor, values, 0.0)[::-1]


def covariance_spectrum(X: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " rank"]:
    """Eigenvalues of the covariance of the embeddings: min(n, d) of them, descending, >= 0.

    Columns are centered and not standardized. The divisor is n - 1.

    Raises:
        ValueError: Fewer than two images.
    """
    if len(X) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(X)}")
    values = np.linalg.eigvalsh(centered_gram(X)[1])
    return without_rounding_errors(values, max(X.shape)) / (len(X) - 1)


def explained_variance(eigenvalues: Float[np.ndarray, " rank"], k: int) -> float:
    """Share of the total variance along the first k principal components, in [0, 1].

    A shape and not a quality: few strong directions raise it, useful or not. It is 1 for k beyond
    the number of components, and NaN where nothing varies.
    """
    total = eigenvalues.sum()
    return float(eigenvalues[:k].sum() / total) if total > 0 else NAN


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
    from its inverse. As an estimate it may slightly exceed the width d. At most n - 1 eigenvalues
    differ from zero, so that the result is positive. It is NaN where nothing varies.
    """
    total = eigenvalues.sum()
    return float(1.0 / (np.square(eigenvalues / total).sum() - 1.0 / n)) if total > 0 else NAN


def effective_rank(X: Float[np.ndarray, "n d"], centered: bool = True) -> float:
    """Effective number of dimensions, exp of the entropy of p = singular values / their sum.

    In [1, min(n - 1, d)] centered and [1, min(n, d)] uncentered; NaN where nothing varies. RankMe,
    Garrido et al. 2023, https://arxiv.org/abs/2210.02885, without the paper's epsilon, which adds
    9% at 1280 columns. The paper does not center; a common offset then hides all other directions.
    """
    values = np.linalg.eigvalsh(centered_gram(X, centered)[1])
    return effective_rank_of_spectrum(without_rounding_errors(values, max(X.shape)))


def effective_rank_of_spectrum(squares: Float[np.ndarray, " rank"]) -> float:
    """`effective_rank` from the squared singular values, or from a covariance's eigenvalues."""
    positive = np.sqrt(squares[squares > 0])
    p = positive / positive.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else NAN


@dataclass(frozen=True)
class Pairs:
    """What one pass over all pairs of images finds.

    The cosine similarities are rounded to a millionth, the silhouettes are Euclidean, and the mean
    silhouettes of the halves are by metric: `euclidean` and `cosine`.
    """

    neighbors: Int[np.ndarray, "n k"]
    similarities: Float[np.ndarray, "n k"]
    silhouettes: Float[np.ndarray, " n"]
    half_silhouettes: dict[str, Float[np.ndarray, " b"]]


def all_pairs(
    X: Float[np.ndarray, "n d"],
    k: int = 0,
    labels: Int[np.ndarray, " n"] | None = None,
    halves: Bool[np.ndarray, "b n"] | None = None,
    device: str = "cpu",
    progress: Callable[..., Any] | None = None,
) -> Pairs:
    """Nearest neighbors and silhouettes from one pass over all pairs of images.

    Blocks of rows are compared with all rows. One float32 product of the centered embeddings gives
    a block's cosine similarities and Euclidean distances: a common offset costs no digits. An image
    is never its own neighbor. Ties go to the smaller index; identical embeddings are always tied.

    Args:
        X: The embeddings.
        k: How many neighbors, 0 for none; a ValueError if there are fewer other images.
        labels: With them there are silhouettes.
        halves: With them there are mean silhouettes of each half. Rows 2i and 2i + 1 are a pair:
            each keeps what the other leaves out, and both keep what the first pair has in common.
        device: "cpu" or a CUDA device of PyTorch.
        progress: Makes a progress bar like `tqdm(total=n)`.
    """
    n = len(X)
    if not 0 <= k <= n - 1:
        raise ValueError(f"k must be at most the {n - 1} other images, got {k}")
    codes = np.zeros(n, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")  # classes are slices
    blocks = _Blocks(X[order], device)
    silhouettes = None
    if labels is not None and np.bincount(codes).max() > 1 and codes.max() > 0:
        everywhere = np.ones((0, n), bool) if halves is None else halves
        silhouettes = _Silhouettes(codes[order], everywhere[:, order], device)
    widest = (
        n
        if silhouettes is None
        else max(n, silhouettes.columns.shape[1] * len(silhouettes.classes))
    )
    step = max(1, min(BLOCK_ROWS, BLOCK_ENTRIES // widest))
    # A key is one int64 per pair: the similarity in the upper half, in the lower one a number that
    # falls with the index. `topk` by value would order ties arbitrarily.
    last = 2**31 - 1
    padded = -(-n // GROUP) * GROUP if k else 0
    keys = torch.full((min(step, n), padded, 2), -last, dtype=torch.int32, device=device)
    keys[:, :n, 0] = torch.tensor(last - order[:padded], dtype=torch.int32)
    neighbors, similarities = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    scores = np.full(n, NAN)
    bar = progress(total=n) if progress else None
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        cosines, distances = blocks.compare(rows, silhouettes is not None)
        if silhouettes is not None:
            scores[order[rows]] = silhouettes.add(rows, distances, cosines)
        if k:
            part = keys[: len(cosines)]
            part[:, :n, 1] = cosines.round_()
            part[:, rows, 1].fill_diagonal_(-last)
            groups = part.view(torch.int64).view(len(part), -1, GROUP)
            chosen = groups.amax(dim=2).topk(min(k, groups.shape[1])).indices[..., None]
            found = groups.gather(1, chosen.expand(-1, -1, GROUP)).flatten(1)
            best = found.topk(k).values.cpu().numpy()
            neighbors[order[rows]] = last - (best & last)
            similarities[order[rows]] = (best >> 32) / ROUNDING
        if bar is not None:
            bar.update(len(cosines))
    if bar is not None:
        bar.close()
    return Pairs(neighbors, similarities, scores, silhouettes.means() if silhouettes else {})


class _Blocks:
    """Similarities and distances of some images to all, from float32 products."""

    def __init__(self, X: Float[np.ndarray, "n d"], device: str):
        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(device)

        # A power of two changes no digit and keeps all squares inside float32's range.
        X = np.ldexp(X, 50 - np.frexp(max(X.max(), -X.min()))[1]) + np.float32(0)  # removes -0
        # The median of a hundred rows: one huge row would draw a mean away from all others.
        center = np.median(X[:: max(1, len(X) // 100)], axis=0).astype(np.float32)
        points, norms = X - center, row_norms(X)
        lengths = row_norms(points)
        self.points, self.squares = put(points), put(np.square(lengths))
        # x.y is the centered product plus a part of x and a part of y.
        self.centered = bool((lengths <= 4 * norms).all())
        if self.centered:
            offsets = np.einsum("ij,j->i", points, center, dtype=np.float64)
            self.offsets = put(offsets + np.square(center.astype(np.float64)).sum() / 2)
            self.scales = put(np.sqrt(ROUNDING) / norms)
        else:  # a row that is small next to the center would lose its direction
            self.units = put(X / norms[:, None])
        first: dict[bytes, int] = {}
        self.original = torch.tensor(
            [first.setdefault(row.tobytes(), i) for i, row in enumerate(X)], device=device
        )
        self.copies = torch.nonzero(self.original != torch.arange(len(X), device=device))[:, 0]

    def _products(self, points: Float[Tensor, "n d"], rows: slice) -> Float[Tensor, "t n"]:
        """Products of some rows with all; last bits would depend on the position."""
        products = points[rows] @ points.T
        if len(self.copies):
            products[:, self.copies] = products[:, self.original[self.copies]]
        return products

    def compare(self, rows: slice, with_distances: bool) -> tuple[Tensor, Tensor | None]:
        """Cosine similarities in millionths, and Euclidean distances if asked for."""
        products, distances = self._products(self.points, rows), None
        if with_distances:
            distances = torch.sub(self.squares, products, alpha=2)
            distances.add_(self.squares[rows, None]).clamp_min_(0).sqrt_()
            distances[:, rows].fill_diagonal_(0)
            if len(self.copies):
                distances[self.original[rows, None] == self.original] = 0
        if self.centered:
            cosines = products.add_(self.offsets).add_(self.offsets[rows, None])
            cosines.mul_(self.scales).mul_(self.scales[rows, None])
        else:
            cosines = self._products(self.units, rows).mul_(ROUNDING)
        return cosines, distances


class _Silhouettes:
    """Silhouettes from sums of distances: products with a class-by-half indicator matrix."""

    def __init__(self, codes: Int[np.ndarray, " n"], halves: Bool[np.ndarray, "b n"], device: str):
        sizes = np.bincount(codes)
        ends = np.cumsum(sizes)
        self.classes = [slice(e - s, e) for s, e in zip(sizes, ends, strict=True)]
        self.codes = torch.tensor(codes, device=device)
        # Of a pair only the first half is multiplied: the sums of the second one follow.
        everyone = np.ones((1, len(codes)), bool)
        columns = np.vstack([everyone, halves[:2].all(axis=0), halves[::2]])
        self.columns = torch.tensor(columns.T, dtype=torch.float32, device=device)
        self.keep = [
            torch.tensor(keep.T, device=device) for keep in (everyone, halves[::2], halves[1::2])
        ]
        self.counts = [
            torch.stack([keep[part].sum(dim=0) for part in self.classes]) for keep in self.keep
        ]
        self.totals = torch.zeros((2, len(halves) // 2, 2), dtype=torch.float64)

    def add(self, rows: slice, distances: Tensor, cosines: Tensor) -> Float[np.ndarray, " t"]:
        """Count some rows in the means; return their Euclidean silhouettes among all images."""
        everyone, *halves = self._sums(distances)
        if self.columns.shape[1] > 2:
            cosines[:, rows].fill_diagonal_(ROUNDING)
            similar = self._sums(cosines)[1:]
            for half, counts in enumerate(self.counts[1:]):
                sums = counts - similar[half] / ROUNDING
                # Equal directions leave only rounding errors, whose quotient would be any number.
                sums = torch.where(sums < 1e-6 * counts, 0, sums)
                for metric, values in enumerate((halves[half], sums)):
                    scores = silhouettes_of_sums(values, counts, self.codes[rows])
                    kept = (scores * self.keep[half + 1][rows]).sum(dim=0, dtype=torch.float64)
                    self.totals[metric, :, half] += kept.cpu()
        scores = silhouettes_of_sums(everyone.double(), self.counts[0], self.codes[rows])
        return scores[:, 0].cpu().numpy()

    def _sums(self, values: Float[Tensor, "t n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the kept images of each class: of all, of the first and the second halves."""
        found = [values[:, part] @ self.columns[part] for part in self.classes]
        total, common, first = torch.stack(found, dim=1).tensor_split((1, 2), dim=2)
        return total, first, total + common - first

    def means(self) -> dict[str, Float[np.ndarray, " b"]]:
        """Mean over the kept images of each half, in the order of the halves."""
        kept = torch.stack([keep.sum(dim=0) for keep in self.keep[1:]], dim=1).cpu()
        euclidean, cosine = (self.totals / kept).reshape(2, -1).numpy()
        return {"euclidean": euclidean, "cosine": cosine}


def silhouettes_of_sums(
    sums: Float[Tensor, "t C b"], counts: Int[Tensor, "C b"], codes: Int[Tensor, " t"]
) -> Float[Tensor, "t b"]:
    """Silhouettes (b - a) / max(a, b) of some images in several subsets.

    a is the mean distance to the rest of the own class and b the smallest mean distance to another
    class, from the sums of distances to the kept images of each class and their counts; 0 in a
    class of one image and where both are 0. Rousseeuw 1987,
    https://doi.org/10.1016/0377-0427(87)90125-7.
    """
    own = codes[:, None, None].expand(-1, 1, sums.shape[2])
    inside = sums.gather(1, own)[:, 0] / (counts[codes] - 1).clamp(min=1)
    absent = torch.where(counts > 0, 0, torch.inf)
    means = torch.addcmul(absent.to(sums), sums, 1 / counts.clamp(min=1).to(sums))
    outside = means.scatter_(1, own, torch.inf).amin(dim=1)
    larger = torch.maximum(inside, outside)
    defined = (counts[codes] > 1) & (larger > 0)
    return torch.where(defined, (outside - inside) / larger, 0)


def nearest_neighbors(
    X: Float[np.ndarray, "n d"], k: int, device: str = "cpu"
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Indices and cosine similarities of the k most similar other images: see `all_pairs`."""
    found = all_pairs(X, k, device=device)
    return found.neighbors, found.similarities


def silhouette_samples(
    X: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    metric: str = "euclidean",
    device: str = "cpu",
) -> Float[np.ndarray, " n"]:
    """Silhouette of each image in its own class, in [-1, 1]; higher is better.

    See `silhouettes_of_sums`. The metric is "euclidean", or "cosine" for 1 - cosine similarity,
    whose sums are linear in the class means. NaN where there is one class, or no two images of any.
    """
    codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    if len(counts) < 2 or counts.max() < 2:
        return np.full(len(X), NAN)
    if metric == "euclidean":
        return all_pairs(X, labels=labels, device=device).silhouettes
    unit = unit_rows(X)
    sums = counts * (1 - unit @ class_means(unit, codes).T)
    # Equal directions leave only rounding errors, whose quotient would be any number.
    sums = torch.tensor(np.where(sums < 1e-12 * counts, 0.0, sums))[..., None]
    return silhouettes_of_sums(sums, torch.tensor(counts[:, None]), torch.from_numpy(codes))[
        :, 0
    ].numpy()


def precision_at_k(
    neighbors: Int[np.ndarray, "n m"], labels: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    """Share of each image's first k neighbors that have its label, in [0, 1]; higher is better.

    The mean over images is the metric. It depends on n: a smaller gallery lowers it. NaN where no
    class has two images.

    Raises:
        ValueError: k exceeds the number of neighbors given.
    """
    if k > neighbors.shape[1]:
        raise ValueError(f"k must be at most the {neighbors.shape[1]} neighbors, got {k}")
    if len(np.unique(labels)) == len(labels):
        return np.full(len(labels), NAN)
    return (labels[neighbors[:, :k]] == labels[:, None]).mean(axis=1)


def chance_precision(labels: Int[np.ndarray, " n"]) -> float:
    """Expected precision of random neighbors, (n_c - 1) / (n - 1) averaged over images."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1.0)).sum() / (len(labels) * (len(labels) - 1.0)))


def knn_vote(
    codes: Int[np.ndarray, "n k"], similarities: Float[np.ndarray, "n k"], num_classes: int
) -> Int[np.ndarray, " n"]:
    """Class that the k neighbors of each image vote for, from their classes, numbered from 0.

    A neighbor's vote weighs exp(similarity / 0.07): the rule of DINO's evaluation (Caron et al.
    2021, https://arxiv.org/abs/2104.14294). Other rules go by the same name, with weights
    softmax(s / T) or 1 / distance. Ties go to the first class.
    """
    # exp(s - 1) changes no order and cannot overflow at small temperatures.
    weights = np.exp((similarities.astype(np.float64) - 1.0) / TEMPERATURE)
    cells = np.arange(len(codes))[:, None] * num_classes + codes
    votes = np.bincount(cells.ravel(), weights.ravel(), len(codes) * num_classes)
    return votes.reshape(-1, num_classes).argmax(axis=1)


def knn_correct(
    neighbors: Int[np.ndarray, "n m"],
    similarities: Float[np.ndarray, "n m"],
    labels: Int[np.ndarray, " n"],
    k: int = KNN_K,
) -> Bool[np.ndarray, " n"]:
    """Whether the k nearest others of each image vote for its label; the mean is kNN accuracy."""
    classes, codes = np.unique(labels, return_inverse=True)
    return knn_vote(codes[neighbors[:, :k]], similarities[:, :k], len(classes)) == codes


def hubness(neighbors: Int[np.ndarray, "n m"], k: int = 10) -> dict[str, float]:
    """How unevenly images serve as neighbors: statistics of the number of k-NN lists each is in.

    `skew` is 0 for even counts and NaN if all are equal, `maximum` the largest count and
    `anti_hub_share` the share of images in no list. Radovanović et al. 2010, "Hubs in Space",
    Journal of Machine Learning Research 11.
    """
    counts = np.bincount(neighbors[:, :k].ravel(), minlength=len(neighbors))
    deviations = counts - counts.mean()
    variance = np.square(deviations).mean()
    skew = (deviations**3).mean() / variance**1.5 if variance > 0 else NAN
    shares = {"skew": skew, "maximum": counts.max(), "anti_hub_share": (counts == 0).mean()}
    return {name: float(value) for name, value in shares.items()}
