"""Checkpoints: our own format, the authors' released encoders, and other files with their names.

Ours is a ``torch.save`` of plain numbers, strings and tensors: architecture, preprocessing and
provenance travel with the weights. Files are read with ``weights_only=True`` or as safetensors, so
none can run code. What a file does not record is assumed, and `notes` says so.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite, isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ijepa.errors import UserError, counted
from ijepa.files import DAMAGED, check_archive, pointer_hint, write_atomically, write_text
from ijepa.model import LAYER_NORM_EPS, VisionTransformer, ViTConfig

FORMAT = "ijepa-compare/1"
# Mean and deviation of ImageNet's pixels, which the authors' released encoders were trained with.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The authors' ViT-H, ViT-g and ViT-G, whose heads do not have 64 channels.
NUM_HEADS = {1280: 16, 1408: 16, 1664: 16}
PATCHES = "patch_embed.proj.weight"
# Words in front of a tensor's name that say which encoder it belongs to.
KINDS = dict.fromkeys(("context", "context_encoder", "student", "online", "encoder"), "context")
KINDS |= dict.fromkeys(("target", "target_encoder", "teacher", "ema", "model_ema"), "target")
# The names that released files have; transformers of every version reads these.
HUGGINGFACE_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)
EXPECTED = (
    "readable are files of scripts/train_ijepa.py, .pth.tar files of the I-JEPA authors, any file "
    f"with their names ({PATCHES}, ...), Hugging Face directories and hub ids"
)

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """An encoder as read from a file: architecture, weights, preprocessing and provenance."""

    config: ViTConfig
    state_dict: StateDict
    weights: str | None
    """`target` or `context`: which of the two encoders this is; None if the file does not say."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int | None
    """Epochs of training so far; None if the file does not say."""
    training: dict[str, Any]
    losses: str | None
    """The terms of the training loss in words; None if unknown."""
    predictor: StateDict = field(default_factory=dict)
    """Its tensors in a file of ours that has one: training continues with them."""
    notes: tuple[str, ...] = ()
    """What was assumed or chosen, one sentence each."""

    def build(self) -> VisionTransformer:
        """The encoder with these weights, in float32 and evaluation mode."""
        with torch.device("meta"):  # random weights, which take time, would only be replaced
            encoder = VisionTransformer(self.config)
        encoder.load_state_dict(self.state_dict, assign=True)
        return encoder.float().eval().requires_grad_(False)


def save_checkpoint(
    path: Path,
    config: ViTConfig,
    networks: Mapping[str, nn.Module],
    normalization: tuple[float, float],
    training: dict[str, Any],
) -> None:
    """Write `target` and `context` encoder in float16 with all that is needed to use them.

    A `predictor` among the networks is stored so that training can continue. Float16 halves the
    file; its rounding is far below that of bfloat16 arithmetic. `training` must be plain data and
    hold `epochs`.
    """
    mean, std = normalization
    content = {
        "format": FORMAT,
        "architecture": asdict(config),
        "preprocessing": {"mean": [mean] * 3, "std": [std] * 3},
        "training": training,
        "weights": {
            which: {name: value.half().cpu() for name, value in network.state_dict().items()}
            for which, network in networks.items()
        },
    }
    write_atomically(path, lambda file: torch.save(content, file))


def read_torch_file(path: Path) -> Any:
    """Read tensors and plain data; code in the file is refused, never run.

    Tensors stay on disk until they are used, so a large optimizer state costs no memory.

    Raises:
        UserError: If the file is missing, damaged, of another kind, or needs code to be read.
    """
    import safetensors.torch

    if not os.path.isfile(path):
        hint = "check the path, or train one: scripts/train_ijepa.py"
        raise UserError(f"no checkpoint at {path}", hint=hint)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        check_archive(path)  # a flipped bit would load as another weight
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*DAMAGED, MemoryError, safetensors.SafetensorError) as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} contains code or objects ({code[1]}) and was not loaded",
                hint="save only its tensors: torch.save(model.state_dict(), 'weights.pth')",
            ) from error
        reason = str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise UserError(
            f"{path} is not a readable PyTorch file ({reason})",
            hint=pointer_hint(path)
            or "copy or download it again; a file from before PyTorch 1.6 has to be saved again",
        ) from error


