import copy
from dataclasses import replace

import numpy as np
import pytest

from ijepa.comparison import SeedSpread, compare
from ijepa.narrative import (
    agreement_finding,
    confusion_finding,
    console_table,
    efficiency_finding,
    headline_lines,
    interval,
    literal,
    markdown,
    markdown_table,
    number,
    ratio,
    retrieval_finding,
    seeds_finding,
    separability_finding,
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
    clouds = [rng.normal(size=(2 * per_class, width)) for width in (8, 12, 6, 8)]
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
    separability_finding: {
        "higher": "The HF model separates the classes better",
        "lower": "The local model separates the classes better",
        "unclear": "No difference can be shown at n = 50",
        "unknown": "this is no verdict",
    },
    variance_finding: {
        "higher": "The HF model puts more of its variance into 10 PCs",
        "lower": "The local model puts more of its variance into 10 PCs",
        "unclear": "No difference in 10 PCs can be shown",
        "unknown": "no verdict on 10 PCs",
    },
}
METRIC_OF = {
    retrieval_finding: "precision_at_5",
    separability_finding: "silhouette",
    variance_finding: "variance_10pc",
}


@pytest.mark.parametrize("finding", CLAIMS)
@pytest.mark.parametrize("estimate", [HIGHER, LOWER, UNCLEAR, UNKNOWN])
def test_a_finding_claims_what_its_interval_allows_and_nothing_else(pair, finding, estimate):
    text = finding(with_difference(pair, METRIC_OF[finding], estimate))
    for word, claim in CLAIMS[finding].items():
        assert (claim in text) == (word == verdict(estimate))


def test_findings_of_one_model_compare_nothing(alone):
    assert "one model alone" in efficiency_finding(alone)
    assert "HF" not in retrieval_finding(alone) + separability_finding(alone)
    assert "HF" not in variance_finding(alone)
    assert headline_lines(alone) == []


def test_efficiency_is_the_ratio_of_the_summary(pair):
    shown = summary(pair)
    share = 100 * shown["local"]["precision_at_5"] / shown["hf"]["precision_at_5"]
    assert f"reaches {share:.0f}% of the HF model's" in efficiency_finding(pair)
    assert "67% of its dimensions (8 against 12)" in efficiency_finding(pair)


@pytest.mark.parametrize(
    ("low", "words"),
    [(0.9, "they agree on more than classes"), (0.0, "no agreement beyond the classes is shown")],
)
def test_agreement_is_claimed_above_the_level_of_the_classes_alone(pair, low, words):
    facts = pair.agreement | {"mutual_knn": Estimate(0.95, 0.02, (low, 1.0))}
    assert words in agreement_finding(replace(pair, agreement=facts))


def test_agreement_without_an_interval_claims_nothing(few):
    assert "agree on more" not in agreement_finding(few)
    nothing = few.agreement | {"mutual_knn": UNKNOWN, "cka": NAN}
    nothing["mutual_knn"] = Estimate(NAN, NAN, (NAN, NAN))
    text = agreement_finding(replace(few, agreement=nothing))
    assert "too few images for mutual 10-NN" in text
    assert "CKA" not in text


def test_confusion_names_the_class_that_neighbours_stray_to():
    labels = np.repeat(np.arange(3), 25)
    rng = np.random.default_rng(0)
    # Classes 0 and 1 lie in one place, class 2 far off.
    X = (rng.normal(size=(75, 4)) + 50 * np.eye(4)[np.where(labels == 2, 2, 0)]).astype(np.float32)
    found = confusion_finding(
        compare({"local": X}, {"pixels": X}, labels, seed=0), ["cat", "dog", "ship_*"]
    )
    assert r"purest neighbourhoods are those of ship\_\* (100%)" in found
    assert "cat to dog" in found
    assert "dog to cat" in found
    assert "ship_" not in found.split("stray")[1]


def test_the_spread_over_seeds_stands_beside_the_error_over_images(pair):
    seeds = {name: SeedSpread([0.5, 0.6], 0.55, 0.0707) for name in pair.metrics["local"]}
    text = seeds_finding(replace(pair, seeds=seeds))
    assert "Over 2 trainings" in text
    error = 100 * pair.metrics["local"]["precision_at_5"].se
    assert (
        "NN precision@5: mean 55.0%, standard deviation 7.1% over trainings, standard error "
        f"{error:.1f}% over images" in text
    )


@pytest.mark.parametrize(
    ("metric", "value", "sign", "shown"),
    [
        ("precision_at_5", 0.4983, "", "49.8%"),
        ("precision_at_5", -0.00001, "+", "+0.0%"),
        ("silhouette", -0.00004, "", "0.000"),
        ("silhouette", 0.0342, "+", "+0.034"),
        ("embedding_dim", 192.0, "", "192"),
        ("variance_10pc", NAN, "", "n/a"),
    ],
)
def test_numbers_are_printed_without_negative_zeros_or_nan(metric, value, sign, shown):
    assert number(metric, value, sign) == shown


def test_an_interval_is_printed_where_there_is_one():
    assert interval("precision_at_5", HIGHER, "+") == "+10.0% [+6.0, +14.0]"
    assert interval("precision_at_5", UNKNOWN) == "10.0%"


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
    assert table(pair)[1][1:3] == ["8", "12"]


def test_markdown_cells_cannot_break_the_table():
    lines = markdown_table([["a|b", "c\nd"], ["e", "f"]]).splitlines()
    assert lines == [r"| a\|b | c d |", "| --- | --- |", "| e | f |"]


def test_console_columns_are_aligned():
    lines = console_table([["name", "x"], ["longer name", "100"]]).splitlines()
    assert lines[0] == "name           x"
    assert lines[2] == "longer name  100"


def test_class_names_are_never_markup():
    assert literal("<b>*a*_`\n#") == r"\<b\>\*a\*\_\` \#"


@pytest.mark.parametrize("which", ["pair", "alone", "few"])
def test_a_report_has_its_sections_and_no_undefined_number(which, request):
    comparison = request.getfixturevalue(which)
    model = {
        "source": "x.pt",
        "embedding_dim": 8,
        "parameters": 10_000_000,
        "input_size": 32,
        "dtype": "float32",
    }
    classes = ["<script>", "b"]
    facts = {
        "dataset": {"name": "d", "split": "test", "n": 50, "classes": classes},
        "models": {name: dict(model) for name in comparison.metrics},
        "run": {"command": "python x --y"},
    }
    text = markdown(comparison, facts, ["mind the gap"])
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[1:4] == ["## Overview", "## Quantitative results", "## Read with it"]
    assert "- mind the gap" in text
    assert "python x --y" in text
    assert "nan" not in text.lower().split()
    assert "<script>" not in text.replace(r"\<script\>", "").replace("| <script> |", "")
    assert ("too few images per class for intervals" in text) == (which == "few")
