import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ijepa.checkpoint import load_checkpoint, read_torch_file
from ijepa.data import load_split
from ijepa.errors import git_commit
from ijepa.runs import earlier_runs
from ijepa.training import embed

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train_ijepa.py"
EPOCHS = 3


def load_script():
    spec = importlib.util.spec_from_file_location("train_ijepa", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(autouse=True, scope="module")
def restored_signals():
    """The script takes over these signals for good: it expects to be a process of its own."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(make_image_folder):
    return make_image_folder({"a": 60, "b": 60})


@pytest.fixture(scope="module")
def flags(folder):
    """Three updates an epoch on 108 images; 12 are held out."""
    return [
        *("--dataset", str(folder), "--epochs", str(EPOCHS), "--batch-size", "36"),
        *("--embed-dim", "16", "--depth", "1", "--device", "cpu", "--dtype", "float32"),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, flags):
    output = tmp_path_factory.mktemp("run") / "new" / "folder"
    assert script.main([*flags, "--output-dir", str(output)]) == 0
    return output


def contents(output):
    return {path: path.read_bytes() for path in output.rglob("*.*")}


def read_log(output):
    with (output / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- what a run leaves behind


def test_a_run_leaves_its_state_a_log_and_a_checkpoint(finished):
    assert sorted(path.relative_to(finished).as_posix() for path in finished.rglob("*.*")) == [
        "checkpoint_latest.pt",
        "hf/config.json",
        "hf/model.safetensors",
        "hf/preprocessor_config.json",
        "state.pt",
        "state_previous.pt",
        "training_curves.png",
        "training_log.csv",
    ]


def test_the_export_is_the_context_encoder(finished):
    exported = safetensors.torch.load_file(finished / "hf" / "model.safetensors")
    context = load_checkpoint(finished / "checkpoint_latest.pt", "context").state_dict
    assert torch.equal(exported["layernorm.weight"], context["norm.weight"])
    target = load_checkpoint(finished / "checkpoint_latest.pt", "target").state_dict
    assert not torch.equal(exported["layernorm.weight"], target["norm.weight"])


def test_the_log_has_one_row_of_numbers_for_each_epoch(finished):
    rows = read_log(finished)
    assert [float(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert list(rows[0]) == [
        *("epoch", "loss", "matching_loss", "lr", "momentum", "weight_decay", "seconds"),
        *("heldout_precision_at_5", "effective_rank", "target_variance"),
    ]
    values = np.array([[float(value) for value in row.values()] for row in rows])
    assert np.isfinite(values).all()
    assert values[-1, 1] < values[0, 1]


def test_the_checkpoint_tells_how_it_was_made(finished, folder):
    checkpoint = load_checkpoint(finished / "checkpoint_latest.pt")
    assert (checkpoint.epochs, checkpoint.weights) == (EPOCHS, "target")
    assert (checkpoint.config.embed_dim, checkpoint.config.depth) == (16, 1)
    assert (checkpoint.mean, checkpoint.std) == ((0.5,) * 3, (0.5,) * 3)
    training = checkpoint.training
    assert (training["dataset"], training["num_images"]) == (str(folder), 108)
    assert (training["planned_epochs"], training["device"]) == (EPOCHS, "cpu")
    assert training["dtype"] == "float32"
    assert training["settings"]["batch_size"] == 36
    assert training["command"].startswith("python scripts/train_ijepa.py --dataset ")
    assert training["command"].endswith(str(finished))
    assert training["seconds"] > 0


def test_both_encoders_of_the_checkpoint_embed_images(finished):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    embeddings = [
        embed(
            load_checkpoint(finished / "checkpoint_latest.pt", weights).build(),
            images,
            torch.float32,
        )
        for weights in ("target", "context")
    ]
    assert embeddings[0].shape == embeddings[1].shape == (4, 16)
    assert not np.array_equal(*embeddings)


def test_held_out_images_play_no_part_in_training(flags):
    args = script.parse_arguments(flags)
    (images, held_out), labels = script.load_images(args, 36)
    assert images.shape == (108, 3, 32, 32)
    assert held_out.shape == (12, 3, 32, 32)
    assert np.bincount(labels).tolist() == [6, 6]
    rows = {image.numpy().tobytes() for image in images}
    assert not rows & {image.numpy().tobytes() for image in held_out}
    assert len(rows) == 108


def test_images_of_a_tensor_data_set_are_taken_as_they_are(tmp_path):
    args = script.parse_arguments(["--dataset", "digits", "--data-dir", str(tmp_path)])
    (images, held_out), labels = script.load_images(args, 36)
    assert (len(images), len(held_out)) == (1797 - 179, 179)
    split = load_split("digits", tmp_path, "train", offline=True)
    known = {image.numpy().tobytes() for image in split.images}
    assert {image.numpy().tobytes() for image in held_out} <= known
    assert max(np.bincount(labels)) - min(np.bincount(labels)) <= 1


# --- resuming


def test_a_finished_run_is_found_and_left_alone(finished, flags, capsys):
    before = contents(finished)
    assert script.main([*flags, "--output-dir", str(finished)]) == 0
    output = capsys.readouterr()
    assert output.err == f"resuming {finished} after {3 * EPOCHS} updates\n"
    assert output.out == ""
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [(["--batch-size", "18"], "batch_size"), (["--depth", "2", "--lr", "1e-4"], "lr, vit")],
)
def test_a_run_with_other_settings_is_not_touched(finished, flags, capsys, change, named):
    before = contents(finished)
    assert script.main([*flags, *change, "--output-dir", str(finished)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: the run in {finished} has other settings: {named}"
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert contents(finished) == before


def test_a_run_goes_on_with_its_own_images_only(finished, flags, make_image_folder, capsys):
    before = contents(finished)
    other = make_image_folder({"cat": 60, "dog": 60})
    Image.new("RGB", (9, 9)).save(other / "cat" / "000.png")
    arguments = [*flags, "--epochs", "3", "--dataset", str(other), "--output-dir", str(finished)]
    assert script.main(arguments) == 1
    problem = capsys.readouterr().err.splitlines()[0]
    assert "108 images of" in problem
    assert str(other) in problem
    assert contents(finished) == before


STOP_AFTER_EPOCH_2 = """
import os, runpy, signal, sys

class Watched:
    def write(self, text):
        sys.__stderr__.write(text)
        if text.startswith("epoch=2 "):
            os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)

