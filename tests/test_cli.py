import csv
import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import compare_embeddings as script
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.data import load_split
from ijepa.model import VisionTransformer

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compare_embeddings.py"
FILES = {
    *("metrics.json", "report.md", "report.html", "per_image.csv", "embeddings_local.npz"),
    *("tsne_comparison.png", "pca_comparison.png", "class_precision.png", "nn_queries.png"),
    *("similarity_matrices.png", "variance_explained.png"),
}
SPLITS = {f"{split}/{name}": 4 for split in ("train", "test") for name in "ab"}


@pytest.fixture(scope="module")
def images(make_image_folder):
    """Splits with copies of 3 images under another label, and two unreadable files."""
    counts = {"test/a b": 30, "test/<script>": 30, "train/<script>": 25, "train/a b": 25}
    folder = make_image_folder({**counts, "train/c": 3})
    a, b = (folder / "test" / name for name in ("a b", "<script>"))
    for row in range(3):
        shutil.copy(a / f"00{row}.png", b / f"copy{row}.png")
    shutil.copy(a / "009.png", folder / "train" / "a b" / "same.png")
    for name in (a, b):
        (name / "bad.jpg").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def run(tiny_models, images):
    def run(output, *flags, local=tiny_models[0]):
        arguments = ["--offline", "--local-checkpoint", local, "--hf-model", tiny_models[1]]
        arguments += ["--dataset", images, "--output-dir", output, *flags]
        if "--no-cache" not in flags:
            arguments += ["--cache-dir", tiny_models[0].with_name("cache")]
        return script.main([str(word) for word in arguments])

    return run


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


def test_headline_numbers_equal_scikit_learn_on_the_saved_embeddings(finished):
    summary = read(finished)["summary"]
    for name in ("local", "hf"):
        arrays = arrays_of(finished, name)
        X, labels = arrays["embeddings"].astype(float), arrays["labels"]
        assert summary[name]["embedding_dim"] == X.shape[1]
        shares = PCA().fit(X).explained_variance_ratio_
        assert summary[name]["variance_10pc"] == pytest.approx(shares[:10].sum(), abs=1e-6)
        silhouette = silhouette_score(X, labels)
        assert summary[name]["silhouette"] == pytest.approx(silhouette, abs=1e-6)
        neighbors = NearestNeighbors(n_neighbors=5, metric="cosine").fit(X).kneighbors()[1]
        hits = (labels[neighbors] == labels[:, None]).mean()
        # Distances that tie to the last bit may be ordered otherwise by scikit-learn.
        assert summary[name]["precision_at_5"] == pytest.approx(hits, abs=4e-3)


def test_a_run_writes_every_file_and_lists_them_by_the_schema(finished):
    content, written = read(finished), {path.name for path in finished.iterdir()}
    assert FILES | {"embeddings_hf.npz", "nn_disagreement.png"} == written
    assert content["schema_version"] == 2
    assert content["names"]["local"] == "checkpoint (target)"
    assert content["names"]["hf"].endswith("/hf (paper)")
    assert content["models"]["local"]["epochs"] == 3
    assert content["dataset"]["n"] == 63
    assert content["dataset"]["per_class"] == [33, 30]
    low, high = content["metrics"]["local"]["precision_at_5"]["ci95"]
    assert low < content["metrics"]["local"]["precision_at_5"]["value"] < high
    assert any("3 of 9 planned epochs" in caveat for caveat in content["caveats"])
    assert {"scipy", "Pillow", "huggingface_hub"} <= content["run"]["versions"].keys()
    assert content["run"]["seconds"].keys() >= {"extract", "compare", "project", "write"}
    assert content["probe"]["bank_images"] == 53
    assert {"local", "hf", "pixels", "random_weights"} == content["probe"]["models"].keys()
    assert any("leaves out 1 training image" in caveat for caveat in content["caveats"])
    made = {name: (finished / name).read_bytes() for name in written - {"metrics.json"}}
    hashes = {name: (sha256(whole).hexdigest(), len(whole)) for name, whole in made.items()}
    assert hashes == {one["path"]: (one["sha256"], one["bytes"]) for one in content["artifacts"]}


