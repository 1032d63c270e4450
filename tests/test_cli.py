import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.comparison import compare
from ijepa.huggingface import export_huggingface
from ijepa.model import VisionTransformer, ViTConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "compare_embeddings.py"
FILES = {
    "metrics.json",
    "report.md",
    "report.html",
    "per_image.csv",
    "tsne_comparison.png",
    "pca_comparison.png",
    "similarity_matrices.png",
    "variance_explained.png",
    "nn_queries.png",
    "embeddings_local.npz",
}


def load_script():
    spec = util.spec_from_file_location("compare_embeddings", SCRIPT)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = ViTConfig(embed_dim=16, depth=2, num_heads=2, patch_size=8)
    torch.manual_seed(0)
    encoders = {"target": VisionTransformer(config), "context": VisionTransformer(config)}
    path = folder / "checkpoint.pt"
    save_checkpoint(path, config, encoders, (0.5, 0.5), {"epochs": 3, "planned_epochs": 9})
    export_huggingface(load_checkpoint(path, "context"), folder / "hf")
    return path, folder / "hf"


def run(models, output, *flags):
    path, hf = models
    arguments = ["--local-checkpoint", str(path), "--output-dir", str(output), "--offline"]
    if "--hf-model" not in flags:
        arguments += ["--hf-model", str(hf)]
    return load_script().main([*arguments, "--max-samples", "220", *flags])


@pytest.fixture
def no_pictures(monkeypatch):
    """For runs whose numbers and words are what is looked at: drawing is most of their time."""
    monkeypatch.setattr("ijepa.report.draw", lambda *_: iter(()))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    assert run(models, output) == 0
    return output


def test_a_run_writes_every_file_and_nothing_temporary(finished):
    names = {path.name for path in finished.iterdir()}
    assert FILES | {"embeddings_hf.npz", "nn_disagreement.png"} | {".cache"} == names


def test_headline_numbers_equal_scikit_learn_on_the_saved_embeddings(finished):
    summary = json.loads((finished / "metrics.json").read_text())["summary"]
    for name in ("local", "hf"):
        with np.load(finished / f"embeddings_{name}.npz", allow_pickle=False) as arrays:
            X, labels = arrays["embeddings"].astype(np.float64), arrays["labels"]
        assert summary[name]["embedding_dim"] == X.shape[1]
        shares = PCA().fit(X).explained_variance_ratio_
        assert summary[name]["variance_10pc"] == pytest.approx(shares[:10].sum(), abs=1e-6)
        expected = silhouette_score(X, labels)
        assert summary[name]["silhouette"] == pytest.approx(expected, abs=1e-6)
        search = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(X)
        found = search.kneighbors(X, return_distance=False)
        without_self = [[j for j in row if j != i][:5] for i, row in enumerate(found)]
        hits = (labels[np.array(without_self)] == labels[:, None]).mean()
        # Distances that tie to the last bit may be ordered otherwise by scikit-learn.
        assert summary[name]["precision_at_5"] == pytest.approx(hits, abs=2e-3)


def test_metrics_json_follows_the_schema(finished):
    content = json.loads((finished / "metrics.json").read_text())
    assert list(content) == [
        "schema_version",
        "summary",
        "run",
        "dataset",
        "models",
        "settings",
        "metrics",
        "comparison",
        "references",
        "gains",
        "training_seeds",
        "caveats",
        "artifacts",
    ]
    assert content["models"]["local"]["epochs"] == 3
    assert content["dataset"]["n"] == 220
    assert content["dataset"]["per_class"] == [22] * 10
    low, high = content["metrics"]["local"]["precision_at_5"]["ci95"]
    assert low < content["metrics"]["local"]["precision_at_5"]["value"] < high
    assert any("3 of 9 epochs" in caveat for caveat in content["caveats"])
    assert "report.html" in {artifact["path"] for artifact in content["artifacts"]}
    for artifact in content["artifacts"]:
        assert (finished / artifact["path"]).stat().st_size == artifact["bytes"]


