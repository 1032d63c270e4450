import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ijepa import narrative, tables
from ijepa.comparison import compare
from ijepa.formats import P5, gap, interval, listed, number
from ijepa.markdown import caveats, console_table, literal, markdown
from ijepa.probe import probe as measure_probe
from ijepa.projections import Maps, TsneProjection
from ijepa.report import complete, unnamed
from ijepa.uncertainty import Estimate, confusion

NAN = float("nan")
HIGHER = Estimate(0.1, 0.02, (0.06, 0.14))
LOWER = Estimate(-0.1, 0.02, (-0.14, -0.06))
UNCLEAR = Estimate(0.01, 0.02, (-0.03, 0.05))
UNKNOWN = Estimate(0.1, NAN, (NAN, NAN))
UNDEFINED = Estimate(NAN, NAN, (NAN, NAN))
CLASSES = ["cat", "dog"]
FILE = {"sha256": "ab", "weights": "target"}
SINGLES = (1,) * 8  # no class has two images: precision is not defined


@cache
def make(num_models=2, sizes=(25, 25), references=True, names=("tiny (target)", "huge_14")):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    clouds = {
        name: (rng.normal(size=(len(labels), width)) + labels[:, None]).astype(np.float32)
        for name, width in {"local": 16, "hf": 24, "pixels": 6, "random_weights": 16}.items()
    }
    models = {name: clouds[name] for name in ("local", "hf")[:num_models]}
    others = {name: clouds[name] for name in ("pixels", "random_weights") if references}
    return compare(models, others, labels, 0, names=dict(zip(("local", "hf"), names, strict=True)))


@pytest.fixture(scope="module")
def pair():
    return make()


def with_difference(comparison, metric, estimate, **more):
    changed = comparison.differences[metric] | {"estimate": estimate, **more}
    return replace(comparison, differences=comparison.differences | {metric: changed})


def facts_of(comparison, classes=None, **models):
    facts = complete(comparison, unnamed(comparison), {"run": {"command": "python x --y"}})
    facts["dataset"]["classes"] = list(classes or facts["dataset"]["classes"])
    for role, values in models.items():
        facts["models"][role] |= values
    return facts


def map_of(n, perplexity):
    return Maps(np.arange(n), {"local": TsneProjection(np.zeros((n, 2)), 1.0, 1.0, perplexity)}, {})


def report(comparison, classes=None, probe=None, **models):
    facts = facts_of(comparison, classes, **models)
    return markdown(comparison, facts, said_of(comparison), ["report.md"], probe)


def said_of(comparison, word="", data=None, maps=None, notes=(), **models):
    """The caveats that have a word."""
    facts, maps = facts_of(comparison, **models), maps or map_of(50, 30.0)
    facts["dataset"] |= data or {}
    return [c for c in caveats(comparison, facts, maps, notes) if word in c]


def records(table):
    """The rows of a table by the names of its columns."""
    header, *rows = table
    return [dict(zip(header, row, strict=True)) for row in rows]


def probe_of(comparison):
    rng = np.random.default_rng(1)
    labels = comparison.analyses["local"].labels
    queries = {role: a.embeddings for role, a in comparison.analyses.items()}
    queries["pixels"] = rng.normal(size=(len(labels), 4)).astype(np.float32)
    noise = {role: rng.normal(size=X.shape).astype(np.float32) / 9 for role, X in queries.items()}
    banks = {role: X + noise[role] for role, X in queries.items()}
    return measure_probe(banks, queries, labels, labels, 0)


@pytest.fixture(scope="module")
def probe(pair):
    return probe_of(pair)


@pytest.mark.parametrize("bounds", [(0.0, 0.0), (0.0, 0.2), (-0.2, 0.0)])
def test_a_verdict_needs_an_interval_that_excludes_zero(bounds):
    assert narrative.verdict(Estimate(0.0, 0.0, bounds)) == "unclear"


