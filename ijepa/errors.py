"""What both scripts need before anything heavy: errors, arguments, the origin of a result."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class UserError(Exception):
    """A mistake the user can correct; scripts show it as two lines and exit with 1.

    Line breaks and control characters, which names from a file may hold, are escaped.

    Args:
        problem: What is wrong, with the offending value; lower case, without a period.
        hint: What to do about it.
    """

    def __init__(self, problem: str, *, hint: str) -> None:
        self.problem, self.hint = printable(problem), printable(hint)
        super().__init__(self.problem)


def printable(text: str) -> str:
    """One line of the first 1,000 characters, with those escaped that would move a cursor."""
    shown = text[:1000]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 class`, `2,000 classes`."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural}"


def nonempty(text: str) -> str:
    """Parse any text but an empty one, as an unset variable of the shell gives."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def home_path(text: str | Path) -> Path:
    """Parse a path; `~` is the home folder, and `~name` stays where there is no such user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  that of pathlib raises


def flag_path(text: str) -> Path:
    """Parse a path that is given with a flag: that of `home_path`, and not empty."""
    return home_path(nonempty(text))


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= low and (high is None or int(text) <= high):
            return int(text)
        limit = "" if high is None else f" to {high}"
        raise argparse.ArgumentTypeError(f"must be a whole number from {low}{limit}, got {text!r}")

    return parse


def is_first_process() -> bool:
    """Whether this is the only process, or the first one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def command_line(
    parser: argparse.ArgumentParser, script: str, arguments: Sequence[str] | None
) -> str:
    """The line that runs a script with these arguments, in as many processes as now.

    An argument that is not UTF-8, or not read as such, is wrong usage: no report could hold it.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if any("\udc80" <= character <= "\udcff" for word in words for character in word):
        locale = sys.getfilesystemencoding()
        how = "" if locale == "utf-8" else f" (read as {locale}: set PYTHONUTF8=1)"
        parser.error(f"arguments must be UTF-8{how}, got {words!a}")
    count = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", count] if count else ["python"]
    return shlex.join([*launcher, script, *words])


def git_commit() -> str | None:
    """The project's commit, marked when files differ from it; None without git or a checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    # An installed package may lie below the checkout of another project.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
