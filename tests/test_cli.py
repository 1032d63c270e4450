import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.model import VisionTransformer

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compare_embeddings.py"
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


def photographs(folder, counts, size=24):
    """Smooth images, those of a class of about one color."""
    rng = np.random.default_rng(size)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for row in range(count):
            coarse = rng.integers(0, 90, (3, 3, 3)) + rng.permutation([0, 60, 150])
            image = Image.fromarray(coarse.astype(np.uint8))
            image.resize((size, size)).save(folder / name / f"{row}.png")
    return folder


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("compare_embeddings")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Splits with copies of 3 images under another label, and two unreadable files."""
    folder = tmp_path_factory.mktemp("images")
    photographs(folder / "test", {"a b": 30, "<script>": 30})
    photographs(folder / "train", {"<script>": 25, "a b": 25, "c": 3}, size=25)
    a, b = (folder / "test" / name for name in ("a b", "<script>"))
    for row in range(3):
        shutil.copy(a / f"{row}.png", b / f"copy{row}.png")
    shutil.copy(a / "9.png", folder / "train" / "a b" / "same.png")
    for name in (a, b):
        (name / "bad.jpg").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def run(script, tiny_models, images):
    def run(output, *flags, local=tiny_models[0]):
        arguments = ["--offline", "--cache-dir", tiny_models[0].with_name("cache")]
        arguments += ["--local-checkpoint", local, "--hf-model", tiny_models[1]]
        arguments += ["--dataset", images, "--output-dir", output, *flags]
        return script.main([str(word) for word in arguments])

    return run


def command(*flags, before, cwd, **env):
    words = [*before, sys.executable, SCRIPT, "--offline", "--hf-model", "none", *flags]
    return subprocess.run(
        list(map(str, words)),
        env={**os.environ, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    assert run(output, "--skip-unreadable", "--probe-samples", "all") == 0
    return output


def read(output):
    return json.loads((output / "metrics.json").read_text())


def arrays_of(output, name):
    with np.load(output / f"embeddings_{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


# --- one whole run


def test_a_run_writes_every_file_and_nothing_temporary(finished):
    names = {path.name for path in finished.iterdir()}
    assert FILES | {"embeddings_hf.npz", "nn_disagreement.png"} == names


def test_the_bundled_pair_has_the_recipes_that_it_is_said_to_have(script, tmp_path):
    flags = ["--offline", "--dataset", "digits", "--max-samples", "20", "--no-cache"]
    assert script.main([*flags, "--output-dir", str(tmp_path)]) == 0
    found = read(tmp_path)
    assert sum("no ViT-Huge" in caveat for caveat in found["caveats"]) == 1
    losses = {role: model["losses"] for role, model in found["models"].items()}
    matched = "I-JEPA prediction + view matching (InfoNCE) + variance/covariance"
    assert losses == {"local": matched, "hf": "I-JEPA prediction"}


def test_headline_numbers_equal_scikit_learn_on_the_saved_embeddings(finished):
    summary = read(finished)["summary"]
    for name in ("local", "hf"):
        arrays = arrays_of(finished, name)
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
        assert summary[name]["precision_at_5"] == pytest.approx(hits, abs=4e-3)


def test_metrics_json_follows_the_schema(finished):
    content = read(finished)
    assert content["schema_version"] == 2
    assert content["models"]["local"]["epochs"] == 3
    assert content["dataset"]["n"] == 63
    assert content["dataset"]["per_class"] == [33, 30]
    low, high = content["metrics"]["local"]["precision_at_5"]["ci95"]
    assert low < content["metrics"]["local"]["precision_at_5"]["value"] < high
    assert any("3 of 9 planned epochs" in caveat for caveat in content["caveats"])
    assert {"scipy", "Pillow", "huggingface_hub"} <= content["run"]["versions"].keys()
    assert content["run"]["seconds"].keys() >= {"extract", "compare", "project", "write"}
    assert "report.html" in {artifact["path"] for artifact in content["artifacts"]}
    for artifact in content["artifacts"]:
        assert (finished / artifact["path"]).stat().st_size == artifact["bytes"]


def test_unreadable_images_and_duplicates_are_counted(finished):
    content = read(finished)
    assert any(caveat.startswith("2 unreadable images") for caveat in content["caveats"])
    assert content["dataset"]["unreadable"] == ["test/<script>/bad.jpg", "test/a b/bad.jpg"]
    assert content["dataset"]["duplicates"] == {"images": 6, "with_two_labels": 6}


@pytest.fixture
def embed(script, tiny_models, tmp_path):
    """What the script embeds of images in a folder with one model."""

    def embed(*flags):
        arguments = ["--hf-model", "none", "--skip-unreadable", "--local-checkpoint"]
        args = script.parse_arguments([*arguments, str(tiny_models[0]), *map(str, flags)])
        args.device = torch.device("cpu")
        return script.embed(args, script.Stages(talks=False), tmp_path / "cache")

    return embed


def test_images_that_fail_only_when_decoded_are_left_out_too(script, embed, tmp_path):
    folder = photographs(tmp_path / "in", {"a": 4, "b": 4})
    cut = (folder / "a" / "1.png").read_bytes()[:-200]
    (folder / "a" / "1.png").write_bytes(cut)
    inputs = embed("--dataset", folder)
    assert len(inputs.split) == len(inputs.results["local"].values) == 7
    assert inputs.notes[0].startswith("1 unreadable image left out: ")
    assert inputs.split.unreadable == ("a/1.png",)
    assert inputs.results["local"].images_per_second > 0
    assert not inputs.results["local"].from_cache
    assert embed("--dataset", folder).results["local"].from_cache
    for row in (0, 2, 3):
        (folder / "a" / f"{row}.png").unlink()
    with pytest.raises(script.UserError, match=r"4 images of 1 class$"):
        embed("--dataset", folder)


def test_paths_of_images_are_in_the_table_the_embeddings_and_the_json(finished):
    with (finished / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["path"] == "test/<script>/0.png"
    arrays = arrays_of(finished, "local")
    paths = [row["path"] for row in rows]
    assert arrays["paths"].tolist() == read(finished)["dataset"]["paths"] == paths
    assert arrays["keys"].shape == (63, 16)


def test_the_probe_takes_its_bank_from_the_train_split(finished):
    content = read(finished)
    assert content["probe"]["bank_images"] == 53
    assert {"local", "hf", "pixels", "random_weights"} == content["probe"]["models"].keys()
    assert any("leaves out 1 training image" in caveat for caveat in content["caveats"])


def test_what_the_bank_leaves_out_is_said(embed, tmp_path):
    folder = photographs(tmp_path / "in" / "train", {"a": 4, "b": 4}, size=25)
    photographs(tmp_path / "in" / "test", {"a": 3, "b": 3})
    (folder / "a" / "gone.png").symlink_to("nowhere")
    (folder / "a" / "1.png").write_bytes((folder / "a" / "1.png").read_bytes()[:-200])
    flags = ["--dataset", tmp_path / "in", "--probe-samples", "all"]
    inputs = embed(*flags)
    assert len(inputs.bank) == len(inputs.bank_results["local"].values) == 7
    assert inputs.split.unreadable == ("train/a/gone.png", "train/a/1.png")
    assert all("bank: 1 unreadable image left out" in note for note in inputs.notes)
    for _ in range(2):  # first with an image that cannot be decoded, then with none
        inputs = embed(*flags, "--split", "train")
        assert inputs.bank is None
        assert "no training image is left" in inputs.notes[-1]
        (folder / "a" / "1.png").unlink(missing_ok=True)


def test_a_second_run_elsewhere_repairs_the_cache_and_gives_the_same_numbers(
    run, tiny_models, finished, tmp_path, capsys
):
    """The embeddings of `hf` are damaged; another seed of the local model is new."""
    key = next((tiny_models[0].parent / "cache").glob("*/facts.json")).parent
    for chunk in key.glob("*.npz"):
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 4
        chunk.write_bytes(content)
    other_seed, config = tmp_path / "seed_1.pt", load_checkpoint(tiny_models[0]).config
    encoders, facts = {"target": VisionTransformer(config)}, {"epochs": 3, "planned_epochs": 9}
    save_checkpoint(other_seed, config, encoders, (0.5, 0.5), facts)
    flags = ["--skip-unreadable", "--json", "--local-checkpoint", other_seed]
    assert run(tmp_path / "out", *flags) == 0
    printed = capsys.readouterr()
    assert "of cached hf embeddings by embedding again: " in printed.err
    assert "note: The local model had 3 of 9 planned epochs." in printed.err.splitlines()
    assert printed.err.splitlines()[-1] == f"open {tmp_path / 'out' / 'report.html'}"
    first, second = read(finished), read(tmp_path / "out")
    assert json.loads(printed.out)["summary"] == second["summary"]
    differences = second["comparison"]["differences"]
    headlines = json.loads(printed.out)["differences"]
    assert "precision_at_5" in headlines
    assert headlines == {name: differences[name] for name in headlines}
    from_cache = {name: model["from_cache"] for name, model in second["models"].items()}
    assert from_cache == {"local": True, "hf": False, "local_2": False}
    for part in ("summary", "metrics", "comparison", "references", "dataset"):
        assert first[part] == second[part]
    for picture in finished.glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "out" / picture.name).read_bytes()
    spread = second["training_seeds"]["precision_at_5"]
    assert spread["values"][0] == second["metrics"]["local"]["precision_at_5"]["value"]
    assert spread["values"][1] != spread["values"][0]
    assert spread["mean"] == pytest.approx(np.mean(spread["values"]))
    assert spread["sd"] == pytest.approx(abs(np.subtract(*spread["values"])) / np.sqrt(2))


# --- other models


def test_equal_names_have_the_folders_of_the_files_or_their_roles(run, tiny_models, tmp_path):
    other = tmp_path / "b" / tiny_models[0].name
    other.parent.mkdir()
    shutil.copy(tiny_models[0], other)
    flags = ["--skip-unreadable", "--hf-model", other]
    assert run(tmp_path / "out", *flags) == 0
    name, folder = f"{other.stem} (target)", tiny_models[0].parent.name
    assert [*read(tmp_path / "out")["names"].values()] == [f"{name} ({folder})", f"{name} (b)"]
    assert run(tmp_path / "out", "--skip-unreadable", "--hf-model", tiny_models[0]) == 0
    assert [*read(tmp_path / "out")["names"].values()] == [f"{name} (Local)", f"{name} (HF)"]


def test_one_model_is_reported_by_itself_and_what_was_assumed_is_said(
    run, tiny_models, tmp_path, capsys
):
    raw = tmp_path / "raw.pth"
    torch.save(load_checkpoint(tiny_models[0]).build().state_dict(), raw)
    folder = photographs(tmp_path / "in", dict.fromkeys("abcd", 1))
    (folder / "a" / "notes.txt").touch()
    flags = ["--hf-model", "none", "--no-cache", "--dataset", folder, "--probe-samples", "20"]
    assert run(tmp_path / "out", *flags, local=raw) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    content, printed = read(tmp_path / "out"), capsys.readouterr()
    assert set(content["summary"]) == {"local"}
    assert "HF" not in printed.out
    assert content["summary"]["local"]["precision_at_5"] is None
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()
    assert "n/a" in printed.out
    assert content["probe"] is None
    assumed = "raw.pth does not record its attention heads: assumed 1 (32 channels each)"
    for words in (assumed, "1 file of another kind (1 .txt)", "no train split"):
        assert any(words in caveat for caveat in content["caveats"])
        assert words in printed.err
    for words in (assumed, "no class has two images"):
        assert words in (tmp_path / "out" / "report.md").read_text()


def test_models_of_any_kind_take_either_side(script, tiny_models):
    local, hf = map(str, tiny_models)

    def names(one, other):
        flags = ["--offline", "--local-checkpoint", one, "--hf-model", other]
        args = script.parse_arguments(flags)
        args.device = torch.device("cpu")
        return [one.name for one in script.load_encoders(args, None)]

    assert names(hf, local) == names(hf, hf) == ["local", "hf", "pixels"]
    assert names(local, "none") == ["local", "pixels", "random_weights"]


# --- mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "cannot read 2 of 65 images"),
        (["--local-checkpoint", "absent.pt", "--skip-unreadable"], "absent.pt"),
        (["--hf-model", "nobody/nothing", "--split", "train"], "nobody/nothing"),
        (["--hf-model", "{finished}/embeddings_hf.npz", "--split", "train"], "lacks 53 of 54"),
        (["--dataset", "cifar10", "--data-dir", "absent"], "CIFAR-10 is not in absent"),
        (["--dataset", "/no/such"], "no such folder"),
        (["--split", "val"], "choose one of its splits"),
        (["--max-samples", "3", "--split", "train"], "too few"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    ],
)
def test_a_mistake_is_two_lines_and_leaves_nothing(run, finished, tmp_path, capsys, flags, words):
    assert run(tmp_path / "out", *(flag.format(finished=finished) for flag in flags)) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-2].startswith("error: ")
    assert error[-1].startswith("hint: ")
    assert words in " ".join(error[-2:])
    assert not list((tmp_path / "out").iterdir())


def test_debug_shows_the_traceback_behind_a_mistake(run, tmp_path, capsys):
    assert run(tmp_path, "--dataset", "/no/such", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_only_other_seeds_of_the_same_training_are_seeds(run, tiny_models, tmp_path, capsys):
    flags = ["--split", "train", "--hf-model", "none", "--local-checkpoint"]
    assert run(tmp_path / "out", *flags, tiny_models[0]) == 1
    assert "is given twice" in capsys.readouterr().err
    config = replace(load_checkpoint(tiny_models[0]).config, depth=1)
    encoders = {"target": VisionTransformer(config)}
    save_checkpoint(tmp_path / "other.pt", config, encoders, (0.5, 0.5), {"epochs": 3})
    assert run(tmp_path / "out", *flags, tmp_path / "other.pt") == 1
    assert "has parameters" in capsys.readouterr().err


def test_an_interruption_is_exit_code_130(run, script, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "load_encoders", interrupt)
    assert run(tmp_path, "--split", "train") == 130
    assert "interrupted; finished embeddings are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-samples", "-1"],
        ["--seed", str(2**32)],
        ["--probe-samples", "some"],
        ["--output-dir", os.fsdecode(b"out\xff")],
    ],
)
def test_wrong_usage_exits_with_2(script, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(flags)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_photo_of_108_megapixels_is_no_warning(run, tmp_path, capsys):
    folder = photographs(tmp_path / "in", {"a": 1, "b": 1})
    (folder / "a" / "large.pgm").write_bytes(b"P5 12000 9000 255\n")
    assert run(tmp_path / "out", "--dataset", folder) == 1
    assert "too few to compare: 3 images of 2 classes" in capsys.readouterr().err


def test_progress_in_a_log_is_a_plain_line_now_and_then(script, capsys):
    with script.make_progress(True)(total=3000, desc="embedding") as bar:
        bar.update(64)
        assert capsys.readouterr().err == ""
        bar.start_t = bar.last_print_t = 0
        bar.update(1216)
        bar.update(64)
    assert capsys.readouterr().err == "embedding: 1,280 of 3,000 images\n"


# --- environments


@pytest.mark.parametrize(
    ("before", "env", "words"),
    [
        (["sh", "-c", 'mkdir x && cd x && rmdir ../x && exec "$@"', "sh"], {}, "has been deleted"),
        ([], {"PYTHONOPTIMIZE": "2"}, "-OO"),
        ([], {"LC_ALL": "C", "PYTHONUTF8": "0"}, "PYTHONUTF8=1"),
    ],
    ids=["working directory deleted", "without docstrings", "path not in ASCII"],
)
def test_what_cannot_work_is_said(tmp_path, before, env, words):
    result = command("--dataset", "gr\u00f6\u00dfe", before=before, cwd=tmp_path, **env)
    assert result.returncode in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_early_costs_nothing(tiny_models, images, tmp_path):
    """As with `2>&1 | head`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    flags = ["--local-checkpoint", tiny_models[0], "--hf-model", "none", "--dataset", images]
    flags += ["--skip-unreadable", "--no-cache", "--json", "--output-dir", tmp_path]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--offline", *map(str, flags)],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=write_end,
        stderr=write_end,
        check=False,
    )
    os.close(write_end)
    assert result.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} >= FILES


