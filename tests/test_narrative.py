import copy
from dataclasses import replace

import numpy as np
import pytest

from ijepa.comparison import SeedSpread, compare
from ijepa.narrative import (
    TOO_FEW,
    agreement_finding,
    answer,
    classes_finding,
    concentration,
    conclusions,
    confusion_finding,
    console_table,
    efficiency_finding,
    gap,
    geometry_in_common,
    headline_lines,
    interval,
    literal,
    neighbors_in_common,
    number,
    question,
    ratio,
    references_finding,
    retrieval_finding,
    seeds_finding,
    separability_finding,
    spread,
    summary,
    table,
    variance_finding,
    verdict,
)
from ijepa.uncertainty import Estimate

NAN = float("nan")
HIGHER = Estimate(0.1, 0.02, (0.06, 0.14))
LOWER = Estimate(-0.1, 0.02, (-0.14, -0.06))
UNCLEAR = Estimate(0.01, 0.02, (-0.03, 0.05))
UNKNOWN = Estimate(0.1, NAN, (NAN, NAN))


def make(num_models=2, per_class=25):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), per_class)
    clouds = [rng.normal(size=(2 * per_class, width)) for width in (16, 24, 6, 16)]
    X, Y, pixels, random = ((cloud + labels[:, None]).astype(np.float32) for cloud in clouds)
    models = {"local": X, "hf": Y} if num_models == 2 else {"local": X}
    return compare(models, {"pixels": pixels, "random_weights": random}, labels, seed=0)


@pytest.fixture(scope="module")
def pair():
    return make()


@pytest.fixture(scope="module")
def alone():
    return make(num_models=1)


@pytest.fixture(scope="module")
def few():
    return make(per_class=8)


def with_difference(comparison, metric, estimate):
    changed = copy.deepcopy(comparison.differences)
    changed[metric]["estimate"] = estimate
    return replace(comparison, differences=changed)


@pytest.mark.parametrize(
    ("estimate", "word"),
    [
        (HIGHER, "higher"),
        (LOWER, "lower"),
        (UNCLEAR, "unclear"),
        (UNKNOWN, "unknown"),
        (Estimate(0.0, 0.0, (0.0, 0.0)), "unclear"),
        (Estimate(0.1, 0.05, (0.0, 0.2)), "unclear"),
    ],
)
def test_a_verdict_needs_an_interval_that_leaves_out_zero(estimate, word):
    assert verdict(estimate) == word


CLAIMS = {
    retrieval_finding: {
        "higher": "the HF model retrieves better",
        "lower": "the local model retrieves better",
        "unclear": "no difference can be shown at n = 50",
        "unknown": "this is no verdict",
    },
    answer: {
        "higher": "The HF model:",
        "lower": "The local model:",
        "unclear": "No difference can be shown:",
        "unknown": "too few images for a verdict",
    },
    separability_finding: {
        "higher": "The HF model separates the classes better",
        "lower": "The local model separates the classes better",
        "unclear": "No difference can be shown at n = 50",
        "unknown": "this is no verdict",
    },
    concentration: {
        "higher": "The HF model puts more of its variance into 10 PCs",
        "lower": "The local model puts more of its variance into 10 PCs",
        "unclear": "No difference in 10 PCs can be shown",
        "unknown": "no verdict on 10 PCs",
    },
    spread: {
        "higher": "The HF model uses more dimensions",
        "lower": "The local model uses more dimensions",
        "unclear": "No difference in effective rank can be shown",
        "unknown": "no verdict on effective rank",
    },
}
METRIC_OF = {
    retrieval_finding: "precision_at_5",
    answer: "precision_at_5",
    separability_finding: "silhouette",
    concentration: "variance_10pc",
    spread: "effective_rank",
}


@pytest.mark.parametrize("finding", CLAIMS)
@pytest.mark.parametrize("estimate", [HIGHER, LOWER, UNCLEAR, UNKNOWN])
def test_a_finding_claims_what_its_interval_allows_and_nothing_else(pair, finding, estimate):
    text = finding(with_difference(pair, METRIC_OF[finding], estimate))
    for word, claim in CLAIMS[finding].items():
        assert (claim in text) == (word == verdict(estimate))


