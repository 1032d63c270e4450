"""I-JEPA pre-training: predict the target encoder's tokens of hidden blocks from visible ones.

Assran et al. 2023 (https://arxiv.org/abs/2301.08243), section 3: three networks, of which the
target encoder is an exponential moving average of the context encoder. No label is read.

Two terms are added to the paper's prediction loss, both on the mean token, which is what is used
of the encoder afterwards: `matching_loss` (which image does another crop show?) and `spread_loss`
(do the dimensions vary, each by itself?). Weights of 0 leave the paper's method.

Every random draw of a step comes from generators seeded by (run seed, step), so a run that is
stopped and resumed at any step is the undisturbed run, on a CPU bit for bit. Nothing here knows of
disks.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn

from ijepa.augmentation import color_jitter, random_resized_crop, standardize
from ijepa.devices import can_compile
from ijepa.graphs import Graphs
from ijepa.masking import MaskConfig, sample_masks
from ijepa.metrics import effective_rank, nearest_neighbors, precision_at_k
from ijepa.model import (
    Block,
    Predictor,
    PredictorConfig,
    VisionTransformer,
    ViTConfig,
    gather_tokens,
)
from ijepa.muon import Muon
from ijepa.parallel import gather_rows, num_processes, own_part, sum_gradients

CHECK_EVERY = 50
"""Updates between looks at the loss."""
EARLY_EPOCHS = 5
COLLAPSED_SHARE = 0.05
"""Effective rank as a share of the width, under which embeddings count as collapsed."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the defaults are the recipe `matched`. See `RECIPES`.

    Nothing but `epochs` knows how long a run is until its last `decay_share`, so that a run can be
    made longer or shorter before that.

    Raises:
        ValueError: If a number is out of range, a matching term has nothing to match, or a further
            view serves no term.
    """

    epochs: int = 300
    batch_size: int = 256
    lr: float = 4e-3
    """Peak learning rate of both optimizers, held from the end of the warm-up to the decay."""
    warmup_epochs: float = 4.0
    decay_share: float = 0.15
    """Last share of the epochs: the learning rate falls linearly towards 0, the further views are
    seen whole, as the encoder will be used, and the temperature is the last one."""
    weight_decay: float = 0.05
    """On weights only, not on biases and norms."""
    ema_start: float = 0.99
    ema_window: float = 0.05
    """Share of the updates so far that the target encoder averages over; momentum <= 0.9999."""
    clip_norm: float = 3.0
    min_crop: float = 0.25
    """Smallest share of the image's area that a view shows."""
    jitter: float = 0.4
    """Strength of the colour jitter of every view; see `color_jitter`."""
    grey_share: float = 0.2
    """Share of the views without colour."""
    num_views: int = 3
    """Crops of each image in an update; 1 without the matching term."""
    matching_weight: float = 1.0
    temperature: float = 0.1
    """Of the matching loss before the decay: low, as telling near images apart teaches most."""
    last_temperature: float = 0.4
    """In the decay: kinder to similar images."""
    spread_weight: float = 0.05
    seed: int = 0
    vit: ViTConfig = field(default_factory=ViTConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "clip_norm", "temperature", "last_temperature")
        for name in (*positive, "num_views"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("matching_weight", "spread_weight", "weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.matching_weight and self.num_views < 2:
            raise ValueError(f"matching needs num_views of at least 2, got {self.num_views}")
        if not self.matching_weight and self.num_views > 1:
            raise ValueError(f"without matching num_views must be 1, got {self.num_views}")

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of the loss that are computed, in words."""
        terms = ["I-JEPA prediction"]
        if self.matching_weight:
            terms.append("view matching (InfoNCE)")
        if self.spread_weight:
            terms.append("variance/covariance")
        return tuple(terms)


RECIPES: dict[str, dict[str, Any]] = {
    "matched": {},
    "paper": {
        "batch_size": 64,
        "lr": 2e-3,
        "warmup_epochs": 1.0,
        "num_views": 1,
        "matching_weight": 0.0,
        "spread_weight": 0.0,
        "mask": MaskConfig(num_targets=4),
    },
}
"""What each recipe changes of the defaults. `paper` is the loss of I-JEPA and nothing else."""


def recipe_config(recipe: str, **settings: Any) -> TrainConfig:
    """The settings of a recipe, except for those given; None takes the recipe's own.

    Raises:
        ValueError: As `TrainConfig`.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return TrainConfig(**{**RECIPES[recipe], **given})


@dataclass
class TrainState:
    """All that a step reads and changes; `step` counts optimizer updates from 0."""

    context_encoder: VisionTransformer
    target_encoder: VisionTransformer
    predictor: Predictor
    muon: Muon
    adamw: torch.optim.AdamW
    dtype: torch.dtype
    """Of the matrix products; weights are float32."""
    loss_sums: Float[Tensor, "2"]
    """Prediction and matching loss, summed since the current epoch began, on the device."""
    step: int = 0
    start_step: int = 0
    """Updates that the networks had when the run began with them."""
    graphs: Graphs | None = None
    """Of `update`, where a GPU replays it."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers enough to go on exactly here."""
        return {
            "context_encoder": self.context_encoder.state_dict(),
            "target_encoder": self.target_encoder.state_dict(),
            "predictor": self.predictor.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "step": self.step,
            "start_step": self.start_step,
            "loss_sums": self.loss_sums,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.context_encoder.load_state_dict(saved["context_encoder"])
        self.target_encoder.load_state_dict(saved["target_encoder"])
        self.predictor.load_state_dict(saved["predictor"])
        self.muon.load_state_dict(saved["muon"])
        self.adamw.load_state_dict(saved["adamw"])
        for group in self.adamw.param_groups:  # the state may come from another kind of device
            group["capturable"] = self.graphs is not None
        if self.graphs:  # recordings go on with the moments that the optimizers had
            self.graphs.recordings.clear()
        self.step = saved["step"]
        self.start_step = saved.get("start_step", 0)  # not in states from before it was kept
        self.loss_sums.copy_(saved["loss_sums"])


@dataclass(frozen=True)
class StepLog:
    """What one update did."""

    step: int
    epoch: int
    """Epochs finished after this step."""
    end_of_epoch: bool
    lr: float
    momentum: float
    weight_decay: float


def init_state(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> TrainState:
    """Random weights by the run's seed; the target encoder starts as a copy of the context's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        context_encoder = VisionTransformer(config.vit)
        predictor = Predictor(config.vit, config.predictor)
    context_encoder, predictor = context_encoder.to(device), predictor.to(device)
    target_encoder = copy.deepcopy(context_encoder).requires_grad_(False)
    if can_compile(device):
        for module in nn.ModuleList([context_encoder, target_encoder, predictor]).modules():
            if isinstance(module, Block):  # alike, so that one compilation serves all of a network
                module.compile(dynamic=True)
    parameters = [*context_encoder.parameters(), *predictor.parameters()]
    muon, adamw = make_optimizers(parameters, config, dtype)
    loss_sums = torch.zeros(2, device=device)
    state = TrainState(context_encoder, target_encoder, predictor, muon, adamw, dtype, loss_sums)
    if device.type == "cuda" and num_processes() == 1:
        state.graphs = Graphs(partial(update, state, config), device)
        for group in adamw.param_groups:
            group["capturable"] = True
    return state


def start_from(
    state: TrainState, weights: Mapping[str, Mapping[str, Tensor]], start_step: int
) -> None:
    """Take over the networks of a run of `start_step` updates, as if it were this one.

    Args:
        state: As `init_state` made it; a predictor that is not in `weights` stays as it is.
        weights: Those of a checkpoint: `context`, `target`, `predictor`.
        start_step: Updates after which this run begins.
    """
    state.context_encoder.load_state_dict(weights["context"])
    state.target_encoder.load_state_dict(weights["target"])
    if "predictor" in weights:
        state.predictor.load_state_dict(weights["predictor"])
    state.step = state.start_step = start_step


def make_optimizers(
    parameters: Sequence[nn.Parameter], config: TrainConfig, dtype: torch.dtype
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices, AdamW for patch projection, mask token, biases and norms.

    Vectors do not decay.
    """
    decay = config.weight_decay
    muon = Muon([p for p in parameters if p.ndim == 2], config.lr, decay, dtype)
    groups = [
        {"params": [p for p in parameters if p.ndim > 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return muon, torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(
    config: TrainConfig, step: int, steps_per_epoch: int, start_step: int = 0
) -> float:
    """Linear warm-up from `start_step` on, constant, linear decay; the lower where both meet.

    Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
    https://arxiv.org/abs/2405.18392.
    """
    total = config.epochs * steps_per_epoch
    rising = (step - start_step + 1) / max(config.warmup_epochs * steps_per_epoch, 1)
    falling = (total - step) / max(total - decay_start(config, steps_per_epoch), 1)
    return config.lr * min(rising, falling, 1.0)


def decay_start(config: TrainConfig, steps_per_epoch: int) -> int:
    """Updates after which the learning rate falls."""
    return round(config.epochs * steps_per_epoch * (1 - config.decay_share))


def ema_momentum(config: TrainConfig, step: int) -> float:
    """The momentum whose memory is `ema_window` of the updates so far, from `ema_start` on."""
    return max(config.ema_start, min(1 - 1 / (config.ema_window * (step + 1)), 0.9999))


def matching_temperature(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """`last_temperature` in the decay, `temperature` before it."""
    decays = step >= decay_start(config, steps_per_epoch)
    return config.last_temperature if decays else config.temperature


@torch.no_grad()
def update_target(
    target: VisionTransformer, context: VisionTransformer, momentum: float | Float[Tensor, ""]
) -> None:
    """Move the target encoder towards the context encoder: t <- m t + (1 - m) c."""
    averaged = list(target.parameters())
    steps = torch._foreach_sub(list(context.parameters()), averaged)
    torch._foreach_mul_(steps, 1 - momentum)
    torch._foreach_add_(averaged, steps)


def spread_loss(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Penalty on dimensions that vary too little or vary together.

    The variance and covariance terms of VICReg (Bardes et al. 2022, section 4.1,
    https://arxiv.org/abs/2105.04906) with target deviation 1 and covariance weight 0.04.
    """
    centered = embeddings - embeddings.mean(dim=0)
    freedom = max(len(embeddings) - 1, 1)  # a single image has no spread, but a loss all the same
    deviation = (centered.square().sum(dim=0) / freedom + 1e-4).sqrt()
    covariance = centered.T @ centered / freedom
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviation).mean() + 0.04 * off_diagonal / embeddings.shape[1]


def matching_loss(
    queries: Float[Tensor, "*P B D"],
    keys: Float[Tensor, "*P B D"],
    temperature: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-entropy of finding, for each query, the key of its image among all keys of its batch.

    InfoNCE on cosine similarities (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748).
    The keys are a moving average's as in MoCo v3 (Chen et al. 2021,
    https://arxiv.org/abs/2104.02057) and also the context encoder's own as in SimCLR (Chen et al.
    2020, https://arxiv.org/abs/2002.05709). There are no projection heads: the mean token itself
    shall be like that of another crop.
    """
    similarities = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).mT
    own = torch.arange(keys.shape[-2], device=keys.device).expand(similarities.shape[:-1])
    return F.cross_entropy(similarities.flatten(0, -2) / temperature, own.flatten())


class Views(NamedTuple):
    """What one update sees of its images: V crops of each, in colours of their own."""

    pixels: Float[Tensor, "B V 3 H W"]
    """Of these the target encoder sees the first, whole."""
    context: Int[Tensor, "B K"]
    """What the context encoder sees of the first view: nothing that is in a target block."""
    further: Int[Tensor, "B W L"]
    """What it sees of the W = V - 1 others."""
    target_blocks: Int[Tensor, "B T M"]


def draw_views(
    config: TrainConfig, images: UInt8[Tensor, "B 3 H W"], step: int, steps_per_epoch: int
) -> Views:
    """Crops, colours and masks of one update, by the run's seed and the step.

    In the decay the further views are whole: Li et al. 2023, "Scaling Language-Image Pre-training
    via Masking", section 3, https://arxiv.org/abs/2212.00794.
    """
    seed = derive_seed(config.seed, step)
    device, grid_size = images.device, config.vit.grid_size
    generator = torch.Generator(device).manual_seed(seed)
    repeated = images.repeat_interleave(config.num_views, dim=0)
    crops = random_resized_crop(repeated, config.min_crop, generator)
    crops = color_jitter(crops, config.jitter, config.grey_share, generator)
    pixels = standardize(crops).unflatten(0, (len(images), config.num_views))
    masks = sample_masks(config.mask, grid_size, len(images), seed, device)
    shape = (len(images), config.num_views - 1, grid_size**2)
    scores = torch.rand(shape, generator=generator, device=device)
    whole = config.num_views > 1 and step >= decay_start(config, steps_per_epoch)
    further = scores.topk(grid_size**2 if whole else config.mask.context_patches).indices
    return Views(pixels, masks.context, further, masks.targets)


def encode_views(
    encoder: VisionTransformer, views: Views
) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B W L D"]]:
    """Tokens of the first view and of the further ones, in one pass where both are as many."""
    B, V = views.pixels.shape[:2]
    if views.context.shape[-1] == views.further.shape[-1]:
        patches = torch.cat([views.context[:, None], views.further], dim=1)
        tokens = encoder(views.pixels.flatten(0, 1), patches.flatten(0, 1)).unflatten(0, (B, V))
        return tokens[:, 0], tokens[:, 1:]
    first = encoder(views.pixels[:, 0], views.context)
    further = encoder(views.pixels[:, 1:].flatten(0, 1), views.further.flatten(0, 1))
    return first, further.unflatten(0, (B, V - 1))


class Losses(NamedTuple):
    """The terms of one update."""

    prediction: Float[Tensor, ""]
    matching: Float[Tensor, ""]
    spread: Float[Tensor, ""]


def compute_losses(
    state: TrainState, views: Views, temperature: float | Float[Tensor, ""]
) -> Losses:
    """The terms over the rows of all processes."""
    dtype = state.dtype
    B, T, M = views.target_blocks.shape
    with torch.autocast(views.pixels.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            tokens = state.target_encoder(views.pixels[:, 0]).float()
        first, further = encode_views(state.context_encoder, views)
        predicted = state.predictor(first, views.context, views.target_blocks)
    # Normalised over channels without learned scale, as in the authors' code, so that the targets'
    # size cannot shrink.
    targets = gather_tokens(
        F.layer_norm(tokens, tokens.shape[-1:]), views.target_blocks.flatten(1)
    ).reshape(B, T, M, -1)
    prediction = gather_rows(F.smooth_l1_loss(predicted.float(), targets)[None]).mean()
    mean_target = gather_rows(tokens.mean(dim=1))
    means = torch.cat([first.float().mean(dim=1)[:, None], further.float().mean(dim=2)], dim=1)
    means = gather_rows(means).transpose(0, 1)  # (V, B, D)
    if len(means) == 1:  # nothing to match
        return Losses(prediction, torch.zeros_like(prediction), spread_loss(means[0]))
    queries, keys = (
        torch.stack(side) for side in zip(*permutations(means.unbind(), 2), strict=True)
    )
    to_target = matching_loss(means[1:], mean_target.expand_as(means[1:]), temperature)
    matching = to_target + matching_loss(queries, keys, temperature)
    return Losses(prediction, matching, spread_loss(means[0]))


def train_step(
    state: TrainState,
    config: TrainConfig,
    images: UInt8[Tensor, "B 3 H W"],
    steps_per_epoch: int,
) -> Losses:
    """One optimizer update and one move of the target encoder.

    Every process is given the whole batch and draws all its views, so that they are those of a
    single process, and computes on its own part. On a GPU the next call may overwrite the losses.
    """
    views = map(own_part, draw_views(config, images, state.step, steps_per_epoch))
    rates = (
        learning_rate(config, state.step, steps_per_epoch, state.start_step),
        ema_momentum(config, state.step),
        matching_temperature(config, state.step, steps_per_epoch),
    )
    tensors = (*views, *(torch.full((), rate, device=images.device) for rate in rates))
    losses = state.graphs(*tensors) if state.graphs else update(state, config, *tensors)
    for group in (*state.muon.param_groups, *state.adamw.param_groups):
        group["lr"] = rates[0]  # to be saved; `update` left a tensor that replays overwrite
    state.step += 1
    return Losses(*losses)


def update(state: TrainState, config: TrainConfig, *tensors: Shaped[Tensor, "..."]) -> Losses:
    """The part of a step that a GPU can replay: numbers that change from step to step are tensors.

    Args:
        state: What is changed in place.
        config: The settings of the run.
        tensors: Those of `Views`; learning rate, momentum of the target encoder, temperature.
    """
    *views, lr, momentum, temperature = tensors
    losses = compute_losses(state, Views(*views), temperature)
    state.muon.zero_grad()
    state.adamw.zero_grad()
    total = losses.prediction
    if config.matching_weight:
        total = total + config.matching_weight * losses.matching
    if config.spread_weight:
        total = total + config.spread_weight * losses.spread
    total.backward()
    parameters = [*state.context_encoder.parameters(), *state.predictor.parameters()]
    sum_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    for optimizer in (state.muon, state.adamw):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    update_target(state.target_encoder, state.context_encoder, momentum)
    return Losses(*(loss.detach() for loss in losses))


def derive_seed(*path: int) -> int:
    """A seed of its own for every path of numbers, spread over 62 bits."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> np.uint64(2))


def epoch_order(seed: int, epoch: int, num_images: int) -> Int[Tensor, " n"]:
    """The order of the images in one epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 1))
    return torch.randperm(num_images, generator=generator)


def train(
    state: TrainState,
    config: TrainConfig,
    images: UInt8[Tensor, "n 3 H W"],
) -> Iterator[StepLog]:
    """Run from `state.step` to the end of the last epoch, yielding after each update.

    An epoch is one pass in random order; the rest that does not fill a batch is left out.

    Raises:
        ValueError: If not even one batch can be filled.
        FloatingPointError: If the loss is no longer a number; the state is then unusable.
    """
    steps_per_epoch = len(images) // config.batch_size
    if not steps_per_epoch:
        raise ValueError(f"batch_size {config.batch_size} exceeds the {len(images)} images")
    while state.step < steps_per_epoch * config.epochs:
        epoch, done = divmod(state.step, steps_per_epoch)
        if not done:
            state.loss_sums.zero_()
        order = epoch_order(config.seed, epoch, len(images)).to(images.device)
        batches = order[: steps_per_epoch * config.batch_size].split(config.batch_size)
        for position, index in enumerate(batches[done:], start=done + 1):
            log = StepLog(
                step=state.step + 1,
                epoch=(state.step + 1) // steps_per_epoch,
                end_of_epoch=position == steps_per_epoch,
                lr=learning_rate(config, state.step, steps_per_epoch, state.start_step),
                momentum=ema_momentum(config, state.step),
                weight_decay=config.weight_decay,
            )
            losses = train_step(state, config, images[index], steps_per_epoch)
            state.loss_sums += torch.stack([losses.prediction, losses.matching])
            # Reading a number makes an accelerator wait; a sum keeps what is not one.
            if log.end_of_epoch or position % CHECK_EVERY == 0:
                check_finite(state)
            yield log


def check_finite(state: TrainState) -> None:
    """Raise FloatingPointError if a loss of this epoch was no number; the state is then useless."""
    if not state.loss_sums.isfinite().all():
        raise FloatingPointError(f"the loss is no longer a number after {state.step} updates")


def mean_losses(state: TrainState, config: TrainConfig, num_images: int) -> tuple[float, float]:
    """Prediction and matching loss, each the mean over the current or just finished epoch."""
    steps_per_epoch = num_images // config.batch_size
    prediction, matching = state.loss_sums.tolist()
    count = (state.step - 1) % steps_per_epoch + 1
    return prediction / count, matching / count


@torch.no_grad()
def embed(
    encoder: VisionTransformer, images: UInt8[Tensor, "n 3 H W"], dtype: torch.dtype
) -> Float[np.ndarray, "n D"]:
    """Mean over the patch tokens of unaugmented images."""
    device = images.device
    parts = []
    for batch in images.split(256):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = encoder(standardize(batch.float() / 255))
        parts.append(tokens.float().mean(dim=1).cpu())
    return torch.cat(parts).numpy()


def evaluate(
    encoder: VisionTransformer,
    images: UInt8[Tensor, "n 3 H W"],
    labels: Int[np.ndarray, " n"],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Watch a run: P@5, effective rank and mean variance of held-out images' embeddings."""
    embeddings = embed(encoder, images, dtype)
    neighbors, _ = nearest_neighbors(embeddings, 5)
    return {
        "heldout_precision_at_5": float(precision_at_k(neighbors, labels, 5).mean()),
        "effective_rank": effective_rank(embeddings),
        "target_variance": float(embeddings.var(axis=0).mean()),
    }


def collapse_warning(row: Mapping[str, Any], config: TrainConfig) -> str | None:
    """What to tell when held-out embeddings use hardly any dimensions, and None while they do.

    In its first epochs every run looks like that, with targets that are mostly position.
    """
    width, rank = config.vit.embed_dim, row["effective_rank"]
    if row["epoch"] <= EARLY_EPOCHS or rank >= COLLAPSED_SHARE * width:
        return None
    return (
        f"the embeddings are collapsing: effective rank {rank:.1f} of {width} after epoch "
        f"{row['epoch']}; stop, and try a lower --lr or a larger --batch-size"
    )
