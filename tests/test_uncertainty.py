from itertools import combinations

import numpy as np
import pytest
from scipy import stats
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
    assert set(halves[::2].sum(axis=1).tolist()) == {70}
    np.testing.assert_array_equal(halves[1::2], ~halves[::2])
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        kept = set(halves[:, labels == label].sum(axis=1).tolist())
        assert kept == {count // 2, (count + 1) // 2}
    np.testing.assert_array_equal(halves, uncertainty.half_samples(labels, 50, seed=1))
    assert (halves != uncertainty.half_samples(labels, 50, seed=2)).any()


def test_every_image_is_kept_about_half_of_the_time():
    halves = uncertainty.half_samples(np.arange(63) % 3, 800)
    assert np.abs(halves[::2].mean(axis=0) - 0.5).max() < 0.12
    together = halves[::2].T @ halves[::2].astype(float) / 400
    assert np.abs(together[~np.eye(63, dtype=bool)] - 0.25).max() < 0.12


@pytest.mark.parametrize(
    ("counts", "possible"),
    [((20, 20), True), ((19, 20), False), ((19, 500), False), ((20, 22), True), ((90,), False)],
)
def test_small_classes_have_no_halves(counts, possible):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert uncertainty.can_halve(labels) is possible
    if not possible:
        with pytest.raises(ValueError, match="halves need 2 classes of at least 20 images"):
            uncertainty.half_samples(labels)


def test_halves_come_in_pairs():
    with pytest.raises(ValueError, match="halves come in pairs, got 5"):
        uncertainty.half_samples(np.arange(60) % 2, 5)


@pytest.mark.parametrize("count", [30, 100])
def test_estimate_is_a_t_interval_of_root_mean_square_deviations(count):
    deviations = np.random.default_rng(0).normal(size=count)
    estimate = uncertainty.estimate(5.0, deviations)
    assert estimate.value == 5.0
    assert estimate.se == pytest.approx(np.linalg.norm(deviations) / np.sqrt(count))
    expected = stats.t.interval(0.95, count - 1, loc=5.0, scale=estimate.se)
    assert estimate.ci95 == pytest.approx(expected)


def test_deviations_of_a_mean_over_all_halves_give_its_textbook_standard_error():
    values = np.random.default_rng(0).normal(size=8)
    pairs = [(values[[*kept]], np.delete(values, kept)) for kept in combinations(range(8), 4)]
    means = np.array([[a.mean(), b.mean()] for a, b in pairs]).ravel()
    estimate = uncertainty.estimate(0.0, uncertainty.half_deviations(means))
    assert estimate.se == pytest.approx(stats.sem(values))


def test_deviations_of_a_statistic_of_pairs_double_its_variance_where_single_halves_triple_it():
    # The mean product of two different values of mean 0 depends on nothing but pairs.
    values = np.random.default_rng(0).normal(size=(4000, 40))

    def mean_product(samples):
        n = samples.shape[1]
        return (samples.sum(axis=1) ** 2 - np.square(samples).sum(axis=1)) / (n * (n - 1))

    halves = [mean_product(values[:, :20]), mean_product(values[:, 20:])]
    deviations = uncertainty.half_deviations(np.stack(halves, axis=1).ravel())
    variance = 2 / (40 * 39)
    assert np.square(deviations).mean() / variance == pytest.approx(2, rel=0.15)
    single = np.square(halves[0] - mean_product(values)).mean()
    assert single / variance == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("list_length", [64, 12])
def test_neighbor_statistics_of_halves_count_every_kept_image_twice(monkeypatch, list_length):
    # Lists of 12 leave fewer than 10 in a half, so that each half must be searched by itself.
    monkeypatch.setattr(uncertainty, "LIST_LENGTH", list_length)
    X, Y, labels = two_models()
    labels = 10 - 2 * labels
    halves = uncertainty.half_samples(labels, 4)
    lists = [uncertainty.list_neighbors(Z) for Z in (X, Y)]
    ours = uncertainty.neighbor_halves(lists[0], labels, halves)
    mutual = uncertainty.mutual_knn_halves(*lists, labels, halves)
    for half, keep in enumerate(halves):
        neighbors, similarities = (
            np.repeat(found, 2, axis=1) for found in metrics.nearest_neighbors(X[keep], 10)
        )
        other = metrics.nearest_neighbors(Y[keep], 5)[0]
        expected = {
            f"precision_at_{k}": metrics.precision_at_k(neighbors, labels[keep], k)
            for k in (1, 5, 10, 20)
        }
        expected["knn_accuracy"] = metrics.knn_correct(neighbors, similarities, labels[keep])
        common = [len({*a} & {*b}) / 5 for a, b in zip(neighbors[:, :10], other, strict=True)]
        for column, label in enumerate(np.unique(labels)):
            own = labels[keep] == label
            for name, scores in expected.items():
                assert ours[name][half, column] == pytest.approx(scores[own].mean())
            assert mutual[half, column] == pytest.approx(np.array(common)[own].mean())


def test_the_overall_mean_weighs_classes_by_their_images():
    labels = np.repeat([7, 2, 5], [30, 10, 20])
    scores = np.random.default_rng(0).random(60)
    codes = np.unique(labels, return_inverse=True)[1]
    by_class = uncertainty.class_means(scores, codes)
    assert by_class == pytest.approx([scores[labels == label].mean() for label in (2, 5, 7)])
    assert uncertainty.overall(by_class[None], labels) == pytest.approx([scores.mean()])


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
    halves = uncertainty.half_samples(labels, 4)
    expected = [
        sklearn_metrics.silhouette_score(X[keep].astype(float), labels[keep], metric=metric)
        for keep in halves
    ]
    ours = metrics.mean_silhouettes(X, labels, halves, metric)
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
    X = X * np.arange(1, width + 1, dtype=np.float32) ** -1.5
    blocks = uncertainty.jackknife_blocks(labels)
    left = []
    for block in range(30):
        spectrum = metrics.covariance_spectrum(X[blocks != block])
        shares = [metrics.explained_variance(spectrum, k) for k in (10, 50)]
        left.append([*shares, metrics.effective_rank(X[blocks != block])])
    left = np.array(left)
    expected = np.sqrt(29 / 30 * np.square(left - left.mean(axis=0)).sum(axis=0))
    ours = uncertainty.spectrum_deviations(X, blocks)
    assert list(ours) == ["variance_10pc", "variance_50pc", "effective_rank"]
    errors = [uncertainty.estimate(0.0, deviations).se for deviations in ours.values()]
    assert errors == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_an_effective_rank_bounded_by_the_number_of_images_has_no_error():
    X, _, labels = two_models(60, 200)
    assert metrics.effective_rank(X) > 30
    found = uncertainty.spectrum_deviations(X, uncertainty.jackknife_blocks(labels))
    assert np.isnan(found["effective_rank"]).all()
    assert np.isfinite(found["variance_10pc"]).all()


def test_explained_variance_at_full_rank_has_no_error_and_constants_have_no_value():
    X, _, labels = two_models()
    blocks = uncertainty.jackknife_blocks(labels)
    found = uncertainty.spectrum_deviations(X, blocks)["variance_50pc"]
    assert np.abs(found).max() < 1e-12
    constant = uncertainty.spectrum_deviations(np.full((200, 4), 0.1, np.float32), blocks)
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
    pairs = [values | uncertainty.spectrum_deviations(X.copy(), blocks) for values in pairs]
    for name in pairs[0]:
        difference = uncertainty.estimate(0.0, (pairs[1][name] - pairs[0][name]).ravel())
        assert difference == uncertainty.Estimate(0.0, 0.0, (0.0, 0.0))
    assert agreement.sign_flip_p(per_image[1] - per_image[0]) == 1
    assert agreement.mcnemar_exact_p(*correct) == 1
    mutual = uncertainty.mutual_knn_halves(first, second, labels, halves)
    deviations = uncertainty.half_deviations(uncertainty.overall(mutual, labels))
    assert uncertainty.estimate(1.0, deviations).ci95 == (1.0, 1.0)
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
    on_halves = uncertainty.mutual_knn_halves(*lists, labels, halves)
    deviations = uncertainty.half_deviations(uncertainty.overall(on_halves, labels))
    low, high = uncertainty.estimate(value, deviations).ci95
    assert low <= 10 / 299 <= high


def test_standard_errors_match_the_spread_over_fresh_samples():
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(4, 10))
    labels = np.arange(160) % 4
    scales = np.linspace(2, 0.5, 10)
    values, errors = [], []
    for _ in range(60):
        X = (centers[labels] + scales * generator.normal(size=(160, 10))).astype(np.float32)
        lists = uncertainty.list_neighbors(X)
        halves = uncertainty.half_samples(labels, 40)
        blocks = uncertainty.jackknife_blocks(labels)
        neighbors = uncertainty.neighbor_halves(lists, labels, halves)
        on_halves = [uncertainty.overall(neighbors[f"precision_at_{k}"], labels) for k in (1, 20)]
        on_halves.append(metrics.mean_silhouettes(X, labels, halves))
        deviations = [uncertainty.half_deviations(half) for half in on_halves]
        deviations.append(uncertainty.spectrum_deviations(X, blocks)["effective_rank"])
        precisions = [metrics.precision_at_k(lists.neighbors, labels, k).mean() for k in (1, 20)]
        silhouette = metrics.silhouette_samples(X, labels).mean()
        values.append([*precisions, silhouette, metrics.effective_rank(X)])
        errors.append([uncertainty.estimate(0.0, one).se for one in deviations])
    ratio = np.mean(errors, axis=0) / np.std(values, axis=0, ddof=1)
    # 60 samples know their deviation to 9 %.
    assert (np.abs(ratio - 1) < 0.3).all(), ratio
