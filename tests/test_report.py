import csv
import hashlib
import io
import json

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.text import Text

from ijepa import report
from ijepa.comparison import compare
from ijepa.data import Split
from ijepa.errors import UserError
from ijepa.projections import make_maps
from ijepa.report import (
    disagreements,
    draw_queries,
    per_image_csv,
    plain,
    write_report,
)


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 20)
    images = torch.from_numpy(rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    split = Split("toys", "test", ("a,b", "c"), images, labels, np.arange(100, 140))
    models = {
        "local": (rng.normal(size=(40, 4)) + labels[:, None]).astype(np.float32),
        "hf": (rng.normal(size=(40, 6)) + labels[:, None]).astype(np.float32),
    }
    references = {name: models["local"].copy() for name in ("pixels", "random_weights")}
    comparison = compare(models, references, labels, seed=0)
    return comparison, make_maps(models, split.labels, 0), split


@pytest.fixture(scope="module")
def facts():
    model = {
        "source": "x",
        "embedding_dim": 4,
        "parameters": 10,
        "input_size": 8,
        "dtype": "float32",
    }
    return {
        "run": {"command": "python x", "seed": 0},
        "dataset": {
            "name": "toys",
            "split": "test",
            "n": 40,
            "classes": ["a,b", "c"],
            "sha256": 64 * "0",
        },
        "models": {"local": model, "hf": model},
        "settings": {},
    }


@pytest.fixture(scope="module")
def written(run, facts, tmp_path_factory):
    comparison, maps, split = run
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, comparison, maps, split, facts, ["a caveat"])


