import csv
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import train_ijepa as script
from PIL import Image

from ijepa import errors
from ijepa.checkpoint import load_checkpoint
from ijepa.data import load_split
from ijepa.errors import UserError
from ijepa.runs import LOG

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_ijepa.py"
EPOCHS = 3
LONGER = ("--epochs", str(EPOCHS + 2))


@pytest.fixture(autouse=True, scope="module")
def restored_signals():
    """The script takes over these signals for good: it expects to be a process of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
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
def train(flags):
    """Run the script with these flags and others; its exit code."""
    return lambda output, *more: script.main([*flags, *more, "--output-dir", str(output)])


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "new" / "folder"
    assert train(output) == 0
    return output


@pytest.fixture
def signal_after(monkeypatch):
    """Send signals to the script, which runs in this process, when it reports an epoch."""

    def signal_after(epoch, *numbers):
        write = sys.stderr.write

        def watched(text):
            write(text)
            for number in numbers if text.startswith(f"epoch={epoch} ") else ():
                os.kill(os.getpid(), number)

        monkeypatch.setattr(sys.stderr, "write", watched)

    return signal_after


def contents(output):
    return {path: path.read_bytes() for path in output.rglob("*.*")}


def weights(output, which="target"):
    return load_checkpoint(output / "checkpoint_latest.pt", which).state_dict


def assert_same_run(one, other):
    """Weights and log of two folders are equal, times apart."""
    for which in ("target", "context"):
        torch.testing.assert_close(weights(one, which), weights(other, which), atol=0, rtol=0)
    for first, second in zip(read_log(one), read_log(other), strict=True):
        assert {**first, "seconds": ""} == {**second, "seconds": ""}


def read_log(output):
    with (output / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def error_of(capsys):
    """The two lines of a mistake."""
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert [line.split()[0] for line in lines] == ["error:", "hint:"]
    return "\n".join(lines)


def test_a_run_leaves_its_state_a_checkpoint_and_a_log_with_a_row_for_each_epoch(finished):
    assert {path.relative_to(finished).as_posix() for path in finished.rglob("*.*")} == {
        *("checkpoint_latest.pt", "state.pt", "state_previous.pt"),
        *("training_curves.png", "training_log.csv"),
        *("hf/config.json", "hf/model.safetensors", "hf/preprocessor_config.json"),
    }
    exported = safetensors.torch.load_file(finished / "hf" / "model.safetensors")
    for which in ("target", "context"):
        same = torch.equal(exported["layernorm.weight"], weights(finished, which)["norm.weight"])
        assert same is (which == "target")
    rows = read_log(finished)
    assert list(rows[0]) == [
        *("epoch", "loss", "matching_loss", "lr", "momentum", "weight_decay", "seconds"),
        *("heldout_precision_at_5", "effective_rank", "target_variance"),
    ]
    values = np.array([[float(value) for value in row.values()] for row in rows])
    assert values[:, 0].tolist() == list(range(1, EPOCHS + 1))
    assert np.isfinite(values).all()
    assert values[-1, 1] < values[0, 1]


def test_the_checkpoint_tells_how_it_was_made(finished, folder):
    checkpoint = load_checkpoint(finished / "checkpoint_latest.pt")
    assert (checkpoint.epochs, checkpoint.weights) == (EPOCHS, "target")
    assert (checkpoint.config.embed_dim, checkpoint.config.depth) == (64, 1)
    assert (checkpoint.mean, checkpoint.std) == ((0.5,) * 3, (0.5,) * 3)
    training = checkpoint.training
    expected = {"dataset": str(folder), "num_images": 38, "planned_epochs": EPOCHS}
    expected |= {"device": "cpu", "dtype": "float32"}
    assert {name: training[name] for name in expected} == expected
    assert training["settings"]["batch_size"] == 12
    assert training["command"].startswith("python scripts/train_ijepa.py --dataset ")
    assert training["command"].endswith(str(finished))
    assert training["seconds"] > 0


def test_held_out_images_play_no_part_in_training(folder, tmp_path):
    for dataset, batch_size, sizes in ((str(folder), 12, (38, 10)), ("digits", 36, (1618, 179))):
        parts = script.load_images(dataset, tmp_path, batch_size)
        assert {part.images.shape[1:] for part in parts} == {(3, 32, 32)}
        rest, held_out = ({image.numpy().tobytes() for image in part.images} for part in parts)
        assert (len(rest), len(held_out)) == sizes
        assert not rest & held_out
        assert np.ptp(np.bincount(parts[1].labels)) <= 1
    digits = load_split("digits", tmp_path, "train", offline=True).images
    assert rest | held_out == {image.numpy().tobytes() for image in digits}


def test_images_without_classes_need_none(train, tmp_path, make_image_folder, capsys):
    """Of 24 images 10 are held out; the smallest batch that a loss of pairs can have."""
    images = make_image_folder({"2024/may": 24})
    for name in ("__MACOSX/._001.png", "docs/a.pdf"):  # no classes
        (images / name).parent.mkdir()
        (images / name).touch()
    flags = ["--dataset", str(images), "--batch-size", "2", "--epochs", "1"]
    assert train(tmp_path, *flags) == 0
    assert "no P@5" in capsys.readouterr().err
    (row,) = read_log(tmp_path)
    assert row["heldout_precision_at_5"] == ""
    assert float(row["effective_rank"]) > 1
    assert float(row["target_variance"]) > 0
    assert (tmp_path / "training_curves.png").exists()


@pytest.mark.parametrize("other", ["test/all", "test/a", "val"])
@pytest.mark.parametrize("own", ["train/all", "train"])
def test_only_the_split_train_is_used_without_classes_too(make_image_folder, tmp_path, own, other):
    folder = make_image_folder({own: 30, other: 12})
    training, held_out = script.load_images(str(folder), tmp_path, 2)
    assert (len(training) + len(held_out), training.classes) == (30, ())
    assert "only the split train is used" in training.notes
    (folder / "labels.csv").touch()
    training, _ = script.load_images(str(folder), tmp_path, 2)
    assert training.notes[0].endswith(": 1 file outside the splits (1 .csv)")
    (folder / "train").rename(folder / "valid")  # without train all of them are used
    assert sum(map(len, script.load_images(str(folder), tmp_path, 2))) == 42


def test_a_finished_run_is_found_and_left_alone(train, finished, capsys):
    before = contents(finished)
    assert train(finished) == 0
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
        (LONGER, "it has had 9"),  # the learning rate has fallen
        (["--init-from", "elsewhere"], "init_from None, not elsewhere"),
        (None, "38 images of"),
    ],
)
def test_other_settings_are_refused(train, finished, make_image_folder, capsys, change, named):
    if not change:
        other = make_image_folder({"cat": 24, "dog": 24})
        Image.new("RGB", (9, 9)).save(other / "cat" / "000.png")
        change = ["--dataset", str(other)]
    before = contents(finished)
    assert train(finished, *change) == 1
    error = error_of(capsys)
    assert error.startswith(f"error: the run in {finished} has other settings: ")
    assert named in error
    assert contents(finished) == before


def test_a_terminated_run_goes_on_to_the_same_end(train, tmp_path, finished, signal_after, capfd):
    signal_after(2, signal.SIGTERM)
    assert train(tmp_path) == 130
    said = capfd.readouterr().err
    assert said.endswith("stopped and saved after 6 updates\n")
    assert "press Ctrl-C again" in said
    assert "img/s" not in said  # no progress bar where no terminal shows it
    assert "held-out P@5 can reach 80%" in said
    assert load_checkpoint(tmp_path / "checkpoint_latest.pt").epochs == 2
    assert (tmp_path / "training_curves.png").exists()

    assert train(tmp_path) == 0
    assert f"resuming {tmp_path} after 6 updates\nepoch=3 " in capfd.readouterr().err
    assert_same_run(tmp_path, finished)


def test_a_signal_that_the_reader_of_messages_got_too_saves_the_state(tmp_path, flags):
    """As Ctrl-C with `2>&1 | tee log`."""
    read_end, write_end = os.pipe()
    words = [sys.executable, str(SCRIPT), *flags, "--epochs", "999", "--output-dir", str(tmp_path)]
    with subprocess.Popen(words, stderr=write_end, stdout=write_end) as run:
        os.close(write_end)
        os.read(read_end, 1)  # the first message follows the loading of the images
        while not (tmp_path / "state.pt").exists() and run.poll() is None:
            time.sleep(0.05)
        os.close(read_end)
        run.send_signal(signal.SIGINT)
    assert run.returncode == 130


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_state(train, tmp_path, signal_after, capfd):
    signal_after(2, signal.SIGINT, signal.SIGINT)
    assert train(tmp_path) == 130
    said = capfd.readouterr().err
    assert "press Ctrl-C again" in said
    assert said.endswith("stopped; a state saved before is kept\n")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["state"]["step"] == 6


def test_the_checkpoint_of_another_run_is_not_replaced(train, tmp_path, finished, capsys):
    shutil.copy(finished / "checkpoint_latest.pt", tmp_path)
    before = contents(tmp_path)
    for other in (["--seed", "1"], ["--dataset", "digits"]):
        assert train(tmp_path, *other) == 1
        assert "is the checkpoint of another run" in error_of(capsys)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [[1], {"model": {}}])
def test_a_state_of_another_program_is_a_user_error(train, tmp_path, capsys, content):
    torch.save(content, tmp_path / "state.pt")
    assert train(tmp_path) == 1
    assert "state.pt is no state of a training run" in error_of(capsys)


def test_a_damaged_state_is_a_user_error(train, tmp_path, capsys):
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    assert train(tmp_path) == 1
    assert "state.pt is not a readable PyTorch file" in error_of(capsys)
    assert (tmp_path / "state.pt").read_bytes() == b"PK\x03\x04 cut off"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PK"), Path.unlink])
def test_a_lost_state_falls_back_to_the_one_before(train, finished, tmp_path, capsys, damage):
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder / "state.pt")
    assert train(folder) == 0
    assert "after 6 updates" in capsys.readouterr().err
    assert_same_run(folder, finished)
    for name in ("state.pt", "state_previous.pt"):  # the damaged one did not replace the good one
        assert torch.load(folder / name, weights_only=True)["state"]["step"] in (6, 9)


def test_a_run_made_longer_in_time_is_the_long_run(train, tmp_path, finished):
    straight, changed = tmp_path / "straight", shutil.copytree(finished, tmp_path / "changed")
    assert train(straight, *LONGER) == 0
    (changed / "state_previous.pt").replace(changed / "state.pt")  # 6 of 9 updates, decay after 7
    assert train(changed, *LONGER, "--resume") == 0
    assert_same_run(straight, changed)


def test_a_run_goes_on_from_a_finished_one_and_resumes_without_it(train, finished, tmp_path):
    start = shutil.copytree(finished, tmp_path / "start")
    log = start / "training_log.csv"
    longer = (f"{line},7\n" for line in log.read_text().splitlines())  # one column more
    log.write_text("".join(longer))
    before = contents(start)
    straight = tmp_path / "straight"
    assert train(straight, *LONGER, "--init-from", str(start)) == 0
    assert contents(start) == before
    rows = read_log(straight)
    assert [float(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 3))
    for row, earlier in zip(rows, read_log(finished), strict=False):
        assert [*map(float, row.values())] == [*map(float, earlier.values())]
    # The networks are trained ones: from scratch the first epoch has a larger loss.
    assert float(rows[EPOCHS]["loss"]) < float(rows[0]["loss"])
    ended, went_on = (
        load_checkpoint(path / "checkpoint_latest.pt").training for path in (finished, straight)
    )
    assert went_on["epochs"] == went_on["planned_epochs"] == EPOCHS + 2
    (earlier,) = went_on["earlier_runs"]
    for name in ("epochs", "command", "seconds", "git_commit", "dtype", "recipe"):
        assert earlier[name] == ended[name]
    assert ended["earlier_runs"] == []

    stopped = shutil.copytree(straight, tmp_path / "stopped")
    (stopped / "state_previous.pt").replace(stopped / "state.pt")
    shutil.rmtree(start)
    assert train(stopped, *LONGER, "--init-from", str(start)) == 0
    assert_same_run(straight, stopped)


def spoil_predictor(path):
    content = torch.load(path, weights_only=True)
    content["weights"]["predictor"]["mask_token"] = torch.ones(1, 1, 5)
    torch.save(content, path)


def forget_epochs(path):
    weights = torch.load(path, weights_only=True)["weights"]
    names = {"target": "target_encoder", "context": "encoder"}
    torch.save({ours: weights[which] for which, ours in names.items()}, path)


@pytest.mark.parametrize(
    "case",
    [
        (shutil.rmtree, [], "no checkpoint at "),
        (lambda run: (run / LOG).unlink(), [], "cannot read the log"),
        (lambda run: (run / LOG).write_text("epoch\nx\n"), [], "cannot read"),
        (lambda run: (run / LOG).write_text("epoch\n1\n"), [], "cannot read"),
        (lambda run: (run / LOG).write_text("epoch,effective_rank\n1,2\n"), [], "has 1 epoch,"),
        (lambda folder: spoil_predictor(folder / "checkpoint_latest.pt"), [], "does not fit"),
        (lambda folder: forget_epochs(folder / "checkpoint_latest.pt"), [], "does not record its"),
        (lambda _: None, ["--epochs", str(EPOCHS)], "has had 3 epochs"),
        (lambda _: None, ["--depth", "2"], "depth=1"),
    ],
)
def test_a_start_that_does_not_fit_is_an_error(train, finished, tmp_path, capsys, case):
    spoil, change, message = case
    folder = shutil.copytree(finished, tmp_path / "start")
    spoil(folder)
    assert train(tmp_path / "run", *LONGER, *change, "--init-from", str(folder)) == 1
    assert message in error_of(capsys)


def test_two_processes_train_the_model_of_one(tmp_path, flags, finished, torchrun, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "that of a notebook")  # which exists in the notebook alone
    result = torchrun(SCRIPT, *flags, "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "warn" not in result.stderr.lower()
    assert result.stderr.count("epoch=1 ") == 1
    for one, other in zip(read_log(tmp_path), read_log(finished), strict=True):
        for name in ("loss", "matching_loss"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-4)
    torch.testing.assert_close(weights(tmp_path), weights(finished), atol=2e-3, rtol=0)
    training = load_checkpoint(tmp_path / "checkpoint_latest.pt").training
    assert training["processes"] == 2
    expected = "torchrun --nproc-per-node 2 scripts/train_ijepa.py --"
    assert training["command"].startswith(expected)


def test_a_batch_that_processes_cannot_share_is_an_error(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert train(tmp_path, "--batch-size", "11") == 1
    assert "error: 2 processes cannot share a batch of 11" in error_of(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "39"], "batches of 39: there are 48, and 10 must be held out"),
        (["--dataset", "/no/such"], "no such folder"),
        (["--device", "tpu"], "device 'tpu' is not available"),
        (["--lr", "1e9"], "the loss is no longer a number after 3 updates"),
        (["--resume"], "there is no run in"),
        (["--batch-size", "256"], "use at least 284 images"),  # 28 of which will be held out
    ],
)
def test_a_mistake_is_two_lines_and_exit_code_1(train, tmp_path, capsys, change, message):
    assert train(tmp_path, *change) == 1
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_images_are_reported_together(train, tmp_path, make_image_folder, capsys):
    folder = make_image_folder({"a": 20, "b": 20})
    for name in ("a/bad.jpg", "b/bad.jpg"):
        (folder / name).write_bytes(b"x")
    for name in ("a/001.png", "b/002.png"):  # the headers are valid
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    assert train(tmp_path, "--dataset", str(folder), "--batch-size", "8") == 1
    names = ".*".join(["a/001.png'", "a/bad.jpg'", "b/002.png'", "b/bad.jpg'"])
    assert re.match(f"error: cannot read 4 of 42 images: .*{names}\nhint: ", error_of(capsys))


def test_splits_that_are_not_used_and_odd_pixels_are_told(train, make_image_folder, capsys):
    """The run lies in the folder of its images, and is none of them when it is repeated."""
    folder = make_image_folder({"train/a": 20, "train/b": 20, "test/a": 2, "test/b": 2})
    frames = [Image.new("L", (8, 8), level) for level in (0, 90)]
    frames[0].save(folder / "train" / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    assert train(folder / "run", "--dataset", str(folder), "--batch-size", "8") == 0
    said = capsys.readouterr().err.splitlines()
    assert "only the split train is used" in said
    assert any(line.endswith("P@5 by 2 classes") for line in said)
    assert any(line.startswith("several frames, of which one is used") for line in said)
    assert train(folder / "run", "--dataset", str(folder), "--batch-size", "8") == 0
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "run")
    capsys.readouterr()
    assert train(folder / "run", "--dataset", str(folder), "--batch-size", "8") == 0
    assert "P@5 by 2 classes" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        script.main(["--debug", "--output-dir", str(tmp_path / "file")])


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = script.parse_arguments(["--output-dir=~/a", "--data-dir=~/b", "--init-from=~/c"])
    assert [args.output_dir, args.data_dir, args.init_from] == [tmp_path / one for one in "abc"]
    (tmp_path / "few").mkdir()
    with pytest.raises(UserError, match="images"):
        script.load_images("~/few", tmp_path, 8)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_this_project_or_none(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    copy = tmp_path / "project" / "ijepa" / "errors.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(errors.__file__, copy)
    find = runpy.run_path(str(copy))["git_commit"]
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for folder, expected in ((tmp_path, r"None"), (copy.parents[1], r"[0-9a-f]{40}")):
        for words in (["init"], [*author, "commit", "--allow-empty", "-m", "x"]):
            subprocess.run(["git", *words, "-q"], cwd=folder, check=True)
        assert re.fullmatch(expected, str(find()))
    monkeypatch.setenv("PATH", "")
    assert find() is None