# --- several processes


@pytest.mark.slow
def test_two_processes_write_the_embeddings_of_one(
    torchrun, tiny_models, images, finished, tmp_path
):
    flags = ["--local-checkpoint", tiny_models[0], "--hf-model", tiny_models[1], "--offline"]
    flags += ["--dataset", images, "--skip-unreadable", "--probe-samples", "all"]
    flags += ["--output-dir", tmp_path, "--cache-dir", tmp_path / "cache"]
    result = torchrun(SCRIPT, *map(str, flags))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("report.html") == 1
    for name in ("embeddings_local.npz", "embeddings_hf.npz"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    content = read(tmp_path)
    assert content["metrics"] == read(finished)["metrics"]
    assert content["run"]["command"].startswith("torchrun --nproc-per-node 2 scripts/")


@pytest.mark.slow
def test_the_error_of_several_processes_is_printed_once(torchrun, tmp_path):
    missing = tmp_path / "missing.pt"
    flags = ["--local-checkpoint", str(missing), "--hf-model", "none", "--offline"]
    result = torchrun(SCRIPT, *flags, "--output-dir", str(tmp_path / "out"))
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert len([line for line in lines if line.startswith("error: ") and str(missing) in line]) == 1
    assert not (tmp_path / "out" / "metrics.json").exists()
