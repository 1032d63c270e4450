import csv
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ijepa import report
from ijepa.comparison import compare
from ijepa.errors import UserError
from ijepa.probe import Probe

CLASSES = ('a,b "c"', "two\r\nlines\rand\nmore")


@pytest.fixture(scope="module")
def run(make_page):
    example = make_page(250, CLASSES)
    return example.comparison, example.split, example.maps


def test_a_failed_write_leaves_no_metrics_and_a_later_run_removes_leftovers(run, tmp_path):
    comparison, split, maps = run
    for name in ("mine.txt", "metrics.json"):  # the latter of an earlier run
        (tmp_path / name).touch()
    (tmp_path / "report.html").mkdir()  # where a late file has to go
    with pytest.raises(UserError):
        report.write_report(tmp_path, comparison, split, maps=maps)
    made = {path.name for path in tmp_path.iterdir()}
    of_two = {"embeddings_hf.npz", "nn_disagreement.png"}
    assert of_two | {"embeddings_local.npz", "nn_queries.png"} < made
    assert not any(name == "metrics.json" or ".tmp" in name for name in made)
    (tmp_path / "report.html").rmdir()
    alone = compare({"local": comparison.analyses["local"].embeddings}, {}, split.labels, 0)
    maps = replace(maps, tsne={"local": maps.tsne["local"]}, pca={"local": maps.pca["local"]})
    report.write_report(tmp_path, alone, split, maps=maps)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == made - of_two | {"metrics.json"}
    named = json.loads((tmp_path / "metrics.json").read_text())["artifacts"]
    assert {one["path"] for one in named} == left - {"mine.txt", "metrics.json"}
    assert "embeddings_hf" not in (tmp_path / "report.md").read_text()


def test_two_labeled_arrays_from_anywhere_make_a_report(tmp_path):
    X = np.random.default_rng(0).normal(size=(2, 75, 12)).astype(np.float32)
    names, labels = {"local": "mine", "hf": "yours\u0378"}, np.repeat(np.arange(3), 25)
    for name in ("embeddings_hf.npz", "nn_queries.png"):
        (tmp_path / name).touch()
    found = compare(dict(zip(names, X, strict=True)), {}, labels, 0, names=names)
    written = report.write_report(tmp_path, found)
    files = [path.name for path in written]
    assert not any(name.startswith(("nn_", "embeddings_")) for name in files)
    assert {"report.md", "report.html", "metrics.json", "tsne_comparison.png"} <= set(files)
    metrics = json.loads(written[-1].read_text())
    assert metrics["names"] == names
    assert metrics["chance_precision"] == pytest.approx(24 / 74)
    hf = metrics["models"]["hf"]
    assert (hf["short_name"], hf["losses"], hf["embedding_dim"]) == (names["hf"], None, 12)
    for words in ("50 PCs of the local model", "no installed font has 1 character"):
        assert any(words in caveat for caveat in metrics["caveats"])
    assert (tmp_path / "embeddings_hf.npz").exists()  # the arrays may come from it
    assert not (tmp_path / "nn_queries.png").exists()


@pytest.mark.parametrize(
    ("changes", "facts", "problem"),
    [
        ({"labels": np.arange(250)[::-1] % 2}, {}, "labels of the comparison"),
        ({"classes": ("one",)}, {}, "a name for each"),
        ({}, {"summary": "good"}, "summary"),
        ({}, {"dataset": {"classes": ["one"]}}, "other classes"),
        ({}, {"models": {"local_2": {}}}, "local_2"),
        ({}, {"models": {"dinov2": {}}}, "dinov2"),
        ({}, {"run": {"where": {1}}}, "not JSON serializable"),
    ],
)
def test_what_is_not_of_the_comparison_is_refused_before_a_file_changes(
    run, tmp_path, changes, facts, problem
):
    comparison, split, maps = run
    (tmp_path / "metrics.json").touch()
    with pytest.raises((ValueError, TypeError), match=problem):
        report.write_report(tmp_path, comparison, replace(split, **changes), facts, maps)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_facts_may_be_of_numpy_and_name_the_classes_of_arrays(run, tmp_path):
    X, labels = run[0].analyses["local"].embeddings[:40], np.arange(40) % 2
    names = np.array(["cat", "dog"])
    facts = {"run": {"lr": np.float64(0.1), "x": np.nan}, "dataset": {"classes": names}}
    facts |= {"models": {"local": {"parameters": np.int64(7), "input_size": 32}}}
    facts |= {"settings": {"mine": np.arange(2)}}
    report.write_report(tmp_path, compare({"local": X}, {}, labels, np.int64(1)), None, facts)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["run"]["lr"], found["run"]["seed"]) == (0.1, 1)
    assert found["settings"].keys() > {"mine", "knn", "tsne"}
    assert "run.x is undefined for this sample" in found["caveats"]
    assert "input 32 px" in (text := (tmp_path / "report.md").read_text())
    assert "px, None" not in text
    assert ",cat," in (tmp_path / "per_image.csv").read_text().replace('"', "")


