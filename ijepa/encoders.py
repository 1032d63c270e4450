"""Frozen encoders: from uint8 images to one vector per image, with all that this takes inside.

Resize, normalisation, network, pooling and number format belong together: a caller cannot pair the
wrong ones, and `description` records them. I-JEPA has no class token; an image's embedding is the
mean over its patch tokens (Assran et al. 2023, appendix A.1, on evaluation).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ijepa import hub, huggingface
from ijepa.checkpoint import load_checkpoint
from ijepa.errors import UserError
from ijepa.files import read_sealed, sha256, write_sealed
from ijepa.model import VisionTransformer, ViTConfig

Images = Sequence[Tensor]
"""uint8 tensors of shape (3, height, width); sizes may differ."""
FACTS_BYTES = 4096
"""Of a file of facts, filled up with spaces."""


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder to compare.

    Args:
        name: What it is called in results: `local`, `hf`, `pixels` or `random_weights`.
        preprocess: From images to normalised pixels (b, 3, size, size).
        network: From those to patch tokens (b, N, d).
        embed_dim: d.
        device: Where the network lives.
        autocast: Whether matrix products alone run in `dtype`, the rest in float32.
        dtype: Number format of the matrix products.
        description: What defines the embeddings, for provenance; plain data.
        load: Brings the network into memory, where that waits until it is needed.
    """

    name: str
    preprocess: Callable[[Images], Tensor]
    network: Callable[[Tensor], Tensor]
    embed_dim: int
    device: torch.device
    dtype: torch.dtype
    autocast: bool
    description: dict[str, Any]
    load: Callable[[], object] = lambda: None

    def embed(self, images: Images) -> Float[Tensor, "b d"]:
        """One float32 embedding per image, on the CPU.

        Raises:
            UserError: If memory runs out.
        """
        return self.encode(self.prepare(images)).cpu()

    @torch.inference_mode()
    def prepare(self, images: Images) -> Float[Tensor, "b 3 H W"]:
        """What the network takes of these images, on the CPU; the next batch's may be made beside.

        For a GPU it lies in pinned memory, from which it is copied while the processor goes on.

        Raises:
            UserError: If memory runs out.
        """
        with self.batch_memory_errors(len(images), torch.device("cpu")):
            pixels = self.preprocess(images)
            if not self.autocast:
                pixels = pixels.to(self.dtype)
            return pixels.pin_memory() if self.device.type == "cuda" else pixels

    @torch.inference_mode()
    def encode(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        """The embeddings of prepared images, float32; a GPU may still be at work on them.

        Raises:
            UserError: If memory runs out.
        """
        with self.batch_memory_errors(len(pixels), self.device):
            pixels = pixels.to(self.device, non_blocking=True)
            enabled = self.autocast and self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype, enabled=enabled):
                tokens = self.network(pixels)
            return tokens.float().mean(dim=1)

    def batch_memory_errors(self, count: int, device: torch.device) -> AbstractContextManager[None]:
        """Memory that runs out with a batch of this many images, as an error for the user."""
        hint = f"try --batch-size {max(count // 4, 1)}" if count > 1 else "try --device cpu"
        return memory_errors(f"out of memory on {device} with {count} images in one batch", hint)

    @property
    def key(self) -> str:
        """A hash of everything that decides the embeddings, device kind included."""
        facts = {**self.description, "device": self.device.type, "torch": torch.__version__}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


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