def test_a_second_run_reads_the_cache_and_gives_the_same_numbers(
    models, finished, capsys, monkeypatch
):
    for never_called in ("ijepa.projections.project_tsne", "ijepa.huggingface.read_model"):
        monkeypatch.setattr(never_called, None)
    first = json.loads((finished / "metrics.json").read_text())
    pictures = {path.name: path.read_bytes() for path in finished.glob("*.png")}
    assert run(models, finished) == 0
    second = json.loads((finished / "metrics.json").read_text())
    assert second["models"]["hf"]["from_cache"]
    assert not first["models"]["hf"]["from_cache"]
    for part in ("summary", "metrics", "comparison", "references", "dataset"):
        assert first[part] == second[part]
    assert pictures == {path.name: path.read_bytes() for path in finished.glob("*.png")}
    assert "NN precision@5" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_other_settings_and_damage_in_the_cache_are_a_line_each(models, finished, capsys):
    first = json.loads((finished / "metrics.json").read_text())["summary"]
    _, chunk = sorted((finished / ".cache").glob("hf-*/*.chunk"))
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 4
    chunk.write_bytes(content)
    assert run(models, finished, "--local-weights", "context") == 0
    other, damaged = capsys.readouterr().err.splitlines()
    assert other.startswith("cached local embeddings are of other weights")
    assert damaged == f"1 cached chunks of hf embeddings were damaged and computed anew: {chunk}"
    summary = json.loads((finished / "metrics.json").read_text())["summary"]
    assert summary["hf"] == first["hf"]
    assert summary["local"]["precision_at_5"] == pytest.approx(
        summary["hf"]["precision_at_5"], abs=0.02
    )


@pytest.mark.usefixtures("no_pictures")
def test_the_same_model_on_both_sides_differs_by_exactly_nothing(models, tmp_path):
    flags = ("--local-weights", "context", "--dtype", "float32")
    assert run(models, tmp_path, *flags) == 0
    comparison = json.loads((tmp_path / "metrics.json").read_text())["comparison"]
    retrieval = comparison["differences"]["precision_at_5"]
    assert retrieval["wins"] + retrieval["losses"] <= 2  # rounding may swap a neighbour
    assert comparison["agreement"]["cka"] == pytest.approx(1, abs=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_without_a_cache_nothing_but_the_results_is_left(models, tmp_path):
    assert run(models, tmp_path, "--hf-model", "none", "--no-cache") == 0
    assert ".cache" not in {path.name for path in tmp_path.iterdir()}


def test_the_local_model_can_be_reported_alone(models, tmp_path, capsys):
    assert run(models, tmp_path, "--hf-model", "none") == 0
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert set(content["summary"]) == {"local"}
    assert {path.name for path in tmp_path.iterdir()} == FILES | {".cache"}
    assert "HF" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_the_device_of_all_pairs_is_chosen_by_their_number_and_told(models, tmp_path, monkeypatch):
    asked = []

    def choose(*facts):
        asked.append(facts)
        return "cpu:0"

    monkeypatch.setattr("ijepa.devices.choose_pairs_device", choose)
    monkeypatch.setattr("ijepa.metrics._search", None)
    assert run(models, tmp_path, "--max-samples", "30", "--device", "cpu") == 0
    assert asked == [(torch.device("cpu"), 30, 3 * 32 * 32)]  # the pixels are the widest
    assert json.loads((tmp_path / "metrics.json").read_text())["run"]["pairs_device"] == "cpu:0"


def test_a_gpu_without_room_for_the_pairs_is_two_lines(models, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("ijepa.comparison.compare", fail)
    assert run(models, tmp_path, "--max-samples", "30") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: cpu has too little free memory for all pairs"
    assert hint.startswith("hint: wait until nothing else uses it")


@pytest.mark.parametrize("samples", ["4", "25"])
def test_tiny_samples_give_numbers_with_caveats(models, tmp_path, samples):
    assert run(models, tmp_path, "--max-samples", samples) == 0
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    content = json.loads(text)
    assert any("no intervals" in caveat for caveat in content["caveats"])
    assert content["summary"]["local"]["variance_50pc"] is None
    assert any("variance_50pc" in caveat for caveat in content["caveats"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--local-checkpoint", "absent.pt"], "no checkpoint at absent.pt"),
        (["--hf-model", "nobody/nothing"], "nobody/nothing"),
        (["--hf-model", "a b c"], "neither a directory nor a hub id"),
        (["--dataset", "cifar10", "--data-dir", "absent"], "CIFAR-10 is not in absent"),
        (["--dataset", "absent"], "unknown data set 'absent'"),
        (["--max-samples", "3"], "too few"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    ],
)
def test_a_mistake_is_two_lines_and_leaves_nothing(models, tmp_path, capsys, flags, words):
    assert run(models, tmp_path / "out", *flags) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-2].startswith("error: ")
    assert words in error[-2]
    assert error[-1].startswith("hint: ")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != ".cache"]


def test_an_output_directory_that_is_a_file_is_an_error(models, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run(models, tmp_path / "out") == 1
    assert "cannot write to" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_interruption_exits_with_130_and_one_line(models, tmp_path, capsys, monkeypatch):
    from ijepa import embeddings

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embeddings, "embed_chunks", interrupt)
    assert run(models, tmp_path) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script().main(["--max-samples", "-1"])
    assert stopped.value.code == 2
    assert "--max-samples" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["compare_embeddings", "train_ijepa"])
