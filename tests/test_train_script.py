import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ijepa.checkpoint import load_checkpoint
from ijepa.data import load_split
from ijepa.errors import UserError, git_commit

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train_ijepa.py"
EPOCHS = 3


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("train_ijepa")


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
    return make_image_folder({"a": 24, "b": 24})


@pytest.fixture(scope="module")
def flags(folder):
    """Three updates an epoch on 38 images; 10 are held out."""
    return [
        *("--dataset", str(folder), "--epochs", str(EPOCHS), "--batch-size", "12"),
        *("--embed-dim", "64", "--depth", "1", "--device", "cpu", "--dtype", "float32"),
    ]


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory, flags):
    output = tmp_path_factory.mktemp("run") / "new" / "folder"
    assert script.main([*flags, "--output-dir", str(output)]) == 0
    return output


def contents(output):
    return {path: path.read_bytes() for path in output.rglob("*.*")}


def assert_same_run(one, other):
    """Weights and log of two folders are equal, times apart."""
    for weights in ("target", "context"):
        first, second = (
            load_checkpoint(path / "checkpoint_latest.pt", weights).state_dict
            for path in (one, other)
        )
        assert all(torch.equal(first[name], second[name]) for name in second)
    for first, second in zip(read_log(one), read_log(other), strict=True):
        assert {**first, "seconds": ""} == {**second, "seconds": ""}


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


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
    assert (checkpoint.config.embed_dim, checkpoint.config.depth) == (64, 1)
    assert (checkpoint.mean, checkpoint.std) == ((0.5,) * 3, (0.5,) * 3)
    training = checkpoint.training
    assert (training["dataset"], training["num_images"]) == (str(folder), 38)
    assert (training["planned_epochs"], training["device"]) == (EPOCHS, "cpu")
    assert training["dtype"] == "float32"
    assert training["settings"]["batch_size"] == 12
    assert training["command"].startswith("python scripts/train_ijepa.py --dataset ")
    assert training["command"].endswith(str(finished))
    assert training["seconds"] > 0


def test_held_out_images_play_no_part_in_training(script, folder):
    rest, held_out = script.load_images(str(folder), Path(), 12)
    assert rest.images.shape == (38, 3, 32, 32)
    assert held_out.images.shape == (10, 3, 32, 32)
    assert np.bincount(held_out.labels).tolist() == [5, 5]
    rows = {image.numpy().tobytes() for image in rest.images}
    assert not rows & {image.numpy().tobytes() for image in held_out.images}
    assert len(rows) == 38


def test_images_of_a_tensor_data_set_are_taken_as_they_are(script, tmp_path):
    rest, held_out = script.load_images("digits", tmp_path, 36)
    assert (len(rest), len(held_out)) == (1797 - 179, 179)
    split = load_split("digits", tmp_path, "train", offline=True)
    known = {image.numpy().tobytes() for image in split.images}
    assert {image.numpy().tobytes() for image in held_out.images} <= known
    assert np.ptp(np.bincount(held_out.labels)) <= 1


def test_a_few_images_without_classes_are_trained_on_without_labels(
    script, tmp_path, flags, make_image_folder, capsys
):
    """Of 24 images 10 are held out; the smallest batch that a loss of pairs can have."""
    images = make_image_folder({"2024/may": 24})
    changes = ["--dataset", str(images), "--batch-size", "2", "--epochs", "1"]
    assert script.main([*flags, *changes, "--output-dir", str(tmp_path)]) == 0
    assert "no P@5" in capsys.readouterr().err
    (row,) = read_log(tmp_path)
    assert row["heldout_precision_at_5"] == ""
    assert float(row["effective_rank"]) > 1
    assert float(row["target_variance"]) > 0
    assert (tmp_path / "training_curves.png").exists()


# --- resuming


