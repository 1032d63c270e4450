import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr
from statsmodels.stats.multitest import multipletests

from ijepa.agreement import cka_null, linear_cka
from ijepa.comparison import METRICS, analyze, compare, neighbor_confusion, pairwise_seconds
from ijepa.errors import UserError
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


@pytest.fixture(scope="module")
def pair():
    X, labels = cloud(8)
    Y, _ = cloud(12, seed=1)
    return compare({"local": X, "hf": Y}, {"pixels": X[:, :4]}, labels, seed=0)


def test_every_metric_of_the_table_is_there_for_every_model_and_reference(pair):
    for numbers in [*pair.metrics.values(), *pair.references.values(), pair.differences]:
        assert list(numbers) == list(METRICS)


def test_intervals_are_where_the_coverage_study_has_them():
    X, labels = cloud(60, per_class=50)
    Y, _ = cloud(70, per_class=50, seed=1)
    wide = compare({"local": X, "hf": Y}, {}, labels, seed=0)
    for numbers in wide.metrics.values():
        found = {name for name, estimate in numbers.items() if np.isfinite(estimate.se)}
        assert found == WITH_INTERVALS
    found = {name for name, f in wide.differences.items() if np.isfinite(f["estimate"].se)}
    assert found == WITH_INTERVALS


def test_ratios_are_local_over_hf_with_the_error_of_the_delta_method(pair):
    for metric in ("precision_at_5", "knn_accuracy", "effective_rank"):
        local, hf = (pair.metrics[name][metric] for name in ("local", "hf"))
        difference, ratio = (pair.differences[metric][key] for key in ("estimate", "ratio"))
        assert ratio.value == pytest.approx(local.value / hf.value)
        # Var(L - rH) from the variances of L, H and H - L.
        shared = (local.se**2 + hf.se**2 - difference.se**2) / 2
        variance = local.se**2 + ratio.value**2 * hf.se**2 - 2 * ratio.value * shared
        assert ratio.se == pytest.approx(np.sqrt(variance) / hf.value)


def test_a_ratio_below_zero_is_not_defined():
    X, labels = cloud(8)
    scattered = np.random.default_rng(3).normal(size=(75, 2)).astype(np.float32)
    facts = compare({"local": X, "hf": scattered}, {}, labels, seed=0).differences["silhouette"]
    assert np.isfinite(facts["estimate"].se)
    assert np.isnan([facts["ratio"].value, facts["ratio"].se]).all()


def test_gains_are_the_difference_from_each_reference(pair):
    X, labels = pair.analyses["local"].embeddings, pair.analyses["local"].labels
    expected = compare({"local": X[:, :4], "hf": X}, {}, labels, seed=0)
    assert pair.gains == {"pixels": expected.differences["precision_at_5"]["estimate"]}
    assert compare({"local": X}, {"pixels": X}, labels, seed=0).gains["pixels"].ci95 == (0, 0)


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
        assert facts["estimate"].se == 0 or np.isnan(facts["estimate"].se)
        assert facts.get("sign_flip_p", 1) == facts.get("mcnemar_p", 1) == 1
    assert same.differences["precision_at_5"]["ties"] == len(labels)
    assert same.differences["precision_at_5"]["ratio"].ci95 == (1, 1)
    assert same.agreement["mutual_knn"].ci95 == (1, 1)
    assert same.agreement["cka"] == same.agreement["cka_class_demeaned"] == pytest.approx(1)
    assert same.agreement["similarity_spearman"] == pytest.approx(1)
    for row in same.per_class:
        assert row["difference"].ci95 == (0, 0)
        assert row["mutual_knn"].ci95 == (1, 1)
        assert row["sign_flip_p"] == row["holm_p"] == row["mcnemar_holm_p"] == 1


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
    assert all(np.isfinite(row["difference"].se) for row in pair.per_class)
    assert np.mean([row["mutual_knn"].value for row in pair.per_class]) == pytest.approx(
        pair.agreement["mutual_knn"].value
    )
    for key in ("wins", "ties", "losses"):
        assert sum(row[key] for row in pair.per_class) == pair.differences["precision_at_5"][key]


def test_tests_by_class_are_those_of_the_class_alone_and_corrected_together(pair):
    first = [pair.analyses[name].precisions(1) == 1 for name in ("local", "hf")]
    for row in pair.per_class:
        own = pair.analyses["local"].labels == row["label"]
        only = [(first[i] & ~first[1 - i] & own).sum() for i in (0, 1)]
        expected = binomtest(int(only[0]), int(sum(only))).pvalue if sum(only) else 1
        assert row["mcnemar_p"] == pytest.approx(expected)
    for test, corrected in (("sign_flip_p", "holm_p"), ("mcnemar_p", "mcnemar_holm_p")):
        expected = multipletests([row[test] for row in pair.per_class], method="holm")[1]
        assert [row[corrected] for row in pair.per_class] == pytest.approx(expected)


