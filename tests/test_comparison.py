from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from scipy.stats import t
from statsmodels.stats.multitest import multipletests

from ijepa.agreement import cka_and_null, mcnemar_exact_p
from ijepa.comparison import METRICS, compare
from ijepa.uncertainty import NUM_HALVES

WITH_INTERVALS = {
    *(f"precision_at_{k}" for k in (1, 5, 10, 20)),
    *("knn_accuracy", "silhouette", "silhouette_cosine"),
    *("variance_10pc", "variance_50pc", "effective_rank"),
}


def cloud(width, per_class=25, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    centers = rng.normal(size=(3, width))
    return (centers[labels] + rng.normal(size=(len(labels), width))).astype(np.float32), labels


X, LABELS = cloud(8)


@pytest.fixture(scope="module")
def pair():
    Y, _ = cloud(12, seed=1)
    return compare({"local": X, "hf": Y}, {"pixels": X[:, :4]}, LABELS, seed=0)


def test_intervals_are_where_the_coverage_study_has_them():
    X, labels = cloud(60, per_class=50)
    Y, _ = cloud(70, per_class=50, seed=1)
    perfect = compare({"local": X, "hf": Y}, {}, labels, seed=0)
    noise = np.random.default_rng(2).normal(size=(2, 150, 70)).astype(np.float32)
    pair = {"local": X + 3 * noise[0, :, :60], "hf": Y + 3 * noise[1]}
    wide = compare(pair, {}, labels, seed=0)
    differences = {name: facts["estimate"] for name, facts in wide.differences.items()}
    for numbers in (*wide.metrics.values(), differences):
        assert list(numbers) == list(METRICS)
        found = {name for name, estimate in numbers.items() if np.isfinite(estimate.se)}
        assert found == WITH_INTERVALS
    # All neighbors are right in all halves: that they always would be is not shown.
    for one in (perfect.metrics["hf"]["precision_at_5"], perfect.class_precision["hf"][2]):
        assert one.value == 1
        assert np.isnan(one.se)
    assert perfect.differences["precision_at_5"]["estimate"].ci95 == (0, 0)


def test_a_model_that_has_collapsed_has_no_intervals_next_to_one_that_has_them():
    found = compare({"local": np.ones_like(X), "hf": X}, {}, LABELS, seed=0)
    for metric in ("variance_10pc", "effective_rank"):
        assert np.isnan(found.metrics["local"][metric].value)
        assert np.isnan(found.differences[metric]["estimate"].se)
    assert np.isfinite(found.differences["precision_at_5"]["estimate"].se)


@pytest.mark.parametrize(
    ("models", "labels", "problem"),
    [
        ({"hf": X}, LABELS, r"local, or local and hf, got \['hf'\]"),
        ({"local": X, "second": X}, LABELS, "second"),
        ({"local": X, "hf": X[:-1]}, LABELS, "hf has 74 rows for 75 labels"),
        ({"local": X}, ["a", "b", "c"] * 25, r"np\.unique"),
        ({"local": X}, [0.0, 1.0, 2.0] * 25, r"np\.unique"),
        ({"local": X}, [-1, 0, 1] * 25, r"np\.unique"),
        ({"local": X}, [0, 1, 5000] * 25, r"np\.unique"),
        ({"local": X}, np.eye(75, dtype=int), r"shape \(75, 75\).*np\.unique"),
        ({"local": X[:1]}, [0], "at least 2 images"),
        ({"local": X[:, 0]}, LABELS, r"rows of real numbers.*shape \(75,\)"),
        ({"local": X > 0}, LABELS, "rows of real numbers.*bool"),
        ({"local": np.ma.masked_less(X, 0)}, LABELS, "rows of real numbers.*masked"),
        ({"local": torch.tensor(X, requires_grad=True)}, LABELS, "local: .*requires grad"),
    ],
)
def test_other_models_images_and_labels_that_number_nothing_are_errors(models, labels, problem):
    with pytest.raises(ValueError, match=problem):
        compare(models, {}, labels, seed=0)
    with pytest.raises(ValueError, match="must not be named"):
        compare({"local": X}, {"hf": X}, LABELS, seed=0)
    with pytest.raises(ValueError, match="must not be named"):
        compare({"local": X}, {"local_2": X}, LABELS, seed=0, other_seeds=[X])
    with pytest.raises(ValueError, match="must not be named"):
        compare({"local": X}, {"chance": X}, LABELS, seed=0)


@pytest.mark.parametrize("kind", [np.float16, np.int8, np.int64, ">f4", list, torch.tensor])
def test_numbers_of_any_kind_are_those_of_float32(kind):
    rounded = np.rint(8 * X)
    given = rounded.astype(kind) if isinstance(kind, str | type) and kind is not list else None
    given = kind(rounded.tolist()) if given is None else given
    found, expected = (
        compare({"local": one, "hf": X}, {"pixels": one}, LABELS, seed=0)
        for one in (given, rounded.astype(np.float32))
    )
    assert str(found.differences) == str(expected.differences)
    assert found.references == expected.references


def test_labels_of_few_bits_are_those_of_many():
    labels = np.arange(75) % 20
    for given in (labels.astype(np.int8), labels.astype(np.uint64)):
        kept = compare({"local": X}, {}, given, seed=0).analyses["local"].labels
        np.testing.assert_array_equal(kept * 10**6, labels * 10**6)


def test_a_model_without_a_name_is_called_by_its_role():
    found = compare({"local": X, "hf": X}, {}, LABELS, seed=0, names={"hf": "mine"})
    assert found.names == {"local": "Local model", "hf": "mine"}


def test_differences_are_hf_less_local_and_ratios_local_over_hf_by_the_delta_method(pair):
    for metric, facts in pair.differences.items():
        expected = pair.metrics["hf"][metric].value - pair.metrics["local"][metric].value
        assert facts["estimate"].value == pytest.approx(expected, nan_ok=True)
    for metric in ("precision_at_5", "knn_accuracy", "effective_rank"):
        local, hf = (pair.metrics[name][metric] for name in ("local", "hf"))
        difference, ratio = (pair.differences[metric][key] for key in ("estimate", "ratio"))
        assert ratio.value == pytest.approx(local.value / hf.value)
        # Var(L - rH) from the variances of L, H and H - L.
        shared = (local.se**2 + hf.se**2 - difference.se**2) / 2
        variance = local.se**2 + ratio.value**2 * hf.se**2 - 2 * ratio.value * shared
        assert ratio.se == pytest.approx(np.sqrt(variance) / hf.value)


@pytest.mark.parametrize("spread", [30, 6])  # below zero, and an interval that holds zero
def test_a_ratio_is_not_defined_where_the_denominator_may_be_zero(spread):
    noise = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    facts = compare({"local": X, "hf": X + spread * noise}, {}, LABELS, seed=0)
    assert facts.metrics["hf"]["silhouette"].ci95[0] < 0
    facts = facts.differences["silhouette"]
    assert np.isfinite(facts["estimate"].se)
    assert np.isnan([facts["ratio"].value, facts["ratio"].se]).all()


def test_p_values_go_with_the_intervals(pair):
    found = [(row["difference"], row["p"]) for row in pair.per_class]
    whole = pair.differences["precision_at_5"]
    for change, p in (*found, (whole["estimate"], whole["p"])):
        assert p == pytest.approx(2 * t.sf(abs(change.value) / change.se, NUM_HALVES / 2 - 1))


def test_gains_are_the_difference_from_each_reference(pair):
    expected = compare({"local": X[:, :4], "hf": X}, {}, LABELS, seed=0)
    assert pair.gains == {"pixels": expected.differences["precision_at_5"]["estimate"]}
    assert compare({"local": X}, {"pixels": X}, LABELS, seed=0).gains["pixels"].ci95 == (0, 0)


def test_a_model_against_itself_differs_by_exactly_nothing():
    same = compare({"local": X, "hf": X.copy()}, {}, LABELS, seed=0)
    for facts in same.differences.values():
        assert np.isnan(facts["estimate"].value) or facts["estimate"].value == 0
        assert facts["estimate"].se == 0 or np.isnan(facts["estimate"].se)
        assert facts.get("p", 1) == facts.get("mcnemar_p", 1) == 1
    assert same.differences["precision_at_5"]["ties"] == len(LABELS)
    assert same.differences["precision_at_5"]["ratio"].ci95 == (1, 1)
    assert same.agreement["mutual_knn"].ci95 == (1, 1)
    for key in ("cka", "cka_class_demeaned", "similarity_spearman"):
        assert same.agreement[key] == pytest.approx(1)
    for row in same.per_class:
        assert (row["difference"].ci95, row["mutual_knn"].ci95) == ((0, 0), (1, 1))
        assert row["p"] == row["holm_p"] == row["mcnemar_holm_p"] == 1


def test_wins_ties_losses_and_mcnemar_count_images_and_are_corrected_over_classes(pair):
    local, hf = (pair.analyses[name].precisions(5) for name in ("local", "hf"))
    counts = [(np.sign(hf - local) == sign).sum() for sign in (1, 0, -1)]
    whole, rows = pair.differences["precision_at_5"], pair.per_class
    for key, count in zip(("wins", "ties", "losses"), counts, strict=True):
        assert whole[key] == sum(row[key] for row in rows) == count
    found = [pair.differences["precision_at_1"], *rows]
    images = [slice(None), *(row["label"] == LABELS for row in rows)]
    for facts, own in zip(found, images, strict=True):
        first = (pair.analyses[name].precisions(1)[own] == 1 for name in ("local", "hf"))
        assert facts["mcnemar_p"] == mcnemar_exact_p(*first)
    for test, corrected in (("p", "holm_p"), ("mcnemar_p", "mcnemar_holm_p")):
        expected = multipletests([row[test] for row in rows], method="holm")[1]
        assert [row[corrected] for row in rows] == pytest.approx(expected)


def test_classes_are_compared_alone_and_average_to_the_whole(pair):
    lists = [pair.analyses[name].neighbors[:, :10] for name in ("local", "hf")]
    common = np.array([len({*a} & {*b}) / 10 for a, b in zip(*lists, strict=True)])
    for row in pair.per_class:
        assert row["mutual_knn"].value == pytest.approx(common[row["label"] == LABELS].mean())
        assert row["mutual_knn"].se > 0
        assert row["difference"].se > 0
    expected = pair.metrics["hf"]["precision_at_5"].value
    assert np.mean([row["hf"] for row in pair.per_class]) == pytest.approx(expected)
    assert pair.agreement["mutual_knn"].value == pytest.approx(common.mean())


def test_levels_of_chance_follow_from_the_counts_and_from_two_hundred_shuffles(pair):
    agreement = pair.agreement
    assert pair.chance_precision == pytest.approx(24 / 74)
    assert agreement["mutual_knn_chance"] == pytest.approx(10 / 74)
    local, hf = (a.precisions(10).reshape(3, 25).mean(axis=1) for a in pair.analyses.values())
    expected = (local * hf * 10 / 24 + (1 - local) * (1 - hf) * 10 / 50).mean()
    assert agreement["mutual_knn_class_only"] == pytest.approx(expected)
    X, Y = (analysis.embeddings for analysis in pair.analyses.values())
    cka, null = cka_and_null(X, Y, LABELS, seed=0)
    null.sort()
    assert null[197] <= agreement["cka_null_p99"] <= null[198]
    assert agreement["cka"] == cka
    assert agreement["cka_null_p"] == (1 + (null >= cka).sum()) / 201


def test_random_encoders_agree_by_chance_and_the_interval_says_so():
    rng = np.random.default_rng(5)
    X, Y = (rng.normal(size=(400, width)).astype(np.float32) for width in (16, 64))
    found = compare({"local": X, "hf": Y}, {}, np.repeat(np.arange(4), 100), seed=0).agreement
    chance, class_only = found["mutual_knn_chance"], found["mutual_knn_class_only"]
    low, high = found["mutual_knn"].ci95
    assert low <= min(chance, class_only) <= chance <= high
    assert class_only == pytest.approx(chance, rel=0.1)
    assert found["cka"] < max(found["cka_null_p99"], 0.02)


def test_without_a_class_of_20_images_there_are_numbers_and_no_interval():
    X, labels = cloud(8, per_class=19)
    small = compare({"local": X, "hf": X[:, ::-1].copy()}, {"pixels": X}, labels, seed=0)
    assert (small.num_halves, small.small_classes) == (0, 3)
    metrics = small.metrics["local"].values()
    assert np.isnan([number for one in metrics for number in (one.se, *one.ci95)]).all()
    assert np.isfinite(small.metrics["local"]["precision_at_5"].value)
    assert np.isnan(small.differences["precision_at_5"]["p"])
    assert all(np.isnan([row["p"], row["holm_p"]]).all() for row in small.per_class)
    assert small.differences["precision_at_5"]["ratio"].value == 1
    assert np.isnan(small.rankings["local"]["purest_class"]["share_of_halves"])


def test_a_small_class_takes_only_its_own_intervals_away():
    X, labels = cloud(8, per_class=80)
    labels[:15], labels[15:65] = 7, 1  # 15 of the images of class 0 are left
    found = compare({"local": X, "hf": X + X[::-1]}, {}, labels, seed=0)
    assert (found.num_halves, found.small_classes) == (NUM_HALVES, 2)
    assert found.metrics["local"]["precision_at_5"].se > 0
    assert found.metrics["local"]["silhouette"].se > 0
    halved = [np.isfinite(row["difference"].se) for row in found.per_class]
    assert halved == [False, True, True, False]
    assert [np.isfinite(row["holm_p"]) for row in found.per_class] == halved
    assert [np.isfinite(one.se) for one in found.class_precision["hf"]] == halved


def test_small_classes_are_denser_in_halves_so_that_these_repeat_no_ranking():
    labels = np.repeat([0, 1, 2], [60, 60, 19])
    X = np.eye(3)[labels] + np.random.default_rng(0).normal(size=(139, 3))
    for rows, repeated in ((slice(None), False), (slice(120), True)):
        ranking = compare({"local": X[rows]}, {}, labels[rows], seed=0).rankings["local"]
        shares = ranking["purest_class"]["share_of_halves"], ranking["confusions_share_of_halves"]
        assert np.isfinite(shares).tolist() == [repeated] * 2


@pytest.mark.parametrize("n", [4, 30])
def test_a_folder_with_one_image_of_each_class_has_undefined_numbers(n):
    X = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    found = compare({"local": X, "hf": X[:, ::-1].copy()}, {"pixels": X}, np.arange(n), seed=0)
    for metric in ("precision_at_1", "knn_accuracy", "silhouette", "silhouette_cosine"):
        assert np.isnan(found.metrics["local"][metric].value)
        assert np.isnan(found.differences[metric]["estimate"].value)
    assert (found.per_class, found.rankings) == ([], {"local": {}, "hf": {}})
    assert np.isnan(found.agreement["mutual_knn_class_only"])
    assert np.isfinite(found.metrics["local"]["effective_rank"].value)
    # One class for all has precision, but no silhouette either.
    metrics = compare({"local": X}, {}, np.zeros(n, np.int64), seed=0).metrics["local"]
    assert metrics["precision_at_5"].value == (1 if n > 5 else pytest.approx(np.nan, nan_ok=True))
    assert np.isnan(metrics["silhouette"].value)


def test_rankings_name_the_extremes_and_how_often_the_halves_repeat_them(pair):
    for name, analysis in pair.analyses.items():
        found, near = pair.rankings[name], LABELS[analysis.neighbors[:, :5]]
        rows = [np.bincount(near[own == LABELS].ravel(), minlength=3) for own in range(3)]
        confusion = rows / np.sum(rows, axis=1, keepdims=True)
        assert found["purest_class"]["label"] == confusion.diagonal().argmax()
        np.fill_diagonal(confusion, 0)
        shares = [one["share"] for one in found["confusions"]]
        assert shares == pytest.approx(sorted(confusion.ravel(), reverse=True)[:3])
        pairs = [(one["from"], one["to"]) for one in found["confusions"]]
        assert [confusion[one] for one in pairs] == pytest.approx(shares)
        assert 0 < found["purest_class"]["share_of_halves"] <= 1
        assert 0 < found["confusions_share_of_halves"] <= 1


def test_each_model_has_a_progress_bar_over_its_images():
    bar, names = MagicMock(), ("local", "pixels", "local_2")
    compare({"local": X}, {"pixels": X}, LABELS, 0, other_seeds=[X], progress=bar)
    assert bar.call_args_list == [call(total=75, desc=f"pairs {name}") for name in names]
    assert sum(one.args[0] for one in bar().__enter__().update.call_args_list) == 3 * 75


def test_the_order_of_the_images_and_of_the_models_changes_no_number(pair):
    order = np.random.default_rng(1).permutation(len(LABELS))
    models = {name: pair.analyses[name].embeddings[order] for name in ("hf", "local")}
    found = compare(models, {}, LABELS[order], seed=0)
    assert list(found.analyses) == ["local", "hf"]
    for name, metrics in found.metrics.items():
        for metric, value in metrics.items():
            expected = pair.metrics[name][metric].value
            assert value.value == pytest.approx(expected, rel=1e-6, nan_ok=True)
            change = found.differences[metric]["estimate"].value
            expected = pair.differences[metric]["estimate"].value
            assert change == pytest.approx(expected, abs=1e-6, nan_ok=True)
