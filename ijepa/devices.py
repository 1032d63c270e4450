"""Which processor to compute on, in which number format, compiled or not."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from ijepa.errors import UserError

SMALL = 100_000_000
"""Parameters from which on a network is worth rounding to bfloat16."""


def choose_device(name: str) -> torch.device:
    """Resolve `auto` to cuda, else mps, else cpu; check any other name.

    From then on products in float32 are those of float32 on a GPU too. PyTorch lets convolutions
    round what they multiply to 10 bits (TF32), and some installations all matrix products.

    Raises:
        UserError: If there is no such device here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {"cuda": gpus > 0, "mps": torch.backends.mps.is_available(), "cpu": True}
    known = [kind for kind, present in here.items() if present]
    name = known[0] if name == "auto" else name
    numbered = [f"cuda:{number}" for number in range(gpus)]
    if name not in (*known, *numbered, *(f"{kind}:0" for kind in known)):
        hint = f"choose auto or one of: {', '.join(known)}"
        raise UserError(f"device {name!r} is not available", hint=hint)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, num_parameters: int | None = None) -> torch.dtype:
    """Resolve `auto` to bfloat16 where that is faster, else float32.

    A small network, of fewer than 100 million parameters, is computed in float32: it is fast all
    the same, and rounding must not look like a difference between models.
    """
    if name == "auto":
        small = num_parameters is not None and num_parameters < SMALL
        return torch.bfloat16 if has_bfloat16(device) and not small else torch.float32
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16 or float32, got {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32.

    Emulation is slower, and so is AVX512-BF16 without AMX on Intel's processors, but not on AMD's
    (benchmarks/README.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        vectors = able.get("avx512_bf16") and "Intel" not in able.get("cpu_name", "")
        return bool(able.get("amx_bf16") or able.get("bf16") or vectors)
    return False


@contextmanager
def memory_errors(problem: str, hint: str) -> Iterator[None]:
    """Turn the ways in which torch runs out of memory into an error for the user."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
        exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not exhausted and not any(word in str(error) for word in words):
            raise
        raise UserError(problem, hint=hint) from error


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs for this GPU: Triton and what Triton builds with.

    That is the C compiler named by CC, where it names none gcc or clang, and Python's headers; the
    GPU must be of compute capability 7.0 or more.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return find_spec("triton") is not None and any(map(shutil.which, names)) and headers.exists()
