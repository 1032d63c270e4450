import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from ijepa import probe as probes
from ijepa.data import Split
from ijepa.errors import UserError
from ijepa.probe import KS, L2_GRID, probe, select_bank


def clouds(n, d=12, num_classes=3, noise=1.6, seed=0, offset=2.0):
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(num_classes, d))
    labels = np.arange(n) % num_classes
    points = offset + centers[labels] + noise * generator.normal(size=(n, d))
    return points.astype(np.float32), labels


def two_models(num_bank, num_queries, num_classes=3):
    """Banks and queries of both models, then the labels of each."""
    sizes, noises = (num_bank, num_queries), {"local": 1.6, "hf": 2.0}
    points = [
        {
            name: clouds(n, num_classes=num_classes, noise=noise, seed=10 * part + row)[0]
            for row, (name, noise) in enumerate(noises.items())
        }
        for part, n in enumerate(sizes)
    ]
    return *points, *(np.arange(n) % num_classes for n in sizes)


@pytest.fixture(scope="module")
def small():
    data = two_models(60, 300)
    return data, probe(*data, 5)


@pytest.fixture(scope="module")
def large():
    return probe(*two_models(2001, 299, num_classes=4), 0)


@pytest.fixture(scope="module")
def digits():
    """Scans with offsets and unequal scales, as embeddings have them."""
    X, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    X = X @ (generator.normal(size=(64, 48)) * np.logspace(0, -2, 48)) + generator.normal(size=48)
    return train_test_split(X.astype(np.float32), y, test_size=0.4, random_state=0)


@pytest.fixture(scope="module")
def digits_probe(digits):
    X, Q, y, q = digits
    return probe({"local": X}, {"local": Q}, y, q, 0)


def votes(distances):
    return np.exp((1 - distances) / 0.07)


@pytest.mark.parametrize("k", KS)
def test_knn_accuracy_is_that_of_scikit_learn(digits, digits_probe, k):
    X, Q, y, q = digits
    neighbors = KNeighborsClassifier(k, weights=votes, metric="cosine", algorithm="brute")
    expected = neighbors.fit(X, y).predict(Q)
    assert digits_probe.models["local"]["knn"][k].value == pytest.approx((expected == q).mean())
    if k == KS[0]:
        np.testing.assert_array_equal(digits_probe.correct["local"]["knn"], expected == q)


@pytest.mark.parametrize("l2", L2_GRID[:4])
def test_linear_accuracy_is_that_of_scikit_learn_at_the_same_penalty(digits, l2):
    X, Q, y, q = digits
    scaler = StandardScaler().fit(X)
    regression = LogisticRegression(C=1 / (l2 * len(X)), max_iter=5000, tol=1e-6)
    expected = regression.fit(scaler.transform(X), y).score(scaler.transform(Q), q)
    answers = probes.linear_answers(X, y, Q, l2=l2)[0]
    # 0.2 points, or one of the 719 queries.
    assert (answers == q).mean() == pytest.approx(expected, abs=0.002)


