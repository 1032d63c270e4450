"""Runs of the two scripts in forked processes, and tiny models, for the campaigns.

A fork costs no import, because PyTorch is there already. Each run is a process of its own, so it
may be killed or starved; its exit code, its output and the most memory it held come back.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "scripts"))
os.environ["HF_HUB_OFFLINE"] = "1"

import compare_embeddings
import torch
import train_ijepa
from PIL import Image

from ijepa import encoders, report  # noqa: F401  what every run imports, once for all
from ijepa.checkpoint import export_huggingface, load_checkpoint, save_checkpoint
from ijepa.model import VisionTransformer, ViTConfig

COMPARE, TRAIN = compare_embeddings.main, train_ijepa.main
torch.set_num_threads(1)  # a process with threads cannot be forked


def tiny_models(folder):
    """Write `tiny.pt` and its export `hf`: random weights, 16 wide."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    networks = {"target": VisionTransformer(config), "context": VisionTransformer(config)}
    facts = {"epochs": 1, "planned_epochs": 1}
    save_checkpoint(folder / "tiny.pt", config, networks, (0.5, 0.5), facts)
    export_huggingface(load_checkpoint(folder / "tiny.pt", "context"), folder / "hf")


def some_images(folder, count, side):
    """Write PNG files of noise, in turn into the class folders `a` and `b`."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((side, side), 20 + number).convert("RGB").save(path)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (minus the signal that ended it), and what it said."""

    code: int
    text: str
    seconds: float
    megabytes: float
    """Most memory held at once, about 500 of them by the libraries."""

    @property
    def refused(self):
        """Whether it ended as a user's mistake has to: two lines and exit code 1."""
        lines = (self.text.strip().splitlines() or [""])[-2:]
        shown = lines[0].startswith("error: ") and lines[-1].startswith("hint: ")
        return self.code == 1 and shown and "Traceback" not in self.text

    @property
    def said(self):
        """Its last error, or its last line."""
        lines = self.text.strip().splitlines() or [""]
        return ([line for line in lines if line.startswith("error: ")] or lines)[-1]


def run(main, arguments, log, prepare=lambda: None, kill_after=300):
    """The outcome of a script's main in a forked process, after `prepare` there.

    It is killed after so many seconds.
    """
    began = time.monotonic()
    if not (pid := os.fork()):
        _child(main, arguments, log, prepare)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > kill_after:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    text, seconds = log.read_text(errors="replace"), time.monotonic() - began
    return Outcome(os.waitstatus_to_exitcode(ended[1]), text, seconds, ended[2].ru_maxrss / 1024)


def _child(main, arguments, log, prepare):
    """Run, and leave without what Python does at its end."""
    code = 70
    try:
        with log.open("w", errors="backslashreplace") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with redirect_stdout(file), redirect_stderr(file):
                try:
                    prepare()
                    code = main([str(argument) for argument in arguments])
                except SystemExit as stopped:
                    code = stopped.code if isinstance(stopped.code, int) else 71
                except BaseException:  # noqa: BLE001  a campaign counts it, whatever it is
                    traceback.print_exc(file=file)
    finally:
        os._exit(code)


def print_table(rows):
    """The command, and a Markdown table of what was tried."""
    print(f"```bash\npython {' '.join(sys.argv)}\n```\n")
    head, *others = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    print(head, "|" + " --- |" * len(rows[0]), *others, sep="\n")