def test_unreadable_images_and_duplicates_are_counted_and_paths_are_everywhere(finished):
    content = read(finished)
    assert any(caveat.startswith("2 unreadable images") for caveat in content["caveats"])
    assert content["dataset"]["unreadable"] == ["test/<script>/bad.jpg", "test/a b/bad.jpg"]
    assert content["dataset"]["duplicates"] == {"images": 6, "with_two_labels": 6}
    assert any(caveat.startswith("6 images have an exact copy") for caveat in content["caveats"])
    with (finished / "per_image.csv").open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert paths[0] == "test/<script>/000.png"
    arrays = arrays_of(finished, "local")
    assert arrays["paths"].tolist() == content["dataset"]["paths"] == paths
    assert arrays["keys"].shape == (63, 16)


@pytest.fixture
def embed(tiny_models, tmp_path):
    """What the script embeds of images in a folder with one model."""

    def embed(*flags):
        arguments = ["--hf-model", "none", "--skip-unreadable", "--local-checkpoint"]
        args = script.parse_arguments([*arguments, str(tiny_models[0]), *map(str, flags)])
        args.device = torch.device("cpu")
        return script.embed(args, script.Stages(talks=False), tmp_path / "cache")

    return embed


def test_images_that_fail_only_when_decoded_are_left_out_too(embed, make_image_folder):
    folder = make_image_folder({"a": 4, "b": 4})
    cut = folder / "a" / "001.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    inputs = embed("--dataset", folder)
    assert len(inputs.split) == len(inputs.results["local"].values) == 7
    assert inputs.notes[0].startswith("1 unreadable image left out: ")
    assert inputs.split.unreadable == ("a/001.png",)
    for row in (0, 2, 3):
        (folder / "a" / f"00{row}.png").unlink()
    with pytest.raises(script.UserError, match=r"4 images of 1 class$"):
        embed("--dataset", folder)


