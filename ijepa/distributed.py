"""Several processes that work as one: they share the rows of a batch and combine the results.

Without a process group there is one process, and every function leaves its input as it is.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed, nn

from ijepa.errors import UserError


def join_processes(
    device: torch.device, backend: str, timeout: timedelta | None = None
) -> torch.device:
    """Join the processes that torchrun started, and return the device of this one.

    Under torchrun with CUDA that is the GPU of its local rank, otherwise the given device.

    Raises:
        UserError: If there are more processes than GPUs.
    """
    if not distributed.is_torchelastic_launched():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (count := torch.cuda.device_count()):
            problem = f"process {device.index} has no GPU of its own, there are {count}"
            raise UserError(problem, hint="lower --nproc-per-node of torchrun")
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=timeout)
    return device


def num_processes() -> int:
    """Processes of this run, 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def own_part(rows: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "b ..."]:
    """The b = B / processes rows of a batch that this process works on."""
    return rows.chunk(num_processes())[process_rank()]


def gather_rows(rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "B ..."]:
    """The rows of all processes in rank order; gradients reach only this process's own rows.

    If all processes compute the same number from them, its gradient is the sum of their gradients.
    """
    if num_processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(num_processes())]
    distributed.all_gather(parts, rows.detach().contiguous())
    parts[process_rank()] = rows
    return torch.cat(parts)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in one message."""
    if num_processes() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in at least one process."""
    if num_processes() == 1:
        return flag
    count = torch.tensor(int(flag), device=device)
    distributed.all_reduce(count)
    return bool(count)


def wait_for_all() -> None:
    """Return when every process has called this.

    Raises:
        UserError: If another process has ended.
    """
    if num_processes() == 1:
        return
    try:
        distributed.barrier()
    except RuntimeError as error:  # gloo has no narrower one for a closed connection
        hint = "read its error, printed next to this one"
        raise UserError("another process of this run has ended", hint=hint) from error


def leave_processes() -> None:
    """End the process group when all processes have arrived; each then runs on its own.

    Raises:
        UserError: As `wait_for_all`.
    """
    if distributed.is_initialized():
        wait_for_all()
        distributed.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let process 0 run the body before the others: it may download, and its error stops them.

    Raises:
        UserError: As `wait_for_all`.
    """
    if process_rank() > 0:
        wait_for_all()
    yield
    if process_rank() == 0:
        wait_for_all()
