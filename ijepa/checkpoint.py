"""Checkpoints: our format, the authors' released one, and export to Hugging Face's IJepaModel.

Ours is a ``torch.save`` of plain numbers, strings and tensors: architecture, preprocessing and
provenance travel with the weights, so no flag has to repeat them. Everything is read with
``weights_only=True``: a file can never run code.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa.errors import UserError
from ijepa.files import write_atomically, write_text
from ijepa.model import LAYER_NORM_EPS, VisionTransformer, ViTConfig

FORMAT = "ijepa-compare/1"
WEIGHTS = ("target", "context")
# Statistics of ImageNet's pixels, which the authors' released encoders were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Head width 64 but for the huge and giant sizes (Assran et al. 2023, appendix A.1; Zhai et al.
# 2022, table 2): the files do not tell it.
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """An encoder as read from a file: architecture, weights, preprocessing and provenance."""

    config: ViTConfig
    state_dict: StateDict
    weights: str
    """`target` or `context`: which of the two encoders this is."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int | None
    """Epochs it was really trained for; None if the file does not say."""
    training: dict[str, Any]

    def build(self) -> VisionTransformer:
        """The encoder with these weights, in float32 and evaluation mode."""
        encoder = VisionTransformer(self.config)
        encoder.load_state_dict({name: value.float() for name, value in self.state_dict.items()})
        return encoder.eval().requires_grad_(False)


def save_checkpoint(
    path: Path,
    config: ViTConfig,
    encoders: Mapping[str, VisionTransformer],
    normalization: tuple[float, float],
    training: dict[str, Any],
) -> None:
    """Write the encoders (`target`, `context`) in float16 with all that is needed to use them.

    Float16 halves the file; the rounding is far below what the embeddings' bfloat16 arithmetic
    does. `training` must be plain data and hold `epochs`.
    """
    mean, std = normalization
    content = {
        "format": FORMAT,
        "architecture": asdict(config),
        "preprocessing": {"mean": [mean] * 3, "std": [std] * 3},
        "training": training,
        "weights": {
            which: {name: value.half().cpu() for name, value in encoder.state_dict().items()}
            for which, encoder in encoders.items()
        },
    }
    write_atomically(path, lambda file: torch.save(content, file))


def read_torch_file(path: Path) -> Any:
    """Read tensors and plain data; code in the file is refused, never run.

    Raises:
        UserError: If the file is missing, truncated, of another kind, or holds code.
    """
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}", hint="check the path, or train one: scripts/train_ijepa.py"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds something else than tensors and plain data and was not loaded",
            hint="use a checkpoint of weights alone from a source you trust; code is never run",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a readable PyTorch file: {str(error).splitlines()[0]}",
            hint="it may be truncated: copy or download it again",
        ) from error