def test_agreement_by_class_counts_common_neighbours(pair):
    lists = [pair.analyses[name].lists.neighbors[:, :10] for name in ("local", "hf")]
    common = np.array([len({*a} & {*b}) / 10 for a, b in zip(*lists, strict=True)])
    for row in pair.per_class:
        own = pair.analyses["local"].labels == row["label"]
        assert row["mutual_knn"].value == pytest.approx(common[own].mean())
        assert row["mutual_knn"].se > 0


def test_agreement_holds_each_number_of_its_definition(pair):
    X, Y = (pair.analyses[name].embeddings for name in ("local", "hf"))
    labels = pair.analyses["local"].labels
    assert pair.agreement["cka"] == linear_cka(X, Y)
    assert pair.agreement["cka_class_demeaned"] == linear_cka(X, Y, labels)
    null = np.sort(cka_null(X, Y, labels, seed=0))
    assert null[197] <= pair.agreement["cka_null_p99"] <= null[198]
    unit = [Z / np.linalg.norm(Z.astype(float), axis=1, keepdims=True) for Z in (X, Y)]
    upper = np.triu_indices(len(X), k=1)
    expected = spearmanr(*((Z @ Z.T)[upper] for Z in unit)).statistic
    assert pair.agreement["similarity_spearman"] == pytest.approx(expected, abs=1e-6)


def test_chance_levels_follow_from_the_counts(pair):
    assert pair.agreement["mutual_knn_chance"] == pytest.approx(10 / 74)
    assert pair.agreement["mutual_knn_class_only"] == pytest.approx(10 / 24)
    assert pair.chance_precision == pytest.approx(24 / 74)


@pytest.mark.parametrize("seed", [5, 6])
def test_random_encoders_agree_by_chance_and_the_interval_says_so(seed):
    rng = np.random.default_rng(seed)
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
    assert all(np.isnan(value.ci95).all() for value in small.metrics["local"].values())
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


@pytest.mark.parametrize("width", [8, 100])
def test_blocks_of_rows_of_a_file_give_the_numbers_of_the_whole(monkeypatch, tmp_path, width):
    def numbers():
        X, labels = cloud(width)
        Y, _ = cloud(12, seed=1)
        (tmp_path / "X").write_bytes(X.tobytes())
        mapped = np.memmap(tmp_path / "X", np.float32, "r", shape=X.shape)
        found = compare({"local": mapped, "hf": Y}, {"pixels": mapped[:, :4]}, labels, seed=0)
        estimates = [e for name in ("local", "hf") for e in found.metrics[name].values()]
        estimates += [d["estimate"] for d in found.differences.values()]
        estimates += [found.gains["pixels"], found.agreement["mutual_knn"]]
        agreements = [v for k, v in found.agreement.items() if k != "mutual_knn"]
        return np.array([[e.value, e.se] for e in estimates]), np.array(agreements)

    whole = numbers()
    for module in ("metrics", "agreement"):
        monkeypatch.setattr(f"ijepa.{module}.TILE_ENTRIES", 700)
    for blocks, expected in zip(numbers(), whole, strict=True):
        # A distance of an image to itself is a rounding error; all else is equal within 1e-12.
        np.testing.assert_allclose(blocks, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("linear", "square"), [(5, 0.25), (5, 0), (0, 0.25)])
def test_the_time_of_all_pairs_is_told_from_the_time_of_few(monkeypatch, linear, square):
    spent = [0.0]

    def spend(X, *_, **__):
        spent.append(spent[-1] + linear * len(X) + square * len(X) ** 2)

    for name in ("list_neighbors", "silhouette_samples", "mean_silhouettes"):
        monkeypatch.setattr(f"ijepa.comparison.{name}", spend)
    monkeypatch.setattr("ijepa.comparison.time.perf_counter", lambda: spent[-1])
    X = np.zeros((3000, 2), np.float32)
    monkeypatch.setattr("ijepa.comparison.PROBE", 100)
    # Two models with three pieces of work, a reference with two.
    found = pairwise_seconds({"local": X, "hf": X}, {"pixels": X}, 2)
    assert found == pytest.approx(8 * (linear * 3000 + square * 3000**2))
    monkeypatch.undo()
    assert 0 <= pairwise_seconds({"local": X[:50] + 1}, {}, 2) < 60
