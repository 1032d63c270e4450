"""Pure functions from the embeddings of one model to the numbers that describe them.

Most functions return a number, or one number per image. Shares and precisions are
fractions in [0, 1]. Undefined values are NaN. Statistics run in float64 on float32 embeddings,
because sums of thousands of float32 products lose about three digits. Only `all_pairs` and the
scores of `principal_scores` are float32.

Dimension key: n images, d width of an embedding, k or m neighbors of an image, C classes,
b subsets of the images, t images of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from ijepa.errors import UserError

NAN = float("nan")
BLOCK_ENTRIES = 2**22  # pairs at once; with 2**24 all pairs of 50,000 images took 1.2 times as long
BLOCK_ROWS = 256  # more would not fit a processor's cache and gain nothing on a GPU
ROUNDING = 1e6  # similarities are compared in millionths: float32 products are exact to about 2e-7
GROUP = 8  # the k largest of many numbers are in the k groups with the largest maxima
KNN_K, TEMPERATURE = 20, 0.07

Embeddings = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, " n"]
PerImage = Float[np.ndarray, " n"]
Eigenvalues = Float[np.ndarray, " rank"]
Neighbors = Int[np.ndarray, "n m"]  # indices of each image's nearest neighbors, best first
Similarities = Float[np.ndarray, "n m"]  # their cosine similarities
Progress = Callable[..., Any]  # makes a progress bar like `tqdm(total=..., desc=...)`
SILENT: Progress = partial(tqdm, disable=True)


def validate_embeddings(X: Embeddings, name: str) -> None:
    """Raise UserError where a row is not finite, or zero and so has no direction."""
    faults = {"NaN or infinity": ~np.isfinite(X).all(axis=1), "only zeros": ~X.any(axis=1)}
    for fault, found in faults.items():
        if found.any():
            problem = f"the {name} model gives {fault} for image {found.argmax()}"
            hint = f"check the weights and preprocessing of the {name} model, or use float32"
            raise UserError(f"{problem} ({found.sum()} of {len(X)} images)", hint=hint)


def class_means(X: Embeddings, codes: Labels) -> Float[np.ndarray, "C d"]:
    """Float64 mean embedding of each class, numbered from 0 without gaps."""
    # Float64 sums of equal float32 values are exact: so is the mean of a constant column.
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return np.stack([X[images].mean(axis=0, dtype=np.float64) for images in members])


def row_norms(X: Embeddings) -> PerImage:
    """Float64 lengths of the embeddings."""
    return np.sqrt(np.einsum("ij,ij->i", X, X, dtype=np.float64))


def unit_rows(X: Embeddings) -> Embeddings:
    """Float64 copy of the embeddings with rows of length 1."""
    return X / row_norms(X)[:, None]


def covariance_spectrum(X: Embeddings, centered: bool = True) -> Eigenvalues:
    """Eigenvalues of the covariance of the embeddings, descending, >= 0.

    Centered there are min(n - 1, d) of them, else min(n, d). Columns are not standardized. The
    divisor is n - 1.
    """
    values = np.linalg.eigvalsh(_gram(X, centered)[1])
    return _without_rounding_errors(values, X)[: len(X) - centered] / (len(X) - 1)


def principal_scores(X: Embeddings) -> tuple[Eigenvalues, Float[np.ndarray, "n rank"]]:
    """The eigenvalues of `covariance_spectrum`, and the images on these principal axes.

    The scores are float32, in units of the standard deviation of the embeddings as a whole.
    """
    rows, gram = _gram(X)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = _without_rounding_errors(values, X), vectors[:, ::-1]
    unit = np.sqrt(values.sum() / (len(X) - 1)) or 1.0
    if X.shape[1] <= len(X):
        scores = (rows / unit).astype(np.float32) @ vectors.astype(np.float32)
    else:
        scores = (vectors * (np.sqrt(values) / unit)).astype(np.float32)
    return values[: len(X) - 1] / (len(X) - 1), scores[:, : len(X) - 1]


def _gram(X: Embeddings, centered: bool = True) -> tuple[Embeddings, Float[np.ndarray, "r r"]]:
    """Float64 embeddings, less their mean if `centered`, and the smaller of X^T X and X X^T."""
    rows = X.astype(np.float64)
    if centered:
        rows -= rows.mean(axis=0)
    return rows, rows.T @ rows if X.shape[1] <= len(X) else rows @ rows.T


def _without_rounding_errors(values: Eigenvalues, X: Embeddings) -> Eigenvalues:
    """Ascending eigenvalues of X^T X in descending order; rounding errors become exactly 0."""
    # An entropy would count them as dimensions. Their size depends on the longer side of X.
    floor = values[-1] * max(X.shape) * np.finfo(np.float64).eps
    return np.where(values > floor, values, 0.0)[::-1]


def explained_variance(eigenvalues: Eigenvalues, k: int) -> float:
    """Share of the total variance along the first k principal components, in [0, 1].

    A shape and not a quality: few strong directions raise it, useful or not. NaN if k
    exceeds the number of components or nothing varies.
    """
    if not (k <= len(eigenvalues) and eigenvalues.any()):
        return NAN
    # Two sums of the same numbers may differ in their last digit.
    rest = eigenvalues[k:].any()
    return float(eigenvalues[:k].sum() / eigenvalues.sum()) if rest else 1.0


def num_components(eigenvalues: Eigenvalues, share: float) -> float:
    """Smallest number of principal components that hold a share, from 0 to 1, of the variance.

    NaN if nothing varies.
    """
    cumulative = np.cumsum(eigenvalues)
    # Rounding of the sum must not ask for a component more; 1e-12 is far below what is shown.
    reached = cumulative >= (share - 1e-12) * cumulative[-1]
    return float(np.argmax(reached) + 1) if cumulative[-1] > 0 else NAN


def participation_ratio(eigenvalues: Eigenvalues, n: int) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of a covariance from n images, at least 1.

    A finite sample spreads its eigenvalues, which lowers the plain ratio. To correct for that, 1/n
    is subtracted from its inverse. The estimate may exceed the width d, by far where n is near d.
    NaN if nothing varies.
    """
    total = eigenvalues.sum()
    return float(1.0 / (np.square(eigenvalues / total).sum() - 1.0 / n)) if total > 0 else NAN


