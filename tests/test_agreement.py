import json
from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from ijepa import agreement, compare, narrative
from ijepa.agreement import class_groups
from ijepa.metrics import all_pairs


def pair(n=40, d=5, e=9, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(n, d)) + 2
    Y = np.hstack([X, generator.normal(size=(n, e - d))]) @ generator.normal(size=(e, e))
    return X.astype(np.float32), Y.astype(np.float32)


def song_hsic(X, Y):
    """Equation 5 of Song et al. 2012, from the n x n Gram matrices without their diagonals."""
    K, L = (Z.astype(float) @ Z.T.astype(float) * (1 - np.eye(len(Z))) for Z in (X, Y))
    n, ones = len(K), np.ones(len(K))
    sums = (ones @ K @ ones) * (ones @ L @ ones) / ((n - 1) * (n - 2))
    return (np.trace(K @ L) + sums - 2 / (n - 2) * ones @ K @ L @ ones) / (n * (n - 3))


def test_cka_equals_the_ratio_of_naive_u_statistics():
    X, Y = pair(n=9, d=3, e=14)
    expected = song_hsic(X, Y) / np.sqrt(song_hsic(X, X) * song_hsic(Y, Y))
    assert agreement.linear_cka(X, Y) == pytest.approx(expected, abs=1e-10)


def test_cka_ignores_rotation_scale_translation_and_the_order_of_images():
    X, Y = pair()
    expected = agreement.linear_cka(X, Y)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0]
    order, wide = np.random.default_rng(2).permutation(len(X)), X.astype(float)
    for same in ((X, Y @ rotation), (-3e3 * wide, Y), (wide + 50, Y), (X[order], Y[order]), (Y, X)):
        assert agreement.linear_cka(*same) == pytest.approx(expected, abs=1e-10)
    assert agreement.linear_cka(X, X) == pytest.approx(1, abs=1e-12)
    stretch = np.array([9, 1, 1, 1, 1])
    assert abs(agreement.linear_cka(X * stretch, Y) - expected) > 0.01


def test_cka_is_nan_where_it_is_not_defined():
    X, Y = pair()
    constant = np.full_like(Y, 0.1)
    assert np.isnan([agreement.linear_cka(X, constant), agreement.linear_cka(X[:3], Y[:3])]).all()
    null = agreement.cka_and_null(X, constant, np.arange(40) % 2, 3)[1]
    assert np.isnan(null).tolist() == [True] * 3
    assert np.isnan(agreement.linear_cka(X[:4], Y[:4], np.array([0, 0, 1, 1])))  # always +-1


