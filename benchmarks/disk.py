"""Run out of disk at every point: full, over a limit, read-only, out of files.

    python benchmarks/disk.py compare --steps 25
    python benchmarks/disk.py train --steps 25

Needs Linux and the right to mount (root): the output folder lies on a small tmpfs that is filled
but for N bytes, N swept from nothing to what a run takes. The same sweep is made with a limit on
the size of a file (as a quota acts), with few files allowed, and with the n-th write, flush or
rename failing. Each run must end well or with `error:` and `hint:`, leave only whole files under
their own names and nothing unfinished, and the next run, with room again, must give the numbers of
an undisturbed one. Exit code 1 if anything is lost.
"""

import argparse
import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kills import Campaign, Comparison, Fatal, Training, reset
from victims import print_table, run


class Failing(Fatal):
    """The same layer; its operation fails like a full disk instead of killing the process."""

    def step(self, dying: Callable[[], object] = lambda: None) -> None:  # noqa: ARG002
        """One operation more."""
        self.count += 1
        if self.count == self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """A small file system of its own in the place of the output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Disk":
        reset(self.folder)
        self.folder.mkdir()
        self.mount("-t", "tmpfs", "-o", "size=32m,nr_inodes=1000", "tmpfs")
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", self.folder], check=True)

    def mount(self, *options: str) -> None:
        """Mount or mount again."""
        subprocess.run(["mount", *options, str(self.folder)], check=True)

    def room(self, free: int) -> None:
        """Fill it but for so many bytes, in pages."""
        filler = self.folder / ".filler"
        state = os.statvfs(self.folder)
        with filler.open("wb") as file:
            file.write(bytes(max(0, state.f_bavail * state.f_frsize - free)))

    def used(self) -> int:
        """Bytes that its files take."""
        state = os.statvfs(self.folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize


def starved(campaign: Campaign, prepare: Callable[[], object], seen: Counter) -> None:
    """A run that lacks something."""
    outcome = run(campaign.script, campaign.arguments, campaign.folder / "log", prepare=prepare)
    seen["runs"] += 1
    if outcome.code == 0:
        seen["ended well"] += 1
    elif outcome.refused:
        seen["refused"] += 1
    else:
        campaign.problems[f"ended with {outcome.code}: {outcome.said}"] += 1
        print(outcome.text[-3000:], file=sys.stderr)
    if (filler := campaign.output / ".filler").exists():
        filler.unlink()
    campaign.check(whole=True)


def recovered(campaign: Campaign, seen: Counter) -> None:
    """The next run, with room again."""
    made = campaign.finish(Fatal(0, campaign.folder))
    for name in campaign.differences(made):
        campaign.problems[f"{name} differs with room again"] += 1
    seen["recovered"] += 1


def limit_files(size: int) -> None:
    """Let no file grow beyond this size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def sweep(campaign: Campaign, steps: int) -> dict[str, Counter]:
    """Every kind of shortage, from nothing to enough; a full next run after every fourth."""
    output, kinds = campaign.output, {}
    sizes = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
    with Disk(output) as disk:
        campaign.finish(Fatal(0, campaign.folder))
        total = disk.used()
    shares = [step / steps for step in range(steps)]

    def tried(kind: str, shortage: Callable[[Disk, float], Callable[[], object]]) -> None:
        seen = kinds[kind] = Counter()
        for number, share in enumerate(shares):
            with Disk(output) as disk:
                prepare = shortage(disk, share)
                starved(campaign, prepare, seen)
                if number % 4 == 0:
                    disk.mount("-o", "remount,rw,size=32m,nr_inodes=1000")
                    recovered(campaign, seen)

    def full(disk: Disk, share: float) -> Callable[[], object]:
        disk.room(int(share * total))
        return campaign.enter

    def limited(_: Disk, share: float) -> Callable[[], object]:
        size = 4096 + int(share**2 * max(sizes))  # most files are small; what it says needs room
        return lambda: [campaign.enter(), limit_files(size)]

    def few(disk: Disk, share: float) -> Callable[[], object]:
        disk.mount("-o", f"remount,nr_inodes={2 + int(share * (len(sizes) + 6))}")
        return campaign.enter

    def failing(_: Disk, share: float) -> Callable[[], object]:
        layer = Failing(1 + int(share * campaign.num_operations), campaign.folder)
        return lambda: campaign.prepare(layer)

    tried("a full disk", full)
    tried("a limit on the size of a file", limited)
    tried("few files allowed", few)
    tried("the n-th write, flush or rename fails", failing)
    seen = kinds["a read-only disk"] = Counter()
    with Disk(output) as disk:
        disk.mount("-o", "remount,ro")
        starved(campaign, campaign.enter, seen)
        disk.mount("-o", "remount,rw")
        recovered(campaign, seen)
    return kinds


def main() -> int:
    """Sweep, and print what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["compare", "train"])
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="disk-"))
    campaign: Any = {"compare": Comparison, "train": Training}[args.what](scratch)
    kinds = sweep(campaign, args.steps)
    reset(scratch)
    columns = ("runs", "refused", "ended well", "recovered")
    rows = [(kind, *(seen[name] for name in columns)) for kind, seen in kinds.items()]
    print_table([("shortage", *columns), *rows])
    print(f"\n{sum(campaign.problems.values())} lost")
    for problem, count in campaign.problems.items():
        print(f"{count} x {problem}")
    return bool(campaign.problems)


if __name__ == "__main__":
    sys.exit(main())