def effective_rank(eigenvalues: Eigenvalues) -> float:
    """Effective number of dimensions, exp of the entropy of p = singular values / their sum.

    The singular values are the roots of the eigenvalues. In [1, min(n - 1, d)] of a centered and
    [1, min(n, d)] of an uncentered spectrum; NaN where nothing varies. RankMe, Garrido et al. 2023,
    https://arxiv.org/abs/2210.02885, without the paper's epsilon, which adds 9% at 1280 columns.
    The paper does not center; a common offset then hides all other directions.
    """
    positive = np.sqrt(eigenvalues[eigenvalues > 0])
    p = positive / positive.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else NAN


@dataclass(frozen=True)
class Pairs:
    """What one pass over all pairs of images finds."""

    neighbors: Neighbors
    similarities: Similarities  # rounded to a millionth
    silhouettes: PerImage  # Euclidean
    half_silhouettes: dict[str, Float[np.ndarray, " b"]]
    """Means on the halves: `silhouette` (Euclidean) and `silhouette_cosine`."""


def all_pairs(
    X: Embeddings,
    k: int = 0,
    labels: Labels | None = None,
    halves: Bool[np.ndarray, "b n"] | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Pairs:
    """Nearest neighbors and silhouettes from one pass over all pairs of images.

    Blocks of rows are compared with all rows. One float32 product of the centered embeddings gives
    a block's cosine similarities and Euclidean distances: a common offset costs no digits. An image
    is never its own neighbor. Ties go to the smaller index; identical embeddings are always tied.
    There are k neighbors, or all other images if they are fewer, and silhouettes if there are
    labels. Rows 2i and 2i + 1 of the halves are a pair: each keeps what the other leaves out, and
    both keep what the first pair has in common. The device is "cpu" or a CUDA device of PyTorch.
    """
    n, k = len(X), min(k, len(X) - 1)
    codes = np.zeros(n, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")  # classes are slices
    blocks = _Blocks(X[order], device)
    halves = np.ones((0, n), bool) if halves is None else halves
    silhouettes, widest = None, n
    if np.bincount(codes).max() > 1 and codes.max() > 0:
        silhouettes = _Silhouettes(codes[order], halves[:, order], device)
        widest = max(n, silhouettes.columns.shape[1] * len(silhouettes.classes))
    step = max(1, min(BLOCK_ROWS, BLOCK_ENTRIES // widest))
    # A key is one int64 per pair: the similarity in the upper half, in the lower one a number that
    # falls with the index. `topk` by value would order ties arbitrarily.
    last = 2**31 - 1
    padded = -(-n // GROUP) * GROUP
    keys = torch.full((min(step, n), padded, 2), -last, dtype=torch.int32, device=device)
    keys[:, :n, 0] = torch.tensor(last - order, dtype=torch.int32)
    neighbors, similarities = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    scores = np.full(n, NAN)
    with progress(total=n) as bar:
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            cosines, distances = blocks.compare(rows, silhouettes is not None)
            if silhouettes is not None:
                scores[order[rows]] = silhouettes.add(rows, distances, cosines)
            part = keys[: len(cosines)]
            part[:, :n, 1] = cosines.round_()
            part[:, rows, 1].fill_diagonal_(-last)
            groups = part.view(torch.int64).view(len(part), -1, GROUP)
            largest = groups.amax(dim=2).topk(min(k, groups.shape[1]), sorted=False)
            chosen = largest.indices[..., None].expand(-1, -1, GROUP)
            found = groups.gather(1, chosen).flatten(1)
            best = found.topk(k).values.cpu().numpy()
            neighbors[order[rows]] = last - (best & last)
            similarities[order[rows]] = (best >> 32) / ROUNDING
            bar.update(len(cosines))
    return Pairs(neighbors, similarities, scores, silhouettes.means() if silhouettes else {})


class _Blocks:
    """Similarities and distances of some images to all, from float32 products."""

    def __init__(self, X: Embeddings, device: str):
        put = partial(torch.tensor, dtype=torch.float32, device=device)
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
        original = [first.setdefault(row.tobytes(), i) for i, row in enumerate(X)]
        self.original = torch.tensor(original, device=device)
        self.copies = torch.nonzero(self.original != torch.arange(len(X), device=device))[:, 0]

    def _products(self, points: Float[Tensor, "n d"], rows: slice) -> Float[Tensor, "t n"]:
        """Products of some rows with all, equal for copies; last bits depend on the position."""
        products = points[rows] @ points.T
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
        if not self.centered:
            return self._products(self.units, rows).mul_(ROUNDING), distances
        cosines = products.add_(self.offsets).add_(self.offsets[rows, None])
        return cosines.mul_(self.scales).mul_(self.scales[rows, None]), distances


class _Silhouettes:
    """Silhouettes from sums of distances: products with a class-by-half indicator matrix."""

    def __init__(self, codes: Labels, halves: Bool[np.ndarray, "b n"], device: str):
        ends = np.cumsum(np.bincount(codes)).tolist()
        self.classes = [slice(*pair) for pair in pairwise([0, *ends])]
        self.codes = torch.tensor(codes, device=device)
        # Only the first half of a pair is multiplied; the second's sums follow from the total.
        everyone = np.ones((1, len(codes)), bool)
        columns = np.vstack([everyone, halves[:2].all(axis=0), halves[::2]])
        self.columns = torch.tensor(columns.T, dtype=torch.float32, device=device)
        kept = everyone, halves[::2], halves[1::2]
        self.keep = [torch.tensor(keep.T, device=device) for keep in kept]
        sums = [[keep[part].sum(dim=0) for part in self.classes] for keep in self.keep]
        self.counts = [torch.stack(counts) for counts in sums]
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
        kept = torch.stack([counts.sum(dim=0) for counts in self.counts[1:]], dim=1).cpu()
        euclidean, cosine = (self.totals / kept).reshape(2, -1).numpy()
        return {"silhouette": euclidean, "silhouette_cosine": cosine}


def silhouettes_of_sums(
    sums: Float[Tensor, "t C b"], counts: Int[Tensor, "C b"], codes: Int[Tensor, " t"]
) -> Float[Tensor, "t b"]:
    """Silhouettes (b - a) / max(a, b) of some images in several subsets.

    a is the mean distance to the rest of the own class and b the smallest mean distance to another
    class, from the sums of distances to the kept images of each class and their counts. 0 in a
    class of one image and where both are 0. Rousseeuw 1987, doi:10.1016/0377-0427(87)90125-7.
    """
    own = codes[:, None, None].expand(-1, 1, sums.shape[2])
    inside = sums.gather(1, own)[:, 0] / (counts[codes] - 1).clamp(min=1)
    absent = torch.where(counts > 0, 0, torch.inf)
    means = torch.addcmul(absent.to(sums), sums, 1 / counts.clamp(min=1).to(sums))
    outside = means.scatter_(1, own, torch.inf).amin(dim=1)
    larger = torch.maximum(inside, outside)
    defined = (counts[codes] > 1) & (larger > 0)
    return torch.where(defined, (outside - inside) / larger, 0)


def cosine_silhouettes(X: Embeddings, labels: Labels) -> PerImage:
    """`silhouettes_of_sums` by 1 - cosine similarity, whose sums are linear in the class means.

    NaN where there is one class, or no two images of any.
    """
    codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    if len(counts) < 2 or counts.max() < 2:
        return np.full(len(X), NAN)
    unit = unit_rows(X)
    sums = counts * (1 - unit @ class_means(unit, codes).T)
    # Equal directions leave only rounding errors, whose quotient would be any number.
    sums = torch.tensor(np.where(sums < 1e-12 * counts, 0.0, sums))[..., None]
    counts, codes = torch.tensor(counts[:, None]), torch.from_numpy(codes)
    return silhouettes_of_sums(sums, counts, codes)[:, 0].numpy()


def precision_at_k(neighbors: Neighbors, labels: Labels, k: int) -> PerImage:
    """Share of each image's first k neighbors that have its label, in [0, 1]; higher is better.

    The mean over images is the metric. It depends on n: a smaller gallery lowers it. NaN for fewer
    than k neighbors, and where no class has two images.
    """
    if k > neighbors.shape[1] or len(np.unique(labels)) == len(labels):
        return np.full(len(labels), NAN)
    return (labels[neighbors[:, :k]] == labels[:, None]).mean(axis=1)


def chance_precision(labels: Labels) -> float:
    """Expected precision of random neighbors, (n_c - 1) / (n - 1) averaged over images.

    NaN like the precision itself where no class has two images.
    """
    counts = np.unique(labels, return_counts=True)[1]
    if counts.max() < 2:
        return NAN
    return float((counts * (counts - 1.0)).sum() / (len(labels) * (len(labels) - 1.0)))


def knn_vote(codes: Neighbors, similarities: Similarities, num_classes: int) -> Labels:
    """Class that the neighbors of each image vote for, from their classes, numbered from 0.

    A vote weighs exp(similarity / 0.07): the rule of DINO's evaluation, Caron et al. 2021,
    https://arxiv.org/abs/2104.14294; others use 1 / distance. Ties go to the first class.
    """
    # exp(s - 1) changes no order and cannot overflow at small temperatures.
    weights = np.exp((similarities.astype(np.float64) - 1.0) / TEMPERATURE)
    cells = np.arange(len(codes))[:, None] * num_classes + codes
    votes = np.bincount(cells.ravel(), weights.ravel(), len(codes) * num_classes)
    return votes.reshape(-1, num_classes).argmax(axis=1)


def knn_correct(neighbors: Neighbors, similarities: Similarities, labels: Labels) -> PerImage:
    """1 where the `KNN_K` nearest others of an image (all, if fewer) vote for its label, else 0.

    The mean is kNN accuracy. NaN where no class has two images.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) == len(labels):
        return np.full(len(labels), NAN)
    voted = knn_vote(codes[neighbors[:, :KNN_K]], similarities[:, :KNN_K], len(classes))
    return (voted == codes).astype(np.float64)


def hubness(neighbors: Neighbors, k: int = 10) -> dict[str, float]:
    """How unevenly images serve as neighbors: statistics of the number of k-NN lists each is in.

    `skew` is 0 for symmetric counts and NaN if all are equal, `maximum` the largest count and
    `anti_hub_share` the share of images in no list; all are NaN for fewer than k neighbors.
    Radovanović et al. 2010, "Hubs in Space", Journal of Machine Learning Research 11.
    """
    if neighbors.shape[1] < k:
        return dict.fromkeys(("skew", "maximum", "anti_hub_share"), NAN)
    counts = np.bincount(neighbors[:, :k].ravel(), minlength=len(neighbors))
    deviations = counts - counts.mean()
    variance = np.square(deviations).mean()
    skew = (deviations**3).mean() / variance**1.5 if variance > 0 else NAN
    shares = {"skew": skew, "maximum": counts.max(), "anti_hub_share": (counts == 0).mean()}
    return {name: float(value) for name, value in shares.items()}
