"""What only a CUDA GPU can show: `make test-gpu`."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from ijepa.checkpoint import read_torch_file
from ijepa.devices import choose_device
from ijepa.encoders import load_encoder
from ijepa.graphs import Graphs
from ijepa.metrics import all_pairs
from ijepa.runs import evaluate
from ijepa.training import TrainConfig, init_state, learning_rate, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
GPU = torch.device("cuda")


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8, generator=rng)


@pytest.fixture
def config(tiny_vit):
    """36 updates, in which every rate changes from one to the next."""
    rates = {"lr": 1e-2, "warmup_epochs": 2.0, "decay_share": 0.5, "ema_start": 0.5}
    return TrainConfig(epochs=12, batch_size=16, ema_window=0.5, vit=tiny_vit, **rates)


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
            patch.setattr("shutil.which", lambda _: None)  # no C compiler
        state = init_state(config, GPU, torch.float32)
        graphs = state.graphs
        if not replayed:
            state.graphs = None
        logs = list(train(state, config, images.to(GPU)))
    assert len(logs) == 36
    assert any(graphs.recordings.values()) is replayed
    assert state.muon.param_groups[0]["lr"] == learning_rate(config, 35, 3)
    networks = (state.context_encoder, state.target_encoder)
    return [value.cpu() for one in networks for value in one.state_dict().values()]


def test_compiled_and_replayed_updates_are_the_plain_ones(config, images, monkeypatch):
    replayed, plain = (weights_after(config, images, one, monkeypatch) for one in (True, False))
    for one, other in zip(replayed, plain, strict=True):
        # Replays with the rates of the recording would be off by far more, rounding by far less.
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_a_run_goes_from_the_cpu_to_a_gpu_and_back(tmp_path, config, images):
    """Through a file, as the script does."""
    stretches = (("cpu", 5), ("cuda", 9), ("cpu", 3))
    for number, (device, updates) in enumerate(stretches):
        state = init_state(config, torch.device(device), torch.float32)
        if number:
            saved = read_torch_file(tmp_path / f"{number}.pt")["state"]
            state.load_state_dict(saved)
            for name in ("context_encoder", "target_encoder", "predictor"):
                for key, value in getattr(state, name).state_dict().items():
                    assert value.device.type == device
                    assert torch.equal(value.cpu(), saved[name][key])
        run = train(state, config, images.to(device))
        for _ in range(updates):
            next(run)
        torch.save({"state": state.state_dict()}, tmp_path / f"{number + 1}.pt")
    assert state.step == 17
    values = evaluate(state.target_encoder, images, np.arange(48) % 4, torch.float32)
    assert np.isfinite(list(values.values())).all()


def test_a_loaded_state_is_not_changed_by_old_recordings(config, images):
    config = dataclasses.replace(config, decay_share=0.0)
    state, fresh = (init_state(config, GPU, torch.float32) for _ in range(2))
    list(zip(train(state, config, images.to(GPU)), range(20), strict=False))
    saved = copy.deepcopy(state.state_dict())
    for one in (state, fresh):
        one.load_state_dict(copy.deepcopy(saved))
        list(zip(train(one, config, images.to(GPU)), range(8), strict=False))
    states = ([*one.muon.state.values()] for one in (state, fresh))
    torch.testing.assert_close(*states, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_embeddings_are_those_of_the_cpu(tiny_models, images, dtype, tolerance):
    def embeddings(device, dtype):
        encoder = load_encoder(tiny_models[0], "local", device=choose_device(device), dtype=dtype)
        assert encoder.prepare(list(images)).is_pinned() is (device == "cuda")
        return encoder.embed(list(images))

    ours, expected = embeddings("cuda", dtype), embeddings("cpu", "float32")
    assert (ours - expected).abs().max() < tolerance * expected.abs().max()


def test_neighbors_and_silhouettes_are_those_of_the_cpu():
    device, labels = str(choose_device("cuda")), np.arange(3000) % 7
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 64)) + rng.normal(size=(7, 64))[labels]
    X = np.concatenate([X[:2000], X[:1000]]).astype(np.float32)  # some twice
    halves = rng.random((2, 3000)) < 0.5
    halves = np.stack([halves, ~halves], axis=1).reshape(4, 3000)
    found, expected = (all_pairs(X, 64, labels, halves, one) for one in (device, "cpu"))
    assert (found.neighbors == expected.neighbors).mean() > 0.99
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=2e-6)
    np.testing.assert_allclose(found.silhouettes, expected.silhouettes, atol=1e-5)
    for metric, means in expected.half_silhouettes.items():
        np.testing.assert_allclose(found.half_silhouettes[metric], means, atol=1e-6)
