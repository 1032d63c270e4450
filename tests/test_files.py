import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ijepa.errors import UserError
from ijepa.files import LOCK, TEMPORARY, own_folder, write_atomically, write_text


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError, RuntimeError])
def test_a_failure_while_writing_stays_what_it_is_and_changes_no_file(tmp_path, failure):
    path = tmp_path / "data.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise failure

    with pytest.raises(failure):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_that_torch_hides_while_saving_is_still_ctrl_c(tmp_path):
    def write(_):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")  # as torch.save on the way out

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "state.pt", write)
    assert not list(tmp_path.iterdir())


def test_files_get_the_rights_that_the_mask_of_the_process_gives(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "ours", "")
    finally:
        assert os.umask(old) == 0o027
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o640


def test_what_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, words in (("file/inner", r"cannot write .*file/inner"), ("folder", "Is a directory")):
        with pytest.raises(UserError, match=words):
            write_text(tmp_path / name, "")
    for name, words in (("file", "is a file"), ("file/inner", "cannot write to")):
        with pytest.raises(UserError, match=words), own_folder(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_disk_that_fills_up_inside_torch_save_is_a_user_error(tmp_path):
    path, limit = tmp_path / "weights.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*weights\.pt: File too large"):
            write_atomically(path, lambda file: torch.save(torch.zeros(100_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from ijepa.files import own_folder

with own_folder(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_with_the_name_of_the_lock_until_the_first_is_dead(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match="another run") as caught, own_folder(tmp_path):
            pass
        assert str(tmp_path / LOCK) in caught.value.hint
        with own_folder(tmp_path / "other"):
            pass
        holder.kill()
    with own_folder(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_locked_by_the_existence_of_the_file(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for _ in range(2):
        with own_folder(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(str(os.getpid()))
            with pytest.raises(UserError, match="another run"), own_folder(tmp_path):
                pass
            assert (tmp_path / LOCK).exists()
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_and_only_unfinished_files_of_dead_runs_are_removed(tmp_path):
    folder = tmp_path / "a" / "b"
    with own_folder(folder):
        assert LOCK in [path.name for path in folder.iterdir()]
    kept = [folder / ".mine.tmp", folder / "sub" / f".x{TEMPORARY}", folder / f"x{TEMPORARY}"]
    gone = [place / f".metrics.json.0123{TEMPORARY}" for place in (folder, folder / "hf")]
    for path in (*kept, *gone):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with own_folder(folder):
        pass
    assert {path for path in folder.rglob("*") if path.is_file()} == {*kept}
