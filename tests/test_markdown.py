import re
from dataclasses import replace

import numpy as np
import pytest

from ijepa.comparison import HEADLINES, SeedSpread, compare, neighbor_confusion
from ijepa.markdown import confusion_table, markdown, markdown_table, per_class_table, seeds_table

CLASSES = ["<script>", "b|c"]


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


def report(comparison, classes=CLASSES):
    model = {
        "source": "x.pt",
        "embedding_dim": 8,
        "parameters": 10_000_000,
        "input_size": 32,
        "dtype": "float32",
    }
    facts = {
        "dataset": {"name": "d", "split": "test", "n": 50, "classes": list(classes)},
        "models": {name: dict(model) for name in comparison.metrics},
        "run": {"command": "python x --y"},
    }
    return markdown(comparison, facts, ["mind the gap"])


def cells(text):
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


@pytest.mark.parametrize("which", ["pair", "alone", "few"])
def test_a_report_has_its_sections_and_no_undefined_number(which, request):
    comparison = request.getfixturevalue(which)
    text = report(comparison)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Overview",
        "## Quantitative results",
        "## Read with it",
        "## Key findings",
        "## Conclusions",
        "## Files",
        "## Reproduction",
    ]
    assert "- mind the gap" in text
    assert "python x --y" in text
    assert not re.search(r"\bnan\b", text.lower())
    assert "<script>" not in text.replace(r"\<script\>", "").replace("| <script> |", "")
    assert ("too few images per class for intervals" in text) == (which == "few")
    for part in ("Agreement", "Class by class", "Representation efficiency", "nn_disagreement"):
        assert (part in text) == (which != "alone")


def test_findings_are_numbered_without_gaps(pair, alone):
    for comparison in (pair, alone):
        numbers = re.findall(r"^### (\d+)\. ", report(comparison), re.MULTILINE)
        assert numbers == [str(i) for i in range(1, len(numbers) + 1)]


def test_the_confusion_table_is_the_confusion_of_both_models(pair, alone):
    rows = cells(confusion_table(pair, ["a", "b"]))
    assert rows[0] == ["Image", "a", "b"]
    local, hf = (100 * neighbor_confusion(pair.analyses[name], 2) for name in ("local", "hf"))
    for row, name in enumerate("ab"):
        shown = [f"{local[row, column]:.0f} / {hf[row, column]:.0f}" for column in range(2)]
        assert rows[row + 1] == [name, *shown]
    assert "/" not in confusion_table(alone, ["a", "b"])


def test_many_classes_have_no_confusion_table(pair):
    assert "| Image |" in report(pair, [*CLASSES, *"cdefghijkl"])
    text = report(pair, [*CLASSES, *"cdefghijklm"])
    assert "| Image |" not in text
    assert "neighbours stray most" in text


def test_the_table_of_classes_tells_tests_and_agreement(pair):
    header, *rows = cells(per_class_table(pair, CLASSES))
    assert rows[1][0] == r"b\|c"
    for shown, row in zip(rows, pair.per_class, strict=True):
        told = dict(zip(header, shown, strict=True))
        assert told["n"] == "25"
        assert told["Local"] == f"{100 * row['local']:.1f}%"
        assert told["Wins / ties / losses"] == f"{row['wins']} / {row['ties']} / {row['losses']}"
        assert told["Holm p"] == f"{row['holm_p']:.2g}"
        assert told["Top-1, Holm p"] == f"{row['mcnemar_holm_p']:.2g}"
        mutual = 100 * row["mutual_knn"].value
        assert told["Shared 10-NN [95 %]"].startswith(f"{mutual:.1f}% [")


def test_trainings_are_told_apart_from_images(pair):
    seeds = {metric: SeedSpread([0.5, 0.6], 0.55, 0.0707) for metric in HEADLINES}
    comparison = replace(pair, seeds=seeds)
    assert "Spread over training seeds" in report(comparison)
    row = cells(seeds_table(comparison))[4]
    error = 100 * pair.metrics["local"]["precision_at_5"].se
    assert row == ["NN precision@5", "50.0%, 60.0%", "55.0%", "7.07%", f"{error:.2f}%"]
    assert "training seeds" not in report(pair)


def test_markdown_cells_cannot_break_the_table():
    lines = markdown_table([["a|b", "c\nd"], ["e", "f"]]).splitlines()
    assert lines == [r"| a\|b | c d |", "| --- | --- |", "| e | f |"]
