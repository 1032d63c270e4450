"""Models of the Hugging Face hub: fetched into the hub's own cache, or found there.

What a server sends may be anything: it is held to the hash it gave and kept to the cache.
"""

import hashlib
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ijepa.errors import UserError

JSON_FILES = ["config.json", "preprocessor_config.json", "*.safetensors.index.json"]
WEIGHTS = "*.safetensors"
SUBFOLDERS = "*/*"
LARGEST_ANSWERS = 2**24
"""Bytes of all that is read from a hub for one model beside its weights: lists and JSON files."""
PIECE = 2**16
"""Bytes that the client hands on at once; what it holds when a download breaks off is lost."""
UNTRUE = "check the network and HF_ENDPOINT, or pass a local directory to --hf-model"
# What the hub's client and transformers raise on damaged answers and files, found by damaging them.
BAD_FILES = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
BAD_MODELS = (RuntimeError, ImportError, AssertionError)


def resolve_model(source: str, offline: bool) -> tuple[Path, str | None]:
    """A directory as it is; else the hub's files in the local cache and their commit."""
    from huggingface_hub import errors, snapshot_download

    here = "or pass a local directory to --hf-model"
    try:
        if Path(source).is_dir():
            return Path(source), None
        if offline:
            wanted = [*JSON_FILES, WEIGHTS]
            folder = snapshot_download(
                source, allow_patterns=wanted, ignore_patterns=SUBFOLDERS, local_files_only=True
            )
        else:
            folder = download(source)
    except errors.HFValidationError as error:
        raise UserError(
            f"{source!r} is neither a directory nor a hub id",
            hint="a hub id looks like facebook/ijepa_vith14_1k",
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"the hub model {source!r} is gated",
            hint=f"ask for access on its page and set HF_TOKEN, {here}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {source!r}",
            hint=f"check the spelling; if it is private set HF_TOKEN, {here}",
        ) from error
    # HTTPError is the base class of what the hub's HTTP client raises, lost connections included;
    # the others come with an answer that is no listing, such as a page to log in.
    except (errors.LocalEntryNotFoundError, errors.HTTPError, *BAD_FILES, *BAD_MODELS) as error:
        cause = error.__cause__ or error
        if offline or isinstance(cause, errors.OfflineModeIsEnabled):
            raise UserError(
                f"the hub model {source!r} is not, or not wholly, in the local cache",
                hint=f"run once with a network and without --offline or HF_HUB_OFFLINE, {here}",
            ) from error
        raise UserError(
            f"the hub model {source!r} could not be downloaded: {first_line(cause)}",
            hint=f"check network and disk and run again (it goes on where it stopped), {here}",
        ) from error
    return Path(folder), Path(folder).name


def download(source: str) -> str:
    """Bring a model's files into the hub's cache; returns their folder there."""
    from huggingface_hub import errors, get_cached_repo_tree, hf_hub_download, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    guard_downloads()
    folder = snapshot_download(source, allow_patterns=JSON_FILES, ignore_patterns=SUBFOLDERS)
    commit = Path(folder).name
    try:
        names = [file.path for file in get_cached_repo_tree(source, revision=commit)]
    except errors.CachedRepoTreeNotFoundError:
        return folder  # the hub is out of reach, and an older client filled the cache
    for name in filter_repo_objects(names, allow_patterns=WEIGHTS, ignore_patterns=SUBFOLDERS):
        if not Path(folder, name).exists():
            fetch(source, name, commit)
            hf_hub_download(source, name, revision=commit)  # finds it and links it
    return folder


def fetch(source: str, name: str, commit: str) -> None:
    """Put a file's content into the hub's cache, going on where an earlier run broke off.

    The hub's client goes on within a run but deletes what it did not finish. The unfinished file
    and its lock have the names that older clients gave them and that `hf cache prune` knows.

    Raises:
        UserError: If what came does not have the hash the hub gave.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    url = hf_hub_url(source, name, revision=commit)
    facts = get_hf_file_metadata(url, retry_on_errors=True)
    if not facts.etag or not facts.size:
        return  # the client copes or says why not
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    folder = repo_folder_name(repo_id=source, repo_type="model")
    blob, locks = cache / folder / "blobs" / facts.etag, cache / ".locks" / folder
    partial = blob.with_name(f"{blob.name}.incomplete")
    lock = locks / f"{facts.etag}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return  # by another run, while this one waited
        remove_others(partial, locks)
        complete(partial, url, facts.size)
        if not has_hash(partial, facts.etag):
            partial.unlink()
            raise UserError(
                f"the download of {name} is damaged: it does not have the hash the hub gave",
                hint=f"run again to begin it anew; if that does not help, {UNTRUE}",
            )
        partial.rename(blob)


def remove_others(partial: Path, locks: Path) -> None:
    """Delete a model's other unfinished files, such as those of its earlier versions."""
    from huggingface_hub.utils import WeakFileLock

    for other in partial.parent.glob("*.incomplete"):
        # Those with a second dot belong to one run of the client, which may be at work on them.
        if other != partial and "." not in other.stem:
            with suppress(OSError), WeakFileLock(locks / f"{other.stem}.lock", timeout=0.1):
                other.unlink()  # not reached while another run has the lock