@pytest.mark.parametrize(
    ("estimate", "claim"),
    [
        (
            HIGHER,
            "The local model is better than random weights (12.0%) by 10.0 points [6.0, 14.0]",
        ),
        (
            LOWER,
            "The local model is worse than random weights (12.0%): local - random weights is -",
        ),
        (UNCLEAR, "No difference between the local model and random weights (12.0%) can be shown"),
        (UNKNOWN, "Random weights give 12.0%."),
    ],
)
def test_better_than_a_reference_needs_an_interval_too(pair, estimate, claim):
    changed = replace(
        pair,
        gains={"random_weights": estimate},
        references={"random_weights": {"precision_at_5": 0.12}},
    )
    assert claim in references_finding(changed)
    assert ("better" in references_finding(changed)) == (estimate == HIGHER)


def test_findings_of_one_model_compare_nothing(alone):
    for finding in (retrieval_finding, separability_finding, variance_finding, answer, question):
        assert "HF" not in finding(alone)
    assert "HF" not in " ".join(conclusions(alone))
    assert headline_lines(alone) == []


def test_retrieval_tells_the_tests_of_the_record(pair):
    facts = pair.differences["precision_at_5"]
    text = retrieval_finding(pair)
    assert f"better on {facts['wins']}, as well on {facts['ties']} and worse on" in text
    assert f"(p = {facts['p']:.2g})" in text
    assert f"McNemar p = {pair.differences['precision_at_1']['mcnemar_p']:.2g}" in text


def test_five_images_have_no_five_neighbours():
    few = make(per_class=2)
    for finding in (retrieval_finding, efficiency_finding, answer):
        assert finding(few) == TOO_FEW
    assert conclusions(few) == [TOO_FEW]
    assert "n/a" not in conclusions(few)


def test_efficiency_is_the_ratio_of_the_summary_with_its_interval(pair):
    shown = summary(pair)
    share = 100 * shown["local"]["precision_at_5"] / shown["hf"]["precision_at_5"]
    text = efficiency_finding(pair)
    assert f"reaches {share:.0f}% [" in text
    assert "67% of its dimensions (16 against 24)" in text


def test_efficiency_of_equal_widths_and_of_a_model_that_finds_nothing(pair):
    same = {"local": pair.analyses["local"], "hf": pair.analyses["local"]}
    text = efficiency_finding(replace(pair, analyses=same))
    assert text.endswith("with as many dimensions (16).")
    changed = copy.deepcopy(pair.differences)
    changed["precision_at_5"]["ratio"] = Estimate(NAN, NAN, (NAN, NAN))
    assert "there is no ratio" in efficiency_finding(replace(pair, differences=changed))


def test_ten_components_are_a_share_of_unequal_widths(pair):
    assert "they are 62.5% of the local and 41.7% of the HF model" in concentration(pair)
    same = {"local": pair.analyses["local"], "hf": pair.analyses["local"]}
    assert "of the local" not in concentration(replace(pair, analyses=same))


def test_variance_tells_effective_ranks_and_that_it_is_no_quality(pair, few):
    assert f"effective rank {interval('effective_rank', rank_of(pair))} of 16" in variance_finding(
        pair
    )
    assert "a shape and not a quality" in variance_finding(pair)
    assert "no verdict on 10 PCs" in variance_finding(few)


def rank_of(comparison):
    return comparison.metrics["local"]["effective_rank"]


@pytest.mark.parametrize(("value", "overlap"), [(0.02, True), (-0.02, True), (0.4, False)])
def test_silhouettes_near_zero_are_explained(pair, value, overlap):
    metrics = copy.deepcopy(pair.metrics)
    metrics["hf"]["silhouette"] = Estimate(value, 0.001, (value - 0.002, value + 0.002))
    metrics["local"]["silhouette"] = metrics["hf"]["silhouette"]
    text = separability_finding(replace(pair, metrics=metrics))
    assert ("Values this near to 0" in text) == overlap
    assert "By cosine instead of Euclidean distance: Local" in text