sys.stderr = Watched()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_terminated_run_saves_and_goes_on_to_the_same_weights(tmp_path, finished, flags, capsys):
    output = tmp_path / "run"
    arguments = [*flags, "--output-dir", str(output)]
    code = STOP_AFTER_EPOCH_2.replace("sys.argv[0]", repr(str(SCRIPT)))
    stopped = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "stopped and saved after 6 updates"
    assert load_checkpoint(output / "checkpoint_latest.pt").epochs == 2

    assert script.main(arguments) == 0
    assert capsys.readouterr().err.startswith(f"resuming {output} after 6 updates\nepoch=3 ")
    for weights in ("target", "context"):
        resumed, straight = (
            load_checkpoint(path / "checkpoint_latest.pt", weights).state_dict
            for path in (output, finished)
        )
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    for one, other in zip(read_log(output), read_log(finished), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}


@pytest.mark.parametrize(
    "stretches",
    [
        # (--save-every, updates before the stop, epochs of the checkpoint then)
        [(2, 4, 0)],
        [(2, 7, 2)],
        [(1, 4, 1), (3, 4, 1)],
        [(3, 7, 0), (1, 1, 0)],
    ],
)
def test_log_curves_and_export_are_of_the_last_checkpoint(
    tmp_path, finished, flags, monkeypatch, stretches
):
    drawn = []
    monkeypatch.setattr(
        "ijepa.plots.plot_training_curves", lambda rows, caption: drawn.append((len(rows), caption))
    )
    monkeypatch.setattr("ijepa.report.save_figure", lambda *_: None)
    arguments = [*flags, "--output-dir", str(tmp_path)]
    for every, updates, epochs in stretches:
        left = iter(range(updates - 1, -1, -1))
        drawn.clear()
        with monkeypatch.context() as patch:
            patch.setattr("ijepa.parallel.any_process", lambda *_, left=left: not next(left))
            assert script.main([*arguments, "--save-every", str(every)]) == 130
        if not epochs:
            assert {path.name for path in tmp_path.iterdir()} <= {"state.pt", "state_previous.pt"}
            assert not drawn
            continue
        assert load_checkpoint(tmp_path / "checkpoint_latest.pt").epochs == epochs
        assert len(read_log(tmp_path)) == epochs
        assert [(rows, caption.title) for rows, caption in drawn] == [
            (epochs, f"I-JEPA training, {epochs} of 3 epochs")
        ]
    assert script.main([*arguments, "--save-every", "3"]) == 0
    one, other = (
        load_checkpoint(path / "checkpoint_latest.pt").state_dict for path in (tmp_path, finished)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)
    for mine, whole in zip(read_log(tmp_path), read_log(finished), strict=True):
        assert {**mine, "seconds": ""} == {**whole, "seconds": ""}


