"""Runs of the two scripts in forked processes: each costs a second, because torch is there already.

For the campaigns beside this file. A run has a process of its own, so it may be killed, starved or
poisoned; what it said, how it ended and the most memory it held come back.
"""

import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
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

# A campaign draws a thousand figures: small ones with few pictures.
report.MAX_QUERIES = report.NUM_DISAGREEMENTS = 1
_save = Figure.savefig
Figure.savefig = lambda figure, *args, **kwargs: _save(figure, *args, **{**kwargs, "dpi": 20})

TINY = ViTConfig(image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)


def load_script(name: str) -> ModuleType:
    """One of the two scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPARE = load_script("compare_embeddings")
TRAIN = load_script("train_ijepa")


def tiny_models(folder: Path) -> tuple[Path, Path]:
    """A checkpoint and an exported directory of random weights."""
    torch.manual_seed(0)
    networks = {"target": VisionTransformer(TINY), "context": VisionTransformer(TINY)}
    path = folder / "tiny.pt"
    save_checkpoint(path, TINY, networks, (0.5, 0.5), {"epochs": 1, "planned_epochs": 1})
    export_huggingface(load_checkpoint(path, "context"), folder / "hf")
    return path, folder / "hf"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, or the signal that ended it as a negative number."""

    code: int
    text: str
    seconds: float
    megabytes: float
    """Most memory held at once, beyond what every run begins with."""

    @property
    def refused(self) -> bool:
        """Whether it ended as a user's mistake has to: two lines and exit code 1."""
        lines = self.text.strip().splitlines()[-2:]
        shown = len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")
        return self.code == 1 and shown and "Traceback" not in self.text

    @property
    def said(self) -> str:
        """Its last error, or its last line."""
        lines = self.text.strip().splitlines() or [""]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines)[-1]


@dataclass
class Run:
    """A run that goes on in another process."""

    pid: int
    log: Path
    began: float

    def kill(self) -> None:
        """End it at once, as the kernel does when memory is short."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, limit: float = 120) -> Outcome:
        """Its end; a run over the limit of seconds is killed and counts as hanging."""
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self.began > limit:
                self.kill()
            time.sleep(0.005)
        text = self.log.read_text(errors="replace")
        held = usage.ru_maxrss / 1024 - BASE
        seconds = time.monotonic() - self.began
        return Outcome(os.waitstatus_to_exitcode(status), text, seconds, held)


def start(
    script: ModuleType,
    arguments: Sequence[object],
    log: Path,
    prepare: Callable[[], object] = lambda: None,
) -> Run:
    """Run a script's main in a forked process, after `prepare` there; output goes to `log`."""
    began = time.monotonic()
    pid = os.fork()
    if pid:
        return Run(pid, log, began)
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


def run(script: ModuleType, arguments: Sequence[object], log: Path, **options: object) -> Outcome:
    """As `start`, to its end."""
    limit = options.pop("limit", 120)
    return start(script, arguments, log, **options).wait(limit)


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table of what was tried."""
    for place, row in enumerate(rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")
        if not place:
            print("|" + " --- |" * len(row))


def _base() -> float:
    """Megabytes that a forked run holds before it does anything."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    return os.wait4(pid, 0)[2].ru_maxrss / 1024


BASE = _base()