def test_data_dir_alone_means_cifar10(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, expected in (([], "digits"), (["--data-dir", "."], "cifar10")):
        assert script.parse_arguments(["--offline", *flags]).dataset == expected
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    assert script.parse_arguments(["--offline"]).dataset == "cifar10"


def test_a_sample_says_how_many_of_the_classes_are_in_it(embed, make_image_folder):
    folder = make_image_folder(dict.fromkeys("abcde", 1))
    (note,) = embed("--dataset", folder, "--max-samples", 4).notes
    assert note.startswith("4 of 5 images and 4 of 5 classes are compared")


def test_what_the_bank_leaves_out_is_said(embed, make_image_folder):
    folder = make_image_folder({"train/a": 4, "train/b": 4, "test/a": 3, "test/b": 3})
    (folder / "train" / "a" / "gone.png").symlink_to("nowhere")
    cut = folder / "train" / "a" / "001.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    flags = ["--dataset", folder, "--probe-samples", "all"]
    inputs = embed(*flags)
    assert len(inputs.bank) == len(inputs.bank_results["local"].values) == 7
    assert inputs.split.unreadable == ("train/a/gone.png", "train/a/001.png")
    assert all("bank: 1 unreadable image left out" in note for note in inputs.notes)
    for _ in range(2):  # first with an image that cannot be decoded, then with none
        inputs = embed(*flags, "--split", "train")
        assert inputs.bank is None
        assert "no training image is left" in inputs.notes[-1]
        cut.unlink(missing_ok=True)
    (folder / "train" / "b" / "odd.png").write_bytes(b"x")  # which only a larger bank needs
    few = embed("--dataset", folder, "--probe-samples", "2")
    assert (len(few.bank), few.split.unreadable) == (2, ())
    for name in "ab":
        (folder / "train" / name).rename(folder / "train" / f"{name}_too")
    inputs = embed(*flags)
    assert inputs.bank is None
    assert inputs.notes[-1].endswith("no compared class is in the train split (a_too and b_too).")


def test_a_folder_named_like_a_data_set_has_its_own_bank(embed, make_image_folder, monkeypatch):
    folder = make_image_folder(SPLITS)
    monkeypatch.chdir(folder.rename(folder.with_name("cifar10")).parent)
    inputs = embed("--dataset", "./cifar10", "--probe-samples", "all", "--data-dir", "absent")
    assert inputs.bank.paths[0] == "train/a/000.png"


def test_embeddings_of_a_file_serve_a_bank_only_by_image_keys(embed, make_image_folder, tmp_path):
    folder = make_image_folder(SPLITS)
    test, train = (load_split(str(folder), tmp_path, one, True) for one in ("test", "train"))
    keys = np.array([list(key) for key in (*test.image_keys, *train.image_keys)], np.uint8)
    X = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    file, flags = tmp_path / "x.npz", ["--dataset", folder, "--probe-samples", "all"]
    for names, words in (
        ({"keys": keys[:8]}, "x.npz lacks 8 of 8 images of the bank."),
        ({"indices": np.arange(8)}, "x.npz has no image keys, and splits share their indices."),
    ):
        np.savez(file, embeddings=X[:8], **names)
        inputs = embed(*flags, "--hf-model", file)
        assert inputs.bank is None
        assert inputs.notes[-1] == f"There is no probe: {tmp_path}/{words}"
        assert not inputs.bank_results
        np.testing.assert_array_equal(inputs.results["hf"].values, X[:8])
        assert inputs.results["hf"].from_cache
    np.savez(file, embeddings=X, keys=keys)
    found = embed(*flags, "--hf-model", file).bank_results["hf"].values
    np.testing.assert_array_equal(found, X[8:])


def test_a_run_does_not_replace_the_embeddings_that_it_is_given(run, finished, capsys):
    given = finished / "embeddings_hf.npz"
    before = given.read_bytes()
    assert run(finished, "--skip-unreadable", "--hf-model", "none", local=given) == 1
    assert f"{given} would be replaced" in capsys.readouterr().err
    assert given.read_bytes() == before
    assert (finished / "metrics.json").exists()


def test_another_run_repairs_the_cache_and_agrees(run, tiny_models, finished, tmp_path, capsys):
    """The embeddings of `hf` are damaged; another seed of the local model is new."""
    key = next((tiny_models[0].parent / "cache").glob("*/facts.json")).parent
    for chunk in key.glob("*.npz"):
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 4
        chunk.write_bytes(content)
    other_seed, config = tmp_path / "seed_1.pt", load_checkpoint(tiny_models[0]).config
    torch.manual_seed(1)
    encoders, facts = {"target": VisionTransformer(config)}, {"epochs": 3, "planned_epochs": 9}
    save_checkpoint(other_seed, config, encoders, (0.5, 0.5), facts)
    flags = ["--skip-unreadable", "--json", "--probe-samples", "all"]
    flags += ["--local-checkpoint", other_seed]
    assert run(tmp_path / "out", *flags) == 0
    printed = capsys.readouterr()
    assert "of cached hf embeddings by embedding again: " in printed.err
    assert "note: The local model had 3 of 9 planned epochs." in printed.err.splitlines()
    assert "note: k = 100, 200 means the whole bank of 53 images." in printed.err.splitlines()
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


def test_one_model_is_reported_by_itself(run, tiny_models, make_image_folder, tmp_path, capsys):
    raw, folder = tmp_path / "raw.pth", make_image_folder(dict.fromkeys("abcd", 1))
    torch.save(load_checkpoint(tiny_models[0]).build().state_dict(), raw)
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


def test_models_of_any_kind_take_either_side_and_are_named_apart(tiny_models, tmp_path):
    """Equal names have the folders of the files, or the roles of the models."""
    local, hf = map(str, tiny_models)
    copied = shutil.copy(local, tmp_path)

    def load(one, other):
        args = script.parse_arguments(["--offline", "--local-checkpoint", one, "--hf-model", other])
        args.device = torch.device("cpu")
        return script.load_encoders(args, None)

    roles = [[one.name for one in load(hf, other)] for other in (local, hf)]
    assert roles == [["local", "hf", "pixels"]] * 2
    assert [one.name for one in load(local, "none")] == ["local", "pixels", "random_weights"]
    pairs = ((copied, (Path(local).parent.name, tmp_path.name)), (local, ("Local", "HF")))
    for other, marks in pairs:
        names = script.table_names(load(local, other)[:2])
        assert [*names.values()] == [f"checkpoint (target) ({mark})" for mark in marks]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "cannot read 2 of 65 images"),
        (["--local-checkpoint", "absent.pt", "--skip-unreadable"], "absent.pt"),
        (["--hf-model", "nobody/nothing", "--split", "train"], "nobody/nothing"),
        (["--hf-model", 300 * "x", "--split", "train"], "is not a file, a directory or a hub id"),
        (["--hf-model", "{finished}/embeddings_hf.npz", "--split", "train"], "lacks 53 of 54"),
        (["--local-checkpoint", "{finished}/embeddings_hf.npz", "--split", "train"], "the first"),
        (["--dataset", "cifar10", "--data-dir", "absent"], "CIFAR-10 is not in absent"),
        (["--dataset", "/no/such", "--debug"], "no such folder"),
        (["--split", "val"], "choose one of its splits"),
        (["--max-samples", "3", "--split", "train"], "too few"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    ],
)
def test_a_mistake_is_two_lines_and_leaves_nothing(run, finished, tmp_path, capsys, flags, words):
    assert run(tmp_path / "out", *(flag.format(finished=finished) for flag in flags)) == 1
    error = capsys.readouterr().err.splitlines()
    assert ("Traceback" in " ".join(error)) is ("--debug" in flags)
    assert error[-2].startswith("error: ")
    assert error[-1].startswith("hint: ")
    assert words in " ".join(error[-2:])
    assert not list((tmp_path / "out").iterdir())


