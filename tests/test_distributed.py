import pytest
import torch

from ijepa.distributed import join_processes
from ijepa.errors import UserError

CPU = torch.device("cpu")
TOGETHER = """
import os, time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ijepa.data import Split
from ijepa.distributed import *
from ijepa.embeddings import extract
from ijepa.encoders import pixel_encoder
from ijepa.errors import UserError

CPU, folder = torch.device("cpu"), Path(__file__).parent


def gradient(rows, split):
    parameter = torch.nn.Parameter(torch.arange(6.0, dtype=torch.float64).reshape(3, 2))
    # A covariance: no process could compute it from its own rows.
    gathered = gather_rows(split(rows) @ parameter)
    torch.cov(gathered.T).square().sum().backward()
    return parameter


everything = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
alone = gradient(everything, lambda rows: rows).grad
assert join_processes(CPU, "gloo") == CPU
assert num_processes() == 2
shared = gradient(everything, own_part)
assert not torch.allclose(shared.grad, alone)
sum_gradients([shared, torch.nn.Parameter(torch.ones(1))])
torch.testing.assert_close(shared.grad, alone)
first = process_rank() == 0
assert any_process(first, CPU)
assert not any_process(False, CPU)
with first_process_first():
    if first:
        time.sleep(0.5)
        (folder / "made").touch()
    assert (folder / "made").exists()

# Each process embeds its share of the images; the first reads all of them from the cache.
images = torch.arange(21 * 12, dtype=torch.uint8).reshape(21, 3, 2, 2)
toy = Split("toy", "all", ("a", "b"), images, np.arange(21) % 2, np.arange(21))
pixels, asked = pixel_encoder(), []
counting = replace(pixels, preprocess=lambda x: asked.extend(x) or pixels.preprocess(x))
options = {"batch_size": 4, "progress": partial(tqdm, disable=True)}
found, _ = extract([counting], toy, cache=folder / "cache", **options)
assert bool(found) == first and len(asked) in (10, 11), len(asked)
if first:
    np.testing.assert_allclose(found["pixels"].values, pixels.embed(images).numpy(), atol=1e-6)

torch.distributed.barrier()
print("checked", flush=True)
if not first:
    os._exit(0)  # not as a failure, for which torchrun would kill the other one before it speaks
try:
    leave_processes()
except UserError as error:
    print(error.problem)
"""


def test_two_processes_share_the_work_and_notice_the_others_death(tmp_path, torchrun):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    result = torchrun(script)
    assert result.stdout.count("checked") == 2, result.stderr
    assert "another process of this run has ended" in result.stdout


def test_a_stray_variable_makes_no_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert join_processes(CPU, "gloo") == CPU
    assert not torch.distributed.is_initialized()


def test_each_process_takes_its_own_gpu_or_is_refused(monkeypatch):
    joined = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **_: joined.append(*a))
    assert join_processes(torch.device("cuda"), "nccl") == torch.device("cuda", 1)
    assert joined == [torch.device("cuda", 1), "nccl"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="has no GPU of its own, there are 2"):
        join_processes(torch.device("cuda"), "nccl")