def test_a_finished_run_is_found_and_left_alone(script, finished, flags, capsys):
    before = contents(finished)
    assert script.main([*flags, "--output-dir", str(finished)]) == 0
    output = capsys.readouterr()
    assert f"resuming {finished} after {3 * EPOCHS} updates\n" in output.err
    assert "epoch=" not in output.err
    assert output.out == ""
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--batch-size", "6"], "batch_size 12, not 6"),
        (["--recipe", "paper", "--batch-size", "12"], "recipe matched, not paper"),
        (["--epochs", str(EPOCHS + 2)], "it has had 9"),  # the learning rate has fallen
        (["--init-from", "elsewhere"], "init_from None, not elsewhere"),
    ],
)
def test_a_run_with_other_settings_is_not_touched(script, finished, flags, capsys, change, named):
    before = contents(finished)
    assert script.main([*flags, *change, "--output-dir", str(finished)]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: the run in {finished} has other settings: ")
    assert named in error
    assert hint.startswith("hint: ")
    assert contents(finished) == before


def test_a_run_goes_on_with_its_own_images_only(script, finished, flags, make_image_folder, capsys):
    before = contents(finished)
    other = make_image_folder({"cat": 24, "dog": 24})
    Image.new("RGB", (9, 9)).save(other / "cat" / "000.png")
    arguments = [*flags, "--epochs", "3", "--dataset", str(other), "--output-dir", str(finished)]
    assert script.main(arguments) == 1
    problem = capsys.readouterr().err.splitlines()[0]
    assert "38 images of" in problem
    assert str(other) in problem
    assert contents(finished) == before


@pytest.fixture
def no_curves(script, monkeypatch):
    """Leave out what takes half of the time of a run and is tested elsewhere."""
    monkeypatch.setattr(script, "finish", lambda _: None)


@pytest.fixture
def signal_after(script, monkeypatch):
    """Send signals to the script, which runs in this process, when it reports an epoch."""

    def after(epoch, *numbers):
        say = script.say

        def say_and_signal(text):
            say(text)
            if text.startswith(f"epoch={epoch} "):
                for number in numbers:
                    os.kill(os.getpid(), number)

        monkeypatch.setattr(script, "say", say_and_signal)

    return after


STOP_AFTER_TWO_EPOCHS = """
import os, runpy, signal, sys

class Watched:
    def write(self, text):
        sys.__stderr__.write(text)
        if text.startswith("epoch=2 "):
            os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)

sys.stderr = Watched()
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_terminated_run_saves_and_goes_on_to_the_same_weights(
    script, tmp_path, finished, flags, capsys
):
    arguments = [*flags, "--output-dir", str(tmp_path)]
    backend = {"MPLBACKEND": "that of a notebook"}  # which exists in the notebook alone
    stopped = run_python("-c", STOP_AFTER_TWO_EPOCHS, str(SCRIPT), *arguments, **backend)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "stopped and saved after 6 updates"
    assert "press Ctrl-C again" in stopped.stderr
    assert "%" not in stopped.stderr  # no progress bar where no terminal shows it
    assert load_checkpoint(tmp_path / "checkpoint_latest.pt").epochs == 2
    assert (tmp_path / "training_curves.png").exists()

    assert script.main(arguments) == 0
    text = capsys.readouterr().err
    assert f"resuming {tmp_path} after 6 updates\nepoch=3 " in text
    assert_same_run(tmp_path, finished)


def test_a_reader_that_leaves_early_stops_no_training(tmp_path, flags):
    """As with `2>&1 | head`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    words = [sys.executable, str(SCRIPT), *flags, "--output-dir", str(tmp_path)]
    assert subprocess.run(words, stderr=write_end, stdout=write_end, check=False).returncode == 0
    os.close(write_end)
    assert len(read_log(tmp_path)) == EPOCHS


@pytest.mark.usefixtures("no_curves")
def test_a_second_ctrl_c_ends_at_once_and_keeps_the_saved_state(
    script, tmp_path, flags, signal_after, capfd
):
    signal_after(2, signal.SIGINT, signal.SIGINT)
    assert script.main([*flags, "--output-dir", str(tmp_path)]) == 130
    said = capfd.readouterr().err
    assert "press Ctrl-C again" in said
    assert said.endswith("stopped; a state saved before is kept\n")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["state"]["step"] == 6


def test_a_run_without_a_checkpoint_yet_leaves_that_of_another_run_unchanged(
    script, tmp_path, finished, flags, signal_after
):
    shutil.copy(finished / "checkpoint_latest.pt", tmp_path)
    before = contents(tmp_path)
    signal_after(1, signal.SIGTERM)
    arguments = [*flags, "--seed", "1", "--save-every", "3", "--output-dir", str(tmp_path)]
    assert script.main(arguments) == 130
    after = contents(tmp_path)
    assert after.pop(tmp_path / "state.pt")
    assert after == before


def test_a_damaged_state_is_a_user_error(script, tmp_path, flags, capsys):
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    assert script.main([*flags, "--output-dir", str(tmp_path)]) == 1
    assert "state.pt is not a readable PyTorch file" in capsys.readouterr().err
    assert (tmp_path / "state.pt").read_bytes() == b"PK\x03\x04 cut off"


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PK"), Path.unlink])
def test_a_lost_state_falls_back_to_the_one_before(
    script, finished, flags, tmp_path, capsys, damage
):
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder / "state.pt")
    assert script.main([*flags, "--output-dir", str(folder)]) == 0
    assert "after 6 updates" in capsys.readouterr().err
    assert_same_run(folder, finished)


