"""Kill runs at random moments and in the middle of writes, then look at what the next run makes.

    python benchmarks/kills.py compare --kills 60
    python benchmarks/kills.py train --kills 60

A victim is killed after a random time, at a random operation on a file (before it is opened,
renamed or removed), or inside a write, by a limit on the size of its files; a fourth finds the disk
full at that size and must end with `error:` and `hint:`. After each one every file under its final
name must be whole. Up to four victims in a row share a folder and a cache. Then an undisturbed run
must end well, leave nothing unfinished, embed no image again beyond a chunk per victim and encoder,
and give the numbers of a run that was never disturbed. Exit code 1 if anything is lost.
"""

import argparse
import csv
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from victims import COMPARE, TRAIN, print_table, run, some_images, tiny_models

from ijepa.encoders import FrozenEncoder

IMAGES = 300
KINDS = ("at a random moment", "at a file operation", "inside a write", "disk full")
OPERATIONS = ("os.rename", "os.remove", "os.mkdir")
NEW, WRITES = os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_RDWR


def last_line(path):
    """Raise an error unless a text is whole."""
    assert path.read_bytes().endswith((b"\n", b"</html>")), "its last line is cut"


READERS = {
    ".png": lambda path: Image.open(path).verify(),
    ".npz": lambda path: dict(np.load(path, allow_pickle=False)),
    ".json": lambda path: json.loads(path.read_text()),
    ".pt": lambda path: torch.load(path, weights_only=True),
    **dict.fromkeys((".html", ".csv", ".md"), last_line),
}


def result(folder):
    """What a run made: everything but times, rates and the hashes of files with them."""
    kinds = (".png", ".npz", ".safetensors")
    paths = [*folder.glob("*"), *folder.glob("hf/*")]
    made = {path.name: path.read_bytes() for path in paths if path.suffix in kinds}
    if (path := folder / "metrics.json").exists():
        made["metrics"] = json.loads(path.read_text())
        del made["metrics"]["run"]["seconds"], made["metrics"]["artifacts"]
        for model in made["metrics"]["models"].values():
            del model["images_per_second"], model["from_cache"]
    if (path := folder / "checkpoint_latest.pt").exists():
        for which, tensors in torch.load(path, weights_only=True)["weights"].items():
            made |= {f"{which} {name}": value.numpy().tobytes() for name, value in tensors.items()}
        rows = csv.DictReader((folder / "training_log.csv").read_text().splitlines())
        made["log"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    return made


class Campaign:
    """Victims in one folder: `out` is what they write, `cache` what they share."""

    def __init__(self, folder, what, seed):
        self.folder, self.rng, self.problems = folder, random.Random(seed), Counter()
        self.died = Counter()
        self.script = COMPARE if what == "compare" else TRAIN
        if what == "compare":
            tiny_models(folder)
            words = f"--offline --dataset digits --max-samples {IMAGES} --cache-dir cache "
            words += "--local-checkpoint tiny.pt --hf-model hf"
        else:
            some_images(folder / "images", 120, 32)
            words = "--dataset images --epochs 3 --batch-size 16 --embed-dim 64 --depth 1"
        self.arguments = [*words.split(), "--output-dir", "out"]
        began = time.monotonic()
        self.undisturbed()
        assert not self.problems, "an undisturbed run must end well"
        self.seconds = time.monotonic() - began
        self.reference = result(folder / "out")
        self.num_operations = (folder / "operations").stat().st_size
        self.largest = max(path.stat().st_size for path in (folder / "out").rglob("*"))

    def prepare(self, fatal=0, size=0, deadly=True):
        """In the victim: count operations on files and embedded images, and arm what ends it."""
        os.chdir(self.folder)
        encode, counted = FrozenEncoder.encode, os.open("work", NEW | os.O_APPEND)
        counter = os.open("operations", NEW | os.O_TRUNC)
        count = 0

        def noted(encoder, pixels):
            os.write(counted, f"{encoder.name} {len(pixels)}\n".encode())
            return encode(encoder, pixels)

        def watch(event, arguments):
            nonlocal count
            if event in OPERATIONS or (event == "open" and (arguments[2] or 0) & WRITES):
                os.write(counter, b".")
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        FrozenEncoder.encode = noted
        sys.addaudithook(watch)
        if size:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)

    def undisturbed(self):
        """A run to the end."""
        outcome = run(self.script, self.arguments, self.folder / "log", self.prepare)
        if outcome.code:
            self.problems[f"the next run ended with {outcome.code}: {outcome.said}"] += 1
            print(outcome.text[-2000:], file=sys.stderr)

    def disturb(self, kind):
        """One victim, and what it left."""
        fatal = self.rng.randint(1, self.num_operations * 2 // 3) if kind == KINDS[1] else 0
        share = self.rng.random() if kind in KINDS[2:] else None
        size = 0 if share is None else int(20_000 * (self.largest / 20_000) ** share)
        prepare = partial(self.prepare, fatal, size, kind != KINDS[3])
        after = self.rng.uniform(0, 2 / 3 * self.seconds) if kind == KINDS[0] else 300
        outcome = run(self.script, self.arguments, self.folder / "log", prepare, after)
        self.died[kind] += outcome.refused if kind == KINDS[3] else outcome.code < 0
        if (outcome.code > 0 and not outcome.refused) or outcome.seconds > 300:
            self.problems[f"a victim ended with {outcome.code}: {outcome.said}"] += 1
            print(outcome.text[-2000:], file=sys.stderr)
        self.check()

    def check(self, finished=False):
        """Every file under its final name is whole; at the end there is no other in `out`."""
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                try:
                    READERS.get(path.suffix, Path.stat)(path)
                except Exception as error:  # noqa: BLE001  whatever it is, the file is not whole
                    self.problems[f"{path.name} is not whole: {error!r}"] += 1
            elif finished and path.name.endswith("tmp") and "out" in path.parts:
                self.problems[f"{path.name} is left over"] += 1

    def embedded(self):
        """Images embedded so far by each encoder."""
        lines = (self.folder / "work").read_text().split("\n")[:-1]
        return Counter(name for name, count in map(str.split, lines) for _ in range(int(count)))

    def round(self):
        """Some victims in a row, then an undisturbed run; images embedded again per kill."""
        before, fresh = self.embedded(), self.rng.random() < 0.75  # else over finished results
        for name in ("out", "cache") if fresh else ():
            shutil.rmtree(self.folder / name, ignore_errors=True)
        victims = self.rng.choices(KINDS, k=self.rng.randint(1, 4))
        for kind in victims:
            self.disturb(kind)
        self.undisturbed()
        self.check(finished=True)
        made = result(self.folder / "out")
        for name in self.reference.keys() | made.keys():
            if self.reference.get(name) != made.get(name):
                self.problems[f"{name} differs"] += 1
        again = max((self.embedded() - before).values(), default=0)
        return (again - IMAGES * fresh) / len(victims)


def main():
    """Kill, look, run again; print what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["compare", "train"])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    most = 0.0
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), args.what, args.seed)
        while sum(campaign.died.values()) < args.kills:
            most = max(most, campaign.round())
            print(dict(campaign.died), dict(campaign.problems), file=sys.stderr, flush=True)
    counts = [campaign.died[kind] for kind in KINDS]
    again = f"{most:.0f} images" if args.what == "compare" else ""
    lost = sum(campaign.problems.values())
    print_table([("of", *KINDS, "again per kill", "lost"), (args.what, *counts, again, lost)])
    for problem, count in campaign.problems.items():
        print(f"{count} x {problem}")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