@pytest.mark.parametrize(
    ("finding", "metric", "claim", "measure"),
    [
        (narrative.answer, P5, "retrieves better", "precision@5"),
        (narrative.separability_finding, "silhouette", "separates the classes", "silhouette"),
        (narrative.variance_finding, "variance_10pc", "has more of its variance", "10 PCs"),
        (narrative.variance_finding, "effective_rank", "uses more dimensions", "effective rank"),
    ],
)
@pytest.mark.parametrize("estimate", [HIGHER, LOWER, UNCLEAR, UNKNOWN])
def test_a_finding_claims_what_its_interval_allows(pair, finding, metric, claim, measure, estimate):
    text = finding(with_difference(pair, metric, estimate))
    assert (f"HF model {claim}" in text) == (estimate is HIGHER)
    assert (f"local model {claim}" in text) == (estimate is LOWER)
    said = next(part for part in text.split(").") if f"HF - local {gap(metric, estimate)}" in part)
    assert measure in said
    assert ("No difference" in said and "n = 50" in said) == (estimate is UNCLEAR)
    assert ("no verdict" in said) == (estimate is UNKNOWN)


def test_better_than_a_reference_needs_an_interval_too(pair):
    for estimate, words in ((LOWER, "baseline retrieves better than"), (UNCLEAR, "No difference")):
        changed = replace(pair, gains={"random_weights": estimate})
        text = narrative.retrieval_finding(changed)
        assert words in text
        assert f"local - random weights {gap(P5, estimate)}" in text
        assert words in " ".join(narrative.conclusions(changed))
    shown = replace(pair, references={"pixels": {P5: 0.99}, "random_weights": {P5: 0.123}})
    assert "], pixels 99.0%, random weights 12.3%, chance " in narrative.answer(shown)


def test_nothing_is_said_twice_and_conclusions_have_no_numbers(pair, probe):
    text = report(pair, probe=probe)
    said = [part for part in re.split(r"(?<=[.)])\s", text) if len(part.split()) > 6]
    # A verdict without its numbers is a conclusion, or that of agreement, which has none.
    assert {part for part in said if said.count(part) > 1} <= {narrative.agreement_ruling(pair)}
    lower = {name: probe.differences[name] | {"estimate": LOWER} for name in ("linear", "knn")}
    sure = replace(probe, differences=probe.differences | lower)
    conclusions = narrative.conclusions(pair, sure)
    assert len(set(conclusions)) == len(conclusions)
    assert narrative.conclusions(make(sizes=(8, 8)), sure)[1:] == conclusions[-2:]
    assert "[" not in " ".join(conclusions)


@pytest.mark.parametrize(
    ("sizes", "why"), [((2, 2), "fewer than six images"), (SINGLES, "no class has two images")]
)
def test_undefined_precision_says_why(sizes, why):
    comparison = make(sizes=sizes)
    assert why in narrative.answer(comparison)
    assert why in narrative.conclusions(comparison)[0]
    assert not narrative.retrieval_finding(comparison)
    assert not narrative.efficiency_finding(comparison)
    assert narrative.undefined(comparison) in said_of(comparison)
    assert tables.headline_table(comparison)[5][1] == "n/a"


def test_efficiency_is_the_ratio_with_its_interval(pair):
    head = tables.summary(pair)
    assert head["ratio"][P5] == pytest.approx(head["local"][P5] / head["hf"][P5])
    text = narrative.efficiency_finding(pair)
    assert f"{100 * head['ratio'][P5]:.0f}% [" in text
    assert "67% of its dimensions (16 / 24)" in text
    same = replace(pair, analyses=dict.fromkeys(("local", "hf"), pair.analyses["local"]))
    assert "as many dimensions (16)" in narrative.efficiency_finding(same)
    without = with_difference(pair, P5, UNCLEAR, ratio=UNDEFINED)
    assert "no ratio" in narrative.efficiency_finding(without)
    assert tables.headline_table(without)[5][3] == "n/a"


@pytest.mark.parametrize(("value", "overlap"), [(-0.02, True), (0.4, False)])
def test_silhouettes_near_zero_are_explained_and_none_is_better(pair, value, overlap):
    shown = Estimate(value, 0.001, (value - 0.002, value + 0.002))
    metrics = {role: values | {"silhouette": shown} for role, values in pair.metrics.items()}
    changed = with_difference(replace(pair, metrics=metrics), "silhouette", LOWER)
    text = narrative.separability_finding(changed)
    assert ("hardly nearer to its own class" in text) == overlap
    assert interval("silhouette_cosine", pair.metrics["hf"]["silhouette_cosine"]) in text
    for said in (text, " ".join(narrative.conclusions(changed))):
        assert ("No model is shown to separate" in said) == overlap
        assert ("separates the classes better" in said) != overlap