@pytest.mark.usefixtures("no_curves")
def test_a_run_made_longer_in_time_is_the_long_run(script, tmp_path, flags, finished):
    longer = [*flags, "--epochs", str(EPOCHS + 2)]
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    assert script.main([*longer, "--output-dir", str(straight)]) == 0
    shutil.copytree(finished, changed)
    (changed / "state_previous.pt").replace(changed / "state.pt")  # 6 of 9 updates, decay after 7
    assert script.main([*longer, "--resume", "--output-dir", str(changed)]) == 0
    assert_same_run(straight, changed)


# --- beginning with the weights of a finished run


@pytest.mark.usefixtures("no_curves")
def test_a_run_goes_on_with_networks_and_log_of_a_finished_one(script, finished, flags, tmp_path):
    longer = [*flags, "--epochs", str(EPOCHS + 2), "--init-from", str(finished)]
    before = contents(finished)
    assert script.main([*longer, "--output-dir", str(tmp_path)]) == 0
    assert contents(finished) == before
    rows = read_log(tmp_path)
    assert [float(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 3))
    for row, earlier in zip(rows, read_log(finished), strict=False):
        assert {name: float(value) for name, value in row.items()} == {
            name: float(value) for name, value in earlier.items()
        }
    # The networks are trained ones: from scratch the first epoch has a larger loss.
    assert float(rows[EPOCHS]["loss"]) < float(rows[0]["loss"])
    ended, went_on = (
        load_checkpoint(path / "checkpoint_latest.pt") for path in (finished, tmp_path)
    )
    assert (went_on.epochs, went_on.training["planned_epochs"]) == (EPOCHS + 2, EPOCHS + 2)
    (earlier,) = went_on.training["earlier_runs"]
    for name in ("epochs", "command", "seconds", "git_commit", "dtype", "recipe"):
        assert earlier[name] == ended.training[name]
    assert ended.training["earlier_runs"] == []


@pytest.mark.usefixtures("no_curves")
def test_a_stopped_run_from_a_finished_one_resumes_without_it(script, finished, flags, tmp_path):
    start = shutil.copytree(finished, tmp_path / "start")
    arguments = [*flags, "--epochs", str(EPOCHS + 2), "--init-from", str(start)]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert script.main([*arguments, "--output-dir", str(straight)]) == 0
    shutil.copytree(straight, stopped)
    (stopped / "state_previous.pt").replace(stopped / "state.pt")
    shutil.rmtree(start)
    assert script.main([*arguments, "--output-dir", str(stopped)]) == 0
    assert_same_run(straight, stopped)


@pytest.mark.parametrize(
    "case",
    [
        (shutil.rmtree, [], "no checkpoint at "),
        (lambda folder: (folder / "training_log.csv").unlink(), [], "cannot read the log"),
        (lambda folder: (folder / "training_log.csv").write_text("epoch\n1\n"), [], "has 1 epoch,"),
        (lambda _: None, ["--epochs", str(EPOCHS)], "has had 3 epochs"),
        (lambda _: None, ["--depth", "2"], "depth=1"),
    ],
)
def test_a_start_that_does_not_fit_is_an_error(script, finished, flags, tmp_path, capsys, case):
    spoil, change, message = case
    folder = shutil.copytree(finished, tmp_path / "start")
    spoil(folder)
    arguments = [*flags, "--epochs", "9", *change, "--init-from", str(folder)]
    assert script.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert message in error
    assert hint.startswith("hint: ")


# --- several processes