def resize_and_normalize(
    images: Images, size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 size size"]:
    """Resize bilinearly with antialiasing to size x size, scale to [0, 1], standardise."""
    from torchvision.transforms.v2 import functional as transforms

    resized = [
        image
        if image.shape[1:] == (size, size)
        else transforms.resize(image, [size, size], antialias=True)
        for image in images
    ]
    pixels = torch.stack(resized).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def load_local_encoder(
    path: Path, weights: str, device: torch.device, dtype: torch.dtype
) -> FrozenEncoder:
    """An encoder from a checkpoint file; see `checkpoint.load_checkpoint` for the formats.

    Raises:
        UserError: If the file cannot be read or does not fit.
    """
    checkpoint = load_checkpoint(path, weights)
    return vit_encoder(
        "local",
        checkpoint.build(),
        (checkpoint.mean, checkpoint.std),
        device,
        dtype,
        {
            "source": str(path),
            "sha256": sha256(path),
            "weights": weights,
            "epochs": checkpoint.epochs,
            "planned_epochs": checkpoint.training.get("planned_epochs"),
        },
    )


def random_encoder(
    config: ViTConfig,
    normalization: tuple[Sequence[float], Sequence[float]],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> FrozenEncoder:
    """The same architecture before any training: what the shape of the network alone gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = VisionTransformer(config).eval().requires_grad_(False)
    facts = {"source": f"random weights, seed {seed}", "weights": "random", "epochs": 0}
    return vit_encoder("random_weights", encoder, normalization, device, dtype, facts)


def vit_encoder(
    name: str,
    encoder: VisionTransformer,
    normalization: tuple[Sequence[float], Sequence[float]],
    device: torch.device,
    dtype: torch.dtype,
    facts: dict[str, Any],
) -> FrozenEncoder:
    """Freeze one of our own networks together with its preprocessing."""
    size = encoder.config.image_size
    mean, std = normalization
    return FrozenEncoder(
        name,
        lambda images: resize_and_normalize(images, size, mean, std),
        encoder.to(device),
        encoder.config.embed_dim,
        device,
        dtype,
        autocast=True,
        description={
            **facts,
            "parameters": count_parameters(encoder),
            "input_size": size,
            "resize": "bilinear, antialiased",
            "mean": list(mean),
            "std": list(std),
            "pooling": "mean over patch tokens",
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def pixel_encoder() -> FrozenEncoder:
    """Raw pixels as embeddings, at 32 x 32: what no learning at all gives."""
    return FrozenEncoder(
        "pixels",
        # A black image has no direction; half a grey level on all pixels gives it one.
        lambda images: resize_and_normalize(images, 32, (-0.5 / 255,) * 3, (1.0,) * 3),
        lambda pixels: pixels.flatten(1)[:, None],
        3 * 32 * 32,
        torch.device("cpu"),
        torch.float32,
        autocast=False,
        description={
            "source": "pixels at 32 x 32 in [0, 1], plus half a grey level",
            "dtype": "float32",
        },
    )


def load_huggingface_encoder(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    offline: bool,
    facts_folder: Path | None = None,
) -> FrozenEncoder:
    """An I-JEPA from the Hugging Face hub or a directory, with its own image processor.

    Weights are read straight into `dtype`; no code of the repository is run.

    Args:
        source: Hub id or directory.
        device: Where the network shall live.
        dtype: Number format of the weights.
        offline: Whether to ask the hub's cache alone.
        facts_folder: Keeps what there is to tell of models that were loaded before. Of those every
            file is still checked, but the network is not loaded before it is needed.

    Raises:
        UserError: If it cannot be found, downloaded or read, or is no I-JEPA.
    """
    folder, revision = hub.resolve_model(source, offline)
    settings = huggingface.check_model_files(folder, source)
    digest = None if revision else huggingface.hash_model(folder)

    @cache
    def load() -> tuple[Any, Any]:
        problem = f"out of memory on {device} while loading {source!r}"
        # The order matters: running out of memory must not be taken for a damaged file.
        with huggingface.loading_errors(source), memory_errors(problem, hint="try --device cpu"):
            processor, model = huggingface.read_model(folder, settings, dtype)
            return processor, model.to(device)

    def describe() -> dict[str, Any]:
        processor, model = load()
        return {
            "embed_dim": model.config.hidden_size,
            "parameters": count_parameters(model),
            "input_size": model.config.image_size,
            **huggingface.describe_processor(processor),
        }

    number_format = str(dtype).removeprefix("torch.")
    identity = [revision or digest, number_format, version("transformers")]
    facts = kept_facts(facts_folder, identity, describe)
    embed_dim = facts.pop("embed_dim")
    return FrozenEncoder(
        "hf",
        lambda images: huggingface.preprocess(load()[0], images),
        lambda pixels: load()[1](pixel_values=pixels).last_hidden_state,
        embed_dim,
        device,
        dtype,
        autocast=False,
        description={
            "source": source,
            "revision": revision,
            "sha256": digest,
            **facts,
            "pooling": "mean over patch tokens",
            "dtype": number_format,
        },
        load=load,
    )


def kept_facts(
    folder: Path | None, identity: Sequence[Any], find: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Plain data on the model of this identity, which is found out once and kept in the folder.

    Raises:
        UserError: If the folder cannot be written.
    """
    if folder is None:
        return find()
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    content = read_sealed(folder / f"{name}.facts", FACTS_BYTES)
    if content is not None:
        return json.loads(content)
    facts = find()
    write_sealed(folder / f"{name}.facts", json.dumps(facts).encode().ljust(FACTS_BYTES))
    return facts


def count_parameters(network: nn.Module) -> int:
    """Weights of the network, position code included."""
    return sum(tensor.numel() for tensor in network.state_dict().values())
