import csv
import json
import os
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from ijepa.checkpoint import export_huggingface, load_checkpoint, save_checkpoint
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
    "class_precision.png",
    "similarity_matrices.png",
    "variance_explained.png",
    "nn_queries.png",
    "embeddings_local.npz",
}


def load_script():
    spec = util.spec_from_file_location("compare_embeddings", SCRIPT)
    module = sys.modules[spec.name] = util.module_from_spec(spec)
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
    arguments += ["--cache-dir", str(Path(path).parent / "cache")]
    if "--hf-model" not in flags:
        arguments += ["--hf-model", str(hf)]
    return load_script().main([*arguments, "--max-samples", "220", *flags])


def read(output):
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    assert run(models, output) == 0
    return output


def test_a_run_writes_every_file_and_nothing_temporary(finished):
    names = {path.name for path in finished.iterdir()}
    assert FILES | {"embeddings_hf.npz", "nn_disagreement.png"} == names


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
    content = read(finished)
    assert content["schema_version"] == 2
    assert content["models"]["local"]["epochs"] == 3
    assert content["dataset"]["n"] == 220
    assert content["dataset"]["per_class"] == [22] * 10
    low, high = content["metrics"]["local"]["precision_at_5"]["ci95"]
    assert low < content["metrics"]["local"]["precision_at_5"]["value"] < high
    assert any("3 of 9 planned epochs" in caveat for caveat in content["caveats"])
    assert {"scipy", "Pillow", "huggingface_hub"} <= content["run"]["versions"].keys()
    assert content["run"]["seconds"].keys() >= {"extract", "compare", "project", "write"}
    assert "report.html" in {artifact["path"] for artifact in content["artifacts"]}
    for artifact in content["artifacts"]:
        assert (finished / artifact["path"]).stat().st_size == artifact["bytes"]


def test_a_second_run_elsewhere_computes_nothing_and_gives_the_same_numbers(
    models, finished, tmp_path
):
    assert run(models, tmp_path) == 0
    first, second = read(finished), read(tmp_path)
    assert all(model["from_cache"] for model in second["models"].values())
    for part in ("summary", "metrics", "comparison", "references", "dataset"):
        assert first[part] == second[part]
    for picture in finished.glob("*.png"):
        assert picture.read_bytes() == (tmp_path / picture.name).read_bytes()


def test_damage_in_the_cache_is_named_and_repaired(models, finished, tmp_path, capsys):
    for chunk in (models[0].parent / "cache").glob("*/*.npz"):
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 4
        chunk.write_bytes(content)
    assert run(models, tmp_path) == 0
    assert "cached files of hf embeddings were damaged" in capsys.readouterr().err
    assert read(tmp_path)["metrics"] == read(finished)["metrics"]


def test_the_same_weights_on_both_sides_differ_by_nothing_and_are_named(models, tmp_path):
    assert run(models, tmp_path, "--hf-model", str(models[0])) == 0
    content = read(tmp_path)
    retrieval = content["comparison"]["differences"]["precision_at_5"]
    assert (retrieval["wins"], retrieval["losses"], retrieval["estimate"]["value"]) == (0, 0, 0)
    assert content["comparison"]["agreement"]["cka"] == pytest.approx(1)
    assert any("same weights" in caveat for caveat in content["caveats"])


def test_two_hugging_face_directories_are_compared(models, tmp_path):
    assert run((models[1], models[1]), tmp_path, "--max-samples", "40") == 0
    assert "random_weights" not in read(tmp_path)["references"]


def test_embeddings_of_an_earlier_run_take_the_place_of_a_model(models, finished, tmp_path, capsys):
    file = str(finished / "embeddings_hf.npz")
    assert run(models, tmp_path, "--hf-model", file, "--seed", "0") == 0
    assert read(tmp_path)["metrics"]["hf"] == read(finished)["metrics"]["hf"]
    assert run(models, tmp_path / "more", "--hf-model", file, "--max-samples", "230") == 1
    assert "10 of 230 images are not in" in capsys.readouterr().err


def test_without_a_cache_nothing_but_the_results_is_left(models, tmp_path):
    assert run(models, tmp_path, "--hf-model", "none", "--no-cache", "--max-samples", "40") == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_one_model_is_reported_by_itself(models, tmp_path, capsys):
    assert run(models, tmp_path, "--hf-model", "none") == 0
    assert set(read(tmp_path)["summary"]) == {"local"}
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "HF" not in capsys.readouterr().out


def test_json_is_the_only_thing_on_stdout(models, tmp_path, capsys):
    assert run(models, tmp_path, "--json", "--max-samples", "40") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["summary"] == read(tmp_path)["summary"]


