"""I-JEPA pre-training: predict the target encoder's tokens of hidden blocks from visible ones.

Assran et al. 2023 (https://arxiv.org/abs/2301.08243), section 3. The target encoder is a moving
average of the context encoder. The recipe `matched` adds two terms on the mean token, which is what
is used of the encoder afterwards; `paper` has only the prediction loss. No labels are used.

Generators seeded by (run seed, step) make all random draws of a step. So a run that is stopped and
resumed at any step equals the uninterrupted run, on a CPU bit for bit.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from ijepa.augmentation import color_jitter, random_resized_crop, standardize
from ijepa.devices import can_compile
from ijepa.distributed import gather_rows, num_processes, own_part, sum_gradients
from ijepa.errors import counted
from ijepa.graphs import Graphs
from ijepa.masking import MaskConfig, sample_masks
from ijepa.model import Predictor, PredictorConfig, VisionTransformer, ViTConfig, gather_tokens
from ijepa.muon import Muon, make_optimizers

CHECK_EVERY = 50
"""Updates between checks that the loss is finite."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the defaults are the recipe `matched` (see `RECIPES`).

    Only the last `decay_share` of a run depends on `epochs`; until then a run can be made longer or
    shorter.
    """

    epochs: int = 300
    batch_size: int = 256
    lr: float = 4e-3  # of both optimizers, constant between warm-up and decay
    warmup_epochs: float = 4.0
    decay_share: float = 0.15
    """Last share of the updates: the learning rate falls linearly to 0, further views are seen
    whole, as the encoder will be used, and `last_temperature` applies."""
    weight_decay: float = 0.05  # of weights, not of biases and norms
    ema_start: float = 0.99  # smallest momentum of the target encoder; the largest is 0.9999
    ema_window: float = 0.05  # share of the updates so far that it averages over
    clip_norm: float = 3.0
    min_crop: float = 0.25  # smallest share of the image's area in a view
    jitter: float = 0.4  # strength of the color jitter of every view
    grey_share: float = 0.2  # of gray views
    num_views: int = 3  # crops of each image in an update: at least 2 for matching, 1 without
    matching_weight: float = 1.0
    temperature: float = 0.1  # of the matching loss before the decay
    last_temperature: float = 0.4  # higher: similar images are separated less
    spread_weight: float = 0.05
    seed: int = 0
    vit: ViTConfig = field(default_factory=ViTConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)


RECIPES = {
    "matched": TrainConfig(),
    "paper": TrainConfig(
        batch_size=64,
        lr=2e-3,
        warmup_epochs=1.0,
        decay_share=0.2,
        num_views=1,
        matching_weight=0.0,
        spread_weight=0.0,
        mask=MaskConfig(num_targets=4),
    ),
}


@dataclass
class TrainState:
    """Everything that an update reads and changes."""

    context_encoder: VisionTransformer
    target_encoder: VisionTransformer
    predictor: Predictor
    muon: Muon
    adamw: torch.optim.AdamW
    dtype: torch.dtype  # of matrix products; weights are float32
    loss_sums: Float[Tensor, "2"]  # prediction and matching, over the current epoch, on the device
    step: int = 0  # optimizer updates so far
    start_step: int = 0  # updates of an earlier run; the warm-up begins there
    graphs: Graphs | None = None  # of `update`, on a GPU

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load_state_dict` continues exactly."""
        modules = ("context_encoder", "target_encoder", "predictor", "muon", "adamw")
        saved = {name: getattr(self, name).state_dict() for name in modules}
        return saved | {name: getattr(self, name) for name in ("step", "start_step", "loss_sums")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over the result of `state_dict`, also from another kind of device."""
        for name in ("context_encoder", "target_encoder", "predictor", "muon", "adamw"):
            getattr(self, name).load_state_dict(saved[name])
        for group in self.adamw.param_groups:
            group["capturable"] = self.graphs is not None
        if self.graphs:  # they hold the optimizers' old moments
            self.graphs.recordings.clear()
        self.step, self.start_step = saved["step"], saved["start_step"]
        self.loss_sums.copy_(saved["loss_sums"])


def init_state(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> TrainState:
    """Random weights by the run's seed; the target encoder starts as a copy of the context's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        context_encoder = VisionTransformer(config.vit)
        predictor = Predictor(config.vit, config.predictor)
    context_encoder, predictor = context_encoder.to(device), predictor.to(device)
    target_encoder = copy.deepcopy(context_encoder).requires_grad_(False)
    if can_compile(device):
        # The blocks of a network are alike and share one compilation.
        for one in (*context_encoder.blocks, *target_encoder.blocks, *predictor.predictor_blocks):
            one.compile(dynamic=True)
    parameters = [*context_encoder.parameters(), *predictor.parameters()]
    muon, adamw = make_optimizers(parameters, config.lr, config.weight_decay, dtype)
    networks, zeros = (context_encoder, target_encoder, predictor), torch.zeros(2, device=device)
    state = TrainState(*networks, muon, adamw, dtype, loss_sums=zeros)
    if device.type == "cuda" and num_processes() == 1:
        state.graphs = Graphs(partial(update, state, config), device)
        for group in adamw.param_groups:
            group["capturable"] = True
    return state


def learning_rate(
    config: TrainConfig, step: int, steps_per_epoch: int, start_step: int = 0
) -> float:
    """Linear warm-up from `start_step` on, constant, linear decay.

    Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
    https://arxiv.org/abs/2405.18392.
    """
    total = config.epochs * steps_per_epoch
    rising = (step - start_step + 1) / max(config.warmup_epochs * steps_per_epoch, 1)
    falling = (total - step) / max(total - decay_start(config, steps_per_epoch), 1)
    return config.lr * min(rising, falling, 1.0)


def decay_start(config: TrainConfig, steps_per_epoch: int) -> int:
    """Updates before the decay begins."""
    return round(config.epochs * steps_per_epoch * (1 - config.decay_share))


def ema_momentum(config: TrainConfig, step: int) -> float:
    """The momentum that averages over `ema_window` of the updates so far."""
    return max(config.ema_start, min(1 - 1 / (config.ema_window * (step + 1)), 0.9999))


def spread_loss(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Variance and covariance terms of VICReg, with target deviation 1 and covariance weight 0.04.

    Bardes et al. 2022, section 4.1, https://arxiv.org/abs/2105.04906.
    """
    centered = embeddings - embeddings.mean(dim=0)
    freedom = max(len(embeddings) - 1, 1)  # a single image has no spread, but a finite loss
    deviation = (centered.square().sum(dim=0) / freedom + 1e-4).sqrt()
    covariance = centered.T @ centered / freedom
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviation).mean() + 0.04 * off_diagonal / embeddings.shape[1]


def matching_loss(
    queries: Float[Tensor, "*P B D"],
    keys: Float[Tensor, "*P B D"],
    temperature: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-entropy of finding the key of each query's image among all keys of its batch.

    InfoNCE on cosine similarities (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748),
    without projection heads, as the mean token itself is what is used afterwards.
    """
    similarities = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).mT
    own = torch.arange(keys.shape[-2], device=keys.device).expand(similarities.shape[:-1])
    return F.cross_entropy(similarities.flatten(0, -2) / temperature, own.flatten())


class Views(NamedTuple):
    """What one update sees of its images: V differently colored crops of each, W = V - 1."""

    pixels: Float[Tensor, "B V 3 H W"]  # the target encoder sees the first view, whole
    context: Int[Tensor, "B K"]  # patches of the first view, none of them in a target block
    further: Int[Tensor, "B W L"]  # patches of the other views
    target_blocks: Int[Tensor, "B T M"]


def draw_views(
    config: TrainConfig, images: UInt8[Tensor, "B 3 H W"], step: int, steps_per_epoch: int
) -> Views:
    """Crops, colors and masks of one update; the run's seed and the step determine them.

    From the start of the learning-rate decay on, further views keep all of their patches: Li
    et al. 2023, "Scaling Language-Image Pre-training via Masking", section 3,
    https://arxiv.org/abs/2212.00794.
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
    """Tokens of the first and of the further views; in one pass if they have the same length."""
    B, V = views.pixels.shape[:2]
    if views.context.shape[-1] == views.further.shape[-1]:
        patches = torch.cat([views.context[:, None], views.further], dim=1)
        tokens = encoder(views.pixels.flatten(0, 1), patches.flatten(0, 1)).unflatten(0, (B, V))
        return tokens[:, 0], tokens[:, 1:]
    first = encoder(views.pixels[:, 0], views.context)
    further = encoder(views.pixels[:, 1:].flatten(0, 1), views.further.flatten(0, 1))
    return first, further.unflatten(0, (B, V - 1))


class Losses(NamedTuple):
    """The terms of one update, without their weights."""

    prediction: Float[Tensor, ""]
    matching: Float[Tensor, ""]
    spread: Float[Tensor, ""]


def compute_losses(
    state: TrainState, views: Views, temperature: float | Float[Tensor, ""]
) -> Losses:
    """The terms over the rows of all processes.

    The keys of the matching term are the target encoder's means, as in MoCo v3 (Chen et al. 2021,
    https://arxiv.org/abs/2104.02057), and the context encoder's own, as in SimCLR (Chen et al.
    2020, https://arxiv.org/abs/2002.05709).
    """
    dtype = state.dtype
    B, T, M = views.target_blocks.shape
    with torch.autocast(views.pixels.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            tokens = state.target_encoder(views.pixels[:, 0]).float()
        first, further = encode_views(state.context_encoder, views)
        predicted = state.predictor(first, views.context, views.target_blocks)
    # Normalized without a learned scale, as in the authors' code, so that targets cannot shrink.
    targets = gather_tokens(
        F.layer_norm(tokens, tokens.shape[-1:]), views.target_blocks.flatten(1)
    ).reshape(B, T, M, -1)
    prediction = gather_rows(F.smooth_l1_loss(predicted.float(), targets)[None]).mean()
    mean_target = gather_rows(tokens.mean(dim=1))
    means = torch.cat([first.float().mean(dim=1)[:, None], further.float().mean(dim=2)], dim=1)
    means = gather_rows(means).transpose(0, 1)  # (V, B, D)
    if len(means) == 1:  # nothing to match
        return Losses(prediction, torch.zeros_like(prediction), spread_loss(means[0]))
    queries, keys = map(torch.stack, zip(*permutations(means.unbind(), 2), strict=True))
    to_target = matching_loss(means[1:], mean_target.expand_as(means[1:]), temperature)
    matching = to_target + matching_loss(queries, keys, temperature)
    return Losses(prediction, matching, spread_loss(means[0]))


def train_step(
    state: TrainState, config: TrainConfig, images: UInt8[Tensor, "B 3 H W"], steps_per_epoch: int
) -> Losses:
    """Update the networks once by a whole batch.

    Every process draws all views, so that they equal a single process's, and computes on its own
    part of them. On a GPU the next call may overwrite the returned losses.
    """
    views = map(own_part, draw_views(config, images, state.step, steps_per_epoch))
    decays = state.step >= decay_start(config, steps_per_epoch)
    rates = (
        learning_rate(config, state.step, steps_per_epoch, state.start_step),
        ema_momentum(config, state.step),
        config.last_temperature if decays else config.temperature,
    )
    tensors = (*views, *(torch.full((), rate, device=images.device) for rate in rates))
    losses = state.graphs(*tensors) if state.graphs else update(state, config, *tensors)
    for group in (*state.muon.param_groups, *state.adamw.param_groups):
        group["lr"] = rates[0]  # a number, to be saved; `update` left a tensor
    state.step += 1
    return Losses(*losses)


def update(state: TrainState, config: TrainConfig, *tensors: Shaped[Tensor, "..."]) -> Losses:
    """The part of a step that a GPU can replay: all that changes between steps is in `tensors`.

    These are the fields of `Views`, learning rate, momentum of the target encoder, temperature.
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
    with torch.no_grad():  # t <- m t + (1 - m) c
        averaged = list(state.target_encoder.parameters())
        steps = torch._foreach_sub(list(state.context_encoder.parameters()), averaged)
        torch._foreach_mul_(steps, 1 - momentum)
        torch._foreach_add_(averaged, steps)
    return Losses(*(loss.detach() for loss in losses))


def derive_seed(*path: int) -> int:
    """A 62-bit seed, another one for every sequence of numbers."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> np.uint64(2))


def epoch_order(seed: int, epoch: int, num_images: int) -> Int[Tensor, " n"]:
    """The order of the images in one epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 1))
    return torch.randperm(num_images, generator=generator)