@pytest.mark.parametrize(
    ("mutual", "words"),
    [
        (Estimate(0.95, 0.02, (0.9, 1.0)), "more nearest neighbors than the classes explain"),
        (Estimate(0.35, 0.02, (0.3, 0.4)), "beyond chance, but not demonstrably beyond"),
        (Estimate(0.45, 0.05, (0.35, 0.55)), "beyond chance, but not demonstrably beyond"),
        (Estimate(0.21, 0.02, (0.17, 0.25)), "beyond chance can be shown at n = 50"),
        (Estimate(0.95, NAN, (NAN, NAN)), "no verdict"),
        (UNDEFINED, "too few images"),
    ],
)
def test_agreement_is_claimed_only_above_its_levels(pair, mutual, words):
    levels = {"mutual_knn_chance": 0.2, "mutual_knn_class_only": 0.4}
    changed = replace(pair, agreement=pair.agreement | {"mutual_knn": mutual, **levels})
    text = narrative.agreement_finding(changed)
    assert words in text
    assert (interval("mutual_knn", mutual) in text) == np.isfinite(mutual.value)


@pytest.mark.parametrize(("p", "more"), [(0.0099, True), (0.05, False)])
def test_common_geometry_is_claimed_only_where_few_permutations_reach_it(pair, p, more):
    facts = {"cka": 0.5, "cka_null_p99": 0.4, "cka_null_p": p, "cka_class_demeaned": 0.123}
    facts["similarity_spearman"] = 0.25
    text = narrative.agreement_finding(replace(pair, agreement=pair.agreement | facts))
    assert ("do not show more" not in text) == more
    for shown in ("0.400", f"p = {p}", "0.123", "50 images", "0.250"):
        assert shown in text
    undefined = replace(pair, agreement=pair.agreement | dict.fromkeys(facts, NAN))
    assert not re.search("CKA|Spearman", narrative.agreement_finding(undefined))


@pytest.mark.parametrize(
    ("rows", "hf", "local", "unclear"),
    [
        ([(HIGHER, 0.01), (LOWER, 0.02)], ["cat"], ["dog"], ""),
        ([(HIGHER, 0.01), (LOWER, 0.07)], ["cat"], [], "on 1 of 2 classes"),
        ([(UNCLEAR, 0.01), (LOWER, 0.04)], [], ["dog"], "on 1 of 2 classes"),
        ([(HIGHER, 0.06), (UNCLEAR, 1.0)], [], [], "any class at n = 50"),
    ],
)
def test_a_class_counts_by_interval_and_corrected_test(pair, rows, hf, local, unclear):
    found = [{"label": i, "difference": one, "holm_p": p} for i, (one, p) in enumerate(rows)]
    text = narrative.classes_finding(replace(pair, per_class=found), CLASSES)
    assert re.findall(r"HF model retrieves better on (\w+)", text) == hf
    assert re.findall(r"local model retrieves better on (\w+)", text) == local
    assert unclear in text


def test_confusion_names_the_class_that_neighbors_stray_to():
    labels = np.repeat(np.arange(3), 25)
    rng = np.random.default_rng(0)
    # Classes 0 and 1 lie in one place, class 2 far off.
    X = (rng.normal(size=(75, 4)) + 50 * np.eye(4)[np.where(labels == 2, 2, 0)]).astype(np.float32)
    found = compare({"local": X}, {}, labels, seed=0)
    text = narrative.confusion_finding(found, ["cat", "dog", "ship"])
    assert "ship has the purest neighborhoods: 100% of neighbors share the class, also in" in text
    apart = compare({"local": X + 200 * np.eye(4)[labels].astype(np.float32)}, {}, labels, seed=0)
    text_of_ties = narrative.confusion_finding(apart, ["cat", "dog", "ship"])
    assert "3 classes have the purest neighborhoods: 100%" in text_of_ties
    assert "half-samples" not in text_of_ties
    assert {"cat -> dog", "dog -> cat"} <= set(re.findall(r"\w+ -> \w+", text))
    assert "ship" not in text.split("confusions")[1]


