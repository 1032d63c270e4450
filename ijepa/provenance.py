"""Where a result comes from: the command and the commit."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path


def command_line(script: str, words: Sequence[str]) -> str:
    """The line that runs a script with these arguments, in as many processes as now.

    Raises:
        ValueError: If an argument is not UTF-8, as no report could hold it.
    """
    if any("\udc80" <= character <= "\udcff" for word in words for character in word):
        raise ValueError(f"arguments must be UTF-8, got {words!a}")
    count = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", count] if count else ["python"]
    return shlex.join([*launcher, script, *words])


def git_commit() -> str | None:
    """The project's commit, marked when files differ from it; None without git or a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
