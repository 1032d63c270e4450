"""Checkpoints: our own format and the one of the authors' released encoders.

Ours is a ``torch.save`` of plain numbers, strings and tensors: architecture, preprocessing and
provenance travel with the weights, so no flag has to repeat them. Everything is read with
``weights_only=True``: a file can never run code. Every byte is checked against the sums in the file
and every field before it is used.
"""

import pickle
import pickletools
import re
import reprlib
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ijepa.errors import UserError
from ijepa.files import write_atomically
from ijepa.model import VisionTransformer, ViTConfig

FORMAT = "ijepa-compare/1"
WEIGHTS = ("target", "context")
# Statistics of ImageNet's pixels, which the authors' released encoders were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Width to attention heads in the authors' code, up to ViT-G: the files do not tell the heads.
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
# Above these a size is a damaged number, not a Vision Transformer; nothing of it is built.
LARGEST_SIZE, LARGEST_DEPTH = 2**16, 2**10
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a pickle of tensors and plain data may name. weights_only allows more: bytearray(10**10) or a
# tensor by its shape, which take any memory out of a few bytes.
PLAIN_GLOBALS = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w+Storage"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter|meta_tensor_no_storage)"
    r"|torch (Size|device|b?float\d\w*|u?int\d+|bool)"
)
# What zipfile, pickle and torch.load raise on damaged files, found by flipping, cutting and
# inventing bytes.
DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)
ALSO_DAMAGED = (pickle.UnpicklingError, AssertionError, OverflowError, MemoryError, struct.error)
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error)
EXPECTED = "expected a file of scripts/train_ijepa.py or an I-JEPA checkpoint of its authors"

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
    networks: Mapping[str, nn.Module],
    normalization: tuple[float, float],
    training: dict[str, Any],
) -> None:
    """Write `target` and `context` encoder in float16 with all that is needed to use them.

    A `predictor` among the networks is kept for who trains them further.

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
            which: {name: value.half().cpu() for name, value in network.state_dict().items()}
            for which, network in networks.items()
        },
    }
    write_atomically(path, lambda file: torch.save(content, file))


def read_torch_file(path: Path) -> Any:
    """Read tensors and plain data; code in the file is refused, never run.

    Tensors stay on the disk until they are used, so a large file's optimizer state costs nothing.

    Raises:
        UserError: If the file is missing, damaged, of another kind, or holds code.
    """
    try:
        if not path.is_file():
            raise UserError(
                f"no checkpoint at {path}",
                hint="check the path, or train one: scripts/train_ijepa.py",
            )
        check_archive(path)
        with warnings.catch_warnings():
            # Of unusual pickles, which either load or end below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*DAMAGED, *ALSO_DAMAGED, *DAMAGED_ZIP) as error:
        reason = str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise UserError(
            f"{path} is not a readable PyTorch file ({reason})",
            hint="copy or download it again; one from before PyTorch 1.6 has to be saved anew",
        ) from error


def check_archive(path: Path) -> None:
    """Compare every byte of a file of ``torch.save`` with its checksums, and look for code.

    ``torch.load`` alone reads a flipped bit as another weight.

    Raises:
        UserError: If it holds code.
        zipfile.BadZipFile: If it is damaged or would grow on reading; `DAMAGED` errors likewise.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # torch.save does not compress. So nothing read is larger than the file.
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("it is compressed")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile("its parts overlap")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
        for record in records:
            if record.filename.endswith(".pkl"):
                check_pickle(path, archive.read(record))


def check_pickle(path: Path, pickled: bytes) -> None:
    """Raise UserError if a pickle names more than tensors and plain data need."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in ("STACK_GLOBAL", "INST") or (
            operation.name == "GLOBAL" and not PLAIN_GLOBALS.fullmatch(argument)
        ):
            named = str(argument or "unnamed").replace(" ", ".")[:80]
            raise UserError(
                f"{path} holds code or objects ({named!r}) and was not loaded",
                hint="use a checkpoint of tensors and plain data alone; code is never run",
            )


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
    try:
        if content.get("format") == FORMAT:
            checkpoint = from_own(content, weights)
        elif "encoder" in content or "target_encoder" in content:
            checkpoint = from_reference(content, weights)
        else:
            raise ValueError("it has none of the keys 'format', 'encoder', 'target_encoder'")
        check_weights(checkpoint)
    except KeyError as error:
        raise UserError(f"{path} lacks the entry {error}", hint=EXPECTED) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot use {path}: {error}", hint=EXPECTED) from error
    return checkpoint


def load_predictor(path: Path) -> StateDict | None:
    """The predictor's tensors, None where a checkpoint that `load_checkpoint` reads has none.

    Raises:
        UserError: If they are no tensors of finite numbers.
    """
    content = read_torch_file(path)
    if content.get("format") != FORMAT or "predictor" not in content["weights"]:
        return None
    try:
        found = check_tensors("the predictor", content["weights"]["predictor"])
        if not all(value.isfinite().all() for value in found.values()):
            raise ValueError("the predictor has NaN or infinite values")
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot use {path}: {error}", hint=EXPECTED) from error
    return found


def from_own(content: dict[str, Any], weights: str) -> Checkpoint:
    """Interpret our own format; KeyError, TypeError or ValueError say what is wrong."""
    encoders = check_mapping("weights", content["weights"])
    preprocessing = check_mapping("preprocessing", content["preprocessing"])
    training = check_mapping("training", content["training"])
    check_epochs("planned_epochs", training.get("planned_epochs"))
    return Checkpoint(
        read_config(check_mapping("architecture", content["architecture"])),
        pick_weights(encoders, weights, WEIGHTS),
        weights,
        read_channels("mean", preprocessing["mean"]),
        read_channels("std", preprocessing["std"]),
        check_epochs("epochs", training["epochs"]),
        training,
    )


def from_reference(content: dict[str, Any], weights: str) -> Checkpoint:
    """Interpret a ``.pth.tar`` of facebookresearch/ijepa: sizes are read off the tensors."""
    raw = pick_weights(content, weights, ("target_encoder", "encoder"))
    # DistributedDataParallel puts `module.` before every name.
    state_dict = {name.removeprefix("module."): value for name, value in raw.items()}
    epochs = check_epochs("epoch", content.get("epoch"))
    return Checkpoint(
        infer_config(state_dict),
        state_dict,
        weights,
        IMAGENET_MEAN,
        IMAGENET_STD,
        epochs,
        {"epochs": epochs, "source": "facebookresearch/ijepa"},
    )


def pick_weights(encoders: Mapping[str, Any], weights: str, keys: tuple[str, str]) -> StateDict:
    """The tensors of the encoder `weights`; `keys` are the file's words for target and context."""
    words = dict(zip(WEIGHTS, keys, strict=True))
    if words[weights] not in encoders:
        available = [which for which in WEIGHTS if words[which] in encoders]
        raise UserError(
            f"the checkpoint has no {weights} encoder",
            hint=f"choose --local-weights {available[0]}" if available else EXPECTED,
        )
    return check_tensors(f"the {weights} encoder", encoders[words[weights]])


