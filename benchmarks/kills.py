"""Kill runs at random moments and in the middle of writes, then look at what the next run makes.

    python benchmarks/kills.py compare --kills 100
    python benchmarks/kills.py train --kills 100

Half of the victims get SIGKILL after a random time, half from inside an operation on a file: a
write of which half has reached the disk, a flush, or a rename, just before or after. After each
kill every file that is there under its own name must be whole. The next run may be a victim, too:
up to four in a row. Then one that is left alone must end well, have removed what was left
unfinished, have computed again no more than a chunk for each kill (comparison) or what followed the
last saved state (training), and give the numbers of an undisturbed run: embeddings, figures and
weights bit for bit. Then two runs are started at once into one folder. Exit code 1 if anything is
lost.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from victims import COMPARE, TRAIN, print_table, run, start, tiny_models

from ijepa import embeddings
from ijepa.checkpoint import read_torch_file
from ijepa.files import LOCK, SEAL_BYTES, read_sealed

CHUNK = 8
IMAGES = 64


class Fatal:
    """Counts operations on files and dies in one of them."""

    def __init__(self, fatal: int, folder: Path) -> None:
        self.left, self.folder, self.count = fatal, folder, 0

    def install(self) -> None:
        """Put this layer between the program and its files."""
        self.open, self.fsync, self.replace = Path.open, os.fsync, os.replace
        Path.open = lambda path, *args, **kwargs: self.opened(path, *args, **kwargs)
        os.fsync = lambda descriptor: self.around(self.fsync, descriptor)
        os.replace = lambda old, new, **kwargs: self.around(self.replace, old, new, **kwargs)

    def step(self, dying: Callable[[], object] = lambda: None) -> None:
        """One operation more."""
        self.count += 1
        if self.count == self.left:
            dying()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, operation: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """An operation that may be the last, before or after it took place."""
        self.step()
        operation(*args, **kwargs)
        self.step()

    def opened(self, path: Path, *args: Any, **kwargs: Any) -> Any:
        """A file; one that is made gets torn writes."""
        file = self.open(path, *args, **kwargs)
        return Torn(file, self) if args[:1] == ("xb",) else file


class Torn:
    """A file whose last write reaches the disk by half."""

    def __init__(self, file: Any, layer: Fatal) -> None:
        self.file, self.layer = file, layer

    def write(self, content: Any) -> int:
        """Write, or write half and die."""
        half = memoryview(content).cast("B")[: memoryview(content).nbytes // 2]
        self.layer.step(lambda: [self.file.write(half), self.file.flush()])
        return self.file.write(content)

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Campaign:
    """What the two campaigns share: `output` is made by `arguments`, `check` knows its files."""

    script: Any
    arguments: list[object]

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        self.problems: Counter[str] = Counter()
        self.most_left = self.died = self.died_writing = 0
        self.most_again = 0.0
        began = time.monotonic()
        self.reference = self.finish(Fatal(0, folder))
        self.seconds = time.monotonic() - began
        self.num_operations = int((folder / "operations").read_text())

    def prepare(self, layer: Fatal) -> None:
        """In the forked process, before the run."""
        os.chdir(self.folder)
        layer.install()

    def finish(self, layer: Fatal) -> Any:
        """Run to the end; what it made."""

        def prepare() -> None:
            self.prepare(layer)
            leave = os._exit

            def counted(code: int) -> None:
                (self.folder / "operations").write_text(str(layer.count))
                leave(code)

            os._exit = counted

        outcome = run(self.script, self.arguments, self.folder / "log", prepare=prepare)
        if outcome.code:
            self.problems[f"the next run ended with {outcome.code}: {outcome.said}"] += 1
            print(outcome.text[-2000:], file=sys.stderr)
        return self.result()

    def kill(self, rng: random.Random, in_write: bool) -> None:
        """One victim and what it left."""
        fatal = rng.randint(1, self.num_operations) if in_write else 0
        layer = Fatal(fatal, self.folder)
        prepare = lambda: self.prepare(layer)  # noqa: E731
        victim = start(self.script, self.arguments, self.folder / "log", prepare)
        if not in_write:
            time.sleep(rng.uniform(0, self.seconds))
            victim.kill()
        ended = victim.wait().code
        self.died += ended == -signal.SIGKILL
        self.died_writing += in_write and ended == -signal.SIGKILL
        if ended not in (-signal.SIGKILL, 0):
            self.problems[f"the victim ended with {ended}"] += 1
        left = [path for path in self.output.rglob("*") if path.name.endswith("-tmp")]
        self.most_left = max(self.most_left, len(left))
        self.check(whole=False)

    def kill_in_a_row(self, rng: random.Random, kills: int, first: int) -> None:
        """Some victims one after the other, then a run that is left alone."""
        done, needed = self.work(), 0 if self.output.exists() else self.needed()
        for number in range(first, first + kills):
            self.kill(rng, in_write=number % 2 == 1)
        for name in self.differences(self.finish(Fatal(0, self.folder))):
            self.problems[f"{name} differs after a kill"] += 1
        self.most_again = max(self.most_again, (self.work() - done - needed) / kills)
        self.check(whole=True)

    def check(self, whole: bool) -> None:
        """Every file that has its name must be whole; at the end nothing else may be there."""
        for path in sorted(self.output.rglob("*")):
            if path.is_file() and not path.name.endswith("-tmp") and path.name != LOCK:
                try:
                    self.read(path)
                except Exception as error:  # noqa: BLE001  whatever it is, the file is not whole
                    self.problems[f"{path.name} is not whole: {error!r}"] += 1
            elif path.is_file() and whole:
                self.problems[f"{path.name} is left over"] += 1

    def twice(self) -> str:
        """Two runs at once into one folder: what the second says."""
        reset(self.output)
        first = start(self.script, self.arguments, self.folder / "log", self.enter)
        while not (self.output / LOCK).exists():
            time.sleep(0.002)
        second = run(self.script, self.arguments, self.folder / "log2", prepare=self.enter)
        if not second.refused or f"process {first.pid} " not in second.text:
            self.problems[f"two at once: the second ended with {second.code}"] += 1
        if first.wait().code:
            self.problems["two at once: the first failed"] += 1
        for name in self.differences(self.result()):
            self.problems[f"{name} differs after two at once"] += 1
        return second.said

    def enter(self) -> None:
        """Go to the folder, so that printed commands are alike."""
        self.prepare(Fatal(0, self.folder))

    def differences(self, made: dict[str, Any]) -> list[str]:
        """Names of results that are not those of the undisturbed run."""
        names = sorted(self.reference.keys() | made.keys())
        return [name for name in names if self.reference.get(name) != made.get(name)]


class Comparison(Campaign):
    """`compare_embeddings.py` on 64 digits in chunks of 8."""

    script = COMPARE

    def __init__(self, folder: Path) -> None:
        tiny, hf = tiny_models(folder)
        self.arguments = ["--offline", "--dataset", "digits", "--max-samples", IMAGES]
        self.arguments += ["--local-checkpoint", tiny.name, "--hf-model", hf.name]
        self.arguments += ["--output-dir", "out"]
        embeddings.CHUNK = CHUNK
        super().__init__(folder)

    def prepare(self, layer: Fatal) -> None:
        """Note every chunk that is computed."""
        super().prepare(layer)
        compute = embeddings.embed_chunks

        def noted(*args: Any) -> Any:
            for chunk in compute(*args):
                with open("work", "a") as file:  # noqa: PTH123  Path.open is under the layer
                    file.write(".")
                yield chunk

        embeddings.embed_chunks = noted

    def work(self) -> int:
        """Chunks computed by all runs so far."""
        return len((self.folder / "work").read_text())

    def needed(self) -> int:
        """Chunks of a run from nothing."""
        return 4 * IMAGES // CHUNK

    def read(self, path: Path) -> None:
        """Raise an error unless a file of the output folder is whole."""
        content = path.read_bytes()
        if path.suffix == ".png":
            Image.open(path).verify()
            assert content[-8:-4] == b"IEND"
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                assert len(arrays["labels"]) == len(arrays["embeddings"]) == IMAGES
        elif path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".html":
            assert content.rstrip().endswith(b"</html>")
        elif ".cache" in path.parts:
            assert read_sealed(path, len(content) - SEAL_BYTES) is not None
        else:
            assert content.endswith(b"\n"), "its last line is cut"

    def result(self) -> dict[str, Any]:
        """All files; times, rates and sums of files with times in them are left out."""
        made: dict[str, Any] = {
            str(path.relative_to(self.output)): path.read_bytes()
            for path in self.output.rglob("*")
            if path.is_file() and path.suffix not in (".json", ".html", ".md")
        }
        metrics = json.loads((self.output / "metrics.json").read_text())
        del metrics["run"]["seconds"], metrics["artifacts"]
        for model in metrics["models"].values():
            del model["images_per_second"], model["from_cache"]
        text = (self.output / "report.md").read_text()
        lines = [line for line in text.splitlines() if "images/s" not in line]
        return {**made, "metrics.json": metrics, "report.md": lines}


class Training(Campaign):
    """`train_ijepa.py` on 120 images, three epochs."""

    script = TRAIN

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        for name in ("a", "b"):
            (folder / "images" / name).mkdir(parents=True)
            for row in range(60):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name / f"{row:02d}.png")
        self.arguments = ["--dataset", "images", "--epochs", 3, "--batch-size", 16]
        self.arguments += ["--embed-dim", 64, "--depth", 1, "--output-dir", "out"]
        super().__init__(folder)

    def work(self) -> int:
        """Not counted: the log of the next run must have each epoch once, as the reference has."""
        return 0

    def needed(self) -> int:
        """As `work`."""
        return 0

    def read(self, path: Path) -> None:
        """Raise an error unless a file of the output folder is whole."""
        content = path.read_bytes()
        if path.suffix == ".pt":
            read_torch_file(path)
        elif path.suffix == ".png":
            Image.open(path).verify()
        elif path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".csv":
            lengths = {len(row) for row in csv.reader(content.decode().splitlines())}
            assert len(lengths) == 1, "a row is cut"
        else:
            assert content

    def result(self) -> dict[str, Any]:
        """Weights, export and log without times."""
        checkpoint = read_torch_file(self.output / "checkpoint_latest.pt")
        made = {
            f"{which} {name}": value.contiguous().view(torch.uint8).numpy().tobytes()
            for which, tensors in checkpoint["weights"].items()
            for name, value in tensors.items()
        }
        with (self.output / "training_log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        made["log"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
        for path in (self.output / "hf").iterdir():
            made[f"hf/{path.name}"] = path.read_bytes()
        return made


def reset(folder: Path) -> None:
    """Remove a folder and all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Kill, look, run again; print what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["compare", "train"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="kills-"))
    campaign = {"compare": Comparison, "train": Training}[args.what](scratch)
    print(
        f"undisturbed: {campaign.seconds:.1f} s, {campaign.num_operations} operations on files",
        flush=True,
    )
    rng = random.Random(args.seed)
    number = 0
    while campaign.died < args.kills:  # some end before they are to die
        # Sometimes over finished results.
        if rng.random() < 0.75:
            reset(campaign.output)
        kills = rng.randint(1, 4)
        campaign.kill_in_a_row(rng, kills, number)
        number += kills
        print(f"{campaign.died} killed, {dict(campaign.problems)}", file=sys.stderr, flush=True)
    said = campaign.twice()
    reset(scratch)
    again = f"{campaign.most_again:.2f} chunks" if args.what == "compare" else "not counted"
    print_table(
        [
            ("killed", "of them in a write", "most left", "again per kill", "lost"),
            (
                campaign.died,
                campaign.died_writing,
                f"{campaign.most_left} files",
                again,
                sum(campaign.problems.values()),
            ),
        ]
    )
    print(f"\ntwo at once: {said}")
    for problem, count in campaign.problems.items():
        print(f"{count} x {problem}")
    return bool(campaign.problems)


if __name__ == "__main__":
    sys.exit(main())
