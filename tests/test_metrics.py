import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from ijepa import metrics


def clustered(n=120, d=7, num_classes=4, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, n)
    centers = 1.5 * generator.normal(size=(num_classes, d))
    return (centers[labels] + generator.normal(size=(n, d)) + 3).astype(np.float32), labels


def nearest(X, k):
    found = metrics.all_pairs(X, k)
    return found.neighbors, found.similarities


@pytest.mark.parametrize(("n", "d"), [(60, 12), (30, 50)])
def test_spectrum_equals_scikit_learn_pca_with_more_and_with_fewer_images_than_dimensions(n, d):
    X = clustered(n, d)[0]
    ours, theirs = metrics.covariance_spectrum(X), PCA().fit(X.astype(np.float64))
    assert ours.shape == (min(n - 1, d),)
    np.testing.assert_allclose(ours, theirs.explained_variance_[: n - 1], atol=1e-10)
    share = theirs.explained_variance_ratio_[:10].sum()
    assert metrics.explained_variance(ours, 10) == pytest.approx(share, abs=1e-12)
    cumulative = np.cumsum(theirs.explained_variance_ratio_)
    assert metrics.num_components(ours, 0.9) == int(np.searchsorted(cumulative, 0.9)) + 1
    eigenvalues, scores = metrics.principal_scores(X)
    np.testing.assert_allclose(eigenvalues, ours, atol=1e-10)
    expected = theirs.transform(X.astype(np.float64)) / np.sqrt(ours.sum())
    np.testing.assert_allclose(np.abs(scores), np.abs(expected[:, : scores.shape[1]]), atol=1e-5)


def test_equal_images_have_exactly_no_variance_and_no_numbers_of_it():
    X = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32).repeat(1001, axis=0)
    constant = metrics.covariance_spectrum(X)
    assert (constant == 0).all()
    numbers = [metrics.explained_variance(constant, 1), metrics.num_components(constant, 0.9)]
    numbers += [metrics.participation_ratio(constant, 9), metrics.effective_rank(constant)]
    assert np.isnan(numbers).all()


def test_explained_variance_and_number_of_components_count_shares_that_are_reached_exactly():
    eigenvalues = np.array([3.0, 1.0])
    shares = [metrics.explained_variance(eigenvalues, k) for k in (1, 2, 3)]
    assert shares == pytest.approx([0.75, 1, np.nan], nan_ok=True)
    odd = np.append(np.sort(np.random.default_rng(0).random(9))[::-1], np.zeros(50))
    assert {metrics.explained_variance(scale * odd, 10) for scale in (0.1, 0.3, 7)} == {1.0}
    assert metrics.num_components(np.ones(10), 0.9) == 9
    assert metrics.num_components(np.ones(10), 0.95) == 10
    assert metrics.num_components(np.full(15, 0.1), 0.8) == 12


def test_effective_rank_does_not_count_rounding_errors_as_dimensions():
    generator = np.random.default_rng(0)
    X = generator.integers(-4, 5, (300, 2)) @ generator.integers(-4, 5, (2, 200))
    spectrum = metrics.covariance_spectrum(X.astype(np.float32))
    assert (spectrum > 0).sum() == 2
    singular = np.sqrt(np.linalg.svd(np.cov(X.T), compute_uv=False)[:2])
    expected = np.exp(stats.entropy(singular))
    assert metrics.effective_rank(spectrum) == pytest.approx(expected, rel=1e-10)


def test_corrected_participation_ratio_of_isotropic_noise_is_its_dimension():
    X = np.random.default_rng(0).normal(size=(300, 100)).astype(np.float32)
    eigenvalues = metrics.covariance_spectrum(X)
    naive = eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()
    assert naive < 80
    assert metrics.participation_ratio(eigenvalues, 300) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(80, 10), (12, 40)])
def test_effective_rank_is_the_exponential_entropy_of_the_singular_values(shape, centered):
    X = clustered(*shape)[0]
    wide = X.astype(np.float64)
    singular = np.linalg.svd(wide - centered * wide.mean(axis=0), compute_uv=False)
    singular = singular[singular > 1e-9]
    found = metrics.effective_rank(metrics.covariance_spectrum(X, centered))
    assert found == pytest.approx(np.exp(stats.entropy(singular)), rel=1e-7)


@pytest.mark.parametrize("factor", [1, 1e-6])  # of some rows, which keep their direction
@pytest.mark.parametrize("n", [120, 700])  # one block, and several with a shorter last one
def test_neighbors_equal_scikit_learn(n, factor):
    X = clustered(n)[0]
    X[::9] *= np.float32(factor)
    neighbors, similarities = nearest(X, 9)
    search = NearestNeighbors(n_neighbors=9, metric="cosine").fit(X.astype(np.float64))
    distances, expected = search.kneighbors()
    assert (neighbors == expected).mean() > 0.998  # but for similarities within a millionth
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-6)
    assert (neighbors.dtype, similarities.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("offset", [0, 40])
def test_many_wide_duplicates_are_tied_exactly(offset):
    X = np.random.default_rng(0).normal(size=(101, 331)).astype(np.float32) + offset
    X[:, 0] = 0.0
    copies = X.copy()
    copies[:, 0] = -0.0
    everything = np.concatenate([X, copies, X, X])  # in several blocks
    neighbors, similarities = nearest(everything, 403)
    for row, values in zip(neighbors, similarities, strict=True):
        places = np.argsort(row)
        others = [values[places][row[places] % 101 == image] for image in range(101)]
        assert all(np.ptp(tied) == 0 for tied in others)


@pytest.mark.parametrize("k", [1, 7, 299, 400])  # 400: all that there are
def test_neighbors_equal_a_sort_by_exact_similarity_and_index(k):
    # Entries of 1 and -1: rows of equal length, products exact in float32, and ties everywhere.
    X = np.random.default_rng(5).choice([-1, 1], (300, 16)).astype(np.float32)
    exact = X.astype(np.int64) @ X.astype(np.int64).T
    np.fill_diagonal(exact, -100)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, : min(k, 299)]
    neighbors, similarities = nearest(X, k)
    np.testing.assert_array_equal(neighbors, expected)
    similar = np.take_along_axis(exact, expected, 1) / 16
    np.testing.assert_allclose(similarities, similar, atol=1e-7)