def test_shuffles_that_change_nothing_are_as_large_as_the_observed_cka():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        once = {name: rng.normal(size=(15, 8)) for name in ("local", "hf")}
        twice = {name: X.repeat(2, axis=0) for name, X in once.items()}
        assert compare(twice, {}, np.arange(30) // 2, seed=0).agreement["cka_null_p"] == 1
        without_pairs = compare(once, {}, np.arange(15), seed=0)
        assert np.isnan(without_pairs.agreement["cka_null_p"])
        said = narrative.agreement_finding(without_pairs)
        assert "Debiased linear CKA is " in said
        assert "Chance is 71.4%." in said


def test_cka_next_to_the_classes_ignores_their_means():
    X, Y = pair()
    labels = np.arange(40) % 3 * 5
    expected = agreement.linear_cka(X, Y, labels)
    moved = X + np.random.default_rng(0).normal(size=(11, 5))[labels].astype(np.float32)
    assert agreement.linear_cka(moved, Y, labels) == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(agreement.linear_cka(X, Y), abs=0.01)
    assert agreement.linear_cka(X, X, labels) == pytest.approx(1)
    assert np.isnan(agreement.linear_cka(np.eye(3)[labels // 5], Y, labels))


@pytest.mark.parametrize(("n", "num_classes"), [(500, 100), (400, 190), (300, 10), (300, 1)])
def test_cka_of_noise_next_to_the_classes_is_zero(n, num_classes):
    generator = np.random.default_rng(0)
    labels = np.arange(n) % num_classes
    X, Y = (generator.normal(size=(n, d)).astype(np.float32) for d in (192, 1280))
    assert abs(agreement.linear_cka(X, Y, labels)) < 0.01


def test_cka_next_to_the_classes_is_the_same_with_two_or_with_many_images_of_a_class():
    shared, *own = np.split(np.random.default_rng(1).normal(size=(3000, 24)), [6, 15], axis=1)
    X, Y = (np.hstack([shared, one]).astype(np.float32) for one in own)
    few, many = (agreement.linear_cka(X, Y, np.arange(3000) % c) for c in (1500, 10))
    assert few == pytest.approx(many, abs=0.03)
    assert many == pytest.approx(6 / 15, abs=0.03)


def test_two_models_that_share_only_classes_have_the_predicted_neighbors_in_common():
    generator = np.random.default_rng(0)
    labels = np.arange(2000) % 10
    lists = []
    for scale in (4, 1.5):
        X = scale * np.eye(10)[labels] + generator.normal(size=(2000, 10))
        lists.append(all_pairs(X.astype(np.float32), 10).neighbors)
    same = [(labels[found] == labels[:, None]).mean(axis=1) for found in lists]
    expected = agreement.mutual_knn_of_classes(*same, labels)
    assert agreement.mutual_knn(*lists).mean() == pytest.approx(expected, rel=0.1)
    perfect = np.ones(40)
    assert agreement.mutual_knn_of_classes(perfect, perfect, np.arange(40) % 2) == 10 / 19


def test_cka_null_equals_cka_of_the_same_shuffles():
    X, Y = pair()
    labels = np.arange(40) % 3
    cka, null = agreement.cka_and_null(X, Y, labels, num_permutations=5, seed=3)
    assert cka == pytest.approx(agreement.linear_cka(X, Y))
    generator = np.random.default_rng(3)
    for value in null:
        order = np.empty(40, int)
        for label in range(3):
            images = np.flatnonzero(labels == label)
            order[images] = generator.permutation(images)
        assert value == pytest.approx(agreement.linear_cka(X[order], Y), abs=1e-6)
    np.testing.assert_array_equal(null, agreement.cka_and_null(X, Y, labels, 5, seed=3)[1])


def test_similarity_spearman_equals_scipy_with_ties_and_is_nan_where_all_are_equal():
    X, Y = pair()
    X[3] = X[4] = X[5]
    pairs = np.triu_indices(40, k=1)
    unit = (Z / np.linalg.norm(Z.astype(float), axis=1, keepdims=True) for Z in (X, Y))
    expected = stats.spearmanr(*((Z @ Z.T)[pairs].round(10) for Z in unit)).statistic
    assert agreement.similarity_spearman(X, Y) == pytest.approx(expected, abs=1e-10)
    assert agreement.similarity_spearman(X, 2 * X) == pytest.approx(1)
    constant = np.random.default_rng(0).normal(size=(1, 193)).repeat(61, axis=0).astype(np.float32)
    assert np.isnan(agreement.similarity_spearman(constant, pair(61)[0]))


def test_similarity_spearman_takes_2000_of_more_images_by_seed():
    X, Y = pair(2010)
    value = agreement.similarity_spearman(X, Y, seed=1)
    kept = np.random.default_rng(1).choice(2010, 2000, replace=False)
    assert value == agreement.similarity_spearman(X[kept], Y[kept])
    assert value != agreement.similarity_spearman(X, Y, seed=2)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 3), (1, 9), (20, 5), (1700, 1900)])
def test_mcnemar_equals_statsmodels(only_a, only_b):
    a = np.repeat([True, False, True, False], [only_a, only_b, 11, 4])
    b = np.repeat([False, True, True, False], [only_a, only_b, 11, 4])
    expected = mcnemar([[11, only_a], [only_b, 4]], exact=True).pvalue if only_a + only_b else 1
    assert agreement.mcnemar_exact_p(a, b) == pytest.approx(expected, rel=1e-9)
    assert agreement.mcnemar_exact_p(a, b) == agreement.mcnemar_exact_p(b, a)


@pytest.mark.parametrize("size", [1, 2, 10])
def test_holm_equals_statsmodels_and_leaves_out_what_is_not_defined(size):
    p_values = np.random.default_rng(size).random(size) ** 3
    p_values[-1] = p_values[0]
    rows = [{"p": p} for p in [*p_values[:1], np.nan, *p_values[1:]]]
    agreement.add_holm(rows, "p", "adjusted")
    found = [row["adjusted"] for row in rows]
    assert np.isnan(found.pop(1))
    np.testing.assert_allclose(found, multipletests(p_values, method="holm")[1], rtol=1e-12)


def images(centers):
    labels = np.repeat(np.arange(len(centers)), 6)
    noise = np.random.default_rng(0).normal(size=(len(labels), len(centers[0])))
    return (np.asarray(centers)[labels] + 0.01 * noise).astype(np.float32), labels


# Two vehicles close to each other, two animals close to each other, and one a bit off.
CENTERS = [[3, 0.2, 0, 1], [3, -0.2, 0, 1], [-3, 0, 0.3, 1], [-3, 0, -0.3, 1], [-2, 3, 0, 1]]


def test_groups_are_those_of_a_naive_average_linkage():
    generator = np.random.default_rng(3)
    X, labels = images(generator.normal(size=(7, 5)))
    means = np.stack([X[labels == c].mean(axis=0, dtype=float) for c in range(7)])
    means -= means.mean(axis=0)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    clusters, expected = [[c] for c in range(7)], []
    while len(clusters) > 1:
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[i + 1 :]]
        height, a, b = min((distance[np.ix_(a, b)].mean(), a, b) for a, b in pairs)
        clusters = [c for c in clusters if c not in (a, b)] + [sorted(a + b)]
        expected.append([*sorted([a, b]), height])
    found = class_groups({"local": X}, labels)["local"]
    assert [row[:2] for row in found["merges"]] == [row[:2] for row in expected]
    heights = [row[2] for row in found["merges"]]
    assert heights == pytest.approx([row[2] for row in expected])
    assert found["top"] == expected[-1][:2]