def test_groups_of_classes_are_named_once_where_the_models_agree(pair):
    tree = {"merges": [[[1], [2], 0.1], [[0], [3], 0.2]], "top": [[1, 2], [3, 0]]}
    other = {"merges": [[[3], [0], 0.1], [[1], [2], 0.2]], "top": [[0, 3], [2, 1]]}
    groups = {"local": tree, "hf": tree, "cophenetic": 0.87, "p": 0.004}
    found = (replace(pair, class_groups=one) for one in (groups, groups | {"hf": other}, {}))
    names = ["airplane", "cat", "dog", "ship"]
    same, differ, none = (narrative.class_groups_finding(one, names) for one in found)
    last = "airplane and ship join cat and dog last"
    assert same.count(f"In both models, {last}; cat and dog join first.") == 1
    assert "0.870" in same
    assert "p = 0.004" in same
    assert differ.count(last) == 2
    assert "airplane and ship join first" in differ
    assert none == ""
    alone = {"merges": [[[0], [1], 0.1]], "top": [[2], [0, 1]]}
    one = replace(pair, class_groups={"local": alone, "hf": alone})
    assert "dog joins airplane and cat last" in narrative.class_groups_finding(one, names)


@pytest.mark.parametrize(("trainings", "rough"), [(2, True), (5, False)])
def test_the_spread_over_seeds_is_next_to_the_error_over_images(pair, trainings, rough):
    spread = {"values": [0.55] * trainings, "mean": 0.55, "sd": 0.0707}
    seen = replace(pair, seeds=dict.fromkeys(tables.HEADLINES, spread))
    assert f"trained {trainings} times" in narrative.seeds_finding(seen)
    assert ("only rough" in narrative.seeds_finding(seen)) == rough
    error = 100 * pair.metrics["local"][P5].se
    row = tables.seeds_table(seen)[4]
    assert row[2:] == ["55.0%", "7.07 points", f"{error:.2f} points"]
    assert row[2] in report(seen).split("Spread over Training Seeds")[1]
    assert "Training Seeds" not in report(pair)


def test_the_probe_names_measure_bank_and_all_models(pair, probe):
    text, alone = narrative.probe_finding(probe), probe_of(make(1))
    for measure, words in (("linear", "linear-probe accuracy"), ("knn", "20-NN accuracy")):
        assert words in text
        assert gap(measure, probe.differences[measure]["estimate"]) in text
    assert "50 labeled images" in text
    assert "other banks" in text
    assert "given this bank" in narrative.probe_finding(replace(probe, bank_in_intervals=False))
    assert text in report(pair, probe=probe)
    assert "Probe" not in report(pair)
    assert "HF" not in str([narrative.probe_finding(alone), tables.probe_table(alone)])


def test_the_probe_has_tables_of_all_accuracies_and_of_the_classes(pair, probe):
    header, *rows = tables.probe_table(probe)
    assert header[1:] == ["Local", "HF", "Pixels", "HF - local [95%]"]
    shown = {row[0]: row for row in rows}
    assert shown["kNN, k = 20"][1] == interval("knn", probe.models["local"]["knn"][20])
    assert shown["Linear"][4] == gap("linear", probe.differences["linear"]["estimate"])
    few = interval("knn", probe.models["hf"]["few_shot"][10]["knn"]["estimate"])
    assert shown["kNN, k = 20, images per class: 10"][2].startswith(few)
    for measure in ("linear", "knn"):
        table = tables.probe_class_table(probe, measure, CLASSES)
        for cell, facts in zip(records(table), probe.per_class, strict=True):
            found = facts[measure]
            assert cell["Class"] == CLASSES[facts["label"]]
            assert cell["HF [95%]"] == interval(measure, found["hf"])
            assert cell["HF - local [95%]"] == gap(measure, found["difference"]["estimate"])
        assert table[1][2] in report(pair, probe=probe)


def test_numbers_are_printed_without_negative_zeros_or_nan_and_with_an_interval_if_any():
    percent = [number(P5, value) for value in (0.4983, 0.7285, -0.00001, NAN)]
    assert percent == ["49.8%", "72.9%", "0.0%", "n/a"]
    assert [number("silhouette", -0.00004), number("ratio", 0.727)] == ["0.000", "73%"]
    assert [number("embedding_dim", 1280.0), number("effective_rank", 87.04)] == ["1,280", "87.0"]
    assert interval(P5, HIGHER, "+") == "+10.0% [+6.0, +14.0]"
    assert interval(P5, UNKNOWN) == "10.0%"
    assert gap(P5, HIGHER) == "+10.0 points [+6.0, +14.0]"
    assert gap("silhouette", Estimate(0.0, 0.0, (0.0, 0.0))) == "+0.000 [+0.000, +0.000]"


