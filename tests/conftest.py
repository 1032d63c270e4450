import os

# Before any import of transformers or huggingface_hub, which read it once: tests open no socket.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa.model import ViTConfig

# Networks this small lose more time in handing work to threads than they gain.
torch.set_num_threads(1)

FolderMaker = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def tiny_vit() -> ViTConfig:
    return ViTConfig(image_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture(scope="session")
def make_image_folder(tmp_path_factory: pytest.TempPathFactory) -> FolderMaker:
    def make(counts: Mapping[str, int]) -> Path:
        folder = tmp_path_factory.mktemp("images")
        rng = np.random.default_rng(0)
        for row, (name, count) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (12 + row, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
        return folder

    return make
