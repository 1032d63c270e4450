"""Embeddings in the plane, for display only: principal components and t-SNE maps.

Dimension key: n images, m of them shown, d width of an embedding.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import orthogonal_procrustes
from threadpoolctl import threadpool_limits

from ijepa.data import balanced_rows
from ijepa.files import read_arrays, write_atomically
from ijepa.metrics import NAN, Embeddings, Labels, class_means, row_norms

MAX_POINTS = 5000  # with more images, t-SNE takes minutes and the map shows a blot
TSNE_WIDTH = 50  # principal components that t-SNE sees at most
PERPLEXITY = 30.0

Plane = Float[np.ndarray, "n 2"]


@dataclass(frozen=True)
class PcaProjection:
    """Principal components of centered, not standardized, embeddings."""

    coordinates: Float[np.ndarray, "n k"]  # scores; zero beyond the d components that there are
    variance_shares: Float[np.ndarray, " d"]  # of all components, descending, in [0, 1]

    @property
    def rank(self) -> int:
        """Components that n images of d dimensions can have: min(n - 1, d)."""
        return min(len(self.coordinates) - 1, len(self.variance_shares))

    @property
    def note(self) -> str:
        """A caption for the two axes: each one's component and share of the variance."""
        shares = [*self.variance_shares[:2], 0.0]  # one-dimensional embeddings have no second
        return f"across: PC1 ({shares[0]:.1%}), up: PC2 ({shares[1]:.1%})"


@dataclass(frozen=True)
class TsneProjection:
    """A t-SNE map and how faithful it is; principal components where t-SNE has no meaning."""

    coordinates: Plane
    kl_divergence: float  # left at the end, in nats, lower is better; NaN without t-SNE
    kept_neighbors: float
    """Share of the 10 nearest neighbors by cosine that are among the 10 nearest in the plane, in
    [0, 1], higher is better; NaN for up to 11 images, which all are neighbors."""
    perplexity: float  # 30, lowered to stay under n/3; NaN without t-SNE

    @property
    def note(self) -> str:
        """How faithful the map is, in words."""
        if not np.isfinite(self.kl_divergence):
            return "no t-SNE of so few or equal images: principal components"
        kept = f", keeps {self.kept_neighbors:.0%} of the 10 nearest"
        return f"KL {self.kl_divergence:.2f}" + kept * bool(np.isfinite(self.kept_neighbors))


@dataclass(frozen=True)
class Maps:
    """The projections to show, by model; the second model's are turned to resemble the first's."""

    rows: Int[np.ndarray, " m"]
    """The images on the maps: all of them, or a class-balanced sample in order."""
    tsne: Mapping[str, TsneProjection]
    pca: Mapping[str, PcaProjection]  # on the components of all images

    @property
    def perplexity(self) -> float | None:
        """That of the t-SNE maps; None where there are only principal components."""
        return next((m.perplexity for m in self.tsne.values() if m.perplexity > 0), None)


def make_maps(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    labels: Labels,
    seed: int,
    cache: Path | None = None,
) -> Maps:
    """PCA and t-SNE maps of each model, of at most `MAX_POINTS` images.

    The seed is that of the sample and of t-SNE; the cache keeps t-SNE maps between runs.

    Raises:
        UserError: If the cache cannot be written.
    """
    rows = balanced_rows(labels, int(labels.max()) + 1, MAX_POINTS, seed)
    # A t-SNE map takes one thread, so both models' are made at once. The limit is set here as
    # well, because the map that is done first would lift it for the other.
    with threadpool_limits(limits=1), ThreadPoolExecutor() as pool:
        made = pool.map(lambda X: project_tsne_cached(X[rows], seed, cache), embeddings.values())
        tsne = dict(zip(embeddings, made, strict=True))
    pca = {name: project_pca(X, 2) for name, X in embeddings.items()}
    pca = {name: replace(p, coordinates=p.coordinates[rows]) for name, p in pca.items()}
    first, *others = embeddings
    for maps, turn in ((tsne, align), (pca, match_signs)):
        for name in others:
            turned = turn(maps[first].coordinates, maps[name].coordinates)
            maps[name] = replace(maps[name], coordinates=turned)
    return Maps(rows, tsne, pca)


def project_pca(X: Embeddings, k: int) -> PcaProjection:
    """Project on k principal components, each with its largest absolute loading positive."""
    centered = X.astype(np.float64)
    centered -= centered.mean(axis=0)
    # On cores shared with other work, more threads made this a hundred times slower.
    with threadpool_limits(limits=1):
        ascending, vectors = np.linalg.eigh(centered.T @ centered)
    variances, loadings = ascending[::-1].clip(min=0), vectors[:, ::-1][:, :k]
    largest = np.take_along_axis(loadings, np.abs(loadings).argmax(axis=0)[None], axis=0)
    scores = centered @ (loadings * np.sign(largest))
    shares = variances / (variances.sum() or 1.0)
    return PcaProjection(np.pad(scores, ((0, 0), (0, k - scores.shape[1]))), shares)


