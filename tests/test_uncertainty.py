import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from ijepa import agreement, metrics, uncertainty


def two_models(n=200, d=12, e=20, num_classes=5, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    signal = generator.normal(size=(num_classes, 6))[labels] + generator.normal(size=(n, 6))
    embeddings = (
        signal @ generator.normal(size=(6, width)) + 3 * generator.normal(size=(n, width)) + 1
        for width in (d, e)
    )
    return *(X.astype(np.float32) for X in embeddings), labels


def test_halves_keep_half_of_every_class_and_are_reproducible():
    labels = np.repeat([3, 1, 8, 4, 5], [20, 21, 33, 27, 40])
    halves = uncertainty.half_samples(labels, 50, seed=1)
    assert halves.shape == (50, 141)
    assert set(halves.sum(axis=1).tolist()) == {70}
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        kept = set(halves[:, labels == label].sum(axis=1).tolist())
        assert kept == {count // 2, (count + 1) // 2}
    np.testing.assert_array_equal(halves, uncertainty.half_samples(labels, 50, seed=1))
    assert (halves != uncertainty.half_samples(labels, 50, seed=2)).any()


def test_every_image_is_kept_about_half_of_the_time():
    share = uncertainty.half_samples(np.arange(63) % 3, 400).mean(axis=0)
    assert np.abs(share - 0.5).max() < 0.12


@pytest.mark.parametrize(
    ("counts", "possible"),
    [((21, 21), True), ((20, 20), False), ((19, 500), False), ((20, 22), True), ((90,), False)],
)
def test_small_classes_have_no_halves(counts, possible):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert uncertainty.can_halve(labels) is possible
    if not possible:
        with pytest.raises(ValueError, match="halves need 2 classes of at least 20 images"):
            uncertainty.half_samples(labels)


def test_estimate_is_the_value_plus_and_minus_1_96_standard_deviations():
    estimate = uncertainty.estimate(5.0, np.array([1.0, 2.0, 3.0]))
    assert estimate == uncertainty.Estimate(5.0, 1.0, (3.04, 6.96))


@pytest.mark.parametrize("list_length", [128, 22])
def test_neighbor_statistics_of_halves_equal_a_search_in_each_half(monkeypatch, list_length):
    # Lists of 22 leave fewer than 20 in a half, so that each half must be searched by itself.
    monkeypatch.setattr(uncertainty, "LIST_LENGTH", list_length)
    X, Y, labels = two_models()
    halves = uncertainty.half_samples(labels, 4)
    lists = [uncertainty.list_neighbors(Z) for Z in (X, Y)]
    ours = uncertainty.neighbor_halves(lists[0], labels, halves)
    mutual = uncertainty.mutual_knn_halves(*lists, halves)
    for half, keep in enumerate(halves):
        neighbors, similarities = metrics.nearest_neighbors(X[keep], 20)
        for k in (1, 5, 10, 20):
            expected = metrics.precision_at_k(neighbors, labels[keep], k).mean()
            assert ours[f"precision_at_{k}"][half] == expected
        accuracy = metrics.knn_correct(neighbors, similarities, labels[keep]).mean()
        assert ours["knn_accuracy"][half] == accuracy
        other = metrics.nearest_neighbors(Y[keep], 20)[0]
        assert mutual[half] == agreement.mutual_knn(neighbors, other).mean()


def test_neighbors_within_a_half_are_positions_among_the_kept_images():
    X, _, _ = two_models(60)
    keep = np.arange(60) % 3 > 0
    neighbors, similarities = uncertainty.neighbors_within(uncertainty.list_neighbors(X), keep, 5)
    expected, expected_similarities = metrics.nearest_neighbors(X[keep], 5)
    np.testing.assert_array_equal(neighbors, expected)
    np.testing.assert_allclose(similarities, expected_similarities, atol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_silhouettes_of_halves_equal_scikit_learn(metric):
    X, _, labels = two_models()
    halves = uncertainty.half_samples(labels, 3)
    expected = [
        sklearn_metrics.silhouette_score(X[keep].astype(float), labels[keep], metric=metric)
        for keep in halves
    ]
    ours = uncertainty.silhouette_halves(X, labels, halves, metric)
    np.testing.assert_allclose(ours, expected, atol=1e-7)


def test_jackknife_blocks_balance_sizes_and_classes_and_are_reproducible():
    labels = np.random.default_rng(0).permutation(np.repeat([4, 0, 9], [60, 93, 35]))
    blocks = uncertainty.jackknife_blocks(labels, seed=1)
    for kept, count in (
        (labels > -1, 188),
        (labels == 4, 60),
        (labels == 0, 93),
        (labels == 9, 35),
    ):
        sizes = np.bincount(blocks[kept], minlength=30)
        assert sizes.min() >= count // 30
        assert sizes.max() <= count // 30 + 1
    np.testing.assert_array_equal(blocks, uncertainty.jackknife_blocks(labels, seed=1))
    assert (blocks != uncertainty.jackknife_blocks(labels, seed=2)).any()


@pytest.mark.parametrize("width", [12, 60, 300])
def test_spectrum_errors_are_those_of_a_jackknife_that_starts_anew_without_each_block(width):
    X, _, labels = two_models(90, width)
    blocks = uncertainty.jackknife_blocks(labels)
    left = []
    for block in range(30):
        spectrum = metrics.covariance_spectrum(X[blocks != block])
        shares = [metrics.explained_variance(spectrum, k) for k in (10, 50)]
        left.append([*shares, metrics.effective_rank(X[blocks != block])])
    left = np.array(left)
    expected = np.sqrt(29 / 30 * np.square(left - left.mean(axis=0)).sum(axis=0))
    ours = uncertainty.spectrum_replicates(X, blocks)
    assert list(ours) == ["variance_10pc", "variance_50pc", "effective_rank"]
    errors = [uncertainty.estimate(0.0, replicates).se for replicates in ours.values()]
    assert errors == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_explained_variance_at_full_rank_has_no_error_and_constants_have_no_value():
    X, _, labels = two_models()
    blocks = uncertainty.jackknife_blocks(labels)
    assert np.ptp(uncertainty.spectrum_replicates(X, blocks)["variance_50pc"]) < 1e-12
    constant = uncertainty.spectrum_replicates(np.full((200, 4), 0.1, np.float32), blocks)
    assert all(np.isnan(values).all() for values in constant.values())


def test_a_model_against_itself_differs_by_exactly_nothing():
    X, _, labels = two_models()
    halves = uncertainty.half_samples(labels, 20)
    blocks = uncertainty.jackknife_blocks(labels)
    first, second = (uncertainty.list_neighbors(X.copy()) for _ in range(2))
    per_image = [metrics.precision_at_k(lists.neighbors, labels, 5) for lists in (first, second)]
    correct = [
        metrics.knn_correct(lists.neighbors, lists.similarities, labels)
        for lists in (first, second)
    ]
    pairs = [uncertainty.neighbor_halves(lists, labels, halves) for lists in (first, second)]
    pairs = [values | uncertainty.spectrum_replicates(X.copy(), blocks) for values in pairs]
    for name in pairs[0]:
        difference = uncertainty.estimate(0.0, pairs[1][name] - pairs[0][name])
        assert difference == uncertainty.Estimate(0.0, 0.0, (0.0, 0.0))
    assert agreement.sign_flip_p(per_image[1] - per_image[0]) == 1
    assert agreement.mcnemar_exact_p(*correct) == 1
    mutual = uncertainty.mutual_knn_halves(first, second, halves)
    assert uncertainty.estimate(1.0, mutual).ci95 == (1.0, 1.0)
    assert agreement.linear_cka(X, X.copy()) == pytest.approx(1, abs=1e-12)
    assert agreement.similarity_spearman(X, X.copy()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agreement_interval_of_two_unrelated_models_contains_chance(seed):
    generator = np.random.default_rng(seed)
    labels = np.arange(300) % 3
    lists = [
        uncertainty.list_neighbors(generator.normal(size=(300, d)).astype(np.float32))
        for d in (16, 40)
    ]
    value = float(agreement.mutual_knn(lists[0].neighbors, lists[1].neighbors).mean())
    halves = uncertainty.half_samples(labels, 60)
    low, high = uncertainty.estimate(value, uncertainty.mutual_knn_halves(*lists, halves)).ci95
    assert low <= 10 / 299 <= high


def test_standard_errors_match_the_spread_over_fresh_samples():
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(4, 10))
    labels = np.arange(160) % 4
    scales = np.linspace(2, 0.5, 10)
    values, errors = [], []
    for _ in range(60):
        X = (centers[labels] + scales * generator.normal(size=(160, 10))).astype(np.float32)
        halves = uncertainty.half_samples(labels, 50)
        blocks = uncertainty.jackknife_blocks(labels)
        on_halves = {
            "effective_rank": uncertainty.spectrum_replicates(X, blocks)["effective_rank"],
            "silhouette": uncertainty.silhouette_halves(X, labels, halves),
        }
        values.append([metrics.effective_rank(X), metrics.silhouette_samples(X, labels).mean()])
        errors.append([uncertainty.estimate(0.0, half).se for half in on_halves.values()])
    ratio = np.mean(errors, axis=0) / np.std(values, axis=0, ddof=1)
    # 60 samples know their deviation to 9 %.
    assert (np.abs(ratio - 1) < 0.3).all(), ratio