def test_help_answers_without_importing_anything_heavy(script):
    code = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'scripts' / script)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as stopped:\n"
        "    assert not stopped.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def other_seed(models):
    path = models[0].with_name("seed_1.pt")
    torch.manual_seed(1)
    config = load_checkpoint(models[0], "target").config
    encoders = {"target": VisionTransformer(config)}
    save_checkpoint(path, config, encoders, (0.5, 0.5), {"epochs": 3, "planned_epochs": 9})
    return path


@pytest.mark.usefixtures("no_pictures")
def test_several_checkpoints_give_the_spread_over_seeds(models, other_seed, tmp_path):
    flags = ["--hf-model", "none", "--local-checkpoint", str(other_seed)]
    assert run(models, tmp_path, *flags) == 0
    content = json.loads((tmp_path / "metrics.json").read_text())
    spread = content["training_seeds"]["precision_at_5"]
    assert spread["values"][0] == content["metrics"]["local"]["precision_at_5"]["value"]
    assert spread["mean"] == pytest.approx(np.mean(spread["values"]))
    assert spread["sd"] == pytest.approx(abs(np.subtract(*spread["values"])) / np.sqrt(2))
    assert content["models"]["local_2"]["source"] == str(other_seed)
    assert "Spread over training seeds" in (tmp_path / "report.md").read_text()
    # Alone, the second training has the number it has as a second seed.
    assert run((other_seed, None), tmp_path / "alone", "--hf-model", "none") == 0
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert spread["values"][1] == alone["summary"]["local"]["precision_at_5"]
    assert alone["training_seeds"] == {}


def test_an_effective_rank_near_its_bound_and_thinned_maps_are_caveats(monkeypatch):
    X = np.random.default_rng(0).normal(size=(60, 200)).astype(np.float32)
    comparison = compare({"local": X}, {"pixels": X[:, :8]}, np.arange(60) % 2, seed=0)
    description = {"epochs": 9, "planned_epochs": 9, "source": "x.pt"}
    loaded = [SimpleNamespace(description=description)]
    maps = SimpleNamespace(tsne={"local": SimpleNamespace(perplexity=30)})
    found = load_script().caveats(comparison, loaded, maps)
    assert any("effective rank of the local embeddings is above half" in c for c in found)
    assert not any("maps show" in c for c in found)
    monkeypatch.setattr("ijepa.projections.MAX_POINTS", 50)
    found = load_script().caveats(comparison, loaded, maps)
    assert any("maps show 50 of 60 images, as many of each class" in c for c in found)


def test_a_checkpoint_given_twice_is_no_second_seed(models, tmp_path, capsys):
    assert run(models, tmp_path, "--local-checkpoint", str(models[0])) == 1
    assert "is given twice" in capsys.readouterr().err


def test_another_architecture_is_no_other_seed(models, tmp_path, capsys):
    config = ViTConfig(embed_dim=16, depth=1, num_heads=2, patch_size=8)
    encoders = {"target": VisionTransformer(config)}
    save_checkpoint(tmp_path / "other.pt", config, encoders, (0.5, 0.5), {"epochs": 3})
    assert run(models, tmp_path, "--local-checkpoint", str(tmp_path / "other.pt")) == 1
    assert "has parameters" in capsys.readouterr().err