@pytest.mark.parametrize(
    ("mutual", "words"),
    [
        (Estimate(0.95, 0.02, (0.9, 1.0)), "so they agree on more than the classes"),
        (
            Estimate(0.35, 0.02, (0.3, 0.4)),
            "so they agree beyond chance; whether on more than classes is open",
        ),
        (Estimate(0.45, 0.05, (0.35, 0.55)), "so they agree beyond chance; whether on more"),
        (Estimate(0.21, 0.02, (0.17, 0.25)), "no agreement beyond chance can be shown"),
        (Estimate(0.95, NAN, (NAN, NAN)), "without an interval this is no verdict"),
        (Estimate(NAN, NAN, (NAN, NAN)), "too few images for mutual 10-NN"),
    ],
)
def test_agreement_is_claimed_above_its_levels_alone(pair, mutual, words):
    levels = {"mutual_knn_chance": 0.2, "mutual_knn_class_only": 0.4}
    text = neighbors_in_common(replace(pair, agreement={"mutual_knn": mutual, **levels}))
    assert words in text
    assert ("agree on more" in text) == (mutual.ci95[0] > 0.4)
    assert ("beyond chance;" in text) == (0.2 < mutual.ci95[0] <= 0.4)


@pytest.mark.parametrize(
    ("cka", "null", "words"),
    [
        (0.5, 0.4, "so they have more than the classes in common"),
        (0.4, 0.4, "nothing beyond the classes is shown to be in common"),
    ],
)
def test_common_geometry_is_claimed_above_the_permutations_alone(pair, cka, null, words):
    facts = {"cka": cka, "cka_null_p99": null, "cka_class_demeaned": 0.123}
    text = geometry_in_common(replace(pair, agreement=facts | {"similarity_spearman": 0.25}))
    assert words in text
    assert ("more than the classes" in text) == (cka > null)
    assert "class means taken out CKA is 0.123" in text
    assert "all pairs of 50 images have a Spearman correlation of 0.250" in text


def test_undefined_agreement_is_left_out(pair):
    names = ("cka", "cka_null_p99", "cka_class_demeaned", "similarity_spearman")
    facts = pair.agreement | dict.fromkeys(names, NAN)
    assert geometry_in_common(replace(pair, agreement=facts)) == ""
    text = agreement_finding(replace(pair, agreement=facts))
    assert "CKA" not in text
    assert not text.endswith(" ")


def class_row(label, difference, holm_p):
    return {"label": label, "difference": difference, "holm_p": holm_p}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(HIGHER, 0.01), (LOWER, 0.02)], "HF model retrieves better on a; the local model ret"),
        ([(HIGHER, 0.01), (LOWER, 0.07)], "better on a; no difference can be shown on the other 1"),
        ([(UNCLEAR, 0.01), (LOWER, 0.04)], "local model retrieves better on b; no difference"),
        ([(HIGHER, 0.06), (UNCLEAR, 1.0)], "no difference can be shown on any class"),
    ],
)
def test_a_class_counts_by_interval_and_corrected_test_together(pair, rows, words):
    found = [class_row(label, *row) for label, row in enumerate(rows)]
    text = classes_finding(replace(pair, per_class=found), ["a", "b"])
    assert words in text
    assert text.startswith("Of 2 classes looked at together: ")


def test_classes_without_intervals_get_no_verdict(few):
    assert "too few images per class for a verdict" in classes_finding(few, ["a", "b"])


def test_conclusions_sort_the_table_by_what_can_be_shown(pair, few):
    changed = pair
    for metric, estimate in (
        ("variance_10pc", HIGHER),
        ("variance_50pc", UNKNOWN),
        ("silhouette", UNCLEAR),
        ("precision_at_5", LOWER),
    ):
        changed = with_difference(changed, metric, estimate)
    expected = (
        "In the table, higher with the HF model: Variance in 10 PCs; higher with the local model: "
        "NN precision@5; no difference can be shown in: Silhouette score."
    )
    assert expected in conclusions(changed)
    assert conclusions(pair)[0] == answer(pair)
    assert not any("In the table" in sentence for sentence in conclusions(few))


def test_agreement_without_an_interval_claims_nothing(few):
    assert "agree on more" not in agreement_finding(few)