@pytest.mark.parametrize("samples", ["4", "25"])
def test_tiny_samples_give_numbers_with_caveats(models, tmp_path, samples):
    assert run(models, tmp_path, "--max-samples", samples) == 0
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    content = json.loads(text)
    assert any("interval" in caveat for caveat in content["caveats"])
    assert content["summary"]["local"]["variance_50pc"] is None
    assert any("variance_50pc" in caveat for caveat in content["caveats"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--local-checkpoint", "absent.pt"], "absent.pt"),
        (["--hf-model", "nobody/nothing"], "nobody/nothing"),
        (["--hf-model", "a b c"], "a b c"),
        (["--dataset", "cifar10", "--data-dir", "absent"], "CIFAR-10 is not in absent"),
        (["--dataset", "/no/such"], "no such folder"),
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
    assert not list((tmp_path / "out").iterdir())


def test_debug_shows_the_traceback_behind_a_mistake(models, tmp_path, capsys):
    assert run(models, tmp_path, "--dataset", "/no/such", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_output_directory_that_is_a_file_is_an_error(models, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run(models, tmp_path / "out") == 1
    assert "cannot write to" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-samples", "-1"],
        ["--seed", str(2**32)],
        ["--probe-samples", "some"],
        ["--output-dir", os.fsdecode(b"out\xff")],
    ],
)
def test_wrong_usage_exits_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script().main(flags)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script().main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("ijepa-compare ")


@pytest.fixture(scope="module")
def other_seed(models):
    path = models[0].with_name("seed_1.pt")
    torch.manual_seed(1)
    config = load_checkpoint(models[0], "target").config
    encoders = {"target": VisionTransformer(config)}
    save_checkpoint(path, config, encoders, (0.5, 0.5), {"epochs": 3, "planned_epochs": 9})
    return path


def test_several_checkpoints_give_the_spread_over_seeds(models, other_seed, tmp_path):
    flags = ["--hf-model", "none", "--local-checkpoint", str(other_seed)]
    assert run(models, tmp_path, *flags) == 0
    content = read(tmp_path)
    spread = content["training_seeds"]["precision_at_5"]
    assert spread["values"][0] == content["metrics"]["local"]["precision_at_5"]["value"]
    assert spread["mean"] == pytest.approx(np.mean(spread["values"]))
    assert spread["sd"] == pytest.approx(abs(np.subtract(*spread["values"])) / np.sqrt(2))
    assert run((other_seed, None), tmp_path / "other", "--hf-model", "none") == 0
    alone = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert spread["values"][1] == alone["summary"]["local"]["precision_at_5"]
    assert alone["training_seeds"] == {}


def test_a_checkpoint_given_twice_is_no_second_seed(models, tmp_path, capsys):
    assert run(models, tmp_path, "--local-checkpoint", str(models[0])) == 1
    assert "is given twice" in capsys.readouterr().err


def test_another_architecture_is_no_other_seed(models, tmp_path, capsys):
    config = ViTConfig(embed_dim=16, depth=1, num_heads=2, patch_size=8)
    encoders = {"target": VisionTransformer(config)}
    save_checkpoint(tmp_path / "other.pt", config, encoders, (0.5, 0.5), {"epochs": 3})
    assert run(models, tmp_path, "--local-checkpoint", str(tmp_path / "other.pt")) == 1
    assert "has parameters" in capsys.readouterr().err


def test_a_class_name_that_is_not_utf_8_is_an_error(models, tmp_path, capsys):
    folder = photographs(tmp_path / "in", {"a": 3, os.fsdecode(b"b\xff"): 3})
    assert run(models, tmp_path / "out", "--dataset", str(folder)) == 1
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
    assert any("are the same: the model has collapsed" in caveat for caveat in caveats)
    assert not any(
        "collapsed" in c for c in json.loads((finished / "metrics.json").read_text())["caveats"]
    )


# --- folders of people


def photographs(folder, counts, size=24):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for row in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{row}.png")
    return folder


def test_unreadable_images_are_reported_together_or_left_out_and_listed(models, tmp_path, capsys):
    folder = photographs(tmp_path / "in", {"a": 8, "b": 8})
    for name in ("a", "b"):
        (folder / name / "bad.jpg").write_bytes(b"x")
    whole = (folder / "a" / "0.png").read_bytes()
    (folder / "a" / "0.png").write_bytes(whole[:-400])  # found when it is decoded
    assert run(models, tmp_path / "out", "--dataset", str(folder)) == 1
    error = capsys.readouterr().err
    assert "2 of 18 images cannot be read" in error
    assert error.count("bad.jpg") == 2
    assert run(models, tmp_path / "out", "--dataset", str(folder), "--skip-unreadable") == 0
    content = read(tmp_path / "out")
    assert content["dataset"]["n"] == 15
    assert sum("unreadable" in caveat for caveat in content["caveats"]) == 2


def test_paths_of_images_are_in_the_table_and_the_embeddings(models, tmp_path):
    folder = photographs(tmp_path / "in", {"a b": 5, "c": 5})
    assert run(models, tmp_path / "out", "--dataset", str(folder)) == 0
    with (tmp_path / "out" / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows[:2]] == ["a b/0.png", "a b/1.png"]
    with np.load(tmp_path / "out" / "embeddings_local.npz", allow_pickle=False) as arrays:
        assert arrays["paths"].tolist() == [row["path"] for row in rows]
        assert arrays["keys"].shape == (10, 16)


def test_single_images_of_classes_have_no_precision_but_a_caveat(models, tmp_path, capsys):
    folder = photographs(tmp_path / "in", dict.fromkeys("abcdefgh", 1))
    assert run(models, tmp_path / "out", "--dataset", str(folder)) == 0
    content = read(tmp_path / "out")
    assert content["summary"]["local"]["precision_at_5"] is None
    assert any("no class has two images" in caveat for caveat in content["caveats"])
    assert "n/a" in capsys.readouterr().out


def test_duplicates_with_two_labels_are_counted(models, tmp_path):
    folder = photographs(tmp_path / "in", {"a": 6, "b": 6})
    for row in range(3):
        shutil.copy(folder / "a" / f"{row}.png", folder / "b" / f"copy{row}.png")
    assert run(models, tmp_path / "out", "--dataset", str(folder)) == 0
    content = read(tmp_path / "out")
    assert content["dataset"]["duplicates"] == {"images": 6, "with_two_labels": 6}
    assert any("copies" in caveat or "duplicate" in caveat for caveat in content["caveats"])


def test_a_probe_takes_its_bank_from_the_train_split(models, tmp_path):
    folder = tmp_path / "in"
    photographs(folder / "test", {"a": 6, "b": 6})
    photographs(folder / "train", {"b": 30, "a": 30, "c": 3}, size=25)
    shutil.copy(folder / "test" / "a" / "0.png", folder / "train" / "a" / "same.png")
    flags = ["--dataset", str(folder), "--probe-samples", "all"]
    assert run(models, tmp_path / "out", *flags) == 0
    content = read(tmp_path / "out")
    assert content["probe"]["bank_images"] == 63
    assert {"local", "hf", "pixels", "random_weights"} == content["probe"]["models"].keys()
    assert any("leaves out 1 training image" in caveat for caveat in content["caveats"])
    assert run(models, tmp_path / "out", "--probe-samples", "20", "--max-samples", "40") == 0
    content = read(tmp_path / "out")
    assert content["probe"] is None
    assert any("no train split" in caveat for caveat in content["caveats"])


def test_black_images_and_classes_of_the_same_images_are_compared(models, tmp_path):
    for name, color in {"a": (0, 0, 0), "b": (90, 5, 5), "c": (90, 5, 5)}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for row in range(4):
            shade = tuple(min(value + 9 * row, 255) if value else 0 for value in color)
            Image.new("RGB", (20, 20), shade).save(tmp_path / "in" / name / f"{row}.png")
    assert run(models, tmp_path / "out", "--dataset", str(tmp_path / "in")) == 0


# --- environments


def command(models, output, *flags, **options):
    words = [sys.executable, str(SCRIPT), "--offline", "--max-samples", "24", "--hf-model", "none"]
    words += ["--local-checkpoint", str(models[0]), "--output-dir", str(output), *flags]
    env = {**os.environ, **options.pop("env", {})}
    return subprocess.run(words, env=env, text=True, stderr=subprocess.PIPE, check=False, **options)


def test_figures_need_no_display_whatever_the_backend(models, tmp_path):
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "DISPLAY": ""}
    result = command(models, tmp_path / "out", env=env, stdout=subprocess.PIPE)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_tilde_is_the_home_folder(models, tmp_path):
    result = command(
        models, "~/out", env={"HOME": str(tmp_path)}, cwd=tmp_path, stdout=subprocess.PIPE
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["out"]


def test_a_closed_stdout_is_no_error(models, tmp_path):
    words = f"exec {sys.executable} {SCRIPT} --offline --hf-model none --max-samples 24"
    words += f" --local-checkpoint {models[0]} --output-dir {tmp_path / 'out'} >&-"
    result = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_deleted_working_directory_is_said(models, tmp_path):
    words = f"cd {tmp_path} && mkdir gone && cd gone && rmdir ../gone && exec {sys.executable}"
    words += f" {SCRIPT} --offline --hf-model none --local-checkpoint {models[0]}"
    result = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_last_line_names_the_page(models, tmp_path):
    result = command(models, tmp_path / "out", stdout=subprocess.PIPE)
    assert result.stderr.splitlines()[-1] == f"open {tmp_path / 'out' / 'report.html'}"


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
@pytest.mark.parametrize("processes", [2])
def test_several_processes_write_the_embeddings_of_one(models, finished, tmp_path, processes):
    flags = ["--local-checkpoint", models[0], "--hf-model", models[1], "--offline"]
    flags += ["--max-samples", 220, "--output-dir", tmp_path, "--cache-dir", tmp_path / "cache"]
    result = torchrun(processes, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("report.html") == 1
    for name in ("embeddings_local.npz", "embeddings_hf.npz"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    content = read(tmp_path)
    assert content["metrics"] == read(finished)["metrics"]
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