def test_per_image_rows_read_back_as_the_numbers(run):
    comparison, split, maps = run
    split = replace(split, paths=tuple(f'a/"{i}",\r.png' for i in range(250)))
    correct = {"local": {"linear": comparison.analyses["local"].first_is_right()}}
    # The last images are on no map.
    shown = {k: replace(m, coordinates=m.coordinates[:15]) for k, m in maps.tsne.items()}
    maps = replace(maps, rows=np.arange(15), tsne=shown)
    text = report.per_image_csv(comparison, maps, split, SimpleNamespace(correct=correct))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [int(row["index"]) for row in rows] == split.indices.tolist()
    assert [row["class"] for row in rows] == [CLASSES[label] for label in split.labels]
    assert tuple(row["path"] for row in rows) == split.paths

    def mean(column):
        return pytest.approx(np.mean([float(row[column]) for row in rows]), abs=1e-6)

    for name, metrics in comparison.metrics.items():
        for metric in ("precision_at_5", "silhouette", "silhouette_cosine"):
            assert metrics[metric].value == mean(f"{metric}_{name}")
        neighbors = [list(map(int, row[f"neighbors_{name}"].split())) for row in rows]
        expected = split.indices[comparison.analyses[name].neighbors[:, :5]]
        np.testing.assert_array_equal(neighbors, expected)
        places = [[row[f"tsne_{axis}_{name}"] for axis in "xy"] for row in rows]
        found = np.array(places[:15], float)
        np.testing.assert_allclose(found, maps.tsne[name].coordinates, rtol=1e-4)
        assert places[15:] == [["", ""]] * 235
    assert comparison.metrics["local"]["precision_at_1"].value == mean("linear_correct_local")
    assert comparison.agreement["mutual_knn"].value == mean("mutual_knn")


def test_on_disagreements_only_one_model_is_right_and_most_clearly(run):
    comparison = run[0]
    local, hf = (comparison.analyses[name] for name in ("local", "hf"))
    chosen = report.disagreements(comparison, 0)
    assert len(chosen) == 8
    for rows, winner, loser in ((chosen[:4], hf, local), (chosen[4:], local, hf)):
        only = (winner.precisions(1) == 1) & (loser.precisions(1) == 0)
        assert only[rows].all()
        gains = winner.precisions(5) - loser.precisions(5)
        assert gains[rows].tolist() == np.sort(gains[only])[::-1][:4].tolist()
    assert chosen.tolist() != report.disagreements(comparison, 1).tolist()
    same = compare(dict.fromkeys(("local", "hf"), local.embeddings), {}, local.labels, 0)
    assert len(report.disagreements(same, 0)) == 0


def test_metrics_hold_every_number_of_the_comparison(run):
    comparison, split, _ = run
    facts = report.complete(comparison, split, {})
    found = report.metrics_content(comparison, facts, [])
    for name, numbers in comparison.metrics.items():
        assert found["metrics"][name].keys() == numbers.keys()
        value = numbers["precision_at_5"]
        expected = {"value": value.value, "se": value.se, "ci95": list(value.ci95)}
        assert found["metrics"][name]["precision_at_5"] == expected
    for part in ("differences", "agreement"):
        assert found["comparison"][part].keys() == getattr(comparison, part).keys()
    assert found["comparison"]["per_class"][1]["mutual_knn"]["se"] > 0
    assert found["gains"]["pixels"]["value"] == comparison.gains["pixels"].value
    confusion = np.array(found["comparison"]["neighbor_confusion"]["hf"])
    np.testing.assert_allclose(confusion.sum(axis=1), 1)
    assert found["probe"] is None
    answers = {"local": {"knn": np.ones(9, bool)}}
    unusual = {"l2": [np.int64(1), np.float64("inf")]}
    probe = Probe(7, 9, 0, False, {}, unusual, {}, [], [], answers)
    found = report.metrics_content(comparison, facts, [], probe)
    assert found["probe"]["differences"] == {"l2": [1, None]}
    assert (found["probe"]["bank_images"], found["probe"]["correct"]) == (7, {})
    assert "probe.differences.l2[...] is undefined for this sample" in found["caveats"]


def test_matrices_of_very_many_classes_are_left_out_with_a_caveat(run):
    comparison, split, _ = run
    split = replace(split, classes=tuple(map(str, range(301))))
    found = report.metrics_content(comparison, report.complete(comparison, split, {}), [])
    assert found["comparison"]["neighbor_confusion"] == {}
    assert any("leaves out matrices of 301 classes" in caveat for caveat in found["caveats"])


def test_queries_come_from_the_seed_and_one_of_each_class():
    labels = np.repeat(np.arange(12), 5)
    queries, again, other = (report.draw_queries(labels, seed) for seed in (3, 3, 4))
    assert labels[queries].tolist() == list(range(10))
    np.testing.assert_array_equal(queries, again)
    assert (queries != other).any()