SILHOUETTES = {
    "euclidean": lambda X, labels: metrics.all_pairs(X, labels=labels).silhouettes,
    "cosine": metrics.cosine_silhouettes,
}


@pytest.mark.parametrize("metric", SILHOUETTES)
def test_silhouettes_are_nan_for_one_class_or_single_images_and_0_for_equal_images(metric):
    for labels in (np.zeros(6, np.int64), np.arange(6)):
        assert np.isnan(SILHOUETTES[metric](clustered(6)[0], labels)).all()
    X, labels = np.full((8, 5), 0.3, np.float32), np.arange(8) % 2
    assert (SILHOUETTES[metric](X, labels) == 0).all()


@pytest.mark.parametrize("metric", SILHOUETTES)
@pytest.mark.parametrize("n", [120, 700])
def test_silhouettes_and_their_means_on_halves_equal_scikit_learn(metric, n):
    X, labels = clustered(n)
    labels[:3], X[5] = [99, 9, 9], X[6]  # 99 is a class of one image
    ours = SILHOUETTES[metric](X, labels)
    theirs = sklearn_metrics.silhouette_samples(X.astype(np.float64), labels, metric=metric)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert ours.mean() == pytest.approx(theirs.mean(), abs=1e-7)
    assert ours[0] == 0
    first = np.random.default_rng(4).random((3, n)) < 0.5
    whole = np.arange(n) < 3  # small classes are in both halves
    halves = np.stack([first, ~first], axis=1).reshape(6, n) | whole
    expected = [
        sklearn_metrics.silhouette_score(X[keep].astype(float), labels[keep], metric=metric)
        for keep in halves
    ]
    name = {"euclidean": "silhouette", "cosine": "silhouette_cosine"}[metric]
    found = metrics.all_pairs(X, 0, labels, halves).half_silhouettes[name]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_precision_counts_equal_labels_among_the_first_k():
    labels = np.array([7, 7, 9, 9])
    neighbors = np.array([[1, 2, 3], [2, 0, 3], [3, 0, 1], [0, 1, 2]])
    assert metrics.precision_at_k(neighbors, labels, 1).tolist() == [1, 0, 1, 0]
    assert metrics.precision_at_k(neighbors, labels, 2).tolist() == [0.5, 0.5, 0.5, 0]
    assert np.isnan(metrics.precision_at_k(neighbors, labels, 4)).all()
    assert np.isnan(metrics.precision_at_k(neighbors, np.arange(4), 3)).all()


def test_chance_precision_is_the_precision_of_all_other_images():
    labels = np.array([0, 0, 0, 1, 1, 5])
    everyone = np.array([[j for j in range(6) if j != i] for i in range(6)])
    mean = metrics.precision_at_k(everyone, labels, 5).mean()
    assert metrics.chance_precision(labels) == pytest.approx(mean)
    assert round(metrics.chance_precision(np.arange(2000) % 10), 4) == 0.0995
    assert np.isnan(metrics.chance_precision(np.arange(5)))


def test_knn_vote_equals_a_naive_loop_and_ties_go_to_the_lowest_label():
    X, labels = clustered(90, 3, seed=3)
    labels = labels * 10 - 5
    neighbors, similarities = nearest(X, 20)
    expected = []
    for i in range(len(X)):
        votes = dict.fromkeys(sorted(set(labels.tolist())), 0.0)
        for j, s in zip(neighbors[i], similarities[i], strict=True):
            votes[int(labels[j])] += np.exp(float(s) / 0.07)
        expected.append(max(votes, key=votes.get) == labels[i])
    correct = metrics.knn_correct(neighbors, similarities, labels)
    assert correct.tolist() == expected
    assert 0 < correct.mean() < 1
    level = np.full((4, 2), 0.5, np.float32)
    tied = metrics.knn_correct(np.array([[1, 2]] * 4), level, np.array([3, 3, 8, 8]))
    assert tied.tolist() == [1, 1, 0, 0]


def test_hubness_equals_scipy_skew_of_the_counts():
    neighbors = nearest(clustered(80, 30)[0], 12)[0]
    counts = [int((neighbors[:, :10] == j).sum()) for j in range(80)]
    hubness = metrics.hubness(neighbors)
    assert hubness["skew"] == pytest.approx(stats.skew(counts))
    assert hubness["maximum"] == max(counts)
    assert hubness["anti_hub_share"] == counts.count(0) / 80
    assert np.isnan([*metrics.hubness(neighbors, k=13).values()]).all()
    ring = metrics.hubness(np.array([[1], [2], [3], [0]]), k=1)
    assert np.isnan(ring["skew"])
    assert (ring["maximum"], ring["anti_hub_share"]) == (1, 0)