def project_tsne(X: Embeddings, seed: int) -> TsneProjection:
    """Map embeddings to the plane: unit length, PCA to 50, then scikit-learn's t-SNE.

    The same seed gives the same map, whatever the number of cores. With fewer than four images or
    no variance the map is that of the first two principal components.
    """
    from sklearn.manifold import TSNE

    unit = X.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores = project_pca(unit, k=max(2, min(TSNE_WIDTH, *X.shape))).coordinates
    if len(X) < 4 or np.ptp(scores, axis=0).max() < 1e-6:  # no variance but that of rounding
        coordinates = scores[:, :2]
        return TsneProjection(coordinates, NAN, kept_neighbors(unit, coordinates), NAN)
    tsne = TSNE(perplexity=min(PERPLEXITY, (len(X) - 1) / 3), random_state=seed)
    # Threads add in any order and t-SNE magnifies the last digit; one thread is repeatable.
    with threadpool_limits(limits=1):
        coordinates = tsne.fit_transform(scores).astype(np.float64)
    kept = kept_neighbors(unit, coordinates)
    return TsneProjection(coordinates, float(tsne.kl_divergence_), kept, tsne.perplexity)


def project_tsne_cached(X: Embeddings, seed: int, cache: Path | None) -> TsneProjection:
    """`project_tsne`, read from the folder `cache` if it is there, else made and saved in it.

    With None nothing is kept. The file's name is a hash of the embeddings, the settings and the
    versions of the libraries. A damaged file is replaced.

    Raises:
        UserError: If the folder cannot be written.
    """
    if cache is None:
        return project_tsne(X, seed)
    versions = [version(name) for name in ("numpy", "scipy", "scikit-learn")]
    settings = json.dumps([X.shape, str(X.dtype), seed, TSNE_WIDTH, PERPLEXITY, *versions])
    key = hashlib.sha256(settings.encode() + X.tobytes()).hexdigest()[:16]
    file = cache / f"{key}.npz"
    facts = ("kl_divergence", "kept_neighbors", "perplexity")
    try:
        kept = read_arrays(file, "coordinates", *facts)
        return TsneProjection(kept["coordinates"], *(float(kept[name]) for name in facts))
    except (ValueError, KeyError):
        made = project_tsne(X, seed)
        write_atomically(file, lambda opened: np.savez(opened, **asdict(made)))
        return made


def kept_neighbors(original: Embeddings, plane: Plane) -> float:
    """Share of the 10 nearest neighbors in `original` that are also among them in `plane`."""
    from sklearn.neighbors import NearestNeighbors

    if len(plane) <= 11:
        return NAN
    # Without an argument, kneighbors leaves each point out of its own neighbors by index.
    search = NearestNeighbors(n_neighbors=10)
    before, after = (search.fit(Z).kneighbors(return_distance=False) for Z in (original, plane))
    return float((before[:, :, None] == after[:, None, :]).sum() / before.size)


def align(reference: Plane, moving: Plane) -> Plane:
    """Rotate, reflect, scale and shift `moving` onto `reference` (orthogonal Procrustes)."""
    center = reference.mean(axis=0)
    centered = moving - moving.mean(axis=0)
    turn, stretch = orthogonal_procrustes(centered, reference - center)
    return center + stretch / (np.square(centered).sum() or 1.0) * centered @ turn


def match_signs(reference: Plane, moving: Plane) -> Plane:
    """Flip each column of `moving` that correlates negatively with that of `reference`."""
    products = ((reference - reference.mean(axis=0)) * (moving - moving.mean(axis=0))).sum(axis=0)
    return moving * np.where(products < 0, -1, 1)


def class_similarity(X: Embeddings, labels: Labels, *, centered: bool) -> Float[np.ndarray, "c c"]:
    """Cosine similarity of the means of the classes present, in ascending order of label.

    Centered, the mean of all embeddings is subtracted first: a common offset brings all raw
    similarities near 1. A class whose mean vanishes has no direction: its row and column are NaN.
    """
    means = class_means(X, np.unique(labels, return_inverse=True)[1])
    if centered:
        means -= X.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    unit = means / np.where(norms > 1e-9 * row_norms(X).mean(), norms, np.nan)
    # Rounding takes parallel means just beyond 1.
    return np.clip(unit @ unit.T, -1, 1)
