import csv
import hashlib
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ijepa.comparison import compare
from ijepa.errors import UserError
from ijepa.report import (
    complete,
    disagreements,
    draw_queries,
    metrics_content,
    per_image_csv,
    summary_json,
    write_report,
)

CLASSES = ('a,b "c"', "two\r\nlines\rand\nmore")


@pytest.fixture(scope="module")
def run(make_page):
    example = make_page(250, CLASSES)
    return example.comparison, example.split, example.maps


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    comparison, split, maps = run
    facts = {"run": {"seconds": {"compare": 1.5}}, "models": {"local": {"losses": "those"}}}
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, comparison, replace(split, notes=("A caveat.",)), facts, maps)


def test_artifacts_are_the_files_with_their_hashes_and_sizes(written):
    assert written[-1].name == "metrics.json"
    metrics = json.loads(written[-1].read_text())
    listed = {artifact["path"]: artifact for artifact in metrics["artifacts"]}
    assert listed.keys() == {path.name for path in written[:-1]}
    for path in written[:-1]:
        content = path.read_bytes()
        assert listed[path.name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert listed[path.name]["bytes"] == len(content)
    assert set(written[0].parent.iterdir()) == set(written)
    assert {"embeddings_local.npz", "embeddings_hf.npz", "nn_queries.png"} <= listed.keys()


def test_metrics_hold_what_is_known_of_the_run_and_the_time_of_writing(written):
    metrics = json.loads(written[-1].read_text())
    assert metrics["caveats"][0] == "A caveat."
    assert metrics["run"]["seconds"]["compare"] == 1.5
    assert 0 < metrics["run"]["seconds"]["write"] < 600
    assert metrics["models"]["local"]["losses"] == "those"
    assert metrics["models"]["hf"]["losses"] is None
    assert metrics["models"]["hf"]["embedding_dim"] == 6
    assert metrics["settings"]["knn"] == {"k": 20, "temperature": 0.07, "leave_one_out": True}
    assert metrics["settings"]["tsne"]["seed"] == 0
    headline = json.loads(summary_json(written[-1]))
    assert headline["summary"] == metrics["summary"]
    assert headline["chance_precision"] == pytest.approx(124 / 249)


def test_files_of_an_earlier_run_that_this_one_does_not_make_are_removed(run, tmp_path):
    comparison, split, maps = run
    for name in ("embeddings_hf.npz", "nn_disagreement.png", "mine.txt"):
        (tmp_path / name).write_bytes(b"of an earlier run")
    X = comparison.analyses["local"].embeddings
    alone = compare({"local": X}, {}, split.labels, comparison.seed)
    maps = replace(maps, tsne={"local": maps.tsne["local"]}, pca={"local": maps.pca["local"]})
    write_report(tmp_path, alone, split, maps=maps)
    left = {path.name for path in tmp_path.iterdir()}
    assert "mine.txt" in left
    assert not left & {"embeddings_hf.npz", "nn_disagreement.png"}
    named = json.loads((tmp_path / "metrics.json").read_text())["artifacts"]
    assert {one["path"] for one in named} <= left
    assert "embeddings_hf" not in (tmp_path / "report.md").read_text()


def test_two_labeled_arrays_from_anywhere_make_a_report(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 25)
    arrays = {name: rng.normal(size=(75, 12)).astype(np.float32) for name in ("local", "hf")}
    comparison = compare(arrays, {}, labels, seed=0, names={"local": "mine", "hf": "yours"})
    written = write_report(tmp_path, comparison)
    names = [path.name for path in written]
    assert not any(name.startswith(("nn_", "embeddings_")) for name in names)
    assert {"report.md", "report.html", "metrics.json", "tsne_comparison.png"} <= set(names)
    metrics = json.loads(written[-1].read_text())
    assert metrics["names"] == {"local": "mine", "hf": "yours"}
    assert any("50 PCs of the local model" in caveat for caveat in metrics["caveats"])


def per_image(*run):
    return list(csv.DictReader(io.StringIO(per_image_csv(*run), newline="")))


def test_per_image_rows_read_back_as_the_numbers(run):
    comparison, split, maps = run
    split = replace(split, paths=tuple(f'a/"{i}",\r.png' for i in range(250)))
    correct = {"local": {"linear": comparison.analyses["local"].first_is_right()}}
    rows = per_image(comparison, maps, split, SimpleNamespace(correct=correct))
    assert [int(row["index"]) for row in rows] == split.indices.tolist()
    assert [row["class"] for row in rows] == [CLASSES[label] for label in split.labels]
    assert tuple(row["path"] for row in rows) == split.paths
    shown = [int(row["linear_correct_local"]) for row in rows]
    assert np.mean(shown) == comparison.metrics["local"]["precision_at_1"].value
    for name in ("local", "hf"):
        for metric in ("precision_at_5", "silhouette", "silhouette_cosine"):
            shown = np.mean([float(row[f"{metric}_{name}"]) for row in rows])
            assert shown == pytest.approx(comparison.metrics[name][metric].value, abs=1e-6)
        neighbors = [list(map(int, row[f"neighbors_{name}"].split())) for row in rows]
        expected = split.indices[comparison.analyses[name].neighbors[:, :5]]
        np.testing.assert_array_equal(neighbors, expected)
        places = [[float(row[f"tsne_{axis}_{name}"]) for axis in "xy"] for row in rows]
        np.testing.assert_allclose(places, maps.tsne[name].coordinates, rtol=1e-4)
    shown = [float(row["mutual_knn"]) for row in rows]
    assert np.mean(shown) == pytest.approx(comparison.agreement["mutual_knn"].value)


def test_images_without_a_place_on_the_maps_have_empty_cells(run):
    comparison, split, maps = run
    tsne = {
        name: replace(made, coordinates=made.coordinates[:15]) for name, made in maps.tsne.items()
    }
    rows = per_image(comparison, replace(maps, rows=np.arange(15), tsne=tsne), split)
    assert [row["tsne_x_hf"] == "" for row in rows] == [False] * 15 + [True] * 235


def test_on_disagreements_only_one_model_is_right_and_most_clearly(run):
    comparison = run[0]
    local, hf = (comparison.analyses[name] for name in ("local", "hf"))
    chosen = disagreements(comparison, 0)
    assert len(chosen) == 8
    for rows, winner, loser in ((chosen[:4], hf, local), (chosen[4:], local, hf)):
        only = (winner.precisions(1) == 1) & (loser.precisions(1) == 0)
        assert only[rows].all()
        gains = winner.precisions(5) - loser.precisions(5)
        assert gains[rows].tolist() == np.sort(gains[only])[::-1][:4].tolist()
    assert chosen.tolist() != disagreements(comparison, 1).tolist()
    same = compare(dict.fromkeys(("local", "hf"), local.embeddings), {}, local.labels, 0)
    assert len(disagreements(same, 0)) == 0


def test_metrics_hold_every_number_of_the_comparison(run):
    comparison, split, _ = run
    found = metrics_content(comparison, complete(comparison, split, {}), [])
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
    probe = SimpleNamespace(record=lambda: {"bank": np.int64(7), "l2": [1, np.float64("inf")]})
    found = metrics_content(comparison, complete(comparison, split, {}), [], probe)
    assert found["probe"] == {"bank": 7, "l2": [1, None]}
    assert "probe.l2[...] is undefined for this sample" in found["caveats"]


def test_queries_come_from_the_seed_and_one_of_each_class():
    labels = np.repeat(np.arange(12), 5)
    queries = draw_queries(labels, 3)
    assert labels[queries].tolist() == list(range(10))
    np.testing.assert_array_equal(queries, draw_queries(labels, 3))
    assert (queries != draw_queries(labels, 4)).any()


def test_a_failed_write_leaves_no_metrics(run, tmp_path):
    comparison, split, maps = run
    (tmp_path / "report.html").mkdir()  # where a late file has to go
    with pytest.raises(UserError):
        write_report(tmp_path, comparison, split, maps=maps)
    assert not (tmp_path / "metrics.json").exists()
    assert not list(tmp_path.glob("*.tmp*"))
