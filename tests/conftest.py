import os

# Before any import of transformers or huggingface_hub, which read it once: tests open no socket.
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

# What is heavy is imported where it is used: the process that only hands out tests needs none.


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Keep what runs cache out of the user's own folder."""
    import torch

    # Networks this small lose more time in handing work to threads than they gain.
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_vit():
    from ijepa.model import ViTConfig

    return ViTConfig(image_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture(scope="session")
def make_image_folder(tmp_path_factory):
    import numpy as np
    from PIL import Image

    def make(counts):
        folder = tmp_path_factory.mktemp("images")
        rng = np.random.default_rng(0)
        for row, (name, count) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (12 + row, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A checkpoint of tiny random encoders, and its context encoder for Hugging Face."""
    import torch

    from ijepa.checkpoint import export_huggingface, load_checkpoint, save_checkpoint
    from ijepa.model import VisionTransformer, ViTConfig

    path = tmp_path_factory.mktemp("models") / "checkpoint.pt"
    config = ViTConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8)
    torch.manual_seed(0)
    encoders = {"target": VisionTransformer(config), "context": VisionTransformer(config)}
    training = {"epochs": 3, "planned_epochs": 9, "recipe": "paper"}
    training |= {"settings": {"spread_weight": 0.1}}
    save_checkpoint(path, config, encoders, (0.5, 0.5), training)
    export_huggingface(load_checkpoint(path, "context"), path.with_name("hf"))
    return path, path.with_name("hf")


@pytest.fixture(scope="session")
def torchrun():
    """Run a script in two processes that meet over a socket on loopback."""

    def run(script, *arguments):
        # By default they meet at the machine's name, which not every machine can look up.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [sys.executable, *launcher, "--nproc-per-node", "2", str(script), *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        options = {"capture_output": True, "text": True, "check": False, "timeout": 600}
        return subprocess.run(command, env=env, **options)

    return run


@pytest.fixture(scope="session")
def make_page():
    """A page of random points, without encoder or t-SNE; `whole` has figures and a probe."""
    import numpy as np
    import torch
    from matplotlib.figure import Figure

    from ijepa.comparison import compare
    from ijepa.data import Split
    from ijepa.page import page
    from ijepa.probe import probe as measure_probe
    from ijepa.projections import Maps, TsneProjection, project_pca
    from ijepa.report import ON_PAGE, complete, draw, json_text, metrics_content

    def make(n=66, classes=("cat", "dog", "ship"), models=("local", "hf"), shown=None, whole=False):
        rng = np.random.default_rng(0)
        # Smooth like photographs: noise would compress worse than anything a user has.
        coarse = torch.from_numpy(rng.normal(128, 60, (n, 3, 8, 8)).clip(0, 255))
        images = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 255)
        indices, labels = rng.permutation(5 * n)[:n], np.arange(n) % len(classes)
        files = tuple(f"x/{row:04d}.png" for row in range(n)) if shown else None
        split = Split("example", "test", classes, images.to(torch.uint8), labels, indices, files)
        centers = rng.normal(size=(len(classes), 6))

        def cloud(noise):
            points = centers[split.labels] + noise * rng.normal(size=(n, 6))
            return points.astype(np.float32)

        references = {"pixels": cloud(1.5), "random_weights": cloud(3)}
        embeddings = {name: cloud(0.6 + 0.5 * row) for row, name in enumerate(models)}
        names = {"local": "small (target)", "hf": "large"}
        comparison = compare(embeddings, references, split.labels, 0, names=names)
        rows = np.arange(n)[:: n // shown if shown else 1]
        pca = {name: project_pca(X, 2) for name, X in embeddings.items()}
        pca = {name: replace(p, coordinates=p.coordinates[rows]) for name, p in pca.items()}
        tsne = {name: TsneProjection(p.coordinates, 1.0, 0.5, 30.0) for name, p in pca.items()}
        maps = Maps(rows, tsne, pca)
        facts = complete(comparison, split, {"run": {"command": "python x --offline", "seed": 0}})
        metrics = json_text(metrics_content(comparison, facts, ["one draw"]) | {"artifacts": []})
        figures, probe = {name: Figure(figsize=(2, 1)) for name in ON_PAGE}, None
        if whole:
            figures |= {k: v for k, v in draw(comparison, maps, split) if k in ON_PAGE}
            banks = {name: X[:60] for name, X in embeddings.items()}
            probe = measure_probe(banks, embeddings, split.labels[:60], split.labels, 0)
        html = page(comparison, maps, split, facts, ["one draw"], metrics, figures, probe)
        parts = {"comparison": comparison, "maps": maps, "split": split, "probe": probe}
        return SimpleNamespace(**parts, metrics=metrics, html=html)

    return make