def pictures(folder, colors):
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for row in range(4):
            shade = tuple(min(value + 9 * row, 255) if value else 0 for value in color)
            Image.new("RGB", (20, 20), shade).save(folder / name / f"{row}.png")
    return str(folder)


def test_black_images_and_classes_of_the_same_images_are_compared(models, tmp_path):
    folder = pictures(tmp_path / "in", {"a": (0, 0, 0), "b": (90, 5, 5), "c": (90, 5, 5)})
    assert run(models, tmp_path / "out", "--dataset", folder) == 0


def test_a_class_name_that_is_not_utf_8_is_an_error(models, tmp_path, capsys):
    folder = pictures(tmp_path / "in", {"a": (9, 9, 9), os.fsdecode(b"b\xff"): (90, 5, 5)})
    assert run(models, tmp_path / "out", "--dataset", folder) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_a_collapsed_model_is_named_and_a_small_sample_is_not(models, finished, tmp_path):
    path = tmp_path / "constant.pt"
    config = load_checkpoint(models[0], "target").config
    encoder = VisionTransformer(config)
    with torch.no_grad():
        encoder.norm.weight.zero_()
        encoder.norm.bias.fill_(1)
    save_checkpoint(path, config, {"target": encoder}, (0.5, 0.5), {"epochs": 1})
    assert run((path, None), tmp_path / "out", "--hf-model", "none", "--max-samples", "20") == 0
    caveats = json.loads((tmp_path / "out" / "metrics.json").read_text())["caveats"]
    assert "the local embeddings are all the same: the model has collapsed" in caveats
    assert not any(
        "collapsed" in c for c in json.loads((finished / "metrics.json").read_text())["caveats"]
    )


def test_an_argument_that_is_not_utf_8_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script().main(["--output-dir", os.fsdecode(b"out\xff")])
    assert stopped.value.code == 2
    assert "UTF-8" in capsys.readouterr().err


def test_a_seed_that_not_every_library_takes_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script().main(["--seed", str(2**32)])
    assert stopped.value.code == 2
    assert "must be below 2**32" in capsys.readouterr().err


# --- several processes


def torchrun(processes, *arguments):
    """Run the script in processes that meet over a socket on loopback."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(SCRIPT), *map(str, arguments)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_write_the_embeddings_of_one(models, finished, tmp_path, processes):
    flags = ["--local-checkpoint", models[0], "--hf-model", models[1], "--offline"]
    flags += ["--max-samples", 220, "--output-dir", tmp_path]
    result = torchrun(processes, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1
    for name in ("embeddings_local.npz", "embeddings_hf.npz"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    content, alone = (
        json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, finished)
    )
    assert content["metrics"] == alone["metrics"]
    assert content["run"]["command"].startswith(f"torchrun --nproc-per-node {processes} scripts/")


@pytest.mark.slow
def test_the_error_of_several_processes_is_printed_once(tmp_path):
    missing = tmp_path / "missing.pt"
    flags = ["--local-checkpoint", missing, "--hf-model", "none", "--offline"]
    result = torchrun(2, *flags, "--output-dir", tmp_path / "out")
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert len([line for line in lines if line.startswith("error: ") and str(missing) in line]) == 1
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(59, ""), (600, "about 10 minutes; --max-samples"), (7300, "about 2 hours; --max-samples")],
)
def test_a_long_comparison_says_beforehand_how_long_it_will_take(
    monkeypatch, capsys, seconds, words
):
    monkeypatch.setattr("ijepa.comparison.pairwise_seconds", lambda *_: seconds)
    script = load_script()
    script.announce_wait({"local": np.zeros(20_000)}, {}, 2, "cpu")
    said = capsys.readouterr()
    assert said.out == ""
    assert bool(words) == ("comparing all pairs of 20,000 images" in said.err)
    assert words in said.err
    script.announce_wait({"local": np.zeros(9_999)}, {}, 2, "cpu")
    assert capsys.readouterr().err == ""
