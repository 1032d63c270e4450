"""What is held beside the embeddings of a file: blocks of rows and small facts of each image."""

import tracemalloc

import numpy as np
import pytest

from ijepa import agreement, gpu_pairs, metrics, plots, projections, uncertainty


def mapped(folder, n, d, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((n, d), dtype=np.float32) + np.arange(n)[:, None] % 2
    path = folder / f"{seed}"
    path.write_bytes(X.astype(np.float32).tobytes())
    return np.memmap(path, np.float32, "r", shape=(n, d))


def peak(work, *arguments):
    tracemalloc.start()
    work(*arguments)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest


LINEAR = {
    "check": lambda X, *_: metrics.validate_embeddings(X, "hf"),
    "spectrum": lambda X, *_: metrics.covariance_spectrum(X),
    "uncentred rank": lambda X, *_: metrics.effective_rank(X, centered=False),
    "jackknife": lambda X, labels: uncertainty.spectrum_deviations(
        X, uncertainty.jackknife_blocks(labels)
    ),
    "CKA": lambda X, labels: agreement.linear_cka(X, X[:, :16], labels),
    "shuffled CKA": lambda X, labels: agreement.cka_null(X, X[:, :16], labels, 4),
    "cosine silhouettes": lambda X, labels: metrics.mean_silhouettes(
        X, labels, uncertainty.half_samples(labels, 4), "cosine"
    ),
    "components": lambda X, *_: projections.project_pca(X, 2),
    "class means": lambda X, labels: plots.class_similarity(X, labels, centered=True),
}
PAIRS = {
    "neighbours": lambda X, *_: metrics.nearest_neighbors(X, 5),
    "silhouettes": lambda X, labels: metrics.silhouette_samples(X, labels),
    "silhouettes of halves": lambda X, labels: metrics.mean_silhouettes(
        X, labels, uncertainty.half_samples(labels, 4)
    ),
    "neighbours on a device": lambda X, *_: metrics.nearest_neighbors(X, 5, "cpu:0"),
    "silhouettes on a device": lambda X, labels: metrics.mean_silhouettes(
        X, labels, uncertainty.half_samples(labels, 4), device="cpu:0"
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (metrics, agreement):
        monkeypatch.setattr(module, "TILE_ENTRIES", 2**16)
    monkeypatch.setattr(gpu_pairs, "BLOCK_ENTRIES", 2**16)


@pytest.mark.parametrize("name", LINEAR)
def test_no_step_over_the_images_copies_the_embeddings(tmp_path, name):
    X = mapped(tmp_path, 60_000, 64)
    assert peak(LINEAR[name], X, np.arange(len(X)) % 2) < X.nbytes / 2


@pytest.mark.parametrize("name", PAIRS)
def test_no_step_over_the_pairs_copies_the_embeddings(tmp_path, name):
    X = mapped(tmp_path, 2500, 2048)
    assert peak(PAIRS[name], X, np.arange(len(X)) % 2) < X.nbytes / 2