def train(
    state: TrainState, config: TrainConfig, images: UInt8[Tensor, "n 3 H W"]
) -> Iterator[bool]:
    """Run from `state.step` to the end of the last epoch; after each update, whether one ended.

    An epoch is one pass in random order without the rest that does not fill a batch.

    Raises:
        FloatingPointError: If the loss is no longer a number; the state is then unusable.
    """
    steps_per_epoch = len(images) // config.batch_size
    while state.step < steps_per_epoch * config.epochs:
        epoch, done = divmod(state.step, steps_per_epoch)
        if not done:
            state.loss_sums.zero_()
        order = epoch_order(config.seed, epoch, len(images)).to(images.device)
        batches = order[: steps_per_epoch * config.batch_size].split(config.batch_size)
        for position, index in enumerate(batches[done:], start=done + 1):
            losses = train_step(state, config, images[index], steps_per_epoch)
            state.loss_sums += torch.stack([losses.prediction, losses.matching])
            # Reading a number makes an accelerator wait; a NaN stays in the sum.
            if position == steps_per_epoch or position % CHECK_EVERY == 0:
                check_finite(state)
            yield position == steps_per_epoch


def check_finite(state: TrainState) -> None:
    """Raise FloatingPointError if a loss of this epoch was not finite."""
    if not state.loss_sums.isfinite().all():
        updates = counted(state.step, "update")
        raise FloatingPointError(f"the loss is no longer a number after {updates}")


def log_row(
    state: TrainState, config: TrainConfig, num_images: int
) -> dict[str, int | float | None]:
    """Finished epochs, mean losses of the last epoch so far, and rates of the last update."""
    steps_per_epoch, last = num_images // config.batch_size, state.step - 1
    updates = last % steps_per_epoch + 1
    prediction, matching = (total / updates for total in state.loss_sums.tolist())
    return {
        "epoch": state.step // steps_per_epoch,
        "loss": prediction,
        "matching_loss": matching if config.matching_weight else None,
        "lr": learning_rate(config, last, steps_per_epoch, state.start_step),
        "momentum": ema_momentum(config, last),
        "weight_decay": config.weight_decay,
    }
