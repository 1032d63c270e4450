"""The tiles of a GPU, computed on the processor: `cpu:0` is a device like any other to them."""

import dataclasses

import numpy as np
import pytest
import sklearn.metrics
import torch

from ijepa import comparison, devices, gpu_pairs, metrics, uncertainty
from ijepa.comparison import compare, pairwise_seconds

DEVICE = "cpu:0"


def clouds(n, d, offset=0.0):
    """Two classes that overlap, one of them three times as large."""
    rng = np.random.default_rng(3)
    labels = (np.arange(n) % 4 == 0).astype(int)
    X = rng.normal(size=(n, d)) + labels[:, None] * 0.5 + offset
    return X.astype(np.float32), labels


@pytest.mark.parametrize("side", [1, 50, 2**13])
@pytest.mark.parametrize("k", [1, 7, 299])
def test_neighbors_equal_a_sort_by_exact_similarity_and_index(monkeypatch, side, k):
    monkeypatch.setattr(gpu_pairs, "SIDE", side)
    # Sixteen entries of 1 and -1: products exact in float32, ties everywhere and many equal rows.
    rng = np.random.default_rng(5)
    X = rng.choice([-1, 1], (120, 16))[rng.integers(0, 120, 300)].astype(np.float32)
    exact = X.astype(np.int64) @ X.astype(np.int64).T
    np.fill_diagonal(exact, -100)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    neighbors, similarities = metrics.nearest_neighbors(X, k, DEVICE)
    np.testing.assert_array_equal(neighbors, expected)
    np.testing.assert_array_equal(similarities, np.take_along_axis(exact, expected, 1) / 16)


def test_neighbors_are_those_of_the_processor(monkeypatch):
    monkeypatch.setattr(gpu_pairs, "SIDE", 64)
    X = clouds(400, 24)[0]
    expected, similar = metrics.nearest_neighbors(X, 20)
    neighbors, similarities = metrics.nearest_neighbors(X, 20, DEVICE)
    np.testing.assert_allclose(similarities, similar, atol=1e-6)
    assert (neighbors == expected).mean() > 0.99  # a last bit may swap two of them
    assert neighbors.dtype == expected.dtype
    assert similarities.dtype == similar.dtype


@pytest.mark.parametrize("side", [1, 37, 2**16])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_silhouettes_equal_scikit_learn(monkeypatch, side, offset):
    monkeypatch.setattr(gpu_pairs, "SIDE", side)
    monkeypatch.setattr(gpu_pairs, "BLOCK_ENTRIES", 300)
    X, labels = clouds(150, 12, offset)
    expected = sklearn.metrics.silhouette_samples(X.astype(np.float64), labels)
    found = metrics.silhouette_samples(X, labels, device=DEVICE)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_silhouettes_of_subsets_are_those_of_the_subsets_alone(monkeypatch):
    monkeypatch.setattr(gpu_pairs, "SIDE", 37)
    X, labels = clouds(150, 12)
    keep = np.random.default_rng(0).random((5, 150)) < 0.5
    found = metrics.mean_silhouettes(X, labels, keep, device=DEVICE)
    for value, half in zip(found, keep, strict=True):
        expected = sklearn.metrics.silhouette_score(X[half].astype(np.float64), labels[half])
        assert value == pytest.approx(expected, abs=1e-7)


def test_an_image_is_at_no_distance_from_itself(monkeypatch):
    monkeypatch.setattr(gpu_pairs, "SIDE", 7)
    X = np.random.default_rng(0).normal(size=(20, 1280)).astype(np.float32)
    members, keep = [np.array([image]) for image in range(20)], np.ones((1, 20), bool)
    sums_of = gpu_pairs.distance_sums(X, np.zeros(1280), members, keep, DEVICE)
    parts = [np.hstack(list(sums_of(slice(at, at + 7)))) for at in range(0, 20, 7)]
    found = np.concatenate(parts)
    assert not found.diagonal().any()  # rounding leaves 1e-6 of it
    np.testing.assert_allclose(found, sklearn.metrics.pairwise_distances(X), rtol=1e-5)


def test_double_precision_and_any_order_of_the_rows_are_kept():
    X, labels = clouds(60, 5)
    X = X[::-1].astype(np.float64) * 1e-2 + 1e6
    expected = metrics.silhouette_samples(X[::-1], labels)
    np.testing.assert_allclose(
        metrics.silhouette_samples(X[::-1], labels, device=DEVICE), expected, atol=1e-6
    )


def test_a_comparison_is_that_of_the_processor():
    local, labels = clouds(120, 12)
    models = {"local": local, "hf": clouds(120, 30)[0] ** 3}
    results = [
        compare(models, {"pixels": np.abs(local)}, labels, 0, [local[:, ::-1].copy()], device)
        for device in ("cpu", DEVICE)
    ]
    one, other = (
        {
            (name, metric): dataclasses.astuple(estimate)
            for name, row in result.metrics.items()
            for metric, estimate in row.items()
        }
        for result in results
    )
    assert one.keys() == other.keys()
    for key, (value, se, ci95) in one.items():
        np.testing.assert_allclose((value, se, *ci95), np.hstack(other[key]), atol=1e-3)
    assert results[0].seeds.keys() == results[1].seeds.keys()


def test_every_search_and_every_silhouette_of_a_comparison_is_on_the_device(monkeypatch):
    X, labels = clouds(120, 12)
    calls = []
    monkeypatch.setattr(comparison, "GPU_PROBE", 30)
    monkeypatch.setattr(uncertainty, "LIST_LENGTH", 20)  # halves need searches of their own
    for name in ("_search", "_distances"):
        monkeypatch.setattr(metrics, name, lambda *_, name=name: calls.append(name))
    compare({"local": X, "hf": X * X}, {"pixels": X}, labels, 0, [X + 1], DEVICE)
    assert pairwise_seconds({"local": X}, {"pixels": X}, 2, DEVICE) >= 0
    assert not calls


@pytest.mark.parametrize(
    ("device", "num_images", "free", "capability", "expected"),
    [
        ("cuda:1", 20_000, 2**35, (9, 0), "cuda:1"),
        ("cuda", 10**6, 2**35, (8, 0), "cuda"),
        ("cuda", 19_999, 2**35, (9, 0), "cpu"),
        ("cuda", 10**6, 2**32 + 4 * 10**6 * 1280, (9, 0), "cpu"),
        ("cuda", 10**6, 2**35, (8, 9), "cpu"),
        ("cpu", 10**6, 2**35, (9, 0), "cpu"),
        ("mps", 10**6, 2**35, (9, 0), "cpu"),
    ],
)
def test_many_pairs_are_looked_at_on_a_fast_gpu_with_room(
    monkeypatch, device, num_images, free, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**36))
    found = devices.choose_pairs_device(torch.device(device), num_images, 1280)
    assert found == expected