def test_a_small_error_and_a_bound_near_zero_get_more_digits():
    for metric, se, shown in (
        (P5, 0.001, "+0.4% [+0.2, +0.6]"),
        (P5, 0.0009, "+0.42% [+0.25, +0.60]"),
        ("silhouette", 1e-12, "+0.004235 [+0.004235, +0.004235]"),
    ):
        estimate = Estimate(0.0042349, se, (0.0042349 - 1.96 * se, 0.0042349 + 1.96 * se))
        assert interval(metric, estimate, "+") == shown
    # An interval that holds 0 must not read as one above it.
    close = Estimate(0.0063, 0.0034, (-0.000285, 0.01297))
    assert gap("silhouette", close) == "+0.0063 [-0.0003, +0.0130]"


def test_the_table_names_models_chance_directions_and_references(pair):
    header, *rows = tables.headline_table(pair)
    assert header[1:5] == ["tiny (target)", "huge_14", "local / HF", "HF - local [95%]"]
    assert header[5:] == ["Chance", "Pixels", "Random weights"]
    assert rows[0] == ["Embedding dimension", "16", "24", "0.67x", "", "", "6", "16"]
    assert rows[4][4:6] == [gap(P5, pair.differences[P5]["estimate"]), number(P5, 24 / 49)]
    assert {len(row) for row in tables.headline_table(make(1))} == {5}
    assert tables.headline_table(make(references=False))[0][5:] == ["Chance"]
    # Where classes differ in size, the mean over them is a row.
    uneven = make(sizes=(40, 22))
    hits = np.split(uneven.analyses["hf"].precisions(5), [40])
    assert tables.headline_table(uneven)[-1][2] == number(P5, np.mean([one.mean() for one in hits]))
    assert "over classes" not in str(rows)


def test_the_confusion_table_is_the_confusion_of_both_models(pair):
    header, *rows = tables.confusion_table(pair, ["a", "b"])
    assert header == ["Image", "a", "b"]
    local, hf = (
        100 * confusion(a.labels, a.labels[a.neighbors[:, :5]], 2) for a in pair.analyses.values()
    )
    shares = [
        [f"{x:.0f} / {y:.0f}" for x, y in zip(*row, strict=True)]
        for row in zip(local, hf, strict=True)
    ]
    assert rows == [["a", *shares[0]], ["b", *shares[1]]]
    assert "/" not in str(tables.confusion_table(make(1), ["a", "b"]))
    assert "| Image |" in report(pair, [*"abcdefghijklm"])  # two of them occur
    for sizes, shown in (((5,) * 12, True), ((5,) * 13, False), ((2, 2), False)):
        assert ("| Image |" in report(make(1, sizes), [*"abcdefghijklm"])) == shown


def test_the_table_of_classes_has_intervals_tests_and_agreement(pair):
    shown, precisions = records(tables.class_table(pair, CLASSES)), pair.class_precision["local"]
    for cell, row, precision in zip(shown, pair.per_class, precisions, strict=True):
        assert cell["n"] == "25"
        assert cell["Local [95%]"] == interval(P5, precision)
        assert cell["HF - local [95%]"] == gap(P5, row["difference"])
        assert cell["HF wins / ties / losses"].split(" / ")[1] == str(row["ties"])
        assert cell["Holm p"] == f"{row['holm_p']:.2g}"
        assert cell["Shared 10-NN [95%]"] == interval("mutual_knn", row["mutual_knn"])
    assert tables.class_table(make(1), CLASSES)[0] == ["Class", "n", "Local [95%]"]


def test_columns_are_aligned_and_many_names_are_listed_up_to_a_limit():
    lines = console_table([["name", "x"], ["longer name", "100"]]).splitlines()
    assert lines[::2] == ["name           x", "longer name  100"]
    names = ["a", "a, b and c", "a, b, c, d, e and 3 more"]
    assert [listed([*letters]) for letters in ("a", "abc", "abcdefgh")] == names


