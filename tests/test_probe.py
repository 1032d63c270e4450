import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from unittest.mock import MagicMock, call

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
from ijepa.data import Split, load_split
from ijepa.errors import UserError
from ijepa.probe import KS, L2_GRID, probe, select_bank


def two_models(num_bank, num_queries, num_classes=3):
    """Banks and queries of both models, then the labels of each."""
    generator = np.random.default_rng(0)
    centers = 2 + generator.normal(size=(num_classes, 12))
    labels = [np.arange(n) % num_classes for n in (num_bank, num_queries)]

    def cloud(own, noise):
        return (centers[own] + noise * generator.normal(size=(len(own), 12))).astype(np.float32)

    points = [{"local": cloud(own, 1.6), "hf": cloud(own, 2.0)} for own in labels]
    return *points, *labels


@pytest.fixture(scope="module")
def small():
    data = two_models(60, 300)
    return data, probe(*data, 5)


@pytest.fixture(scope="module")
def large():
    return probe(*two_models(2001, 299, num_classes=4), 0)


@pytest.fixture(scope="module")
def digits():
    """Scans with offsets and unequal scales, as embeddings have them: X, Q, y, q."""
    X, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    X = X @ (generator.normal(size=(64, 48)) * np.logspace(0, -2, 48)) + generator.normal(size=48)
    return train_test_split(X.astype(np.float32), y, test_size=0.4, random_state=0)


@pytest.fixture(scope="module")
def digits_probe(digits):
    X, Q, *labels = digits
    return probe({"local": X}, {"local": Q}, *labels, 0)


@pytest.mark.parametrize("k", KS)
def test_knn_accuracy_is_that_of_scikit_learn(digits, digits_probe, k):
    X, Q, y, q = digits
    look = {"metric": "cosine", "algorithm": "brute"}
    neighbors = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.07), **look)
    expected = neighbors.fit(X, y).predict(Q)
    assert digits_probe.models["local"]["knn"][k].value == pytest.approx((expected == q).mean())
    if k == KS[0]:
        np.testing.assert_array_equal(digits_probe.correct["local"]["knn"], expected == q)


@pytest.mark.parametrize("l2", L2_GRID[:4])
def test_linear_accuracy_is_that_of_scikit_learn_at_the_same_penalty(digits, l2):
    X, Q, y, q = digits
    scaler = StandardScaler().fit(X.astype(np.float64))
    bank, queries = (scaler.transform(Z.astype(np.float64)) for Z in (X, Q))
    regression = LogisticRegression(C=1 / (l2 * len(X)), max_iter=5000, tol=1e-6)
    expected = regression.fit(bank, y).score(queries, q)
    answers = probes.linear_answers(X, y, Q, l2=l2)[0]
    # 0.2 points, or one of the 719 queries.
    assert (answers == q).mean() == pytest.approx(expected, abs=0.002)