def test_an_interruption_is_exit_code_130(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("PIL.Image.open", Mock(side_effect=KeyboardInterrupt))
    assert run(tmp_path, "--split", "train") == 130
    assert "interrupted; finished embeddings are kept" in capsys.readouterr().err


def test_a_photo_of_108_megapixels_is_no_warning(run, make_image_folder, tmp_path, capsys):
    folder = make_image_folder({"a": 1, "b": 1})
    (folder / "a" / "large.pgm").write_bytes(b"P5 12000 9000 255\n")
    assert run(tmp_path / "out", "--dataset", folder) == 1
    assert "too few to compare: 3 images of 2 classes" in capsys.readouterr().err


def test_progress_in_a_log_is_a_plain_line_now_and_then(capsys):
    with script.make_progress(True)(total=3000, desc="embedding") as bar:
        bar.update(64)
        assert capsys.readouterr().err == ""
        bar.start_t = bar.last_print_t = 0
        bar.update(1216)
        bar.update(64)
    assert capsys.readouterr().err == "embedding: 1,280 of 3,000 images\n"


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
    flags = ["--offline", "--hf-model", "none", "--dataset", "gr\u00f6\u00dfe"]
    command = [*before, sys.executable, str(SCRIPT), *flags]
    result = subprocess.run(
        command, env={**os.environ, **env}, cwd=tmp_path, capture_output=True, check=False
    )
    assert result.returncode in (1, 2)
    assert words.encode() in result.stderr
    assert b"Traceback" not in result.stderr


def test_the_bundled_pair_is_compared_though_the_reader_leaves_early(tmp_path):
    """As with `| head`, and a terminal that is gone."""
    read_end, write_end = os.pipe()
    screen, terminal = os.openpty()
    os.close(read_end)
    os.close(screen)
    flags = ["--offline", "--dataset", "digits", "--max-samples", "20", "--no-cache", "--json"]
    command = [sys.executable, "-u", str(SCRIPT), *flags, "--output-dir", str(tmp_path)]
    subprocess.run(command, stdout=write_end, stderr=terminal, check=True)
    os.close(write_end)
    os.close(terminal)
    assert {path.name for path in tmp_path.iterdir()} >= FILES
    found = read(tmp_path)
    assert sum("no ViT-Huge" in caveat for caveat in found["caveats"]) == 1
    losses = {role: model["losses"] for role, model in found["models"].items()}
    matched = "I-JEPA prediction + view matching (InfoNCE) + variance/covariance"
    assert losses == {"local": matched, "hf": "I-JEPA prediction"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk to write to")
def test_a_summary_is_json_for_any_terminal_even_a_closed_one_and_a_full_disk_is_an_error(tmp_path):
    local = shutil.copy(script.bundled("checkpoint_latest.pt"), tmp_path / "größe.pt")
    flags = ["--offline", "--no-cache", "--hf-model", "none", "--local-checkpoint", local, "--json"]
    flags += ["--dataset", "digits", "--max-samples", "9", "--output-dir", tmp_path / "out"]
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=env, capture_output=True, check=True)
    assert json.loads(result.stdout)["names"] == {"local": "größe (target)"}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 1
    assert b"error: cannot print the summary: No space left" in result.stderr
    screen, terminal = os.openpty()
    os.close(screen)
    subprocess.run(command, stdout=terminal, stderr=terminal, check=True)
    os.close(terminal)


@pytest.mark.slow
def test_two_processes_embed_what_one_does(torchrun, tiny_models, images, finished, tmp_path):
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
