"""Models of the Hugging Face hub: fetched into the hub's own cache, or found there.

What a server sends may be anything: it is held to the hash it gave and kept to the cache.
"""

import hashlib
import re
import reprlib
from pathlib import Path
from typing import Any

from ijepa.errors import UserError
from ijepa.files import sha256

MODEL_FILES = [
    "config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
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
        if not offline:
            guard_downloads()
        folder = snapshot_download(source, allow_patterns=MODEL_FILES, local_files_only=offline)
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
            hint=f"check the network and run again (finished files are kept), {here}",
        ) from error
    return Path(folder), Path(folder).name


def guard_downloads() -> None:
    """Let the hub's client refuse answers that would make it write outside its cache."""
    from huggingface_hub import get_session, set_client_factory

    session = get_session()
    hooks = session.event_hooks
    if refuse_paths not in hooks["response"]:
        hooks["response"] = [*hooks["response"], refuse_paths]
        make = type(session)
        set_client_factory(lambda: make(event_hooks=hooks, follow_redirects=True, timeout=None))


def refuse_paths(response: Any) -> None:
    """Raise UserError for an answer that leads away: the client makes paths of hash and commit."""
    for name in ("ETag", "X-Linked-ETag", "X-Repo-Commit"):
        value = response.headers.get(name, "").removeprefix("W/").strip('"')
        if ".." in value or value.startswith("/"):
            raise UserError(
                f"the hub's answer has no valid {name}: {reprlib.repr(value)}",
                hint="check the network and HF_ENDPOINT, or pass a local directory to --hf-model",
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
    if blob.parent.name != "blobs":
        return
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = sha256(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):  # Git's name of a small file
        content = blob.read_bytes()
        head = f"blob {len(content)}\0".encode()
        found = hashlib.sha1(head + content, usedforsecurity=False).hexdigest()
    else:
        return
    if found != blob.name:
        raise UserError(
            f"the download of {file.name} is damaged: it does not have the hash the hub gave",
            hint=f"delete {blob} and run again to download it",
        )