def load_checkpoint(
    path: Path, weights: str = "target", num_heads: int | None = None
) -> Checkpoint:
    """Load one encoder from any file that has the tensor names of the I-JEPA authors.

    Args:
        path: The file.
        weights: `target` (the averaged encoder that the paper evaluates) or `context`. If a file of
            another format has only one encoder, that one is taken and `notes` says so.
        num_heads: Attention heads, for files that do not record them.

    Raises:
        UserError: If the file cannot be read or used; says which keys or shapes are wrong.
    """
    content = read_torch_file(path)
    try:
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
        if content.get("format") == FORMAT:
            checkpoint = from_own(content, weights, num_heads)
        else:
            checkpoint = from_other(path.name, content, weights, num_heads)
        check_weights(checkpoint)
    except KeyError as error:
        raise UserError(f"{path} lacks the entry {error}", hint=EXPECTED) from error
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"cannot use {path}: {error}", hint=EXPECTED) from error
    return checkpoint


def from_own(content: dict[str, Any], weights: str, num_heads: int | None) -> Checkpoint:
    """Interpret our own format; KeyError, TypeError or ValueError say what is wrong."""
    if weights not in content["weights"]:
        raise ValueError(f"it has no {weights} encoder, choose another with --local-weights")
    state_dict = dict(named_tensors(content["weights"][weights]))
    heads, training = content["architecture"]["num_heads"], dict(content["training"])
    if num_heads not in (None, heads):
        raise ValueError(f"it records {heads} attention heads, not {num_heads}")
    mean, std = (tuple(map(float, content["preprocessing"][name])) for name in ("mean", "std"))
    if not len(mean) == len(std) == 3 or not all(map(isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std} must be three finite numbers, std positive")
    config, losses = infer_config(state_dict, heads), losses_of(training)
    predictor = dict(named_tensors(content["weights"].get("predictor") or {}))
    epochs = training["epochs"]
    return Checkpoint(config, state_dict, weights, mean, std, epochs, training, losses, predictor)


def losses_of(training: Mapping[str, Any]) -> str | None:
    """The terms of the loss that a file of ours has settings for; None if it has none."""
    if "settings" not in training:
        return None
    weights = {"matching_weight": "view matching (InfoNCE)", "spread_weight": "variance/covariance"}
    extra = [term for name, term in weights.items() if training["settings"].get(name)]
    return " + ".join(["I-JEPA prediction", *extra])


def from_other(name: str, content: Any, weights: str, num_heads: int | None) -> Checkpoint:
    """Interpret any other file: sizes are read from the tensors, the rest is assumed and noted."""
    tensors = dict(named_tensors(content))
    prefix, kind = find_encoder(tensors, weights)
    state_dict = {key[len(prefix) :]: tensors[key] for key in tensors if key.startswith(prefix)}
    notes = [f"{name} does not record its pixel normalization: assumed that of ImageNet"]
    if kind != weights:
        under = f", under {prefix!r}" if prefix else ""
        notes.append(f"{name} has no {weights} encoder: took its {kind or 'only'} encoder{under}")
    if num_heads is None:
        width = len(state_dict[PATCHES])
        if width % 32:
            raise ValueError(f"attention heads for width {width} are unknown: --local-num-heads")
        num_heads = NUM_HEADS.get(width) or width // (32 if width % 64 else 64)
        notes.append(
            f"{name} does not record its attention heads: assumed {num_heads} "
            f"({width // num_heads} channels each); --local-num-heads changes it"
        )
    authors = content.keys() >= {"encoder", "predictor", "target_encoder"}
    losses = "I-JEPA prediction" if authors else None
    epochs = content["epoch"] if isinstance(content.get("epoch"), int) else None
    config, (mean, std) = infer_config(state_dict, num_heads), IMAGENET
    return Checkpoint(config, state_dict, kind, mean, std, epochs, {}, losses, notes=tuple(notes))


def named_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every dense floating-point tensor in nested dictionaries, its keys joined by dots."""
    for key, value in content.items():
        dense = isinstance(value, Tensor) and value.is_cpu and value.layout == torch.strided
        if isinstance(value, dict):
            yield from named_tensors(value, f"{prefix}{key}.")
        elif dense and value.is_floating_point():
            yield f"{prefix}{key}", value


def find_encoder(tensors: StateDict, weights: str) -> tuple[str, str | None]:
    """What stands before the names of the wanted encoder, and which kind this says it is.

    Raises:
        ValueError: If the file has no encoder, or several of which none is preferred.
    """
    kinds = {
        prefix: next((KINDS[word] for word in prefix.split(".") if word in KINDS), None)
        for prefix in (key.removesuffix(PATCHES) for key in tensors if key.endswith(PATCHES))
    }
    for wanted in (weights, None, "target", "context"):
        found = [prefix for prefix, kind in kinds.items() if kind == wanted]
        if len(found) == 1:
            return found[0], wanted
    names = ", ".join(map(repr, [*(kinds or tensors)][:5]))
    if kinds:
        raise ValueError(f"it has several encoders, under {names}")
    found = counted(len(tensors), "tensor")
    raise ValueError(f"no name ends in {PATCHES}; it has {found}: {names}, ...")


def infer_config(state_dict: StateDict, num_heads: int) -> ViTConfig:
    """The architecture according to the shapes of the tensors."""
    shape = state_dict[PATCHES].shape
    if len(shape) != 4:
        raise ValueError(f"{PATCHES} has shape {tuple(shape)}: it is of no encoder of images")
    width, _, patch_size, _ = shape
    _, num_patches, _ = state_dict["pos_embed"].shape
    hidden_dim, _ = state_dict["blocks.0.mlp.fc1.weight"].shape
    blocks = {found[1] for name in state_dict if (found := re.match(r"blocks\.(\d+)\.", name))}
    side = isqrt(num_patches) * patch_size
    return ViTConfig(side, patch_size, width, len(blocks), num_heads, hidden_dim / width)


def check_weights(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless exactly the right tensors are there and finite."""
    with torch.device("meta"):
        network = VisionTransformer(checkpoint.config)
    try:
        network.load_state_dict(checkpoint.state_dict, assign=True)
    except RuntimeError as error:  # several lines that name all wrong tensors
        raise ValueError(" ".join(str(error).split())) from error
    for name, value in (*checkpoint.state_dict.items(), *checkpoint.predictor.items()):
        if not value.float().isfinite().all():
            raise ValueError(f"{name!r} has NaN or infinite values")


def export_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a directory that ``IJepaModel.from_pretrained`` and ``AutoImageProcessor`` load.

    Weights keep the precision they are stored in; the configuration asks for float32 arithmetic.
    """
    import safetensors.torch

    config = checkpoint.config
    described = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "dtype": "float32",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": round(config.embed_dim * config.mlp_ratio),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "ijepa_training": {
            "recipe": checkpoint.training.get("recipe"),
            "epochs": checkpoint.epochs,
            "planned_epochs": checkpoint.training.get("planned_epochs"),
            "losses": checkpoint.losses,
        },
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 2,  # Pillow's number for bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(checkpoint.mean),
        "image_std": list(checkpoint.std),
    }
    weights = safetensors.torch.save(to_huggingface(checkpoint.state_dict), {"format": "pt"})
    write_atomically(folder / "model.safetensors", lambda file: file.write(weights))
    write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
    write_text(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")


def to_huggingface(state_dict: StateDict) -> StateDict:
    """Rename the encoder's tensors to those of transformers' IJepaModel; q, k and v are split."""
    renamed: StateDict = {}
    for name, value in state_dict.items():
        for ours, theirs in HUGGINGFACE_NAMES:
            name = re.sub(ours, theirs, name)
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                # Copies, because safetensors refuses tensors that share memory.
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = piece.clone()
        else:
            renamed[name] = value.contiguous()
    return renamed
