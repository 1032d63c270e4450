"""Embeddings in the plane: principal components, and t-SNE maps for display only.

Dimension key: n images, d width of an embedding.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from ijepa.data import balanced_rows
from ijepa.files import read_sealed, write_sealed
from ijepa.metrics import centered_gram

TSNE_WIDTH = 50
"""Principal components that t-SNE sees at most."""
PERPLEXITY = 30.0
MAX_POINTS = 5000
"""Images on a map at most; beyond that t-SNE takes minutes and a map shows a blot."""


@dataclass(frozen=True)
class PcaProjection:
    """Principal components of centered, not standardized, embeddings.

    Args:
        scores: Coordinates on the first k components; zero beyond the d that there are.
        variance_shares: Share of the total variance of all d components, descending, in [0, 1].
    """

    scores: Float[np.ndarray, "n k"]
    variance_shares: Float[np.ndarray, " d"]


@dataclass(frozen=True)
class TsneProjection:
    """A t-SNE map and how far it can be believed.

    Args:
        coordinates: Positions in the plane; the first two principal components where
            t-SNE has no meaning (fewer than four images, or no variance).
        kl_divergence: Divergence left at the end, in nats, lower is better; NaN without t-SNE.
        kept_neighbors: Share of the 10 nearest neighbors by cosine that are among the 10 nearest
            in the plane, in [0, 1], higher is better; NaN for a single image.
        perplexity: The perplexity used: 30, lowered to stay under n/3; NaN without t-SNE.
    """

    coordinates: Float[np.ndarray, "n 2"]
    kl_divergence: float
    kept_neighbors: float
    perplexity: float


@dataclass(frozen=True)
class Maps:
    """The projections to show.

    Args:
        rows: The images on the maps; the page holds pictures of these alone.
        tsne: By model, of `rows`.
        pca: By model, of all images.
    """

    rows: Int[np.ndarray, " m"]
    tsne: Mapping[str, TsneProjection]
    pca: Mapping[str, PcaProjection]


def make_maps(
    embeddings: Mapping[str, Float[np.ndarray, "n _"]],
    labels: Int[np.ndarray, " n"],
    seed: int,
    cache: Path | None = None,
) -> Maps:
    """PCA of all images and a t-SNE map of at most `MAX_POINTS` of them, for display only.

    Raises:
        UserError: If the folder that keeps the maps cannot be written.
    """
    rows = balanced_rows(labels, int(labels.max()) + 1, MAX_POINTS, seed)
    # A map takes one thread, so both are made at once. The limit is set here as well, because the
    # map that is done first would lift it for the other.
    with threadpool_limits(limits=1), ThreadPoolExecutor() as pool:
        shown = [X[rows] for X in embeddings.values()]
        maps = list(pool.map(lambda X: project_tsne_cached(X, seed, cache), shown))
    pca = {name: project_pca(X, 2) for name, X in embeddings.items()}
    return Maps(rows, dict(zip(embeddings, maps, strict=True)), pca)


def project_pca(X: Float[np.ndarray, "n d"], k: int) -> PcaProjection:
    """Project on k principal components, each with its largest absolute loading positive."""
    centered, gram = centered_gram(X)
    n, d = X.shape
    # On cores shared with other work, more threads made these a hundred times slower.
    with threadpool_limits(limits=1):
        if n < d:
            _, singular, loadings = np.linalg.svd(centered, full_matrices=False)
            variances = np.pad(singular**2, (0, d - n))
        else:  # cheaper: 1 s instead of 8 s for 50,000 x 1280
            ascending, vectors = np.linalg.eigh(gram)
            variances, loadings = ascending[::-1].clip(min=0), vectors[:, ::-1].T
    loadings = loadings[:k]
    largest = loadings[np.arange(len(loadings)), np.abs(loadings).argmax(axis=1)]
    axes = (loadings * np.sign(largest)[:, None]).T
    scores = centered @ axes
    total = variances.sum()
    shares = variances / total if total > 0 else np.zeros(d)
    return PcaProjection(np.pad(scores, ((0, 0), (0, k - scores.shape[1]))), shares)


def project_tsne(X: Float[np.ndarray, "n d"], seed: int) -> TsneProjection:
    """Map embeddings to the plane: unit length, PCA to 50, then scikit-learn's t-SNE.

    The same seed gives the same map, whatever the number of cores.
    """
    from sklearn.manifold import TSNE

    unit = X.astype(np.float64) / np.linalg.norm(X.astype(np.float64), axis=1, keepdims=True)
    pca = project_pca(unit, k=max(2, min(TSNE_WIDTH, *X.shape)))
    spread = np.ptp(pca.scores, axis=0).max()
    if len(X) < 4 or spread < 1e-6:  # no variance but that of rounding
        coordinates, divergence, perplexity = pca.scores[:, :2], float("nan"), float("nan")
    else:
        perplexity = min(PERPLEXITY, (len(X) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, random_state=seed)
        # Threads add up in any order and t-SNE magnifies the last digit; one thread is repeatable.
        with threadpool_limits(limits=1):
            coordinates = tsne.fit_transform(pca.scores).astype(np.float64)
        divergence = float(tsne.kl_divergence_)
    kept = kept_neighbors(unit, coordinates)
    return TsneProjection(coordinates, divergence, kept, perplexity)


def project_tsne_cached(
    X: Float[np.ndarray, "n d"], seed: int, cache: Path | None
) -> TsneProjection:
    """`project_tsne`, made once: a map that a folder keeps is read, any other is put there.

    Raises:
        UserError: If the folder cannot be written.
    """
    if cache is None:
        return project_tsne(X, seed)
    file = cache / f"{map_key(X, seed)}.map"
    content = read_sealed(file, 8 * (2 * len(X) + 3))
    if content is not None:
        *places, divergence, kept, perplexity = np.frombuffer(content, "<f8").tolist()
        return TsneProjection(np.array(places).reshape(-1, 2), divergence, kept, perplexity)
    made = project_tsne(X, seed)
    facts = made.kl_divergence, made.kept_neighbors, made.perplexity
    write_sealed(file, np.array([*made.coordinates.flat, *facts], "<f8").tobytes())
    return made


def map_key(X: Float[np.ndarray, "n d"], seed: int) -> str:
    """A hash of everything that decides a map: numbers, settings and libraries."""
    versions = [version(name) for name in ("numpy", "scipy", "scikit-learn")]
    facts = json.dumps([X.shape, str(X.dtype), seed, TSNE_WIDTH, PERPLEXITY, *versions])
    return hashlib.sha256(facts.encode() + X.tobytes()).hexdigest()[:16]


def kept_neighbors(original: Float[np.ndarray, "n d"], plane: Float[np.ndarray, "n 2"]) -> float:
    """Share of the 10 nearest neighbors in ``original`` that are so in ``plane`` as well."""
    from sklearn.neighbors import NearestNeighbors

    k = min(10, len(plane) - 1)
    if k == 0:
        return float("nan")
    # Without an argument, kneighbors leaves each point out of its own neighbors by index.
    before, after = (
        NearestNeighbors(n_neighbors=k).fit(Z).kneighbors(return_distance=False)
        for Z in (original, plane)
    )
    return float((before[:, :, None] == after[:, None, :]).sum() / before.size)


def align(
    reference: Float[np.ndarray, "n 2"], moving: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n 2"]:
    """Rotate, reflect, scale and shift ``moving`` onto ``reference`` (orthogonal Procrustes)."""
    center = reference.mean(axis=0)
    centered = moving - moving.mean(axis=0)
    left, stretch, right = np.linalg.svd(centered.T @ (reference - center))
    scale = stretch.sum() / max((centered**2).sum(), np.finfo(np.float64).tiny)
    return center + scale * centered @ left @ right
