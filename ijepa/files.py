"""Files that appear whole or not at all, their fingerprints, and archives checked for damage."""

import errno
import hashlib
import os
import pickle
import secrets
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ijepa.errors import UserError

TEMPORARY = ".ijepa-tmp"
"""Ending of the names of unfinished files; only a killed run leaves one behind."""
LOCK = ".ijepa-lock"
# What zipfile, NumPy, torch and transformers were seen to raise on damaged, cut and foreign files,
# besides errors of their own.
DAMAGED = (OSError, EOFError, ValueError, LookupError, SyntaxError, RuntimeError, TypeError)
DAMAGED += (AttributeError, ArithmeticError, AssertionError, ImportError)
DAMAGED += (zlib.error, zipfile.BadZipFile, pickle.UnpicklingError)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Raises:
        UserError: If the folder cannot be written or the disk is full; `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk and Ctrl-C behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from error
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"cannot write {path}: {cause.strerror or cause}",
            hint="check that the folder exists, is writable and has space left, or choose another",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a folder, keep other runs out of it, and remove what a killed run left unfinished.

    Raises:
        UserError: If it cannot be made or written, or another run holds it; or if the working
            directory is gone, without which libraries cannot be loaded.
    """
    path = folder / LOCK
    try:
        Path.cwd()
    except FileNotFoundError as error:
        problem = "the working directory has been deleted"
        raise UserError(problem, hint="change to a folder that exists") from error
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file", hint="give another --output-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
    except Timeout as error:
        raise UserError(
            f"another run is writing to {folder}",
            hint="wait until it ends, or give another --output-dir; if none is running, delete "
            f"{path}",
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}",
            hint=f"give a folder that can be written; the file that could not be locked is {path}",
        ) from error
    try:
        for leftover in (*folder.glob(f".*{TEMPORARY}"), *folder.glob(f"hf/.*{TEMPORARY}")):
            with suppress(OSError):  # another user's
                leftover.unlink()
        yield
    finally:
        with suppress(OSError):  # the disk may be gone
            path.unlink()
        lock.release()


def take_lock(path: Path) -> BaseFileLock:
    """A held lock: the kernel's, or the file's existence on file systems without such locks.

    Raises:
        Timeout: If another process holds it.
        OSError: If the file cannot be made or written.
    """
    was_there = path.exists()
    lock: BaseFileLock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOTSUP, errno.ENOLCK):
            raise
        if not was_there:  # else it may be the soft lock of another run
            path.unlink(missing_ok=True)
        lock = SoftFileLock(path, timeout=0)
        lock.acquire()
    return lock


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pointer_hint(path: Path) -> str | None:
    """What to do about a file that only points to the real one in Git LFS; None for others."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            return "it only points to the file in Git LFS: run git lfs pull"
    return None


def check_archive(path: Path) -> None:
    """Raise BadZipFile or another error of `DAMAGED` unless all parts match their checksums."""
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise zipfile.BadZipFile(f"{broken} does not match its checksum")


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the named arrays that an `.npz` file has; pickled objects are refused.

    Raises:
        ValueError: If it is missing, damaged or no such archive.
    """
    try:
        check_archive(path)  # before NumPy believes any number in it
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays}
    except DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from error