def test_the_penalty_is_chosen_on_a_tenth_of_the_bank(digits, digits_probe):
    X, _, y, _ = digits
    held_out, found = probes.draw_parts(y, 0)[0], digits_probe.models["local"]
    np.testing.assert_array_equal(np.bincount(y[held_out]), np.bincount(y) // 10)
    Z, accuracies = StandardScaler().fit_transform(X), found["held_out_accuracy"]
    for l2, accuracy in accuracies.items():
        regression = LogisticRegression(C=1 / (l2 * (~held_out).sum()), max_iter=5000)
        expected = regression.fit(Z[~held_out], y[~held_out]).score(Z[held_out], y[held_out])
        # One of the hundred images held out.
        assert accuracy == pytest.approx(expected, abs=1.01 / held_out.sum())
    # The strongest within a standard error of the best.
    best = max(accuracies.values())
    limit = best - np.sqrt(best * (1 - best) / held_out.sum())
    assert found["l2"] == max(l2 for l2, accuracy in accuracies.items() if accuracy >= limit)
    assert found["l2"] > max(l2 for l2, accuracy in accuracies.items() if accuracy == best)


def test_scale_offset_and_constant_columns_change_no_linear_answer(digits):
    X, Q, y, _ = digits
    expected = probes.linear_answers(X, y, Q, l2=1e-3)[0]
    scaled = [Z * np.logspace(-1, 1, X.shape[1]) + 3 for Z in (X, Q)]
    X, Q = (np.pad(Z, ((0, 0), (0, 1)), constant_values=7.1).astype(np.float32) for Z in scaled)
    assert (probes.linear_answers(X, y, Q, l2=1e-3)[0] == expected).mean() > 0.997


def test_pixels_are_reduced_on_the_bank_alone(digits):
    X, Q, _, _ = digits
    reduced, queries = probes.principal_components(X, Q)
    pca = PCA(min(X.shape)).fit(X)
    for found, Z in ((reduced, X), (queries, Q)):
        expected = pca.transform(Z)
        signs = np.sign((found * expected).sum(axis=0))
        np.testing.assert_allclose(found[:, :20] * signs[:20], expected[:, :20], atol=1e-2)


@pytest.mark.parametrize(("n", "d", "copies"), [(30, 700, 1), (200, 40, 3)])
def test_axes_without_variance_decide_no_answer_on_pixels(n, d, copies):
    """Of few images, and of gray ones, whose three channels are equal."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 5
    X, Q = (np.tile(rng.normal(size=(n, d)) + 0.5 * d**0.5 * np.eye(d)[y], copies) for _ in "XQ")
    X, Q = (Z.astype(np.float32) + 0.5 for Z in (X, Q))
    assert probes.principal_components(X, Q)[1].shape == (n, min(n - 1, d))
    expected = LogisticRegression(max_iter=1000).fit(X, y).score(Q, y)
    found = probe({"pixels": X}, {"pixels": Q}, y, y, 0).models["pixels"]["linear"].value
    assert expected > 0.5
    assert found > expected - 0.15


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
    assert (change["wins"], change["losses"]) == ((gains > 0).sum(), (gains < 0).sum())
    table = [[0, change["wins"]], [change["losses"], 0]]
    assert change["p"] == change["mcnemar_p"] == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_the_length_of_embeddings_does_not_matter(small):
    (banks, queries, *labels), _ = small
    found = [
        probe({"local": banks["local"] * scale}, {"local": queries["local"] * scale}, *labels, 5)
        for scale in np.float32([1, 1e-9, 1e9])
    ]
    accuracies = [one.models["local"]["knn"][20].value for one in found]
    assert accuracies == [accuracies[0]] * 3


def test_a_small_bank_widens_the_intervals(small):
    (banks, queries, bank_labels, labels), probed = small
    assert probed.bank_in_intervals
    found, correct = probed.models["local"]["linear"], probed.correct["local"]["linear"]
    wilson = proportion_confint(correct.sum(), 300, method="wilson")
    assert found.ci95[0] < wilson[0] < wilson[1] < found.ci95[1]
    pairs, accuracies = probes.draw_parts(bank_labels, 5)[1], []
    for keep in pairs:
        part = banks["local"][keep], bank_labels[keep], queries["local"]
        answers = probes.linear_answers(*part, l2=probed.models["local"]["l2"])[0]
        accuracies.append((answers == labels).mean())
    halves = np.subtract(accuracies[::2], accuracies[1::2]) / 2
    image = correct.mean() * (1 - correct.mean()) / 300
    assert found.se == pytest.approx(np.sqrt(image + np.square(halves).mean()))
    change = probed.differences["linear"]
    value, (low, high) = change["estimate"].value, change["estimate"].ci95
    statistic = abs(value) / (high - value) * stats.t.ppf(0.975, 9)
    assert change["p"] == pytest.approx(2 * stats.t.sf(statistic, 9))
    assert (change["p"] < 0.05) == (low > 0 or high < 0)
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert (first != second).all()
        assert np.bincount(bank_labels[first]).tolist() == [10, 10, 10]


def test_each_class_has_its_accuracy_and_the_tests_are_corrected(large):
    labels = np.arange(299) % 4
    assert [row["n"] for row in large.per_class] == [75, 75, 75, 74]
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
    banks["twin"], queries["twin"] = banks["local"], queries["local"]
    probed = probe(banks, queries, *labels, 3)
    few = {name: model["few_shot"] for name, model in probed.models.items()}
    assert few["twin"] == few["local"]
    gains, changes = probed.gains["twin"]["few_shot"], probed.differences["few_shot"]
    for size, measure in product(probes.FEW_IMAGES, ("knn", "linear")):
        assert gains[size][measure]["estimate"].ci95 == (0, 0)
        one, other = (few[name][size][measure]["estimate"].value for name in ("hf", "local"))
        assert changes[size][measure]["estimate"].value == pytest.approx(one - other)
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


def test_neither_labels_nor_order_of_the_queries_matter_and_the_seed_repeats(small):
    (banks, queries, bank_labels, labels), expected = small
    assert repr(probe(*small[0], 5)) == repr(expected)
    order = np.random.default_rng(0).permutation(300)
    shuffled = {name: Q[order] for name, Q in queries.items()}
    found = probe(banks, shuffled, bank_labels, labels[order], 5)
    np.testing.assert_array_equal(found.correct["hf"]["knn"], expected.correct["hf"]["knn"][order])
    wrong = probe(banks, queries, bank_labels, (labels + 1) % 3, 5)
    for name, model in wrong.models.items():
        for chosen in ("l2", "held_out_accuracy"):
            assert model[chosen] == expected.models[name][chosen]


def test_queries_of_a_class_that_the_bank_lacks_count_as_wrong():
    banks, queries, bank_labels, labels = two_models(90, 60)
    kept = bank_labels != 1
    banks = {name: X[kept] for name, X in banks.items()}
    probed = probe(banks, queries, bank_labels[kept], labels, 0)
    assert probed.per_class[1]["linear"]["local"].value == 0
    assert not probed.correct["hf"]["knn"][labels == 1].any()
    assert any("20 compared images" in note and "lacks" in note for note in probed.notes)


@pytest.mark.parametrize(("apart", "weakest"), [(1e-3, True), (3e-3, False)])
def test_a_penalty_at_the_end_of_the_grid_is_told(apart, weakest):
    """The classes differ in a direction of little variance, which needs large weights."""
    labels = np.arange(800) % 2
    column = np.random.default_rng(0).normal(size=800)
    X = np.stack([column, column + apart * (2 * labels - 1)], axis=1).astype(np.float32)
    bank, queries = ({"local": part, "pixels": part} for part in (X[:400], X[400:]))
    probed = probe(bank, queries, labels[:400], labels[400:], 0)
    told = [note for note in probed.notes if note.startswith("A weaker L2 than the weakest")]
    assert (probed.models["local"]["l2"] == 1e-6) == weakest
    assert any(note.endswith(": local.") or ": local, " in note for note in told) == weakest


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
    json.dumps(asdict(replace(probed, correct={})), allow_nan=False)


def test_what_is_no_number_is_refused_and_progress_reaches_its_total():
    (banks, queries, *labels), bar = two_models(30, 12), MagicMock()
    probe(banks, queries, *labels, 0, bar)
    bar.assert_called_once_with(total=24, desc="probe")
    assert bar().__enter__().update.call_args_list == [call(12)] * 2
    banks["hf"][4] = np.nan
    with pytest.raises(UserError, match="NaN"):
        probe(banks, queries, *labels, 0)


def test_a_bank_is_balanced_nested_matched_by_name_and_free_of_compared_images():
    labels = np.repeat([0, 1, 2], [30, 40, 50])
    shades = np.arange(120)
    shades[7] = 100  # a copy
    pixels = torch.from_numpy(shades)[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8)
    train = Split("x", "train", ("c", "b", "a"), pixels, labels, np.arange(120))
    compared = train.take(np.array([7, 31, 33]))
    compared = replace(compared, classes=("a", "b"), labels=np.array([0, 1, 0]))
    (small, excluded), (large, _), (everything, _) = (
        select_bank(train, compared, limit, 4) for limit in (30, 60, 0)
    )
    assert excluded == 4
    taken = [set(one.indices.tolist()) for one in (small, large, everything)]
    assert taken[0] < taken[1] < taken[2] == set(range(120)) - {7, 100, 31, 33}
    # a and b have the numbers of the compared ones; c has one of its own.
    assert everything.labels.tolist() == [[2, 1, 0][labels[row]] for row in everything.indices]
    assert np.bincount(small.labels).tolist() == [10, 10, 10]


def test_of_files_only_those_as_large_as_a_compared_one_are_read(make_image_folder, monkeypatch):
    folder = make_image_folder({"train/a": 3, "train/b": 4, "test/a": 2, "test/b": 2})
    (folder / "train" / "b" / "copy.png").write_bytes((folder / "test/a/000.png").read_bytes())
    train, test = (load_split(str(folder), folder, name, True) for name in ("train", "test"))
    test, read, read_bytes = test.take(np.array([0, 1])), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    bank, excluded = select_bank(train, test, 0, 0)
    assert (len(bank), excluded) == (7, 1)
    assert read
    assert not {*folder.rglob("b/00*.png")} & {*read}  # images of b have one row more


def test_intervals_of_accuracies_with_few_images_end_at_0_and_100_percent():
    """All queries but one are easy: without an end an interval would exceed 100%."""
    rng, y = np.random.default_rng(0), np.arange(60) % 3
    noise = rng.normal(size=(60, 8)).astype(np.float32)
    apart = (noise + 4 * np.eye(8)[y]).astype(np.float32)
    found = probe({"local": apart}, {"local": np.vstack([apart[:-1], noise[:1]])}, y, y, 0)
    few = found.models["local"]["few_shot"].values()
    estimates = [one["estimate"] for measures in few for one in measures.values()]
    assert max(one.ci95[1] for one in estimates) == 1.0
    assert all(0 <= one.ci95[0] < one.ci95[1] <= 1 for one in estimates)
