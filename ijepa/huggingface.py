"""Frozen encoders of Hugging Face: find and read a model of a known family.

Only classes that are part of transformers are used, no code of a repository is run, and tensors
that a file lacks, which transformers would fill with random numbers, are an error.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ijepa.devices import memory_errors
from ijepa.errors import UserError, counted
from ijepa.files import DAMAGED, pointer_hint, sha256

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
FILES = ["config.json", *PROCESSORS, "*.safetensors", "*.safetensors.index.json"]
WEIGHTS = "[!.]*.safetensors"  # hidden ones are macOS's, not the model's
BACKEND = "torchvision"
"""Of image processors; transformers' default depends on what is installed."""
TRAINING = {"recipe": str, "epochs": int, "planned_epochs": int, "losses": str}
"""What an export of ours records of its training in config.json."""
RETRY = "take all files from the same model, or download or export them again"


@dataclass(frozen=True)
class Family:
    """How to get features from one kind of model.

    Tokens come in the order class token, register tokens (`num_register_tokens` of the
    configuration), patch tokens.
    """

    model: str
    """Class of transformers, without any head."""
    class_token: str | None = None
    """Output that starts with the class token, or is it; None if the family has none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For `from_pretrained`."""
    any_size: bool = False
    """Whether position codes adapt to the pixels that the processor makes."""
    inputs: Callable[[Any, Tensor], dict[str, Tensor]] = lambda *_: {}
    """Further inputs, from configuration and pixels."""


