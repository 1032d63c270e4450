import numpy as np
import pytest
from scipy.stats import binomtest

from ijepa.comparison import METRICS, analyze, compare, neighbor_confusion
from ijepa.errors import UserError
from ijepa.uncertainty import NUM_HALVES


def cloud(width, per_class=25, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    centers = rng.normal(size=(3, width))
    return (centers[labels] + rng.normal(size=(len(labels), width))).astype(np.float32), labels


@pytest.fixture(scope="module")
def pair():
    X, labels = cloud(8)
    Y, _ = cloud(12, seed=1)
    return compare({"local": X, "hf": Y}, {"pixels": X[:, :4]}, labels, seed=0)


def test_every_metric_of_the_table_is_there_for_every_model_and_reference(pair):
    for numbers in [*pair.metrics.values(), *pair.references.values(), pair.differences]:
        assert list(numbers) == list(METRICS)


def test_differences_are_hf_minus_local(pair):
    for metric, facts in pair.differences.items():
        expected = pair.metrics["hf"][metric].value - pair.metrics["local"][metric].value
        assert facts["estimate"].value == pytest.approx(expected, nan_ok=True)


def test_swapping_the_sides_turns_every_sign(pair):
    swapped = compare(
        {"local": pair.analyses["hf"].embeddings, "hf": pair.analyses["local"].embeddings},
        {},
        pair.analyses["local"].labels,
        seed=0,
    )
    there, back = (c.differences["precision_at_5"] for c in (pair, swapped))
    assert back["estimate"].value == -there["estimate"].value
    assert back["estimate"].ci95 == pytest.approx(
        [-bound for bound in there["estimate"].ci95[::-1]]
    )
    assert (back["wins"], back["losses"]) == (there["losses"], there["wins"])


def test_a_model_against_itself_differs_by_exactly_nothing():
    X, labels = cloud(8)
    same = compare({"local": X, "hf": X.copy()}, {}, labels, seed=0)
    for facts in same.differences.values():
        assert np.isnan(facts["estimate"].value) or facts["estimate"].value == 0
        assert facts.get("sign_flip_p", 1) == facts.get("mcnemar_p", 1) == 1
    assert same.differences["precision_at_5"]["ties"] == len(labels)
    assert same.agreement["mutual_knn"].value == 1
    assert same.agreement["cka"] == pytest.approx(1)


def test_wins_ties_and_losses_and_mcnemar_count_images(pair):
    local, hf = (pair.analyses[name].precisions(5) for name in ("local", "hf"))
    facts = pair.differences["precision_at_5"]
    counted = [sum(h > a for a, h in zip(local, hf, strict=True))]
    counted += [sum(h == a for a, h in zip(local, hf, strict=True))]
    counted += [sum(h < a for a, h in zip(local, hf, strict=True))]
    assert [facts[key] for key in ("wins", "ties", "losses")] == counted
    first = [pair.analyses[name].precisions(1) == 1 for name in ("local", "hf")]
    only_local, only_hf = (first[0] & ~first[1]).sum(), (first[1] & ~first[0]).sum()
    expected = binomtest(int(only_local), int(only_local + only_hf)).pvalue
    assert pair.differences["precision_at_1"]["mcnemar_p"] == pytest.approx(expected)


def test_classes_average_to_the_whole(pair):
    assert np.mean([row["hf"] for row in pair.per_class]) == pytest.approx(
        pair.metrics["hf"]["precision_at_5"].value
    )
    assert all(row["holm_p"] >= row["sign_flip_p"] for row in pair.per_class)
    assert all(np.isfinite(row["difference"].se) for row in pair.per_class)


def test_chance_levels_follow_from_the_counts(pair):
    assert pair.agreement["mutual_knn_chance"] == pytest.approx(10 / 74)
    assert pair.agreement["mutual_knn_class_only"] == pytest.approx(10 / 24)
    assert pair.chance_precision == pytest.approx(24 / 74)


def test_random_encoders_agree_by_chance_and_the_interval_says_so():
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(4), 100)
    X, Y = (rng.normal(size=(400, width)).astype(np.float32) for width in (16, 64))
    agreement = compare({"local": X, "hf": Y}, {}, labels, seed=0).agreement
    low, high = agreement["mutual_knn"].ci95
    assert low <= agreement["mutual_knn_chance"] <= high
    assert agreement["cka"] < max(agreement["cka_null_p99"], 0.02)


def test_fewer_than_20_images_of_a_class_have_numbers_and_no_interval():
    X, labels = cloud(8, per_class=19)
    small = compare({"local": X}, {}, labels, seed=0)
    assert small.num_halves == 0
    assert all(np.isnan(value.se) for value in small.metrics["local"].values())
    assert np.isfinite(small.metrics["local"]["precision_at_5"].value)


def test_20_images_of_each_class_have_intervals():
    X, labels = cloud(8, per_class=20)
    enough = compare({"local": X}, {}, labels, seed=0)
    assert enough.num_halves == NUM_HALVES
    assert enough.metrics["local"]["precision_at_5"].se > 0


def test_the_order_of_the_images_changes_no_number(pair):
    labels = pair.analyses["local"].labels
    order = np.random.default_rng(1).permutation(len(labels))
    models = {name: a.embeddings[order] for name, a in pair.analyses.items()}
    shuffled = compare(models, {}, labels[order], seed=0)
    for name, metrics in shuffled.metrics.items():
        for metric, value in metrics.items():
            expected = pair.metrics[name][metric].value
            assert value.value == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_confusion_is_the_share_of_neighbours_by_class(pair):
    analysis = pair.analyses["local"]
    confusion = neighbor_confusion(analysis, 3)
    expected = np.zeros((3, 3))
    for row, neighbors in enumerate(analysis.lists.neighbors[:, :5]):
        for neighbor in neighbors:
            expected[analysis.labels[row], analysis.labels[neighbor]] += 1 / (5 * 25)
    np.testing.assert_allclose(confusion, expected)


def test_embeddings_of_other_images_are_refused():
    X, labels = cloud(8)
    with pytest.raises(ValueError, match="hf has 74 rows for 75 labels"):
        compare({"local": X, "hf": X[:-1]}, {}, labels, seed=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0])
def test_undefined_embeddings_are_refused_with_model_and_image(bad):
    X, labels = cloud(8)
    X[7] = bad
    with pytest.raises(UserError) as caught:
        analyze(X, labels, "hf")
    assert "hf" in caught.value.problem
    assert "7" in caught.value.problem