@pytest.mark.parametrize(
    "arguments", [{}, {"num_models": 1}, {"sizes": (8, 8)}, {"sizes": SINGLES}], ids=str
)
def test_a_report_has_its_sections_no_undefined_number_and_no_long_sentence(arguments):
    comparison = make(**arguments)
    facts, known = facts_of(comparison), said_of(comparison)
    precise = np.isfinite(comparison.metrics["local"][P5].value)
    probe = probe_of(comparison) if precise else None
    text = markdown(comparison, facts, known, ["nn_disagreement.png", "metrics.json"], probe)
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    expected = ["Overview", "Quantitative Results", "Caveats", "Key Findings", "Conclusions"]
    assert headings == [*expected, "Files Generated", "Reproduction"]
    assert "python x --y" in text
    assert not re.search(r"\bnan\b", text.lower())
    numbers = re.findall(r"^### (\d+)\. ", text, re.MULTILINE)
    assert numbers == [str(i) for i in range(1, len(numbers) + 1)]
    assert ("Agreement of" in text) == (arguments != {"num_models": 1})
    assert ("Representation Efficiency" in text) == (precise and "Agreement of" in text)
    assert bool(re.search("HF|huge|Both models", text)) == (arguments != {"num_models": 1})
    assert ("so no verdict on classes" in text) == (arguments == {"sizes": (8, 8)})
    prose = [line for line in text.splitlines() if not line.startswith(("|", "Versions", "python"))]
    for sentence in re.split(r"\. |\n", "\n".join(prose)):
        words = re.sub(r"\[[^]]*\]", "", sentence).split()
        assert len(words) <= 30 or sentence.startswith(("Versions", "- Undefined")), sentence


def test_the_overview_says_what_was_trained_and_the_protocol_what_was_done(pair):
    known = {"losses": "view matching (InfoNCE)", "epochs": 3, "planned_epochs": 9}
    known |= {"parameters": 2_700_000, "pooling": "mean over patch tokens"}
    overview, protocol = report(pair, local=known).split("## Quant")[0].split("*Protocol.*")
    for said in ("view matching (InfoNCE)", "2.7 million", "3 of 9 planned"):
        assert said in overview
    assert "not recorded" in report(pair).split("*Protocol.*")[0]
    for said in ("mean over patch tokens", "cosine", "25 images of each of 2", "seed 0", "scipy"):
        assert said in protocol


def test_classes_named_by_numbers_are_no_numbers_of_a_sentence(pair):
    better = [{"label": 1, "difference": HIGHER, "holm_p": 0.01}]
    found = narrative.findings(replace(pair, per_class=better), ["7", "a1"])
    assert "retrieves better on a1 (" in found["Class by Class"]
    assert '"7" -> a1 (' in found["What the Embeddings Learn"]


def test_hostile_names_are_shown_and_never_markup():
    classes = ["<script>alert(1)</script>\r\n# x", "a|b`\\`[l](u) _e_ $x$ &lt;"]
    text = report(make(names=("<b>x</b>", "a|b*c*")), classes)
    assert not re.search(r"(?<!\\)<|^# x|(?<!\\)\]\(", text, re.MULTILINE)
    shown = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    cells = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in lines] for lines in shown]
    assert len(cells) == 3
    for rows in cells:
        assert {len(row) for row in rows} == {len(rows[0])}
    assert re.sub(r"\\(.)", r"\1", cells[2][3][0]).strip() == classes[1]
    assert literal("ijepa_vith14_1k") == "ijepa_vith14_1k"


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("dtype", {"local": {"dtype": "bfloat16"}, "hf": {"dtype": "float32"}}),
        ("epochs of training: local 9 and HF 3", {"local": {"epochs": 9}, "hf": {"epochs": 3}}),
        ("9 planned", {"local": {"epochs": 3, "planned_epochs": 9}}),
        ("heads are assumed", {"local": {"notes": ["64 heads are assumed."]}}),
        ("two files", {"notes": ["two files were left out."]}),
        ("train split", {"data": {"split": "train"}}),
        ("Maps show 10 of 50", {"maps": map_of(10, 30.0)}),
        ("perplexity is 3.0", {"maps": map_of(50, 3.0)}),
        ("same weights", {"local": FILE, "hf": FILE}),
    ],
)
def test_what_limits_the_numbers_is_a_caveat_and_only_then(pair, word, arguments):
    assert len(said_of(pair, word, **arguments)) == 1
    assert said_of(pair, word) == []


