"""Files that appear whole or not at all, their fingerprints, and caches that notice damage."""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ijepa.errors import UserError

TEMPORARY = ".ijepa-tmp"
"""Ending of the names of unfinished files; only a killed run leaves one behind."""
LOCK = ".ijepa-lock"
SEAL_BYTES = hashlib.sha256().digest_size


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
        # torch.save hides the error of a full disk behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def cannot_write(place: Path | str, error: OSError) -> UserError:
    """The user's error for a file that could not be written."""
    return UserError(
        f"cannot write {place}: {error.strerror or error}",
        hint="check that the folder exists, is writable and has space left",
    )


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it; what a killed run left unfinished is removed.

    The lock is the kernel's and ends with the process that holds it, however that ends; the file
    stands for it and names the holder.

    Raises:
        UserError: If it is a file, cannot be made or written, or another run holds it.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}",
            hint="give a folder that can be written",
        ) from error
    try:
        remove_leftovers(folder)
        yield
    finally:
        with suppress(OSError):  # the disk may be gone
            path.unlink()
        os.close(lock)


def take_lock(path: Path) -> int:
    """Lock a file and write this process's number into it; closing what is returned unlocks it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file since it was opened here.
            if os.fstat(lock).st_nlink:
                os.truncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {os.uname().nodename}".encode())
                return lock
        except BlockingIOError as error:
            holder = os.read(lock, 200).decode(errors="replace")
            os.close(lock)
            raise UserError(
                f"another run ({holder}) is writing to {path.parent}",
                hint="wait until it ends, or give another --output-dir",
            ) from error
        except OSError:
            path.unlink(missing_ok=True)
            os.close(lock)
            raise
        os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files of dead runs in an output folder."""
    for place in (folder, *folder.glob(".cache/*"), folder / "hf"):
        for leftover in place.glob(f".*{TEMPORARY}"):
            with suppress(OSError):  # another user's
                leftover.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_sealed(path: Path, content: bytes) -> None:
    """Write bytes below a checksum (32 bytes) over them and their place.

    Raises:
        UserError: As `write_atomically`.
    """
    write_atomically(path, lambda file: file.write(seal(path, content) + content))


def read_sealed(path: Path, num_bytes: int) -> bytes | None:
    """What `write_sealed` wrote; None if there is no such file or it is damaged or moved."""
    try:
        if path.stat().st_size != SEAL_BYTES + num_bytes:
            return None
        stored = path.read_bytes()
    except OSError:
        return None
    content = stored[SEAL_BYTES:]
    return content if seal(path, content) == stored[:SEAL_BYTES] else None


def seal(path: Path, content: bytes) -> bytes:
    """SHA-256 of a content and its place, so that no file is taken for another."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}\n".encode() + content).digest()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
