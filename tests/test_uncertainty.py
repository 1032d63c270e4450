from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from ijepa import metrics, uncertainty
from ijepa.comparison import analyze, measure


def two_models(n=200, d=12, e=20, num_classes=5, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    signal = generator.normal(size=(num_classes, 6))[labels] + generator.normal(size=(n, 6))
    embeddings = (
        signal @ generator.normal(size=(6, width)) + 3 * generator.normal(size=(n, width)) + 1
        for width in (d, e)
    )
    return *(X.astype(np.float32) for X in embeddings), labels


def test_halves_keep_half_of_every_class_all_of_small_ones_and_are_reproducible():
    counts = {3: 20, 1: 21, 8: 33, 4: 27, 5: 40, 2: 19, 7: 1}
    labels = np.repeat([*counts], [*counts.values()])
    small = np.isin(labels, [2, 7])
    assert uncertainty.small_classes(labels).tolist() == [2, 7]
    halves = uncertainty.half_samples(labels, 50, seed=1)
    assert halves.shape == (50, 161)
    assert halves[:, small].all()
    assert set(halves[::2, ~small].sum(axis=1).tolist()) == {70}
    np.testing.assert_array_equal(halves[1::2, ~small], ~halves[::2, ~small])
    for label in set(labels[~small].tolist()):
        kept = set(halves[:, labels == label].sum(axis=1).tolist())
        assert kept == {counts[label] // 2, (counts[label] + 1) // 2}
    np.testing.assert_array_equal(halves, uncertainty.half_samples(labels, 50, seed=1))
    assert (halves != uncertainty.half_samples(labels, 50, seed=2)).any()


def test_one_class_or_too_many_images_in_small_ones_have_no_halves():
    most = ([20] * 8 + [19, 12], uncertainty.NUM_HALVES)
    for counts, halves in (([19, 19], 0), ([90], 0), ([1] * 3, 0), ([19] * 9 + [20], 0), most):
        labels = np.repeat(np.arange(len(counts)), counts)
        assert uncertainty.half_samples(labels).shape == (halves, len(labels))


@pytest.mark.parametrize("count", [30, 100])
def test_estimate_is_a_t_interval_of_root_mean_square_deviations(count):
    deviations = np.random.default_rng(0).normal(size=count)
    estimate = uncertainty.estimate(5.0, deviations)
    assert estimate.value == 5.0
    assert estimate.se == pytest.approx(np.linalg.norm(deviations) / np.sqrt(count))
    expected = stats.t.interval(0.95, count - 1, loc=5.0, scale=estimate.se)
    assert estimate.ci95 == pytest.approx(expected)


def test_without_finite_deviations_there_is_no_interval():
    for value, deviations in ((0.5, np.empty(0)), (np.nan, np.ones(9)), (0.5, [1, np.nan])):
        found = uncertainty.estimate(value, np.array(deviations))
        p = uncertainty.student_p(value, np.array(deviations))
        assert found.value is value
        assert np.isnan([found.se, *found.ci95, p]).all()


def test_p_is_that_of_the_t_test():
    sample = np.random.default_rng(1).normal(0.3, 1, size=50)
    same = (sample - sample.mean()) / np.sqrt(49)
    expected = stats.ttest_1samp(sample, 0).pvalue
    assert uncertainty.student_p(sample.mean(), same) == pytest.approx(expected)
    assert uncertainty.student_p(0.0, np.zeros(9)) == 1
    assert uncertainty.student_p(0.1, np.zeros(9)) == 0


def test_deviations_of_a_mean_over_all_halves_give_its_textbook_standard_error():
    values = np.random.default_rng(0).normal(size=8)
    pairs = [(values[[*kept]], np.delete(values, kept)) for kept in combinations(range(8), 4)]
    means = np.array([[a.mean(), b.mean()] for a, b in pairs]).ravel()
    estimate = uncertainty.estimate(0.0, uncertainty.half_deviations(means))
    assert estimate.se == pytest.approx(stats.sem(values))


def test_deviations_of_a_mean_weigh_classes_by_their_images_and_small_ones_have_none():
    labels = np.repeat([7, 2, 5], [30, 10, 20])
    scores = np.random.default_rng(0).random((2, 60))
    codes = np.unique(labels, return_inverse=True)[1]
    by_class = np.stack([uncertainty.class_average(one, codes) for one in scores])
    expected = [scores[:, labels == label].mean(axis=1) for label in (2, 5, 7)]
    np.testing.assert_allclose(by_class.T, expected)
    whole, parts = uncertainty.mean_deviations(by_class, labels)
    assert whole == pytest.approx([(scores[0] - scores[1]).mean() / 2])
    assert parts[0] == pytest.approx([np.nan, *(by_class[0] - by_class[1])[1:] / 2], nan_ok=True)


def test_a_list_that_ends_early_repeats_its_last_kept_neighbor():
    neighbors, near = np.array([[1, 3], [0, 3], [0, 1], [1, 0]]), np.ones((4, 2), np.float32)
    keep = np.array([True, True, False, True])
    found = uncertainty.neighbors_within(neighbors, near, keep, 3)[0]
    assert found.tolist() == [[1, 3, 3], [0, 3, 3], [1, 0, 0]]


def test_neighbor_statistics_of_halves_count_every_kept_image_twice():
    X, _, labels = two_models()
    labels = 10 - 2 * labels
    halves = uncertainty.half_samples(labels, 4)
    pairs = metrics.all_pairs(X, 64)
    found = uncertainty.neighbor_halves(pairs.neighbors, pairs.similarities, labels, halves)
    for half, keep in enumerate(halves):
        own = labels[keep]
        pairs = metrics.all_pairs(X[keep], 10)
        nearest = pairs.neighbors, pairs.similarities
        neighbors, similarities = (np.repeat(one, 2, axis=1) for one in nearest)
        expected = {
            f"precision_at_{k}": metrics.precision_at_k(neighbors, own, k) for k in (1, 5, 10, 20)
        }
        expected["knn_accuracy"] = metrics.knn_correct(neighbors, similarities, own)
        for column, label in enumerate(np.unique(labels)):
            for name, scores in expected.items():
                mean = scores[own == label].mean()
                assert found.values[name][half, column] == pytest.approx(mean)
        first = np.flatnonzero(keep)[nearest[0][:, :5]]
        np.testing.assert_array_equal(found.first[half], first)
        codes = np.unique(own, return_inverse=True)[1]
        shares = uncertainty.confusion(codes, codes[neighbors[:, :5]], 5, np.ones(5))
        assert found.confused[half] == {pair[:2] for pair in uncertainty.most_confused(shares)}


def test_the_most_confused_classes_are_counted_by_a_loop():
    codes = np.array([0, 0, 1, 1, 2, 2])
    others = np.array([[0, 1], [2, 1], [1, 0], [1, 1], [2, 2], [2, 2]])
    shares = uncertainty.confusion(codes, others, 4, np.array([2.0, 1.0]))
    assert uncertainty.most_confused(shares) == [(0, 1, 2 / 6), (0, 2, 2 / 6), (1, 0, 1 / 6)]
    assert uncertainty.most_confused(np.eye(3)) == []


def influences(X):
    return uncertainty.spectrum_deviations(*metrics.principal_scores(X))


def test_each_influence_is_the_derivative_by_the_weight_of_its_image():
    X = two_models(90, 60)[0].astype(np.float64) * np.arange(1, 61) ** -1.5
    deviations = influences(X.astype(np.float32))
    assert list(deviations) == ["variance_10pc", "variance_50pc", "effective_rank"]
    for image in (0, 17, 89):
        values = []
        for step in (-1e-4, 1e-4):
            weights = np.full(90, (1 - step) / 90)
            weights[image] += step
            spectrum = np.linalg.eigvalsh(np.cov(X.T, aweights=weights, ddof=0))[::-1]
            shares = [metrics.explained_variance(spectrum, k) for k in (10, 50)]
            values.append([*shares, metrics.effective_rank(spectrum)])
        derivatives = np.subtract(*values[::-1]) / 2e-4
        ours = [one[image] * np.sqrt(90) for one in deviations.values()]
        assert ours == pytest.approx(derivatives, rel=1e-3, abs=1e-5)


def test_where_images_bound_the_effective_rank_or_nothing_varies_there_is_no_error():
    X = two_models(60, 200)[0]
    assert metrics.effective_rank(metrics.covariance_spectrum(X)) > 30
    assert np.isnan(influences(X)["effective_rank"]).all()
    assert np.isfinite(influences(X)["variance_10pc"]).all()
    # At full rank explained variance has an error of exactly 0.
    assert np.abs(influences(two_models()[0])["variance_50pc"]).max() < 1e-6
    assert np.isnan([*influences(np.full((200, 4), 0.1, np.float32)).values()]).all()


def test_standard_errors_match_the_spread_over_fresh_samples():
    generator, labels = np.random.default_rng(0), np.arange(160) % 4
    centers, scales = generator.normal(size=(4, 10)), np.linspace(2, 0.5, 10)
    halves = uncertainty.half_samples(labels, 40)
    samples = []
    for _ in range(60):
        X = (centers[labels] + scales * generator.normal(size=(160, 10))).astype(np.float32)
        samples.append(measure(analyze(X, labels, "local", halves)))
    for metric in ("precision_at_1", "precision_at_20", "silhouette", "effective_rank"):
        spread = np.std([one[metric].value for one in samples], ddof=1)
        # 60 samples know their deviation to 9%.
        assert 0.7 < np.mean([one[metric].se for one in samples]) / spread < 1.3, metric