def complete(partial: Path, url: str, size: int) -> None:
    """Append to a file what it lacks of `size` bytes."""
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = {**build_hf_headers(), "Range": f"bytes=0-{size - 1}"}
    with partial.open("ab") as file:
        if file.tell() > size:
            file.seek(0)
            file.truncate()
        try:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=headers,
                expected_size=size,
                displayed_filename=url.rpartition("/")[2],
            )
        except errors.HfHubHTTPError as error:
            if error.response.status_code == 416:
                partial.unlink()  # a server that cannot go on could never be asked for the whole
            raise
        file.flush()
        os.fsync(file.fileno())


def guard_downloads() -> None:
    """Let the hub's client refuse answers that lead it out of its cache or fill the memory."""
    from huggingface_hub import constants, get_session, set_client_factory

    # Xet is a second client: it heeds none of this, and takes names of files from the list.
    constants.HF_HUB_DISABLE_XET = True
    constants.DOWNLOAD_CHUNK_SIZE = PIECE
    session, rest = get_session(), Allowance(LARGEST_ANSWERS)

    def bound(response: Any) -> None:
        last = response.request.headers.get("Range", "").partition("-")[2]
        is_range = last and response.status_code in (200, 206)
        allowance = Allowance(int(last) + 1) if is_range else rest
        read = response.iter_bytes
        response.iter_bytes = lambda chunk_size=None: allowance.spend(read(chunk_size))

    make, request_hooks = type(session), session.event_hooks["request"]
    hooks = {"request": request_hooks, "response": [refuse_paths, bound]}
    set_client_factory(lambda: make(event_hooks=hooks, follow_redirects=True, timeout=None))


class Allowance:
    """How many bytes of a server's answers, counted after decompression, may be read."""

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit

    def spend(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The same chunks, as long as they are not too many.

        Raises:
            UserError: If they are.
        """
        for chunk in chunks:
            self.left -= len(chunk)
            if self.left < 0:
                raise UserError(
                    f"the hub sends more than {self.limit:,} bytes where less was asked for",
                    hint=UNTRUE,
                )
            yield chunk


def refuse_paths(response: Any) -> None:
    """Raise UserError for an answer that leads away: the client makes paths of hash and commit."""
    for name in ("ETag", "X-Linked-ETag", "X-Repo-Commit"):
        value = response.headers.get(name, "").lstrip("W/").strip('"')  # as the client does
        if ".." in value or value.startswith("/"):
            raise UserError(
                f"the hub's answer has no valid {name}: {reprlib.repr(value)}", hint=UNTRUE
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_blob(file: Path) -> None:
    """Compare a file of the hub's cache with the hash that is its name there.

    Raises:
        UserError: If it differs, by a broken disk or a server that sent something else.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and not has_hash(blob, blob.name):
        raise UserError(
            f"the download of {file.name} is damaged: it does not have the hash the hub gave",
            hint=f"delete {blob} and run again to download it",
        )


def has_hash(path: Path, name: str) -> bool:
    """Whether a file has the hash that is its name in the cache; names that are none always fit."""
    with path.open("rb") as file:
        if re.fullmatch(r"[0-9a-f]{64}", name):
            return hashlib.file_digest(file, "sha256").hexdigest() == name
        if re.fullmatch(r"[0-9a-f]{40}", name):  # Git's name of a small file
            head = f"blob {path.stat().st_size}\0".encode()
            digest = hashlib.sha1(head, usedforsecurity=False)
            return hashlib.file_digest(file, lambda: digest).hexdigest() == name
    return True