def test_confusion_names_the_class_that_neighbours_stray_to():
    labels = np.repeat(np.arange(3), 25)
    rng = np.random.default_rng(0)
    # Classes 0 and 1 lie in one place, class 2 far off.
    X = (rng.normal(size=(75, 4)) + 50 * np.eye(4)[np.where(labels == 2, 2, 0)]).astype(np.float32)
    found = confusion_finding(
        compare({"local": X}, {"pixels": X}, labels, seed=0), ["cat", "dog", "ship_*"]
    )
    assert r"purest neighbourhoods are those of ship\_\* (100% of the five" in found
    assert "cat to dog" in found
    assert "dog to cat" in found
    assert "ship_" not in found.split("stray")[1]


@pytest.mark.parametrize(("trainings", "rough"), [(2, True), (5, False)])
def test_the_spread_over_seeds_stands_beside_the_error_over_images(pair, few, trainings, rough):
    seeds = {"precision_at_5": SeedSpread([0.55] * trainings, 0.55, 0.0707)}
    text = seeds_finding(replace(pair, seeds=seeds))
    error = 100 * pair.metrics["local"]["precision_at_5"].se
    assert text.startswith(
        f"Over {trainings} trainings of the local model precision@5 is 55.0% in the mean, with a "
        f"standard deviation of 7.07 points over trainings; the standard error over images is "
        f"{error:.2f} points. The intervals hold the latter alone."
    )
    assert ("only roughly" in text) == rough
    assert "over images" not in seeds_finding(replace(few, seeds=seeds))


@pytest.mark.parametrize(
    ("metric", "value", "sign", "shown"),
    [
        ("precision_at_5", 0.4983, "", "49.8%"),
        ("precision_at_5", -0.00001, "+", "+0.0%"),
        ("silhouette", -0.00004, "", "0.000"),
        ("silhouette", 0.0342, "+", "+0.034"),
        ("embedding_dim", 192.0, "", "192"),
        ("effective_rank", 87.04, "", "87.0"),
        ("ratio", 0.727, "", "73%"),
        ("variance_10pc", NAN, "", "n/a"),
    ],
)
def test_numbers_are_printed_without_negative_zeros_or_nan(metric, value, sign, shown):
    assert number(metric, value, sign) == shown


def test_an_interval_is_printed_where_there_is_one():
    assert interval("precision_at_5", HIGHER, "+") == "+10.0% [+6.0, +14.0]"
    assert interval("precision_at_5", UNKNOWN) == "10.0%"
    assert gap("precision_at_5", HIGHER) == "+10.0 points [+6.0, +14.0]"
    assert gap("silhouette", Estimate(0.0, 0.0, (0.0, 0.0))) == "+0.000 [+0.000, +0.000]"


@pytest.mark.parametrize(
    ("metric", "se", "shown"),
    [
        ("precision_at_5", 0.001, "+0.4% [+0.2, +0.6]"),
        ("precision_at_5", 0.0009, "+0.42% [+0.25, +0.60]"),
        ("silhouette", 0.0009, "+0.0042 [+0.0025, +0.0060]"),
        ("silhouette", 1e-12, "+0.004235 [+0.004235, +0.004235]"),
    ],
)
def test_small_errors_are_printed_with_the_digits_that_show_them(metric, se, shown):
    estimate = Estimate(0.0042349, se, (0.0042349 - 1.96 * se, 0.0042349 + 1.96 * se))
    assert interval(metric, estimate, "+") == shown


@pytest.mark.parametrize(
    ("local", "hf", "expected"),
    [(1.0, 2.0, 0.5), (1.0, 0.0, NAN), (-1.0, 2.0, NAN), (-1.0, -2.0, NAN)],
)
def test_a_ratio_across_zero_is_not_defined(local, hf, expected):
    assert ratio(local, hf) == pytest.approx(expected, nan_ok=True)


def test_the_table_has_five_rows_of_the_summary_and_equal_columns(pair, alone):
    for comparison, columns in ((pair, 7), (alone, 4)):
        rows = table(comparison)
        assert len(rows) == 6
        assert {len(row) for row in rows} == {columns}
    assert table(pair)[1][1:3] == ["16", "24"]


def test_console_columns_are_aligned():
    lines = console_table([["name", "x"], ["longer name", "100"]]).splitlines()
    assert lines[0] == "name           x"
    assert lines[2] == "longer name  100"


def test_class_names_are_never_markup():
    assert literal("<b>*a*_`\n#") == r"\<b\>\*a\*\_\` \#"