def check_tensors(network: str, value: Any) -> StateDict:
    """The value, if it maps names to tensors of real numbers."""
    found = check_mapping(network, value)
    for name, value in found.items():
        # The last condition is about tensors that repeat a few stored numbers: they would fill
        # any memory.
        if (
            not isinstance(value, Tensor)
            or value.dtype not in FLOAT_DTYPES
            or value.device.type != "cpu"
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise ValueError(f"{name!r} is not a dense tensor of floating-point numbers")
    return found


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """The value, if it is a dictionary with names as keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a dictionary, got {reprlib.repr(value)}")
    return value


def check_size(name: str, value: Any) -> int:
    """The value, if it is a whole number that a Vision Transformer may have."""
    largest = LARGEST_DEPTH if name in ("depth", "num_hidden_layers") else LARGEST_SIZE
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(
            f"{name} must be a whole number from 1 to {largest}, got {reprlib.repr(value)}"
        )
    return value


def check_epochs(name: str, value: Any) -> int | None:
    """The value, if it is a number of epochs or None."""
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{name} must be a whole number from 0, got {reprlib.repr(value)}")
    return value


def read_config(sizes: dict[str, Any]) -> ViTConfig:
    """The architecture with these sizes, all of which must be given."""
    names = [field.name for field in fields(ViTConfig)]
    if set(sizes) != set(names):
        raise ValueError(f"architecture must have {', '.join(names)}; got {', '.join(sizes)}")
    for name in names:
        if name != "mlp_ratio":
            check_size(name, sizes[name])
    ratio = sizes["mlp_ratio"]
    if type(ratio) not in (int, float) or not 1 / sizes["embed_dim"] <= ratio <= LARGEST_SIZE:
        raise ValueError(f"mlp_ratio must be a positive number, got {reprlib.repr(ratio)}")
    return ViTConfig(**{**sizes, "mlp_ratio": float(ratio)})


def read_channels(name: str, values: Any) -> tuple[float, ...]:
    """Three numbers, one per colour channel; a `std` must be positive."""
    lowest = 1e-6 if name == "std" else -1e6
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(type(value) in (int, float) and lowest <= value <= 1e6 for value in values)
    ):
        raise ValueError(f"{name} must be three finite numbers, got {reprlib.repr(values)}")
    return tuple(float(value) for value in values)


def count_blocks(state_dict: StateDict) -> int:
    """How many Transformer blocks the names speak of."""
    return len({found[1] for name in state_dict if (found := re.match(r"blocks\.(\d+)\.", name))})


def infer_config(state_dict: StateDict) -> ViTConfig:
    """Read the architecture off the shapes of the tensors; heads follow from the known widths."""
    width, _, patch_size, _ = shape_of(state_dict, "patch_embed.proj.weight", 4)
    _, num_patches, _ = shape_of(state_dict, "pos_embed", 3)
    hidden_dim, _ = shape_of(state_dict, "blocks.0.mlp.fc1.weight", 2)
    if width not in NUM_HEADS:
        raise ValueError(
            f"it does not tell its number of attention heads, and for width {width} it is not "
            f"known (only for {', '.join(map(str, NUM_HEADS))}); save it in our own format"
        )
    return read_config(
        {
            "image_size": round(num_patches**0.5) * patch_size,
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": count_blocks(state_dict),
            "num_heads": NUM_HEADS[width],
            "mlp_ratio": hidden_dim / width,
        }
    )


def shape_of(state_dict: StateDict, name: str, num_dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor, which must have that many dimensions."""
    if state_dict[name].ndim != num_dimensions:
        raise ValueError(f"{name} must have {num_dimensions} dimensions")
    return tuple(state_dict[name].shape)


def check_weights(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with the architecture before anything large is built.

    Raises:
        ValueError: Naming the first tensor that is missing, unknown, misshapen or not finite.
    """
    found, depth = checkpoint.state_dict, checkpoint.config.depth
    if (blocks := count_blocks(found)) != depth:
        raise ValueError(f"its architecture says depth {depth}, its weights have {blocks} blocks")
    with torch.device("meta"):
        expected = VisionTransformer(checkpoint.config).state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"it lacks the tensor {name!r}")
        if name not in expected:
            raise ValueError(f"it has an unknown tensor {name!r}")
        if found[name].shape != expected[name].shape:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(found[name].shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
        if not found[name].isfinite().all():
            raise ValueError(f"tensor {name!r} has NaN or infinite values")