def test_the_penalty_is_chosen_on_a_tenth_of_the_bank(digits, digits_probe):
    X, _, y, _ = digits
    held_out = probes.draw_parts(y, 0)[0]
    counts = np.bincount(y)
    np.testing.assert_array_equal(np.bincount(y[held_out]), counts // 10)
    scaler, found = StandardScaler().fit(X), digits_probe.models["local"]
    Z = scaler.transform(X)
    for l2, accuracy in found["held_out_accuracy"].items():
        regression = LogisticRegression(C=1 / (l2 * (~held_out).sum()), max_iter=5000)
        expected = regression.fit(Z[~held_out], y[~held_out]).score(Z[held_out], y[held_out])
        # One of the hundred images held out.
        assert accuracy == pytest.approx(expected, abs=1.01 / held_out.sum())
    # The strongest within a standard error of the best.
    accuracies = found["held_out_accuracy"]
    best = max(accuracies.values())
    limit = best - np.sqrt(best * (1 - best) / held_out.sum())
    assert found["l2"] == max(l2 for l2, accuracy in accuracies.items() if accuracy >= limit)
    assert found["l2"] > max(l2 for l2, accuracy in accuracies.items() if accuracy == best)


def test_scale_offset_rotation_and_constant_columns_change_no_linear_answer(digits):
    X, Q, y, _ = digits
    expected = probes.linear_answers(X, y, Q, l2=1e-3)[0]
    scale = np.logspace(-1, 1, X.shape[1])
    constant = [np.hstack([scale * Z + 3, np.full((len(Z), 1), 7.1)]) for Z in (X, Q)]
    X2, Q2 = (Z.astype(np.float32) for Z in constant)
    assert (probes.linear_answers(X2, y, Q2, l2=1e-3)[0] == expected).mean() > 0.997


def test_pixels_are_reduced_on_the_bank_alone(digits):
    X, Q, _, _ = digits
    reduced, queries = probes.principal_components(X, Q)
    pca = PCA(min(X.shape)).fit(X)
    for found, Z in ((reduced, X), (queries, Q)):
        expected = pca.transform(Z)
        signs = np.sign((found * expected).sum(axis=0))
        np.testing.assert_allclose(found[:, :20] * signs[:20], expected[:, :20], atol=1e-2)
    wide = clouds(30, d=700)[0]
    assert probes.principal_components(wide, wide[:4])[1].shape == (4, 30)


def test_wilson_intervals_and_paired_tests_of_a_large_bank(large):
    local, hf = (large.correct[name]["linear"] for name in ("local", "hf"))
    found, n = large.models["local"]["linear"], 299
    assert found.ci95 == pytest.approx(proportion_confint(local.sum(), n, method="wilson"))
    assert found.se == pytest.approx(np.sqrt(local.mean() * (1 - local.mean()) / n))
    assert not large.bank_in_intervals
    change = large.differences["linear"]
    gains = hf.astype(float) - local
    assert change["estimate"].value == pytest.approx(gains.mean())
    # With one disagreement more than was seen.
    variance = (np.square(gains).sum() + 1) / n - gains.mean() ** 2
    assert change["estimate"].se == pytest.approx(np.sqrt(variance / n))
    assert change["estimate"].se == pytest.approx(gains.std() / np.sqrt(n), rel=0.05)
    assert (change["wins"], change["losses"]) == ((gains > 0).sum(), (gains < 0).sum())
    table = [[0, change["wins"]], [change["losses"], 0]]
    assert change["p"] == change["mcnemar_p"] == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_a_small_bank_widens_the_intervals(small):
    (banks, queries, bank_labels, labels), probed = small
    assert probed.bank_in_intervals
    found, correct = probed.models["local"]["linear"], probed.correct["local"]["linear"]
    wilson = proportion_confint(correct.sum(), 300, method="wilson")
    assert found.ci95[0] < wilson[0] < wilson[1] < found.ci95[1]
    pairs, l2, accuracies = probes.draw_parts(bank_labels, 5)[1], probed.models["local"]["l2"], []
    for keep in pairs:
        part = banks["local"][keep], bank_labels[keep], queries["local"]
        accuracies.append((probes.linear_answers(*part, l2=l2)[0] == labels).mean())
    halves = np.subtract(accuracies[::2], accuracies[1::2]) / 2
    image = correct.mean() * (1 - correct.mean()) / 300
    assert found.se == pytest.approx(np.sqrt(image + np.square(halves).mean()))
    change = probed.differences["linear"]
    statistic = abs(change["estimate"].value) / change["estimate"].se
    assert change["p"] == pytest.approx(2 * stats.t.sf(statistic, 9))
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert (first != second).all()
        assert np.bincount(bank_labels[first]).tolist() == [10, 10, 10]


def test_each_class_has_its_accuracy_and_the_tests_are_corrected(large):
    labels = np.arange(299) % 4
    assert [row["label"] for row in large.per_class] == [0, 1, 2, 3]
    assert sum(row["n"] for row in large.per_class) == 299
    for measure in ("knn", "linear"):
        for row in large.per_class:
            correct = large.correct["hf"][measure][labels == row["label"]]
            assert row[measure]["hf"].value == pytest.approx(correct.mean())
            expected = proportion_confint(correct.sum(), len(correct), method="wilson")
            assert row[measure]["hf"].ci95 == pytest.approx(expected)
        changes = [row[measure]["difference"] for row in large.per_class]
        expected = multipletests([change["p"] for change in changes], method="holm")[1]
        assert [change["holm_p"] for change in changes] == pytest.approx(list(expected))


def test_few_images_are_drawn_alike_for_all_models():
    banks, queries, *labels = two_models(90, 200)
    banks["twin"], queries["twin"] = banks["local"].copy(), queries["local"].copy()
    probed = probe(banks, queries, *labels, 3)
    few = {name: model["few_shot"] for name, model in probed.models.items()}
    assert few["twin"] == few["local"]
    same = probed.gains["twin"]
    for size in probes.FEW_IMAGES:
        for measure in ("knn", "linear"):
            assert same["few_shot"][size][measure]["estimate"].ci95 == (0, 0)
            paired = probed.differences["few_shot"][size][measure]["estimate"].value
            one, other = (few[name][size][measure]["estimate"].value for name in ("hf", "local"))
            assert paired == pytest.approx(one - other)
    draws = probes.draw_parts(labels[0], 3)[2]
    assert {size: len(kept) for size, kept in draws.items()} == {1: 20, 10: 20}
    parts = [(banks["hf"][keep], labels[0][keep], queries["hf"]) for keep in draws[10]]
    means = [probes.knn_answers(*part, [20])[0] == labels[1] for part in parts]
    found = few["hf"][10]["knn"]
    assert found["estimate"].value == pytest.approx(np.mean(means))
    assert found["sd"] == pytest.approx(np.mean(means, axis=1).std(ddof=1))
    image = np.mean(means, axis=0).var() / 200
    # Ten of thirty images overlap as if there were fewer draws.
    drawn = found["sd"] ** 2 * (1 / 20 + 0.5)
    assert found["estimate"].se == pytest.approx(np.sqrt(drawn + image))


def test_nothing_is_chosen_on_the_queries(small):
    (*data, labels), right = small
    wrong = probe(*data, (labels + 1) % 3, 5)
    for name in ("local", "hf"):
        for key in ("l2", "held_out_accuracy"):
            assert wrong.models[name][key] == right.models[name][key]


def test_the_order_of_the_queries_does_not_matter_and_the_seed_repeats(small):
    (banks, queries, bank_labels, labels), expected = small
    order = np.random.default_rng(0).permutation(300)
    shuffled = {name: Q[order] for name, Q in queries.items()}
    found = probe(banks, shuffled, bank_labels, labels[order], 5)
    np.testing.assert_array_equal(found.correct["hf"]["knn"], expected.correct["hf"]["knn"][order])
    assert probe(*small[0], 5).record() == expected.record()


def test_models_that_never_differ_have_an_interval_all_the_same():
    right = np.ones((1, 50), bool)
    found = probes.difference(right, right)
    low, high = found["estimate"].ci95
    assert low < 0 < high
    assert found["p"] == 1


def test_queries_of_a_class_that_the_bank_lacks_count_as_wrong():
    banks, queries, bank_labels, query_labels = two_models(90, 60)
    kept = bank_labels != 1
    banks = {name: X[kept] for name, X in banks.items()}
    probed = probe(banks, queries, bank_labels[kept], query_labels, 0)
    assert probed.per_class[1]["linear"]["local"].value == 0
    assert not probed.correct["hf"]["knn"][query_labels == 1].any()
    assert any("20 compared images" in note and "lacks" in note for note in probed.notes)


@pytest.mark.parametrize("counts", [[1], [5], [1, 1, 1], [2, 1], [3, 1, 12]])
def test_tiny_banks_give_numbers_and_say_what_is_left_out(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    generator = np.random.default_rng(0)
    bank = generator.normal(size=(len(labels), 4)).astype(np.float32)
    queries = generator.normal(size=(9, 4)).astype(np.float32)
    query_labels = np.arange(9) % len(counts)
    probed = probe({"local": bank}, {"local": queries}, labels, query_labels, 0)
    low, high = probed.models["local"]["linear"].ci95
    assert 0 <= low <= probed.models["local"]["linear"].value <= high <= 1
    assert probed.bank_in_intervals == (max(counts) > 1)
    assert any("means the whole bank" in note for note in probed.notes)
    assert any("no draws of" in note for note in probed.notes)
    assert probed.differences == {}
    if len(counts) == 1:
        assert probed.models["local"]["knn"][20].value == 1
    json.dumps(probed.record(), allow_nan=False)


def test_what_is_no_number_is_refused():
    banks, queries, *labels = two_models(30, 12)
    broken = {**banks, "hf": np.where(np.arange(30)[:, None] == 4, np.nan, banks["hf"])}
    with pytest.raises(UserError, match="NaN"):
        probe(broken, queries, *labels, 0)


def test_progress_reaches_its_total():
    seen = []

    @contextmanager
    def progress(total, desc):
        yield SimpleNamespace(update=seen.append)
        assert (sum(seen), desc) == (total, "probe")

    probe(*two_models(30, 12), 0, progress)
    assert seen == [12, 12]


def test_a_bank_is_balanced_nested_matched_by_name_and_free_of_compared_images():
    labels = np.repeat([0, 1, 2], [30, 40, 50])
    pixels = torch.arange(120)[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8)
    pixels = torch.where(torch.arange(120)[:, None, None, None] == 7, 100, pixels)
    train = Split("x", "train", ("c", "b", "a"), pixels, labels, np.arange(120))
    rows = np.array([7, 31, 33])
    compared = replace(train.take(rows), classes=("a", "b"), labels=np.array([0, 1, 0]))
    small, excluded = select_bank(train, compared, 30, 4)
    large, _ = select_bank(train, compared, 60, 4)
    everything, _ = select_bank(train, compared, 0, 4)
    assert excluded == 4
    assert not {7, 100, 31, 33} & set(everything.indices.tolist())
    assert len(everything) == 116
    # a and b have the numbers of the compared ones; c has one of its own.
    assert everything.labels.tolist() == [[2, 1, 0][labels[row]] for row in everything.indices]
    assert np.bincount(small.labels).tolist() == [10, 10, 10]
    taken = [set(one.indices.tolist()) for one in (small, large, everything)]
    assert taken[0] < taken[1] < taken[2]
