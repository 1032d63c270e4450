"""Runs of the two scripts in forked processes, and tiny models, for the campaigns.

A fork costs a second, because PyTorch is there already. Each run is a process of its own, so it may
be killed or starved; its exit code, its output and the most memory it held come back.
"""

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from matplotlib.figure import Figure

from ijepa import encoders, report  # noqa: F401  what every run imports, once for all
from ijepa.checkpoint import load_checkpoint, save_checkpoint
from ijepa.huggingface import export_huggingface
from ijepa.model import VisionTransformer, ViTConfig

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # a process with threads cannot be forked
_save = Figure.savefig  # campaigns draw hundreds of figures: coarse ones
Figure.savefig = lambda figure, *args, **kwargs: _save(figure, *args, **{**kwargs, "dpi": 20})


def load_script(name: str) -> ModuleType:
    """One of the two scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPARE = load_script("compare_embeddings")
TRAIN = load_script("train_ijepa")


def tiny_models(folder: Path) -> tuple[Path, Path]:
    """A checkpoint and an exported directory of random weights, 16 wide."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    networks = {"target": VisionTransformer(config), "context": VisionTransformer(config)}
    path = folder / "tiny.pt"
    save_checkpoint(path, config, networks, (0.5, 0.5), {"epochs": 1, "planned_epochs": 1})
    export_huggingface(load_checkpoint(path, "context"), folder / "hf")
    return path, folder / "hf"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (minus the signal that ended it), and what it said."""

    code: int
    text: str
    seconds: float
    megabytes: float
    """Most memory held at once, beyond what every run begins with."""

    @property
    def refused(self) -> bool:
        """Whether it ended as a user's mistake has to: two lines and exit code 1."""
        lines = (self.text.strip().splitlines() or [""])[-2:]
        shown = lines[0].startswith("error: ") and lines[-1].startswith("hint: ")
        return self.code == 1 and shown and "Traceback" not in self.text

    @property
    def said(self) -> str:
        """Its last error, or its last line."""
        lines = self.text.strip().splitlines() or [""]
        return ([line for line in lines if line.startswith("error: ")] or lines)[-1]


def start(
    script: ModuleType,
    arguments: Sequence[object],
    log: Path,
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """Run a script's main in a forked process, after `prepare` there; its process number."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        with log.open("w", errors="backslashreplace") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with redirect_stdout(file), redirect_stderr(file):
                try:
                    prepare()
                    code = script.main([str(argument) for argument in arguments])
                except SystemExit as stopped:
                    code = stopped.code if isinstance(stopped.code, int) else 71
                except BaseException:  # noqa: BLE001  a campaign counts it, whatever it is
                    traceback.print_exc(file=file)
                    code = 72
    finally:
        os._exit(code)


def finish(pid: int, log: Path, limit: float = 300) -> Outcome:
    """Wait for a run; one that takes over the limit of seconds is killed."""
    began = time.monotonic()
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > limit:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    text, held = log.read_text(errors="replace"), ended[2].ru_maxrss / 1024
    seconds = time.monotonic() - began
    return Outcome(os.waitstatus_to_exitcode(ended[1]), text, seconds, held - BASE)


def run(
    script: ModuleType,
    arguments: Sequence[object],
    log: Path,
    prepare: Callable[[], object] = lambda: None,
) -> Outcome:
    """`start` and `finish`."""
    return finish(start(script, arguments, log, prepare), log)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a campaign; removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """The command, and a Markdown table of what was tried."""
    print(f"```bash\npython {' '.join(sys.argv)}\n```\n")
    for place, row in enumerate(rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")
        if not place:
            print("|" + " --- |" * len(row))


def _base() -> float:
    """Megabytes that a forked run holds before it does anything."""
    if pid := os.fork():
        return os.wait4(pid, 0)[2].ru_maxrss / 1024
    os._exit(0)


BASE = _base()