def test_two_processes_train_the_model_of_one(tmp_path, flags, finished, torchrun):
    result = torchrun(SCRIPT, *flags, "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "warn" not in result.stderr.lower()
    assert result.stderr.count("epoch=1 ") == 1
    for one, other in zip(read_log(tmp_path), read_log(finished), strict=True):
        for name in ("loss", "matching_loss"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-4)
    both, single = (load_checkpoint(path / "checkpoint_latest.pt") for path in (tmp_path, finished))
    for name, value in single.state_dict.items():
        torch.testing.assert_close(both.state_dict[name], value, atol=2e-3, rtol=0)
    assert both.training["processes"] == 2
    command = both.training["command"]
    assert command.startswith("torchrun --nproc-per-node 2 scripts/train_ijepa.py --")


def test_a_batch_that_processes_cannot_share_is_an_error(
    script, tmp_path, flags, monkeypatch, capsys
):
    monkeypatch.setattr("ijepa.distributed.num_processes", lambda: 2)
    assert script.main([*flags, "--batch-size", "11", "--output-dir", str(tmp_path)]) == 1
    assert "2 processes cannot share a batch of 11" in capsys.readouterr().err


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "39"], "too few images for batches of 39: 48, 10 of them held out"),
        (["--dataset", "/no/such"], "no such folder"),
        (["--device", "tpu"], "device 'tpu' is not available"),
        (["--lr", "1e9"], "the loss is no longer a number after 3 updates"),
        (["--resume"], "there is no run in"),
    ],
)
def test_a_mistake_of_the_user_is_two_lines_and_exit_code_1(
    script, tmp_path, flags, capsys, change, message
):
    assert script.main([*flags, *change, "--output-dir", str(tmp_path)]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_images_are_reported_together_and_large_photos_are_none_of_them(
    script, tmp_path, flags, make_image_folder, capsys
):
    folder = make_image_folder({"a": 20, "b": 20})
    for name in ("a", "b"):
        (folder / name / "bad.jpg").write_bytes(b"x")
    (folder / "a" / "large.pgm").write_bytes(b"P5 12000 9000 255\n")
    changes = ["--dataset", str(folder), "--batch-size", "8", "--output-dir", str(tmp_path)]
    assert script.main([*flags, *changes]) == 1
    error, _ = capsys.readouterr().err.splitlines()
    assert error.startswith("error: cannot read 2 of 43 images: ")
    assert "a/bad.jpg'; " in error
    assert error.endswith("b/bad.jpg'")
    for name in ("a/bad.jpg", "b/bad.jpg", "a/large.pgm"):
        (folder / name).unlink()
    for name in ("a/001.png", "b/002.png"):  # the headers are valid
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    assert script.main([*flags, *changes]) == 1
    error, _ = capsys.readouterr().err.splitlines()
    assert error.startswith("error: cannot read 2 of 40 images: ")
    assert "a/001.png'; " in error
    assert error.endswith("b/002.png'")


def test_debug_shows_where_an_error_comes_from(script, tmp_path):
    with pytest.raises(UserError):
        script.main(["--debug", "--device", "tpu", "--output-dir", str(tmp_path)])


def test_the_home_folder_is_expanded(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = script.parse_arguments(["--output-dir=~/a", "--data-dir=~/b", "--init-from=~/c"])
    assert [args.output_dir, args.data_dir, args.init_from] == [tmp_path / one for one in "abc"]
    (tmp_path / "few").mkdir()
    with pytest.raises(UserError, match="images"):
        script.load_images("~/few", tmp_path, 8)


def test_an_output_folder_that_is_a_file_is_told_before_training(script, tmp_path, flags, capsys):
    (tmp_path / "file").write_text("")
    assert script.main([*flags, "--output-dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'} is a file")


def test_an_argument_that_is_not_utf_8_is_wrong_usage(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--dataset", os.fsdecode(b"in\xff")])
    assert stopped.value.code == 2
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        *(["--epochs", "0"], ["--batch-size", "-3"], ["--lr", "-1"], ["--lr", "nan"]),
        *(["--seed", "-1"], ["--seed", "99999999999999999999"], ["--embed-dim", "100"]),
        *(["--batch-size", "1"], ["--num-views", "1"], ["--num-views", "2", "--recipe", "paper"]),
    ],
)
def test_wrong_usage_is_exit_code_2(script, wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(wrong)
    assert stopped.value.code == 2
    assert f"argument {wrong[0]}" in capsys.readouterr().err


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