def test_labels_keep_their_numbers_and_the_order_of_images_does_not_matter():
    X, labels = images(CENTERS)
    order = np.random.default_rng(0).permutation(len(labels))
    found = class_groups({"local": 5 * X[order] + 2}, 10 * labels[order] + 3)
    assert found["local"]["top"] == [[3, 13], [23, 33, 43]]
    assert "cophenetic" not in found


def test_trees_are_compared_by_the_correlation_and_all_orders_of_the_classes():
    X, labels = images(CENTERS)
    Y = images(CENTERS + np.random.default_rng(1).normal(size=(5, 4)))[0]
    found = class_groups({"local": X, "hf": Y}, labels, num_permutations=4000)
    a, b = np.zeros((2, 5, 5))
    for heights, name in ((a, "local"), (b, "hf")):
        for left, right, height in found[name]["merges"]:
            heights[np.ix_(left, right)] = heights[np.ix_(right, left)] = height
    pairs = np.triu_indices(5, 1)
    observed, *others = (
        stats.pearsonr(a[pairs], b[np.ix_(order, order)][pairs]).statistic
        for order in permutations(range(5))
    )
    assert found["cophenetic"] == pytest.approx(observed)
    as_large = 1 + sum(other >= observed - 1e-9 for other in others)
    assert found["p"] == pytest.approx(as_large / 120, abs=0.03)
    assert json.loads(json.dumps(found)) == found
    assert class_groups({"local": X, "hf": Y}, labels, num_permutations=4000) == found


def test_few_classes_and_means_without_direction_have_no_groups():
    X, labels = images(CENTERS[:2])
    assert class_groups({"local": X}, labels) == {}
    assert class_groups({"local": np.ones((9, 3), np.float32)}, np.repeat([0, 1, 2], 3)) == {}
    X, labels = images(CENTERS[:3])
    assert len(class_groups({"local": X}, labels)["local"]["merges"]) == 2
