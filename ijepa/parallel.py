"""Several processes as one: shares of the work, and what comes back from them.

Without a process group each function is the identity, and a run is one process.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed, nn

from ijepa.errors import UserError

Item = TypeVar("Item")
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process that it starts; some of it alone means nothing."""


def join_processes(
    device: torch.device, backend: str, timeout: timedelta | None = None
) -> torch.device:
    """Under torchrun, join its processes and take the GPU of this one; else the device as it is.

    Raises:
        UserError: If there are more processes than GPUs.
    """
    if not all(name in os.environ for name in TORCHRUN):
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"process {device.index} has no GPU of its own, there are "
                f"{torch.cuda.device_count()}",
                hint="lower --nproc-per-node of torchrun",
            )
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
    """The rows of a batch that this process works on, B / processes of them.

    Raises:
        ValueError: If the rows cannot be shared out evenly.
    """
    if len(rows) % num_processes():
        raise ValueError(f"{len(rows)} rows for {num_processes()} processes")
    return rows.chunk(num_processes())[process_rank()]


def gather_rows(rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "B ..."]:
    """The rows of all processes in their order; gradients flow back to this process's own.

    Where all compute the same number from them, the sum of their gradients is its gradient.
    """
    if num_processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(num_processes())]
    distributed.all_gather(parts, rows.detach().contiguous())
    parts[process_rank()] = rows
    return torch.cat(parts)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all gradients, in one message."""
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


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn a connection that another process has closed into an error for the user."""
    try:
        yield
    except RuntimeError as error:  # all that gloo raises
        raise UserError(
            "another process of this run has ended", hint="its own error stands beside this one"
        ) from error


def leave_processes() -> None:
    """End the group when all have done their part; afterwards this process is a run of its own.

    Raises:
        UserError: If another process has ended.
    """
    if not distributed.is_initialized():
        return
    # One that leaves early takes its connections from those that still listen.
    with lost_processes():
        distributed.barrier()
    distributed.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let process 0 run the body before the others: it may download, and its error stops them.

    Raises:
        UserError: If another process has ended.
    """
    if num_processes() > 1 and process_rank() > 0:
        with lost_processes():
            distributed.barrier()
    yield
    if num_processes() > 1 and process_rank() == 0:
        with lost_processes():
            distributed.barrier()


def gather_objects(mine: Item) -> list[Item]:
    """In process 0 what every process has, in their order; in the others their own alone.

    Raises:
        UserError: If another process has ended.
    """
    if num_processes() == 1:
        return [mine]
    everyone = [mine] * (num_processes() if process_rank() == 0 else 1)
    with lost_processes():
        distributed.gather_object(mine, everyone if process_rank() == 0 else None)
    return everyone
