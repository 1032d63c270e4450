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


def joining_heights(merges):
    heights = np.zeros((5, 5))
    for left, right, height in merges:
        heights[np.ix_(left, right)] = heights[np.ix_(right, left)] = height
    return heights


def test_trees_are_compared_by_the_correlation_and_all_orders_of_the_classes():
    X, labels = images(CENTERS)
    Y = images(CENTERS + np.random.default_rng(1).normal(size=(5, 4)))[0]
    found = groups({"local": X, "hf": Y}, labels, num_permutations=4000)
    a, b = (joining_heights(found[name]["merges"]) for name in ("local", "hf"))
    pairs = np.triu_indices(5, 1)
    observed, *others = (
        stats.pearsonr(a[pairs], b[np.ix_(order, order)][pairs]).statistic
        for order in permutations(range(5))
    )
    assert found["cophenetic"] == pytest.approx(observed)
    as_large = 1 + sum(other >= observed - 1e-9 for other in others)
    assert found["p"] == pytest.approx(as_large / 120, abs=0.03)
    assert json.loads(json.dumps(found)) == found
    assert groups({"local": X, "hf": Y}, labels, num_permutations=4000) == found


def test_few_classes_and_means_without_direction_have_no_groups():
    X, labels = images(CENTERS[:2])
    assert groups({"local": X}, labels) == {}
    assert groups({"local": np.ones((9, 3), np.float32)}, np.repeat([0, 1, 2], 3)) == {}
    X, labels = images(CENTERS[:3])
    assert len(groups({"local": X}, labels)["local"]["merges"]) == 2
