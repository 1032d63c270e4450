"""I-JEPA models of Hugging Face: check and read a directory, export one of ours.

Configuration, processor and weights may come from a stranger: no code of a repository is run, only
the settings named here are read, and what does not fit together is refused before the first image.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa.checkpoint import Checkpoint, StateDict, check_size
from ijepa.errors import UserError
from ijepa.files import sha256, write_atomically, write_text
from ijepa.hub import BAD_FILES, BAD_MODELS, check_blob, first_line
from ijepa.model import LAYER_NORM_EPS

ANOTHER = "give an I-JEPA such as facebook/ijepa_vith14_1k, or a directory exported from one"
DAMAGED = "the files may be damaged or incomplete: download or export them again"
SUMS = "SHA256SUMS"
"""File of an export with the SHA-256 of the others, as `sha256sum` writes and checks it."""
LARGEST_JSON = 2**24
DIMENSIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIDES = {"image_size": 224, "patch_size": 16}
"""Sides and what transformers takes for them by default."""
# All that is taken from a config.json; transformers would follow many more, such as the names of
# code, kernels, quantisers and other files.
SETTINGS = (*DIMENSIONS, *SIDES, "num_channels", "qkv_bias", "hidden_act", "layer_norm_eps")
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


def check_model_files(folder: Path, source: str) -> dict[str, Any]:
    """Refuse what is no I-JEPA before anything large is read or built; returns its settings."""
    weights, texts = find_files(folder, source)
    config = read_json(folder / "config.json", source)
    if (kind := config.get("model_type")) != "ijepa":
        raise UserError(
            f"{source!r} is a {reprlib.repr(kind or 'nameless')} model, not an I-JEPA", hint=ANOTHER
        )
    names = [file.name for file in weights]
    for index in folder.glob("*.safetensors.index.json"):
        parts = read_json(index, source).get("weight_map")
        if not isinstance(parts, dict) or not all(part in names for part in parts.values()):
            raise UserError(f"{index} names weights that are not in {source!r}", hint=DAMAGED)
    try:
        check_sizes(config, sum(file.stat().st_size for file in weights))
    except ValueError as error:
        raise UserError(f"in config.json of {source!r} {error}", hint=DAMAGED) from error
    for file in (*weights, *texts):
        check_blob(file)
    check_sums(folder)
    return {name: config[name] for name in SETTINGS if name in config}


def find_files(folder: Path, source: str) -> tuple[list[Path], list[Path]]:
    """The weights and the JSON files of a directory, all of them ordinary files."""
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{source!r} has no {name}", hint=ANOTHER)
    weights, texts = list(folder.glob("*.safetensors")), list(folder.glob("*.json"))
    if not weights:
        raise UserError(
            f"{source!r} has no *.safetensors file", hint="pickled weights are not loaded"
        )
    # A pipe or a device would never end.
    for file in (*weights, *texts):
        if not file.is_file() or (file in texts and file.stat().st_size > LARGEST_JSON):
            raise UserError(f"{file} is no ordinary file of a model", hint=DAMAGED)
    return weights, texts


def read_json(path: Path, source: str) -> dict[str, Any]:
    """The object in a JSON file of a model."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path.name} of {source!r}: {error}", hint=DAMAGED) from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} of {source!r} holds no settings", hint=DAMAGED)
    return content


def check_sizes(config: dict[str, Any], num_bytes: int) -> None:
    """Raise ValueError for sizes that no Vision Transformer has or these weights cannot fill."""
    (height, width), (patch_height, patch_width) = (
        check_sides(name, config.get(name, default)) for name, default in SIDES.items()
    )
    if config.get("quantization_config") is not None:
        raise ValueError("quantization_config is set: only weights as they were trained are read")
    if config.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels must be 3, got {reprlib.repr(config['num_channels'])}")
    # Absent ones have defaults.
    dim, depth, _, hidden = (check_size(name, config.get(name, 1)) for name in DIMENSIONS)
    # Less than the blocks and the position code have: transformers would make what is missing out
    # of random numbers.
    tokens = (height // patch_height) * (width // patch_width)
    if dim * max(depth * (dim + hidden), tokens) > num_bytes:
        raise ValueError(
            f"hidden_size {dim}, num_hidden_layers {depth} and {tokens} patches need more than the "
            f"{num_bytes} bytes of weights there are"
        )


def check_sides(name: str, value: Any) -> tuple[int, int]:
    """Height and width of an image or a patch, given as a pair or as one number."""
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"{name} must be one or two whole numbers, got {reprlib.repr(value)}")
    return check_size(name, pair[0]), check_size(name, pair[1])


