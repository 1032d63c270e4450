"""I-JEPA models of Hugging Face: read one from the hub or a directory, export one of ours.

Configuration, processor and weights may come from a stranger: no code of a repository is run, and
what does not fit together is refused before the first image.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa.checkpoint import Checkpoint, StateDict, check_size
from ijepa.errors import UserError
from ijepa.files import sha256, write_atomically, write_text
from ijepa.model import LAYER_NORM_EPS

MODEL_FILES = [
    "config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
ANOTHER = "give an I-JEPA such as facebook/ijepa_vith14_1k, or a directory exported from one"
DAMAGED = "the files may be damaged or incomplete: download or export them again"
# What transformers raises on damaged files, found by damaging them.
BAD_FILES = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
BAD_MODELS = (RuntimeError, ImportError, AssertionError)
DIMENSIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIDES = ("image_size", "patch_size")
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


def resolve_model(source: str, offline: bool) -> tuple[Path, str | None]:
    """A directory as it is; else the hub's files in the local cache and their commit."""
    from huggingface_hub import errors, snapshot_download

    here = "or pass a local directory to --hf-model"
    try:
        if Path(source).is_dir():
            return Path(source), None
        folder = snapshot_download(source, allow_patterns=MODEL_FILES, local_files_only=offline)
    except errors.HFValidationError as error:
        raise UserError(
            f"{source!r} is neither a directory nor a hub id",
            hint="a hub id looks like facebook/ijepa_vith14_1k",
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"the hub model {source!r} is gated",
            hint=f"ask for access on its page and set HF_TOKEN, {here}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {source!r}",
            hint=f"check the spelling; if it is private set HF_TOKEN, {here}",
        ) from error
    # HTTPError is the base class of what the hub's HTTP client raises, lost connections included.
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        cause = error.__cause__ or error
        if offline or isinstance(cause, errors.OfflineModeIsEnabled):
            raise UserError(
                f"the hub model {source!r} is not, or not wholly, in the local cache",
                hint=f"run once with a network and without --offline or HF_HUB_OFFLINE, {here}",
            ) from error
        raise UserError(
            f"the hub model {source!r} could not be downloaded: {first_line(cause)}",
            hint=f"check the network and run again to go on where it stopped, {here}",
        ) from error
    return Path(folder), Path(folder).name


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_model_files(folder: Path, source: str) -> None:
    """Refuse what is no I-JEPA before anything large is read or built."""
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{source!r} has no {name}", hint=ANOTHER)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read config.json of {source!r}: {error}", hint=DAMAGED) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "ijepa":
        raise UserError(f"{source!r} is a {kind or 'nameless'} model, not an I-JEPA", hint=ANOTHER)
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{source!r} has no *.safetensors file", hint="pickled weights are not loaded"
        )
    try:
        check_sizes(config, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    except ValueError as error:
        raise UserError(f"in config.json of {source!r} {error}", hint=DAMAGED) from error


def check_sizes(config: dict[str, Any], num_bytes: int) -> None:
    """Raise ValueError for sizes that no Vision Transformer has or these weights cannot fill."""
    for name in SIDES:
        pair = config.get(name, 1)
        for side in pair if isinstance(pair, list) else [pair]:
            check_size(name, side)
    # Absent ones have defaults.
    width, depth, _, hidden = (check_size(name, config.get(name, 1)) for name in DIMENSIONS)
    # Less than each block has: transformers would make what is missing out of random numbers.
    if width * (width + hidden) * depth > num_bytes:
        raise ValueError(
            f"hidden_size {width} and num_hidden_layers {depth} need more than the {num_bytes} "
            "bytes of weights there are"
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


def read_model(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Processor and network of a checked directory; the weights are read straight into `dtype`.

    Raises:
        ValueError: If tensors are missing or misshapen, which transformers would fill with random
            numbers, or the processor does not fit. `loading_errors` deals with all else.
    """
    from transformers import AutoImageProcessor, IJepaModel

    with silent_transformers():
        # Without this refusal transformers asks on the terminal whether to run foreign code, and
        # an attention implementation named in the configuration may be fetched from the hub.
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        loaded: Any = IJepaModel.from_pretrained(
            folder,
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