@pytest.mark.parametrize("stops", [(), (4,), (2, 3, 5)])
def test_an_epoch_that_was_stopped_keeps_its_seconds(tmp_path, flags, monkeypatch, stops):
    clock = [0]

    def tick(*_):  # called after each of the 3 x 3 updates
        clock[0] += 1
        return clock[0] in stops

    monkeypatch.setattr("ijepa.parallel.any_process", tick)
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for code in (*(130 for _ in stops), 0):
        assert script.main([*flags, "--output-dir", str(tmp_path)]) == code
    assert [float(row["seconds"]) for row in read_log(tmp_path)] == [2, 3, 3]
    checkpoint = read_torch_file(tmp_path / "checkpoint_latest.pt")
    assert checkpoint["training"]["seconds"] == 8


def test_a_damaged_state_is_a_user_error(tmp_path, flags, capsys):
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    assert script.main([*flags, "--output-dir", str(tmp_path)]) == 1
    assert "state.pt is not a readable PyTorch file" in capsys.readouterr().err
    assert (tmp_path / "state.pt").read_bytes() == b"PK\x03\x04 cut off"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PK"), Path.unlink])
def test_a_lost_state_falls_back_to_the_one_before(finished, flags, tmp_path, capsys, damage):
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder / "state.pt")
    assert script.main([*flags, "--output-dir", str(folder)]) == 0
    assert "resuming" in capsys.readouterr().err
    again = load_checkpoint(folder / "checkpoint_latest.pt", "target").state_dict
    before = load_checkpoint(finished / "checkpoint_latest.pt", "target").state_dict
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_run_made_longer_in_time_is_the_long_run(tmp_path, flags, finished):
    longer = [*flags, "--epochs", str(EPOCHS + 2)]
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    assert script.main([*longer, "--output-dir", str(straight)]) == 0
    shutil.copytree(finished, changed)
    (changed / "state_previous.pt").replace(changed / "state.pt")  # 6 of 9 updates, decay after 7
    assert script.main([*longer, "--resume", "--output-dir", str(changed)]) == 0
    one, other = (
        load_checkpoint(path / "checkpoint_latest.pt").state_dict for path in (straight, changed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [{**row, "seconds": ""} for row in read_log(straight)] == [
        {**row, "seconds": ""} for row in read_log(changed)
    ]


def test_a_run_whose_learning_rate_fell_keeps_its_length(flags, finished, capsys):
    before = contents(finished)
    arguments = [*flags, "--epochs", str(EPOCHS + 2), "--output-dir", str(finished)]
    assert script.main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: the run in {finished} is of 3 epochs; after 9 updates")
    assert contents(finished) == before


# --- going on from a finished run


def test_a_run_goes_on_with_networks_and_log_of_a_finished_one(finished, flags, tmp_path, capsys):
    longer = [*flags, "--epochs", str(EPOCHS + 2), "--init-from", str(finished)]
    before = contents(finished)
    assert script.main([*longer, "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err.startswith(f"epoch={EPOCHS + 1} ")
    assert contents(finished) == before
    rows, earlier = read_log(tmp_path), read_log(finished)
    assert [{**row, "epoch": float(row["epoch"])} for row in rows[:EPOCHS]] == [
        {**row, "epoch": float(row["epoch"])} for row in earlier
    ]
    assert [float(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 3))
    # The networks are trained ones: from nothing the first epoch has a larger loss.
    assert float(rows[EPOCHS]["loss"]) < float(rows[0]["loss"])
    ended, went_on = (
        load_checkpoint(path / "checkpoint_latest.pt") for path in (finished, tmp_path)
    )
    assert (went_on.epochs, went_on.training["planned_epochs"]) == (EPOCHS + 2, EPOCHS + 2)
    (earlier,) = went_on.training["earlier_runs"]
    assert earlier["epochs"] == EPOCHS
    for name in ("command", "seconds", "git_commit", "dtype"):
        assert earlier[name] == ended.training[name]
    assert ended.training["earlier_runs"] == []


def test_a_run_from_a_finished_one_begins_with_its_rounded_weights(finished, flags, tmp_path):
    """A rate of almost 0 leaves the networks where they began."""
    arguments = [*flags, "--epochs", str(EPOCHS + 1), "--init-from", str(finished), "--lr", "1e-12"]
    assert script.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    for name in ("checkpoint_latest.pt", "hf/model.safetensors"):
        assert (tmp_path / name).exists()
    weights = [
        torch.load(path / "checkpoint_latest.pt", weights_only=True)["weights"]
        for path in (finished, tmp_path)
    ]
    for network in ("context", "predictor"):
        for name, value in weights[0][network].items():
            torch.testing.assert_close(weights[1][network][name], value, atol=1e-6, rtol=1e-3)
    # The average of equal networks moves a little towards the context encoder.
    moved = [each["target"]["norm.weight"] - each["context"]["norm.weight"] for each in weights]
    assert moved[1].abs().sum() < moved[0].abs().sum()


def test_a_stopped_run_from_a_finished_one_resumes_by_itself(finished, flags, tmp_path, capsys):
    """The same command goes on, even where the finished run is gone."""
    start = shutil.copytree(finished, tmp_path / "start")
    arguments = [*flags, "--epochs", str(EPOCHS + 2), "--init-from", str(start)]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert script.main([*arguments, "--output-dir", str(straight)]) == 0
    shutil.copytree(straight, stopped)
    (stopped / "state_previous.pt").replace(stopped / "state.pt")
    shutil.rmtree(start)
    capsys.readouterr()
    assert script.main([*arguments, "--output-dir", str(stopped)]) == 0
    updates = 3 * (EPOCHS + 1)
    assert capsys.readouterr().err.startswith(f"resuming {stopped} after {updates} updates\n")
    one, other = (load_checkpoint(path / "checkpoint_latest.pt") for path in (straight, stopped))
    assert all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)
    assert one.training["earlier_runs"] == other.training["earlier_runs"] != []


@pytest.mark.parametrize("other", [[], ["--init-from", "elsewhere"]])
def test_a_run_does_not_change_where_it_began(finished, flags, tmp_path, capsys, other):
    output = ["--output-dir", str(tmp_path / "run")]
    longer = [*flags, "--epochs", str(EPOCHS + 1), *output]
    assert script.main([*longer, "--init-from", str(finished)]) == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert script.main([*longer, *other]) == 1
    assert "has other settings: init_from" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_state_from_before_a_run_could_begin_elsewhere_is_resumed(finished, flags, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    saved = torch.load(folder / "state_previous.pt", weights_only=True)
    del saved["earlier_runs"], saved["settings"]["init_from"], saved["state"]["start_step"]
    torch.save(saved, folder / "state.pt")
    assert script.main([*flags, "--output-dir", str(folder)]) == 0
    one, other = (
        load_checkpoint(path / "checkpoint_latest.pt").state_dict for path in (folder, finished)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("begins", ["from nothing", "from a finished run"])
def test_a_run_stopped_in_its_first_epoch_leaves_a_checkpoint_there_alone(
    tmp_path, finished, flags, monkeypatch, begins
):
    """As in a folder with a shipped checkpoint, which has no state."""
    monkeypatch.setattr("ijepa.parallel.any_process", lambda *_: True)
    shutil.copy(finished / "checkpoint_latest.pt", tmp_path)
    arguments = [*flags, "--epochs", str(EPOCHS + 1), "--output-dir", str(tmp_path)]
    if begins == "from a finished run":
        arguments += ["--init-from", str(finished)]
    assert script.main(arguments) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "checkpoint_latest.pt"}


def test_runs_before_are_a_list_of_plain_facts(finished):
    training = load_checkpoint(finished / "checkpoint_latest.pt").training
    deep = []
    for _ in range(2000):
        deep = [deep]
    first = {"epochs": 2, "command": "a", "seconds": deep, "secret": 1}
    runs = earlier_runs({**training, "earlier_runs": [first, "nothing"]})
    assert runs[0] == {"epochs": 2, "command": "a"}
    assert runs[1]["recipe"] == "matched"
    assert (len(runs), runs[1]["epochs"]) == (2, EPOCHS)
    assert "settings" not in runs[1]
    assert earlier_runs({"epochs": 1, "earlier_runs": 7}) == [{"epochs": 1}]


def change_weights(change):
    def spoil(folder):
        path = folder / "checkpoint_latest.pt"
        content = torch.load(path, weights_only=True)
        change(content["weights"])
        torch.save(content, path)

    return spoil


def change_log(change):
    def spoil(folder):
        path = folder / "training_log.csv"
        path.write_text(change(path.read_text()))

    return spoil


def change_content(change):
    def spoil(folder):
        path = folder / "checkpoint_latest.pt"
        content = torch.load(path, weights_only=True)
        torch.save(change(content) or content, path)

    return spoil


def as_of_the_authors(content):
    """Their layout, with a key of ours that means nothing there."""
    weights = content["weights"]
    return {"target_encoder": weights["target"], "encoder": weights["context"], "weights": None}


def make_pipe(folder):
    (folder / "training_log.csv").unlink()
    os.mkfifo(folder / "training_log.csv")


def test_a_predictor_begins_anew_where_the_checkpoint_has_none(finished, flags, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "without")
    change_weights(lambda weights: weights.pop("predictor"))(folder)
    arguments = [*flags, "--epochs", str(EPOCHS + 1), "--lr", "1e-12"]
    for name, start in (("with", finished), ("anew", folder)):
        folders = ["--init-from", str(start), "--output-dir", str(tmp_path / name)]
        assert script.main([*arguments, *folders]) == 0
    told = f"{folder} holds no predictor: a new one begins"
    assert capsys.readouterr().err.count(told) == 1
    losses = [float(read_log(tmp_path / name)[-1]["loss"]) for name in ("with", "anew")]
    assert losses[0] < losses[1]


def refused(flags, folder, output, capsys):
    """The problem that is told, after a look at what has to come with it."""
    arguments = [*flags, "--init-from", str(folder), "--output-dir", str(output)]
    assert script.main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert not output.exists() or list(output.iterdir()) == []
    return lines[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no checkpoint at "),
        (lambda folder: (folder / "checkpoint_latest.pt").write_text("x"), "not a readable"),
        (lambda folder: (folder / "training_log.csv").unlink(), "cannot read the log"),
        (change_log(lambda text: text.replace("epoch,", "step,")), "its columns are not"),
        (change_log(lambda text: text[:-30]), "cannot read the log"),
        (change_log(lambda text: text.replace("\n2,", "\nx,")), "cannot read the log"),
        (change_log(lambda text: text.replace("\n2,", "\ninf,")), "cannot read the log"),
        (change_log(lambda text: text.replace("\n2,", "\n2.7,")), "cannot read the log"),
        (change_log(lambda text: re.sub("\n2,[^,]+", "\n2,1e308", text)), "values beyond 1e+09"),
        (change_log(lambda text: re.sub("\n2,[^,]+", "\n2,nan", text)), "values beyond 1e+09"),
        (change_log(lambda text: text + "\0" * 2**24), "no file of at most 16 MiB"),
        (make_pipe, "no file of at most 16 MiB"),
        (change_log(lambda text: text + "4" + ",0" * 9), "not one row for each of the 3"),
        (change_log(lambda text: text.replace("\n2,", "\n3,")), "not one row for each of the 3"),
        (
            change_content(lambda content: content["training"].update(epochs=10**30)),
            "not one row for each of the 1000000000000000000000000000000 epochs",
        ),
        (
            change_content(lambda content: content["preprocessing"].update(mean=[0.4] * 3)),
            "takes pixels of mean (0.4, 0.4, 0.4)",
        ),
        (change_content(as_of_the_authors), "does not tell its number of attention heads"),
        (change_weights(lambda all_: all_.pop("context")), "has no context encoder"),
        (
            change_weights(lambda all_: all_["predictor"]["mask_token"].fill_(torch.nan)),
            "the predictor has NaN",
        ),
        (change_weights(lambda all_: all_["predictor"].popitem()), "the predictor does not fit"),
        (change_weights(lambda all_: all_.update(predictor=[])), "predictor must be a dictionary"),
    ],
)
def test_a_damaged_start_is_told(finished, flags, tmp_path, capsys, spoil, message):
    folder = shutil.copytree(finished, tmp_path / "start")
    spoil(folder)
    longer = [*flags, "--epochs", str(EPOCHS + 1)]
    assert message in refused(longer, folder, tmp_path / "run", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--epochs", str(EPOCHS)], "has had 3 epochs: nothing is left to do"),
        (["--epochs", "9", "--depth", "2"], "is another one: depth 1, not 2"),
    ],
)
def test_a_start_that_does_not_fit_the_run_is_told(
    finished, flags, tmp_path, capsys, change, message
):
    assert message in refused([*flags, *change], finished, tmp_path / "run", capsys)


def test_collapsed_embeddings_are_told_in_words(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr("ijepa.training.EARLY_EPOCHS", 1)
    monkeypatch.setattr("ijepa.training.COLLAPSED_SHARE", 1.0)
    assert script.main([*flags, "--output-dir", str(tmp_path)]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == EPOCHS - 1
    assert warnings[0].startswith("warning: the embeddings are collapsing: effective rank")


# --- several processes


def torchrun(processes, arguments):
    """Run the script in processes that meet over a socket on loopback."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(SCRIPT), *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_processes_train_the_model_of_one(tmp_path, flags, finished):
    result = torchrun(2, [*flags, "--output-dir", str(tmp_path)])
    assert result.returncode == 0, result.stderr
    rows = list(zip(read_log(tmp_path), read_log(finished), strict=True))
    assert len(rows) == EPOCHS
    for one, other in rows:
        for name in ("loss", "matching_loss"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-4)
    one, other = (
        load_checkpoint(path / "checkpoint_latest.pt").state_dict for path in (tmp_path, finished)
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=0)
    training = load_checkpoint(tmp_path / "checkpoint_latest.pt").training
    assert training["processes"] == 2
    assert training["command"].startswith("torchrun --nproc-per-node 2 scripts/train_ijepa.py --")
    assert result.stderr.count("epoch=1 ") == 1


def test_a_batch_that_processes_cannot_share_is_told(tmp_path, flags):
    result = torchrun(2, [*flags, "--batch-size", "35", "--output-dir", str(tmp_path)])
    assert result.returncode != 0
    assert "error: a batch of 35 cannot be shared by 2 processes" in result.stderr


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--patch-size", "8"], "leaves fewer than 20 context patches"),
        (["--patch-size", "5"], "patch_size 5 does not divide image_size 32"),
        (["--num-views", "1"], "matching needs num_views of at least 2, got 1"),
        (["--embed-dim", "18"], "embed_dim must be a multiple of 4"),
        (["--batch-size", "109"], "120 images are too few for batches of 109"),
        (["--dataset", "nothing"], "unknown data set 'nothing'"),
        (["--device", "tpu"], "device 'tpu' is not available"),
        (["--lr", "1e9"], "the loss is no longer a number after 3 updates"),
        (["--resume"], "there is no run in"),
    ],
)
def test_a_mistake_of_the_user_is_two_lines_and_exit_code_1(
    tmp_path, flags, capsys, change, message
):
    assert script.main([*flags, *change, "--output-dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_told_before_training(tmp_path, flags, capsys):
    (tmp_path / "file").write_text("")
    assert script.main([*flags, "--output-dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write to {tmp_path / 'file'}")


def test_an_argument_that_is_not_utf_8_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--dataset", os.fsdecode(b"in\xff")])
    assert stopped.value.code == 2
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--epochs", "0"], ["--batch-size", "-3"], ["--seed", "-1"], ["--dtype", "half"], ["--epoch"]],
)
def test_wrong_usage_is_exit_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(wrong)
    assert stopped.value.code == 2
    assert f"argument {wrong[0]}" in capsys.readouterr().err


LIGHT = """
import runpy, sys
for words, code in ((["--help"], 0), (["--epochs", "none"], 2)):
    sys.argv = ["train_ijepa.py", *words]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == code, stopped.code
heavy = {"torch", "numpy", "PIL", "tqdm", "torchvision", "transformers", "sklearn", "matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_help_and_usage_errors_import_nothing_heavy():
    result = subprocess.run(
        [sys.executable, "-c", LIGHT.replace("SCRIPT", repr(str(SCRIPT)))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--output-dir" in result.stdout


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