def check_sums(folder: Path) -> None:
    """Compare the files of an export with its SHA256SUMS; other directories have no sums.

    Raises:
        UserError: If a file differs or is missing.
    """
    path = folder / SUMS
    if not path.is_file():
        return
    for line in path.read_text("utf-8", errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        file = folder / Path(name).name
        if not file.is_file() or sha256(file) != expected:
            raise UserError(
                f"{file} does not have its sum in {SUMS}",
                hint=f"copy the directory again, or delete {path} if you changed it yourself",
            )


@contextmanager
def loading_errors(source: str) -> Iterator[None]:
    """Turn what transformers raises on damaged or foreign files into errors for the user."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (*BAD_FILES, *BAD_MODELS, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load {source!r}: {first_line(error)}", hint=DAMAGED) from error


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers from writing reports and progress bars to the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_model(folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """Processor and network of a checked directory; the weights are read straight into `dtype`.

    Args:
        folder: The directory.
        settings: What `check_model_files` took from its configuration.
        dtype: Number format of the weights.

    Raises:
        ValueError: If tensors are missing or misshapen, which transformers would fill with random
            numbers, or not finite, or the processor does not fit. `loading_errors` deals with all
            else.
    """
    from transformers import AutoImageProcessor, IJepaConfig, IJepaModel

    with silent_transformers():
        # Without this refusal transformers asks on the terminal whether to run foreign code.
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        loaded: Any = IJepaModel.from_pretrained(
            folder,
            config=IJepaConfig(**settings),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            add_pooling_layer=False,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # they are named below, not ignored
            output_loading_info=True,
        )
    model, report = loaded
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(f"tensor {name!r} has shape {tuple(found)}, expected {tuple(expected)}")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks the tensor {missing[0]!r} ({len(missing)} missing)")
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"tensor {name!r} has NaN or infinite values")
    check_processor(processor, model.config.image_size)
    return processor, model.eval().requires_grad_(False)


def preprocess(processor: Any, images: Any) -> Tensor:
    """Normalised pixels (b, 3, height, width) as the model's own processor makes them."""
    # The layout is stated because a 3 pixel wide image would be taken for one with channels last.
    return processor(images=list(images), return_tensors="pt", input_data_format="channels_first")[
        "pixel_values"
    ]


def check_processor(processor: Any, side: Any) -> None:
    """Try the processor on one image.

    Raises:
        ValueError: If its output does not fit the network or is not finite.
    """
    height, width = side if isinstance(side, list | tuple) else (side, side)
    for name in ("size", "crop_size", "pad_size"):
        for value in dict(getattr(processor, name, None) or {}).values():
            if value is not None and not 1 <= value <= 16 * max(height, width):
                raise ValueError(f"{name} {value!r} of its processor does not fit {side} pixels")
    pixels = preprocess(processor, [torch.zeros(3, 48, 40, dtype=torch.uint8)])
    if pixels.shape != (1, 3, height, width):
        raise ValueError(
            f"its processor makes images of {tuple(pixels.shape[2:])} pixels, "
            f"its network needs {(height, width)}"
        )
    if not pixels.isfinite().all():
        raise ValueError("its processor makes pixels that are not finite: check mean and std")


def describe_processor(processor: Any) -> dict[str, Any]:
    """Resize and normalisation in words and numbers."""
    from PIL import Image

    facts: dict[str, Any] = {"resize": "none", "mean": None, "std": None}
    if processor.do_resize:
        name = Image.Resampling(processor.resample).name.lower()
        smooth = name in ("bilinear", "bicubic", "lanczos")
        facts["resize"] = f"{name}, antialiased" if smooth else name
    if processor.do_normalize:
        for key, value in (("mean", processor.image_mean), ("std", processor.image_std)):
            facts[key] = [value] * 3 if isinstance(value, int | float) else list(value)
    return facts


def hash_model(folder: Path) -> str:
    """One SHA-256 over the weight files and the configurations of a directory."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


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
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
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
    weights = safetensors.torch.save(
        to_huggingface(checkpoint.state_dict), metadata={"format": "pt"}
    )
    write_atomically(folder / "model.safetensors", lambda file: file.write(weights))
    write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
    write_text(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    names = ("config.json", "model.safetensors", "preprocessor_config.json")
    write_text(folder / SUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in names))


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