def test_a_rank_without_interval_is_near_its_bound_only_above_half_of_it():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 60)), rng.normal(size=(50, 1)) @ rng.normal(size=(1, 16))
    for embeddings, said in zip(X, (True, False), strict=True):
        found = compare({"local": embeddings}, {}, np.arange(50) % 2, 0)
        assert np.isnan(found.metrics["local"]["effective_rank"].se)
        assert bool(said_of(found, "near its bound")) == said


def test_same_weights_few_images_small_classes_and_single_images_are_caveats(pair):
    assert not said_of(pair, "same weights", local=FILE, hf=FILE | {"weights": "context"})
    few = make(sizes=(8, 8))
    same = replace(pair, analyses=dict.fromkeys(("local", "hf"), pair.analyses["local"]))
    seeds = replace(pair, seeds={P5: {"values": [0.5], "mean": 0.5, "sd": 0.0}})
    for comparison, words, said in (
        (same, "same weights", True),
        (few, "no intervals and no verdicts", True),
        (pair, "no intervals", False),
        (replace(pair, small_classes=3), "within 3 classes of fewer than 20 images", True),
        (make(sizes=(9, 1)), "count as 0 in 1 class with one image", True),
        (make(sizes=(9, 1)), "precision@5 cannot exceed 90.0% here", True),
        (make(sizes=(4, 3)), "precision@5 cannot exceed 51.4% here", True),
        (make(sizes=(6, 6)), "cannot exceed", False),
        (few, "50 PCs of the local model", True),
        (pair, "here 50", True),
        (pair, "one checkpoint is one draw", True),
        (seeds, "one checkpoint is one draw", False),
    ):
        assert bool(said_of(comparison, words)) == said


def test_neighbors_that_rounding_makes_equal_are_a_caveat():
    rng, labels = np.random.default_rng(0), np.arange(200) % 4
    X = (rng.normal(size=(200, 16)) + 2 * np.eye(16)[labels]).astype(np.float32)
    for offset, tied in ((0, False), (10, False), (500, True), (10_000, True)):
        found = compare({"local": X + offset}, {}, labels, seed=0)
        assert bool(said_of(found, "equally similar")) == tied
    few = np.repeat(rng.normal(size=(10, 16)), 20, axis=0).astype(np.float32)
    assert said_of(compare({"local": few}, {}, labels, seed=0), "the order of the images decides")


def test_equal_embeddings_are_a_caveat_and_equal_offsets_are_not():
    labels = np.arange(60) % 2
    X, Y = (1000 + 0.02 * np.random.default_rng(i).normal(size=(60, 8)) for i in range(2))
    for other, same in ((Y, False), (X + 5, False), (X + 1e-9, True), (X[:, :7], False)):
        found = compare({"local": X, "hf": other}, {}, labels, seed=0)
        assert bool(said_of(found, "the same embeddings")) == same


@pytest.mark.parametrize(
    ("rank", "precision", "words"),
    [
        (Estimate(1.1, 0.1, (0.9, 1.3)), 0.1, "HF model looks collapsed"),
        (UNDEFINED, 0.1, "HF model are the same"),
        (Estimate(40.0, NAN, (NAN, NAN)), 0.9, "above n / 2"),
        (Estimate(1.1, 0.1, (0.9, 1.3)), 0.99, ""),
    ],
)
def test_collapse_and_ranks_that_n_bounds_are_caveats(pair, rank, precision, words):
    p5 = Estimate(precision, 0.01, (precision - 0.02, precision + 0.02))
    hf = pair.metrics["hf"] | {"effective_rank": rank, P5: p5}
    changed = replace(pair, metrics=pair.metrics | {"hf": hf})
    assert said_of(changed, words)
    worse = {"pixels": {P5: 0.9}, "random_weights": {P5: precision / 2}}
    assert not said_of(replace(changed, references=worse), "looks collapsed")
    assert bool(said_of(changed, "collapsed")) == (precision < 0.5)