def load_checkpoint(path: Path, weights: str = "target") -> Checkpoint:
    """Load one encoder, of our format or the authors' ``.pth.tar``.

    Args:
        path: The file.
        weights: `target` (the averaged encoder that the paper evaluates) or `context`.

    Raises:
        UserError: If the file cannot be read or used; says which key or shape is wrong.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint", hint=EXPECTED)
    if content.get("format") == FORMAT:
        checkpoint = from_own(content, weights, path)
    elif "encoder" in content or "target_encoder" in content:
        checkpoint = from_reference(content, weights, path)
    else:
        raise UserError(
            f"{path} has none of the keys 'format', 'encoder', 'target_encoder'", hint=EXPECTED
        )
    check_weights(checkpoint, path)
    return checkpoint


EXPECTED = "expected a file of scripts/train_ijepa.py or an I-JEPA checkpoint of its authors"


def from_own(content: dict[str, Any], weights: str, path: Path) -> Checkpoint:
    """Interpret our own format."""
    try:
        encoders, preprocessing = content["weights"], content["preprocessing"]
        config = ViTConfig(**content["architecture"])
        training = dict(content["training"])
        mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        available = sorted(encoders)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is incomplete: {error}", hint="write it again with scripts/train_ijepa.py"
        ) from error
    if weights not in encoders:
        raise missing_weights(weights, available, path)
    return Checkpoint(
        config, dict(encoders[weights]), weights, mean, std, training.get("epochs"), training
    )


def from_reference(content: dict[str, Any], weights: str, path: Path) -> Checkpoint:
    """Interpret a ``.pth.tar`` of facebookresearch/ijepa: sizes are read off the tensors."""
    keys = {"target": "target_encoder", "context": "encoder"}
    if keys[weights] not in content:
        raise missing_weights(weights, [w for w in WEIGHTS if keys[w] in content], path)
    raw = content[keys[weights]]
    if not isinstance(raw, Mapping) or not all(isinstance(v, Tensor) for v in raw.values()):
        raise UserError(f"{keys[weights]!r} in {path} is not a set of tensors", hint=EXPECTED)
    # DistributedDataParallel puts `module.` before every name.
    state_dict = {name.removeprefix("module."): value for name, value in raw.items()}
    training = {"epochs": content.get("epoch"), "source": "facebookresearch/ijepa"}
    return Checkpoint(
        infer_config(state_dict, path),
        state_dict,
        weights,
        IMAGENET_MEAN,
        IMAGENET_STD,
        content.get("epoch"),
        training,
    )


def infer_config(state_dict: StateDict, path: Path) -> ViTConfig:
    """Read the architecture off the shapes of the tensors; heads follow from the known widths."""
    depth = len({m[1] for name in state_dict if (m := re.match(r"blocks\.(\d+)\.", name))})
    try:
        embed_dim, _, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
        num_patches = state_dict["pos_embed"].shape[1]
        hidden_dim = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} has no usable tensor {error}", hint=EXPECTED) from error
    if embed_dim not in NUM_HEADS:
        raise UserError(
            f"{path} does not tell its number of attention heads and width {embed_dim} is unknown",
            hint=f"known widths: {', '.join(map(str, NUM_HEADS))}; or save it in our own format",
        )
    image_size = round(num_patches**0.5) * patch_size
    return ViTConfig(
        image_size, patch_size, embed_dim, depth, NUM_HEADS[embed_dim], hidden_dim / embed_dim
    )


def missing_weights(weights: str, available: list[str], path: Path) -> UserError:
    """The error for an encoder that a file does not hold."""
    return UserError(
        f"{path} has no {weights} encoder",
        hint=f"it has: {', '.join(available) or 'none'}; pass --local-weights",
    )


def check_weights(checkpoint: Checkpoint, path: Path) -> None:
    """Compare names and shapes with the architecture before anything large is built.

    Raises:
        UserError: Naming the first tensor that is missing, unknown, misshapen or not finite.
    """
    with torch.device("meta"):
        expected = VisionTransformer(checkpoint.config).state_dict()
    found = checkpoint.state_dict
    again = "the file does not fit its own architecture; write or download it again"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{path} lacks the tensor {name!r}", hint=again)
        if name not in expected:
            raise UserError(f"{path} has an unknown tensor {name!r}", hint=again)
        if found[name].shape != expected[name].shape:
            raise UserError(
                f"tensor {name!r} in {path} has shape {tuple(found[name].shape)}, "
                f"expected {tuple(expected[name].shape)}",
                hint=again,
            )
        if not found[name].isfinite().all():
            raise UserError(f"tensor {name!r} in {path} has NaN or infinite values", hint=again)


def to_huggingface(state_dict: StateDict) -> StateDict:
    """Rename the encoder's tensors to those of transformers' IJepaModel; q, k and v are split."""
    renamed: StateDict = {}
    for name, value in state_dict.items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                target = name.replace("attn.qkv", f"attention.{letter}_proj")
                renamed[target.replace("blocks.", "layers.")] = part.contiguous()
            continue
        for ours, theirs in HUGGINGFACE_NAMES:
            name = re.sub(ours, theirs, name)
        renamed[name] = value
    return renamed


HUGGINGFACE_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^blocks\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^norm\.", "layernorm."),
)


def export_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a directory that ``IJepaModel.from_pretrained`` and ``AutoImageProcessor`` load.

    Weights keep the precision they are stored in; the configuration asks for float32 arithmetic.
    """
    import safetensors.torch
    from transformers import IJepaConfig, ViTImageProcessor

    config = checkpoint.config
    hf_config = IJepaConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=int(config.embed_dim * config.mlp_ratio),
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=LAYER_NORM_EPS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype="float32",
        architectures=["IJepaModel"],
    )
    size = {"height": config.image_size, "width": config.image_size}
    processor = ViTImageProcessor(
        size=size, image_mean=list(checkpoint.mean), image_std=list(checkpoint.std)
    )
    tensors = to_huggingface(checkpoint.state_dict)
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    write_atomically(
        folder / "model.safetensors",
        lambda file: file.write(safetensors.torch.save(tensors, metadata={"format": "pt"})),
    )
    write_text(folder / "config.json", hf_config.to_json_string())
    described = {
        key: value
        for key, value in json.loads(processor.to_json_string()).items()
        if value is not None
    }
    write_text(folder / "preprocessor_config.json", json.dumps(described, indent=2) + "\n")
