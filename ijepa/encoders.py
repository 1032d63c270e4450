"""Frozen encoders: from uint8 images to one vector per image, with everything this takes inside.

Resize, normalization, network, pooling and number format belong together: a caller cannot combine
the wrong ones, and `description` records them. `load_encoder` takes any source on either side.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ijepa import huggingface
from ijepa.checkpoint import load_checkpoint
from ijepa.devices import choose_dtype, memory_errors
from ijepa.errors import UserError, counted, home_path
from ijepa.files import read_arrays, sha256, write_text
from ijepa.model import VisionTransformer

Images = Sequence[Tensor]
"""uint8 tensors of shape (3, height, width); sizes may differ."""
DECODER_VERSION = 1
"""To be raised when decoded pixels change: cached embeddings of other versions are not read."""
WEIGHT_SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors")
PACKAGES = ("torch", "torchvision", "transformers", "pillow")
"""Whose versions may change embeddings."""
TAKES = {
    "a file of embeddings": (),
    "a file of weights": ("--local-weights", "--local-num-heads"),
    "a directory": ("--hf-pooling",),
    "a hub id": ("--hf-pooling", "--hf-revision"),
}
"""Flags that mean something for each kind of source."""
IDENTITY = ("sha256", "revision", "weights", "num_heads", "preprocessing", "pooling", "dtype")
"""The entries of a description that tell embeddings apart; all others follow or change nothing."""


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder to compare. Its methods raise UserError if memory runs out.

    Args:
        name: What it is called in results: `local`, `hf`, `pixels`, `random_weights`, or
            `local_2` and so on for other seeds.
        preprocess: From images to normalized pixels (b, 3, height, width).
        network: From those to tokens (b, N, d), whose mean is the embedding.
        embed_dim: d.
        device: Where the network is.
        dtype: Number format of the matrix products.
        autocast: Whether only matrix products run in `dtype`, the rest in float32.
        description: What defines the embeddings, for provenance; plain data.
        load: Brings the network into memory, if it is not there yet.
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
        """One float32 embedding per image, on the CPU."""
        return self.encode(self.prepare(images)).cpu()

    @torch.inference_mode()
    def prepare(self, images: Images) -> Float[Tensor, "b 3 H W"]:
        """Pixels for the network, on the CPU; in pinned memory if the network is on a GPU."""
        with self.batch_memory_errors(len(images), torch.device("cpu")):
            pixels = self.preprocess(images)
            if not self.autocast:
                pixels = pixels.to(self.dtype)
            return pixels.pin_memory() if self.device.type == "cuda" else pixels

    @torch.inference_mode()
    def encode(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        """The embeddings of prepared images, float32; a GPU may still be at work on them."""
        with self.batch_memory_errors(len(pixels), self.device):
            pixels = pixels.to(self.device, non_blocking=True)
            enabled = self.autocast and self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype, enabled=enabled):
                tokens = self.network(pixels)
            return tokens.float().mean(dim=1)

    def batch_memory_errors(self, count: int, device: torch.device) -> AbstractContextManager[None]:
        """Memory that runs out with a batch of this many images, as an error for the user."""
        hint = f"try --batch-size {max(count // 4, 1)}" if count > 1 else "try --device cpu"
        images = counted(count, "image")
        return memory_errors(f"out of memory on {device} with {images} in one batch", hint)

    @property
    def key(self) -> str:
        """A hash of all that decides the embeddings; neither paths nor names enter it."""
        facts = {name: self.description.get(name) for name in IDENTITY}
        versions = {"decoder": DECODER_VERSION, **{name: version(name) for name in PACKAGES}}
        return json_hash([facts, self.device.type, versions])[:32]


@dataclass(frozen=True)
class PrecomputedEmbeddings:
    """Embeddings of an earlier run, or of any other program, in place of an encoder."""

    name: str
    embed_dim: int
    description: dict[str, Any]
    values: Float[np.ndarray, "n d"]
    rows: dict[bytes, int] | dict[int, int]
    """Row of each image by its key (16 bytes, see `Split.image_keys`), or by its index."""

    def look_up(
        self, keys: Sequence[bytes], indices: Int[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m d"]:
        """The float32 embeddings of the images with these keys and positions in the data set.

        Raises:
            UserError: If images are missing; counts them.
        """
        names: Sequence[Any] = keys if self.description["matched_by"] == "key" else indices.tolist()
        found = [self.rows.get(name) for name in names]
        if missing := found.count(None):
            raise UserError(
                f"{self.description['source']} lacks {missing:,} of {len(found):,} images",
                hint="compare the images, --max-samples and --seed that it was made with",
            )
        return self.values[cast(list[int], found)].astype(np.float32)


def json_hash(content: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resize_and_normalize(
    images: Images, size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 size size"]:
    """Resize bilinearly with antialiasing to size x size, scale to [0, 1], standardize."""
    from torchvision.transforms.v2 import functional as transforms

    pixels = torch.stack([transforms.resize(image, [size, size]) for image in images]).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def load_encoder(  # noqa: PLR0913  one argument per flag
    source: str | Path,
    role: str,
    *,
    weights: str = "target",
    num_heads: int | None = None,
    revision: str | None = None,
    pooling: str = "mean",
    device: torch.device | str,
    dtype: str = "auto",
    offline: bool = False,
    cache: Path | None = None,
) -> FrozenEncoder | PrecomputedEmbeddings:
    """An encoder from whatever the source is: a file, a Hugging Face directory or a hub id.

    Args:
        source: An `.npz` with embeddings, any other file with weights, a directory, or a hub id
            such as `facebook/ijepa_vith14_1k` or `facebook/ijepa_vith14_1k@main`.
        role: Its name in results: `local`, `hf`, or `local_2` and so on for other seeds.
        weights: For files: `target` or `context`.
        num_heads: For files that do not record their attention heads.
        revision: For hub ids: a branch, tag or commit.
        pooling: For Hugging Face models: `mean` over patch tokens, or `cls` for the class token.
        device: Where the network will be.
        dtype: `auto`, `float32` or `bfloat16`, see `choose_dtype`.
        offline: Whether to look only into the hub's local cache.
        cache: Folder for facts about Hugging Face models; with them, a run whose embeddings are all
            cached does not load the network.

    Raises:
        UserError: If the source cannot be found, downloaded, read or used.
        ValueError: If pooling or dtype are none of these.
    """
    if pooling not in ("mean", "cls"):
        raise ValueError(f"pooling must be mean or cls, got {pooling!r}")
    text, device = str(source), torch.device(device)
    path = home_path(text)
    kind = kind_of(text, path)
    given = {"--local-weights": weights != "target", "--local-num-heads": num_heads is not None}
    given |= {"--hf-revision": revision is not None, "--hf-pooling": pooling != "mean"}
    for flag in given:
        if given[flag] and flag not in TAKES[kind]:
            raise UserError(f"{flag} means nothing for {text!r}, {kind}", hint=f"omit {flag}")
    if kind == "a file of embeddings":
        return load_embeddings(path, role)
    if kind == "a file of weights":
        return load_file_encoder(path, role, weights, num_heads, device, dtype)
    name, _, own = (str(path), "", "") if kind == "a directory" else text.partition("@")
    if own and revision not in (None, own):
        raise UserError(f"{text!r} is not revision {revision!r}", hint="omit --hf-revision")
    folder, commit = huggingface.find_model(name, own or revision, offline)
    parts = Path(name).absolute().parts
    description = {
        "source": name,
        "short_name": "/".join(parts[-2:]) if parts[-1] == "hf" else parts[-1],
        "revision": commit,
        "sha256": None if commit else huggingface.hash_model(folder),
        "pooling": "class token" if pooling == "cls" else "mean over patch tokens",
    }
    return huggingface_encoder(folder, role, description, device, dtype, cache)


def kind_of(text: str, path: Path) -> str:
    """Which of the kinds in `TAKES` a source is; UserError for a web address."""
    if "://" in text:
        hint = "download it and give the file, or give a hub id such as facebook/ijepa_vith14_1k"
        raise UserError(f"{text!r} is a web address", hint=hint)
    if path.suffix.lower() == ".npz":
        return "a file of embeddings"
    if os.path.isdir(path):
        return "a directory"
    # A hub id has at most one slash and no file's ending.
    deep = text.partition("@")[0].count("/") > 1
    is_path = os.path.isfile(path) or deep or text.startswith((".", "/", "~"))
    return "a file of weights" if is_path or path.suffix in WEIGHT_SUFFIXES else "a hub id"


def load_embeddings(path: Path, role: str) -> PrecomputedEmbeddings:
    """Read an `.npz` with `embeddings` and, for their images, `keys` or `indices`."""
    try:
        file = read_arrays(path, "embeddings", "keys", "indices")
        values, by_key = file["embeddings"], "keys" in file
        names = file["keys" if by_key else "indices"]
        if values.ndim != 2 or values.dtype.kind != "f" or names.shape[:1] != values.shape[:1]:
            raise ValueError(f"{names.shape} names for {values.dtype} values {values.shape}")
        if by_key and (names.dtype, names.shape[1:]) != (np.uint8, (16,)):
            raise ValueError(f"keys are {names.dtype} of shape {names.shape}")
        if not by_key and (names.ndim != 1 or names.dtype.kind not in "iu"):
            raise ValueError(f"indices are {names.dtype} of shape {names.shape}")
        if not by_key and len(np.unique(names)) < len(names):
            raise ValueError("an index occurs twice")
    except (ValueError, KeyError) as error:
        raise UserError(
            f"cannot read embeddings from {path}: {error}",
            hint="it needs embeddings (n x d floating-point numbers) and keys (n x 16 uint8) or "
            "indices (n), as in the embeddings_*.npz of an earlier run",
        ) from error
    rows = {row.tobytes() if by_key else int(row): number for number, row in enumerate(names)}
    note = f"{path.name} has no image keys: images were matched by their index"
    description = {
        "source": str(path),
        "short_name": path.stem,
        "family": "precomputed",
        "sha256": sha256(path),
        "dtype": str(values.dtype),
        "matched_by": "key" if by_key else "index",
        "notes": [note] * (not by_key),
    }
    return PrecomputedEmbeddings(role, values.shape[1], description, values, rows)


def load_file_encoder(
    path: Path, role: str, weights: str, num_heads: int | None, device: torch.device, dtype: str
) -> FrozenEncoder:
    """An encoder from a checkpoint file; see `checkpoint.load_checkpoint` for the formats."""
    checkpoint = load_checkpoint(path, weights, num_heads)
    config, network, name = checkpoint.config, checkpoint.build(), path.name
    while Path(name).suffix in WEIGHT_SUFFIXES:
        name = Path(name).stem
    size, mean, std = config.image_size, checkpoint.mean, checkpoint.std
    parameters = sum(tensor.numel() for tensor in network.state_dict().values())
    number_format = choose_dtype(dtype, device, parameters)
    return FrozenEncoder(
        role,
        lambda images: resize_and_normalize(images, size, mean, std),
        network.to(device),
        config.embed_dim,
        device,
        number_format,
        autocast=True,
        description={
            "source": str(path),
            "short_name": f"{name} ({checkpoint.weights})" if checkpoint.weights else name,
            "family": "ijepa",
            "sha256": sha256(path),
            "weights": checkpoint.weights,
            "epochs": checkpoint.epochs,
            "planned_epochs": checkpoint.training.get("planned_epochs"),
            "losses": checkpoint.losses,
            "num_heads": config.num_heads,
            "parameters": parameters,
            "input_size": size,
            "resize": "bilinear, antialiased",
            "mean": list(mean),
            "std": list(std),
            "pooling": "mean over patch tokens",
            "dtype": str(number_format).removeprefix("torch."),
            "notes": list(checkpoint.notes),
        },
    )


def check_seeds(local: Any, seeds: list[Any]) -> None:
    """Raise UserError unless the checkpoints can be several seeds of one training."""
    everything = [one.description | {"width": one.embed_dim} for one in (local, *seeds)]
    seen, first = [], everything[0]
    for facts in everything:
        identity = [facts.get(name) for name in ("sha256", "revision")]
        problems = ["is given twice"] * (identity in seen)
        problems += [
            f"has {key} {facts.get(key)}, the first has {first.get(key)}"
            for key in ("width", "parameters", "input_size", "epochs")
            if facts.get(key) != first.get(key)
        ]
        if problems:
            hint = "every --local-checkpoint must be another seed of the same training"
            raise UserError(f"checkpoint {facts['source']} {problems[0]}", hint=hint)
        seen.append(identity)


def random_encoder(trained: FrozenEncoder, seed: int) -> FrozenEncoder:
    """An encoder of our own before any training: what the shape of the network gives by itself.

    Its weights are drawn when it is first used.
    """
    config, facts = cast(VisionTransformer, trained.network).config, trained.description

    @once
    def load() -> VisionTransformer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = VisionTransformer(config)
        return network.eval().requires_grad_(False).to(trained.device)

    description = {
        **{name: facts[name] for name in ("num_heads", "pooling", "dtype")},
        "source": f"random weights, seed {seed}",
        "weights": "random",
        "preprocessing": json_hash([asdict(config), [facts["mean"], facts["std"]], seed]),
    }
    changes = {"network": lambda pixels: load()(pixels), "load": load, "description": description}
    return replace(trained, name="random_weights", **changes)


def pixel_encoder() -> FrozenEncoder:
    """Raw pixels as embeddings, at 32 x 32: what no learning at all gives."""
    return FrozenEncoder(
        "pixels",
        # A black image has no direction; half a gray level on all pixels gives it one.
        lambda images: resize_and_normalize(images, 32, (-0.5 / 255,) * 3, (1.0,) * 3),
        lambda pixels: pixels.flatten(1)[:, None],
        3 * 32 * 32,
        torch.device("cpu"),
        torch.float32,
        autocast=False,
        description={
            "source": "pixels at 32 x 32 in [0, 1], plus half a gray level",
            "preprocessing": "bilinear to 32 x 32, antialiased",
            "dtype": "float32",
        },
    )


def huggingface_encoder(
    folder: Path,
    role: str,
    description: dict[str, Any],
    device: torch.device,
    dtype: str,
    cache: Path | None,
) -> FrozenEncoder:
    """A model of a known family with its own image processor; weights are read into `dtype`.

    With its facts in the cache the network is loaded when it is first used, otherwise at once.
    """
    source, use_class_token = description["source"], description["pooling"] == "class token"
    kind, family = huggingface.family_of(folder, source)
    if use_class_token and family.class_token is None:
        raise UserError(f"{kind} models have no class token", hint="use --hf-pooling mean")
    number_format = choose_dtype(dtype, device, huggingface.stored_parameters(folder, source))

    load = once(lambda: huggingface.read_model(folder, source, family, device, number_format))
    encoder = FrozenEncoder(
        role,
        lambda images: huggingface.preprocess(load()[0], images),
        lambda pixels: huggingface.tokens(load()[1], family, use_class_token, pixels),
        0,
        device,
        number_format,
        autocast=False,
        description={
            **description,
            "family": kind,
            "preprocessing": f"its own image processor, {huggingface.BACKEND} backend",
            "dtype": str(number_format).removeprefix("torch."),
        },
        load=load,
    )
    facts = dict(kept_facts(cache and cache / encoder.key / "facts.json", lambda: load()[2]))
    embed_dim = facts.pop("embed_dim")
    facts["notes"] = [f"{source}: {note}" for note in facts["notes"]]
    if recipe := facts.get("recipe"):
        facts["short_name"] = f"{description['short_name']} ({recipe})"
    return replace(encoder, embed_dim=embed_dim, description={**encoder.description, **facts})


def kept_facts(path: Path | None, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON object kept in a file; where there is none, or it is damaged, it is found again.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        kept = json.loads(path.read_text("utf-8")) if path else {}
        if kept["sha256"] == json_hash(kept["facts"]):
            return kept["facts"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    facts = find()
    if path:
        write_text(path, json.dumps({"facts": facts, "sha256": json_hash(facts)}))
    return facts