def test_artifacts_are_the_files_with_their_hashes_and_sizes(written):
    assert written[-1].name == "metrics.json"
    metrics = json.loads(written[-1].read_text())
    listed = {artifact["path"]: artifact for artifact in metrics["artifacts"]}
    assert listed.keys() == {path.name for path in written[:-1]}
    for path in written[:-1]:
        content = path.read_bytes()
        assert listed[path.name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert listed[path.name]["bytes"] == len(content)
    assert metrics["caveats"][0] == "a caveat"
    assert set(written[0].parent.iterdir()) == set(written)


def test_files_of_an_earlier_run_that_this_one_does_not_make_are_neither_kept_nor_named(
    run, facts, tmp_path
):
    comparison, _, split = run
    for name in ("embeddings_hf.npz", "nn_disagreement.png", "mine.txt"):
        (tmp_path / name).write_bytes(b"of an earlier run")
    X = comparison.analyses["local"].embeddings
    references = {"pixels": X, "random_weights": X}
    alone = compare({"local": X}, references, split.labels, comparison.seed)
    write_report(tmp_path, alone, make_maps({"local": X}, split.labels, 0), split, facts, [])
    left = {path.name for path in tmp_path.iterdir()}
    assert "mine.txt" in left
    assert not left & {"embeddings_hf.npz", "nn_disagreement.png"}
    named = json.loads((tmp_path / "metrics.json").read_text())["artifacts"]
    assert {one["path"] for one in named} <= left


def test_the_same_run_writes_the_same_bytes(run, facts, written, tmp_path):
    comparison, maps, split = run
    again = write_report(tmp_path, comparison, maps, split, facts, ["a caveat"])
    assert [path.name for path in again] == [path.name for path in written]
    for one, other in zip(again, written, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_per_image_rows_read_back_as_the_numbers(run, monkeypatch):
    comparison, maps, split = run
    monkeypatch.setattr(report, "CSV_ROWS", 7)
    pieces = list(per_image_csv(comparison, maps, split))
    assert [piece.count("\n") for piece in pieces] == [8, 7, 7, 7, 7, 5]
    rows = list(csv.DictReader(io.StringIO("".join(pieces))))
    assert [int(row["index"]) for row in rows] == list(range(100, 140))
    assert {row["class"] for row in rows} == {"a,b", "c"}
    for name in ("local", "hf"):
        shown = [float(row[f"precision_at_5_{name}"]) for row in rows]
        assert np.mean(shown) == pytest.approx(comparison.metrics[name]["precision_at_5"].value)
        for metric in ("silhouette", "silhouette_cosine"):
            shown = [float(row[f"{metric}_{name}"]) for row in rows]
            expected = comparison.metrics[name][metric].value
            assert np.mean(shown) == pytest.approx(expected, abs=1e-6)
        neighbors = [list(map(int, row[f"neighbors_{name}"].split())) for row in rows]
        expected = comparison.analyses[name].neighbors[:, :5] + 100
        np.testing.assert_array_equal(neighbors, expected)
    shown = [float(row["mutual_knn"]) for row in rows]
    assert np.mean(shown) == pytest.approx(comparison.agreement["mutual_knn"].value)


def test_on_disagreements_one_model_alone_is_right_and_most_clearly(run):
    comparison = run[0]
    local, hf = (comparison.analyses[name] for name in ("local", "hf"))
    chosen = disagreements(comparison, 0)
    assert len(chosen) == 8
    for rows, winner, loser in ((chosen[:4], hf, local), (chosen[4:], local, hf)):
        alone = (winner.precisions(1) == 1) & (loser.precisions(1) == 0)
        assert alone[rows].all()
        gains = winner.precisions(5) - loser.precisions(5)
        assert gains[rows].tolist() == np.sort(gains[alone])[::-1][:4].tolist()
    assert chosen.tolist() != disagreements(comparison, 1).tolist()


def test_a_model_against_itself_disagrees_nowhere(run):
    local = run[0].analyses["local"].embeddings
    labels = run[0].analyses["local"].labels
    assert len(disagreements(compare({"local": local, "hf": local}, {}, labels, 0), 0)) == 0
    assert len(disagreements(compare({"local": local}, {}, labels, 0), 0)) == 0


def test_metrics_hold_every_number_of_the_comparison(run, facts):
    comparison = run[0]
    found = json.loads(report.metrics_json(comparison, facts, [], []))
    assert found["schema_version"] == 1
    for name, numbers in comparison.metrics.items():
        assert found["metrics"][name].keys() == numbers.keys()
        shown = found["metrics"][name]["precision_at_5"]
        assert shown == {
            "value": numbers["precision_at_5"].value,
            "se": numbers["precision_at_5"].se,
            "ci95": list(numbers["precision_at_5"].ci95),
        }
    facts = found["comparison"]["differences"]["precision_at_5"]
    assert facts.keys() == {"estimate", "ratio", "sign_flip_p", "wins", "ties", "losses"}
    assert "mcnemar_p" in found["comparison"]["differences"]["precision_at_1"]
    assert found["comparison"]["agreement"].keys() == comparison.agreement.keys()
    assert found["comparison"]["agreement"]["cka_null_p99"] == comparison.agreement["cka_null_p99"]
    assert found["comparison"]["per_class"][1]["mutual_knn"]["se"] > 0
    assert found["gains"]["pixels"] == {"value": 0, "se": 0, "ci95": [0, 0]}
    confusion = np.array(found["comparison"]["neighbor_confusion"]["hf"])
    np.testing.assert_allclose(confusion.sum(axis=1), 1)


def test_queries_come_from_the_seed_and_one_of_each_class():
    labels = np.repeat(np.arange(12), 5)
    queries = draw_queries(labels, 3)
    assert labels[queries].tolist() == list(range(10))
    np.testing.assert_array_equal(queries, draw_queries(labels, 3))
    assert (queries != draw_queries(labels, 4)).any()


@pytest.mark.parametrize("most", [15, 5000])
def test_maps_of_fewer_images_say_so(run, facts, monkeypatch, tmp_path, most):
    monkeypatch.setattr("ijepa.projections.MAX_POINTS", most)
    comparison, _, split = run
    drawn = {}

    def keep(path, figure):
        drawn[path.name] = figure
        path.touch()

    monkeypatch.setattr(report, "save_figure", keep)
    maps = make_maps({k: a.embeddings for k, a in comparison.analyses.items()}, split.labels, 0)
    write_report(tmp_path, comparison, maps, split, facts, [])
    for name in ("tsne_comparison.png", "pca_comparison.png"):
        panels = drawn[name].findobj(PathCollection)
        assert {len(panel.get_offsets()) for panel in panels} == {min(most, 40)}
        words = " ".join(text.get_text() for text in drawn[name].findobj(Text))
        assert ("15 images shown, equally many of each class" in words) == (most == 15)
    lines = (tmp_path / "per_image.csv").read_text().splitlines()
    assert sum(line.count(",,") for line in lines) == (2 * 25 if most == 15 else 0)


def test_undefined_numbers_become_null_and_are_named():
    undefined = []
    value = {"a": [1, float("nan")], "b": {"c": np.float64("inf"), "d": np.int64(3)}}
    assert plain(value, "", undefined) == {"a": [1, None], "b": {"c": None, "d": 3}}
    assert undefined == [".a[1]", ".b.c"]


def test_a_failed_write_leaves_no_metrics(run, facts, tmp_path):
    comparison, maps, split = run
    (tmp_path / "report.html").mkdir()  # where a file has to go
    with pytest.raises(UserError):
        write_report(tmp_path, comparison, maps, split, facts, [])
    assert not (tmp_path / "metrics.json").exists()
    assert not list(tmp_path.glob("*.tmp*"))