def keep_order(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """ViT-MAE sorts the patches by noise; rising noise keeps their order."""
    num_patches = prod(side // config.patch_size for side in pixels.shape[2:])
    noise = torch.arange(num_patches, device=pixels.device, dtype=torch.float32)
    return {"noise": noise.expand(len(pixels), -1)}


NO_POOLER = {"add_pooling_layer": False}
HIDDEN = "last_hidden_state"
# In the comments: what the family's paper or documentation takes as features for probing.
FAMILIES = {
    # Mean over patches (Assran et al. 2023, appendix A.1); there is no class token.
    "ijepa": Family("IJepaModel", None, NO_POOLER),
    # Class token; the mean over patches works as well (Dosovitskiy et al. 2021, appendix D.3).
    "vit": Family("ViTModel", HIDDEN, NO_POOLER),
    # Class token; the mean over patches works as well (He et al. 2022, appendix A.1).
    "vit_mae": Family("ViTMAEModel", HIDDEN, {"mask_ratio": 0.0}, inputs=keep_order),
    # Class token (Assran et al. 2022, section 5).
    "vit_msn": Family("ViTMSNModel", HIDDEN),
    # Class token, for linear probes also with the mean over patches (Oquab et al. 2024).
    "dinov2": Family("Dinov2Model", HIDDEN, any_size=True),
    # As DINOv2; register tokens are discarded (Darcet et al. 2024).
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", HIDDEN, any_size=True),
    # Class token; patches follow class and register tokens (documentation of transformers).
    "dinov3_vit": Family("DINOv3ViTModel", HIDDEN, any_size=True),
    # Mean over patches (Bao et al. 2022); the norm after it belongs to the classifier.
    "beit": Family("BeitModel", HIDDEN, NO_POOLER),
    # Mean over patches, as BEiT (Baevski et al. 2022).
    "data2vec-vision": Family("Data2VecVisionModel", HIDDEN, NO_POOLER),
    # Class token after the last norm and before the projection (Radford et al. 2021, 3.2).
    "clip": Family("CLIPVisionModel", "pooler_output"),
    # Attention pooling, which is left out; there is no class token (Zhai et al. 2023).
    "siglip": Family("SiglipVisionModel", None, {"vision_use_head": False}),
    # Mean over the positions of the last stage (Liu et al. 2021). For ConvNeXt this is not enough:
    # a norm follows it.
    "swin": Family("SwinModel", None, NO_POOLER),
}
FAMILIES |= {f"{name}_vision_model": FAMILIES[name] for name in ("clip", "siglip")}


def find_model(source: str, revision: str | None, offline: bool) -> tuple[Path, str | None]:
    """A directory as it is; else the files in the hub's local cache and their commit.

    Raises:
        UserError: If the hub id cannot be found, reached or downloaded.
    """
    if os.path.isdir(source):  # false for names that are too long for a file
        return Path(source), None
    from huggingface_hub import errors, snapshot_download

    chosen = {"allow_patterns": FILES, "ignore_patterns": ["*/*"], "local_files_only": offline}
    try:
        folder = snapshot_download(source, revision=revision, **chosen)
    # HTTPError is the base class of what the hub's client raises, lost connections included.
    except (errors.HTTPError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(error, errors.HFValidationError):
            problem = "is not a file, a directory or a hub id"
            hint = "check the path; a hub id looks like facebook/ijepa_vith14_1k"
        elif isinstance(error, errors.GatedRepoError):
            problem, hint = "is gated", "ask for access on its page and set HF_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            problem, hint = "is not on the hub", "check the spelling; if it is private set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            problem = f"has no revision {revision!r}"
            hint = "give a branch, a tag or a commit that its page lists"
        elif offline or isinstance(cause, errors.OfflineModeIsEnabled):
            problem = "is not complete in the hub's local cache"
            hint = "check the spelling, or run once without --offline and HF_HUB_OFFLINE"
        else:
            problem = f"could not be downloaded: {first_line(cause)}"
            hint = "check network, disk and HF_TOKEN and run again (finished files are kept)"
        raise UserError(f"{source!r} {problem}", hint=f"{hint}, or give a directory") from error
    return Path(folder), Path(folder).name


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def family_of(folder: Path, source: str) -> tuple[str, Family]:
    """The kind of model in a directory, and how to read it.

    Raises:
        UserError: If files are missing or the kind is unknown.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob(WEIGHTS)):
        raise UserError(
            f"{source!r} has no config.json with *.safetensors files",
            hint="give the directory of one model; pickled weights are not loaded: save them with "
            "save_pretrained",
        )
    try:
        kind = str(json.loads((folder / "config.json").read_text("utf-8")).get("model_type"))
    except DAMAGED as error:
        problem = f"cannot read config.json of {source!r}: {first_line(error)}"
        raise UserError(problem, hint=RETRY) from error
    if kind == "siglip2":  # fixed-size SigLIP 2 models are of kind `siglip`
        hint = "give a fixed-size one such as google/siglip2-base-patch16-224"
        raise UserError(f"{source!r} takes images of any size (NaFlex)", hint=hint)
    if kind not in FAMILIES:
        raise UserError(
            f"{source!r} is a {kind!r} model, which is not supported",
            hint=f"supported are {', '.join(FAMILIES)}; another one is one line in FAMILIES of "
            "ijepa/huggingface.py (README, Extending)",
        )
    if not any((folder / name).is_file() for name in PROCESSORS):
        raise UserError(
            f"{source!r} has no {PROCESSORS[0]}, which says how to resize and normalize images",
            hint=f"copy {PROCESSORS[0]} from the original model into the directory",
        )
    return kind, FAMILIES[kind]


def hash_model(folder: Path) -> str:
    """One SHA-256 over the weight files and the configurations of a directory."""
    found = sorted([*folder.glob(WEIGHTS), *folder.glob("*config.json")])
    return hashlib.sha256("".join(map(sha256, filter(Path.is_file, found))).encode()).hexdigest()


def stored_parameters(folder: Path, source: str) -> int:
    """How many numbers the weight files hold, less text towers, decoders and classifiers.

    Reads only headers.

    Raises:
        UserError: If a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for path in folder.glob(WEIGHTS):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dictionary
                    if not re.search(r"\b(text_\w+|visual_projection|decoder|classifier)\b", name):
                        total += prod(file.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        problem = f"cannot read {path.name} of {source!r}: {first_line(error)}"
        raise UserError(problem, hint=pointer_hint(path) or RETRY) from error
    return total


@contextmanager
def quiet_transformers() -> Iterator[None]:
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


def read_model(
    folder: Path, source: str, family: Family, device: torch.device, dtype: torch.dtype
) -> tuple[Any, nn.Module, dict[str, Any]]:
    """Image processor and network of a directory, and what metrics.json says of them.

    Raises:
        UserError: If they cannot be read, tensors are missing, misshapen or not finite, the images
            have other than 3 channels, or the processor does not fit the network.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    memory = f"out of memory on {device} while loading {source!r}"
    try:
        with quiet_transformers(), memory_errors(memory, hint="try --device cpu"):
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, backend=BACKEND, local_files_only=True, trust_remote_code=False
            )
            model, report = getattr(transformers, family.model).from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # they are named below, not ignored
                output_loading_info=True,
                **family.options,
            )
            check_tensors(model, report)
            if (channels := getattr(model.config, "num_channels", 3)) != 3:
                problem = f"{source!r} takes images of {counted(channels, 'channel')}, not of 3"
                raise UserError(problem, hint="give a model of color images")
            sides = check_processor(processor, model.config.image_size, family.any_size)
            recorded = getattr(model.config, "ijepa_training", {})  # of our own exports
            training = {k: v for k, v in recorded.items() if isinstance(v, TRAINING.get(k, ()))}
            model = model.to(device)
    except (*DAMAGED, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load {source!r}: {first_line(error)}", hint=RETRY) from error
    prefix = f"{model.base_model_prefix}."
    names = (name.removeprefix(prefix) for name in report["unexpected_keys"])
    unused = Counter(name.split(".")[0] for name in names)
    parts = ", ".join(f"{part} ({count})" for part, count in sorted(unused.items()))
    facts = {
        **describe_processor(processor),
        **training,
        "input_size": sides[0] if sides[0] == sides[1] else sides,
        "embed_dim": model.config.hidden_size,
        "parameters": sum(tensor.numel() for tensor in model.state_dict().values()),
        "notes": [f"tensors that {family.model} does not use: {parts}"] if unused else [],
    }
    return processor, model.eval().requires_grad_(False), facts


def check_tensors(model: nn.Module, report: dict[str, Any]) -> None:
    """Raise ValueError for tensors that would be random numbers, or that are not finite."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks the tensor {missing[0]!r} ({len(missing)} missing)")
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(f"tensor {name!r} has shape {tuple(found)}, expected {tuple(expected)}")
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"tensor {name!r} has NaN or infinite values")


def check_processor(processor: Any, side: Any, any_size: bool) -> list[int]:
    """Height and width of the pixels that the processor makes.

    Raises:
        ValueError: If a tall and a wide image do not become pixels for this network.
    """
    images = (torch.zeros(3, *size, dtype=torch.uint8) for size in ((48, 40), (40, 48)))
    tall, wide = (preprocess(processor, [image]) for image in images)
    made, needed = tall.shape[2:], side if isinstance(side, list | tuple) else (side, side)
    if tall.shape != wide.shape:
        raise ValueError("its image processor does not give all images the same size")
    if tuple(made) != tuple(needed) and not any_size:
        found = f"makes images of {tuple(made)} pixels, its network takes {tuple(needed)}"
        raise ValueError(f"its image processor {found}: the two must match")
    if not tall.isfinite().all():
        raise ValueError("its image processor makes pixels that are not finite: check mean and std")
    return list(made)


def preprocess(processor: Any, images: Iterable[Tensor]) -> Float[Tensor, "b 3 H W"]:
    """Normalized pixels as the model's own processor makes them."""
    # The layout is stated because a 3 pixel wide image would be taken for one with channels last.
    made = processor(images=list(images), return_tensors="pt", input_data_format="channels_first")
    return made["pixel_values"]


def tokens(
    model: Any, family: Family, use_class_token: bool, pixels: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b N d"]:
    """The tokens whose mean is the embedding: those of the patches, or only the class token."""
    outputs = model(pixel_values=pixels, **family.inputs(model.config, pixels))
    if use_class_token:
        found = outputs[family.class_token]
        return found[:, :1] if found.ndim == 3 else found[:, None]
    leading = (family.class_token is not None) + getattr(model.config, "num_register_tokens", 0)
    return outputs.last_hidden_state[:, leading:]


def describe_processor(processor: Any) -> dict[str, Any]:
    """Resize and normalization."""
    facts: dict[str, Any] = {"resize": "none", "mean": None, "std": None}
    if processor.do_resize:
        name = Image.Resampling(processor.resample).name.lower()
        smooth = name in ("bilinear", "bicubic", "lanczos")
        facts["resize"] = f"{name}, antialiased" if smooth else name
    if processor.do_normalize:
        for key, value in (("mean", processor.image_mean), ("std", processor.image_std)):
            facts[key] = [value] * 3 if isinstance(value, int | float) else list(value)
    return facts
