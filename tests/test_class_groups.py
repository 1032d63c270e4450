import json
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from ijepa.agreement import class_groups
from ijepa.metrics import class_means


def groups(embeddings, labels, *args, **options):
    classes, codes = np.unique(labels, return_inverse=True)
    means = {name: class_means(X, codes) for name, X in embeddings.items()}
    return class_groups(means, classes, *args, **options)


def images(centers, per_class=6, noise=0.01, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(centers)), per_class)
    points = np.asarray(centers, float)[labels]
    return (points + noise * generator.normal(size=points.shape)).astype(np.float32), labels


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
    found = groups({"local": X}, labels)["local"]
    assert [row[:2] for row in found["merges"]] == [row[:2] for row in expected]
    heights = [row[2] for row in found["merges"]]
    assert heights == pytest.approx([row[2] for row in expected])
    assert found["top"] == expected[-1][:2]


def test_labels_keep_their_numbers_and_the_order_of_images_does_not_matter():
    X, labels = images(CENTERS)
    order = np.random.default_rng(0).permutation(len(labels))
    found = groups({"local": 5 * X[order] + 2}, 10 * labels[order] + 3)
    assert found["local"]["top"] == [[3, 13], [23, 33, 43]]
    assert "cophenetic" not in found


def naive_p(a, b, num_classes):
    """Over all orders of the classes."""
    pairs = [(i, j) for i in range(num_classes) for j in range(i + 1, num_classes)]
    position = {pair: at for at, pair in enumerate(pairs)}
    observed = stats.pearsonr(a, b).statistic
    values = []
    for order in permutations(range(num_classes)):
        shuffled = [b[position[tuple(sorted((order[i], order[j])))]] for i, j in pairs]
        values.append(stats.pearsonr(a, shuffled).statistic)
    return observed, np.mean(np.array(values) >= observed - 1e-9)


def joining_heights(merges, num_classes):
    heights = {}
    for left, right, height in merges:
        heights |= {tuple(sorted((i, j))): height for i in left for j in right}
    return [heights[i, j] for i in range(num_classes) for j in range(i + 1, num_classes)]


def test_trees_are_compared_by_the_correlation_and_all_orders_of_the_classes():
    generator = np.random.default_rng(1)
    X, labels = images(CENTERS)
    Y = images(np.array(CENTERS) + generator.normal(size=(5, 4)))[0]
    found = groups({"local": X, "hf": Y}, labels, num_permutations=4000)
    a, b = (joining_heights(found[name]["merges"], 5) for name in ("local", "hf"))
    observed, p = naive_p(a, b, 5)
    assert found["cophenetic"] == pytest.approx(observed)
    assert found["p"] == pytest.approx(p, abs=0.03)
    assert json.loads(json.dumps(found)) == found


def test_equal_trees_agree_wholly_and_the_seed_repeats():
    X, labels = images(np.random.default_rng(0).normal(size=(8, 6)))
    same = groups({"local": X, "hf": X @ np.diag([1, -1, 1, 1, -1, 1])}, labels)
    assert same["cophenetic"] == pytest.approx(1)
    assert same["p"] < 0.01
    pair = {"local": X, "hf": images(np.random.default_rng(1).normal(size=(8, 6)))[0]}
    assert groups(pair, labels, 7) == groups(pair, labels, 7)


def test_few_classes_and_means_without_direction_have_no_groups():
    X, labels = images(CENTERS[:2])
    assert groups({"local": X}, labels) == {}
    assert groups({"local": np.ones((9, 3), np.float32)}, np.repeat([0, 1, 2], 3)) == {}
    X, labels = images(CENTERS[:3])
    assert len(groups({"local": X}, labels)["local"]["merges"]) == 2
