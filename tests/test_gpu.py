"""What only a CUDA GPU can show: `pytest -m gpu`."""

import numpy as np
import pytest
import torch

from ijepa import training
from ijepa.checkpoint import save_checkpoint
from ijepa.encoders import load_local_encoder
from ijepa.graphs import Graphs
from ijepa.model import VisionTransformer
from ijepa.runs import NORMALIZATION
from ijepa.training import TrainConfig, evaluate, init_state, train

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8, generator=rng)


@pytest.fixture
def config(tiny_vit):
    return TrainConfig(epochs=4, batch_size=16, lr=1e-3, decay_share=0.5, vit=tiny_vit)


def test_a_replay_does_with_new_inputs_what_was_recorded():
    total = torch.zeros(3, device=GPU)

    def add(values, factor):
        total.add_(values.sum(dim=0) * factor)
        return [total * 2]

    graphs, expected = Graphs(add, GPU), torch.zeros(3)
    for call in range(8):
        values = torch.full((2 + call % 2, 3), float(call))
        (doubled,) = graphs(values.to(GPU), torch.tensor(0.5, device=GPU))
        expected += values.sum(dim=0) * 0.5
        assert torch.equal(total.cpu(), expected)
        assert torch.equal(doubled.cpu(), expected * 2)
    assert len(graphs.recordings) == 2


def weights_after(config, images, replayed, monkeypatch):
    with monkeypatch.context() as patch:
        if not replayed:
            patch.setattr(training, "can_compile", lambda _: False)
        state = init_state(config, GPU, torch.float32)
        assert state.graphs is not None
        if not replayed:
            state.graphs = None
        logs = list(train(state, config, images.to(GPU)))
    assert len(logs) == 12
    return {name: value.cpu() for name, value in state.target_encoder.state_dict().items()}


def test_compiled_and_replayed_updates_are_the_plain_ones(config, images, monkeypatch):
    replayed, plain = (weights_after(config, images, one, monkeypatch) for one in (True, False))
    for name, value in plain.items():
        torch.testing.assert_close(replayed[name], value, atol=1e-4, rtol=0)


def test_a_run_goes_from_the_cpu_to_a_gpu_and_back(config, images):
    began = init_state(config, torch.device("cpu"), torch.float32)
    run = train(began, config, images)
    for _ in range(5):
        next(run)
    there = init_state(config, GPU, torch.float32)
    there.load_state_dict(began.state_dict())
    assert all(value.is_cuda for value in there.target_encoder.state_dict().values())
    for _ in zip(train(there, config, images.to(GPU)), range(3), strict=False):
        pass
    back = init_state(config, torch.device("cpu"), torch.float32)
    back.load_state_dict(there.state_dict())
    logs = list(train(back, config, images))
    assert logs[-1].step == 12
    values = evaluate(back.target_encoder, images, np.arange(48) % 4, torch.float32)
    assert np.isfinite(list(values.values())).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_embeddings_are_those_of_the_cpu(tmp_path, tiny_vit, images, dtype, tolerance):
    path = tmp_path / "checkpoint.pt"
    networks = {"target": VisionTransformer(tiny_vit), "context": VisionTransformer(tiny_vit)}
    save_checkpoint(path, tiny_vit, networks, NORMALIZATION, {"epochs": 0})

    def embeddings(device, dtype):
        encoder = load_local_encoder(path, "target", torch.device(device), dtype)
        assert encoder.prepare(list(images)).is_pinned() is (device == "cuda")
        return encoder.embed(list(images))

    ours, expected = embeddings("cuda", dtype), embeddings("cpu", torch.float32)
    assert (ours - expected).abs().max() < tolerance * expected.abs().max()
