"""I-JEPA pre-training: predict the target encoder's tokens of hidden blocks from visible ones.

Assran et al. 2023 (https://arxiv.org/abs/2301.08243), section 3: three networks, of which the
target encoder is an exponential moving average of the context encoder. No label is read.

Every random draw of a step comes from generators seeded by (run seed, step), so a run that is
stopped and resumed at any step is the undisturbed run bit for bit. Nothing here knows of disks.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ijepa.masking import MaskConfig, Masks, sample_masks
from ijepa.metrics import effective_rank, nearest_neighbors, precision_at_k
from ijepa.model import Predictor, PredictorConfig, VisionTransformer, ViTConfig, gather_tokens


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the defaults are the recipe of the shipped checkpoint."""

    epochs: int = 300
    batch_size: int = 64
    lr: float = 7e-4
    """Peak learning rate of AdamW, reached after `warmup_share` of the run."""
    warmup_share: float = 0.05
    final_lr_share: float = 0.01
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """First and last value of a cosine, on matrices only (paper, appendix A.1)."""
    ema_start: float = 0.99
    ema_window: float = 0.05
    """Share of the run that the target encoder averages over at the end; momentum <= 0.9999."""
    clip_norm: float = 1.0
    pad: int = 4
    """Random crops after zero-padding by this many pixels, the same for both encoders."""
    jitter: float = 0.4
    """Brightness, contrast and saturation factors in 1 +- jitter, on the context view alone."""
    spread_weight: float = 0.05
    """Weight of the variance and covariance terms on the mean context token; see `spread_loss`."""
    seed: int = 0
    vit: ViTConfig = field(default_factory=ViTConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)


@dataclass
class TrainState:
    """All that a step reads and changes; `step` counts optimizer updates from 0."""

    context_encoder: VisionTransformer
    target_encoder: VisionTransformer
    predictor: Predictor
    optimizer: torch.optim.AdamW
    step: int = 0
    loss_sum: float = 0.0
    """Sum of the losses since the current epoch began."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers enough to go on exactly here."""
        return {
            "context_encoder": self.context_encoder.state_dict(),
            "target_encoder": self.target_encoder.state_dict(),
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.context_encoder.load_state_dict(saved["context_encoder"])
        self.target_encoder.load_state_dict(saved["target_encoder"])
        self.predictor.load_state_dict(saved["predictor"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.loss_sum = saved["loss_sum"]


@dataclass(frozen=True)
class StepLog:
    """What one update did."""

    step: int
    epoch: int
    """Epochs finished after this step."""
    end_of_epoch: bool
    mean_loss: float
    """Mean over the epoch so far."""
    lr: float
    momentum: float
    weight_decay: float


def init_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Random weights by the run's seed; the target encoder starts as a copy of the context's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        context_encoder = VisionTransformer(config.vit)
        predictor = Predictor(config.vit, config.predictor)
    context_encoder, predictor = context_encoder.to(device), predictor.to(device)
    target_encoder = copy.deepcopy(context_encoder).requires_grad_(False)
    parameters = [*context_encoder.parameters(), *predictor.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "decays": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decays": False, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return TrainState(context_encoder, target_encoder, predictor, optimizer)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `final_lr_share` of it."""
    warmup = config.warmup_share * total_steps
    if step < warmup:
        return config.lr * (step + 1) / math.ceil(warmup)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    final = config.lr * config.final_lr_share
    return final + (config.lr - final) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay(config: TrainConfig, step: int, total_steps: int) -> float:
    """Half a cosine from the first to the last value."""
    first, last = config.weight_decay
    return last + (first - last) * (1 + math.cos(math.pi * step / total_steps)) / 2


def ema_momentum(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear from `ema_start` to the momentum whose memory is `ema_window` of the run."""
    last = min(1 - 1 / (config.ema_window * total_steps), 0.9999)
    return config.ema_start + max(last - config.ema_start, 0.0) * step / total_steps


@torch.no_grad()
def update_target(target: VisionTransformer, context: VisionTransformer, momentum: float) -> None:
    """Move the target encoder towards the context encoder: t <- m t + (1 - m) c."""
    for averaged, current in zip(target.parameters(), context.parameters(), strict=True):
        averaged.lerp_(current, 1 - momentum)


def crop_and_flip(
    images: UInt8[Tensor, "B 3 H W"], pad: int, generator: torch.Generator
) -> UInt8[Tensor, "B 3 H W"]:
    """Random crop after zero padding, and a horizontal flip for half of the images."""
    B, _, H, W = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator, device=device)
    flip = torch.rand(B, 1, generator=generator, device=device) < 0.5
    rows = top + torch.arange(H, device=device)  # (B, H) in padded coordinates
    columns = torch.arange(W, device=device).expand(B, W)
    columns = left + torch.where(flip, W - 1 - columns, columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    image = torch.arange(B, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def color_jitter(
    images: Float[Tensor, "B 3 H W"], strength: float, generator: torch.Generator
) -> Float[Tensor, "B 3 H W"]:
    """Scale brightness, contrast and saturation, in this order, of images in [0, 1]."""
    draws = torch.rand(3, len(images), 1, 1, 1, generator=generator, device=images.device)
    brightness, contrast, saturation = 1 + strength * (2 * draws - 1)
    images = images * brightness
    images = torch.lerp(images.mean(dim=(1, 2, 3), keepdim=True), images, contrast)
    images = torch.lerp(images.mean(dim=1, keepdim=True), images, saturation)
    return images.clamp(0, 1)


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


def prediction_loss(
    state: TrainState,
    context_view: Float[Tensor, "B 3 H W"],
    target_view: Float[Tensor, "B 3 H W"],
    masks: Masks,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B K D"]]:
    """Smooth-L1 between predicted and layer-normalised target tokens; also the context tokens.

    The target encoder sees the whole image; its tokens are normalised over channels without learned
    scale, as in the authors' code, so that the targets' size cannot shrink.
    """
    B, T, M = masks.targets.shape
    with torch.no_grad():
        tokens = state.target_encoder(target_view)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        targets = gather_tokens(tokens, masks.targets.flatten(1)).reshape(B, T, M, -1)
    context = state.context_encoder(context_view, masks.context)
    predicted = state.predictor(context, masks.context, masks.targets)
    return F.smooth_l1_loss(predicted.float(), targets), context


def train_step(
    state: TrainState,
    config: TrainConfig,
    images: UInt8[Tensor, "B 3 H W"],
    total_steps: int,
    dtype: torch.dtype,
) -> Tensor:
    """One optimizer update and one move of the target encoder; returns the prediction loss."""
    device = images.device
    seed = derive_seed(config.seed, state.step)
    generator = torch.Generator(device).manual_seed(seed)
    target_view = crop_and_flip(images, config.pad, generator).float() / 255
    context_view = color_jitter(target_view, config.jitter, generator)
    masks = sample_masks(config.mask, config.vit.grid_size, len(images), seed, device)

    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step, total_steps)
        if group["decays"]:
            group["weight_decay"] = weight_decay(config, state.step, total_steps)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss, context = prediction_loss(
            state, standardize(context_view), standardize(target_view), masks
        )
    spread = spread_loss(context.float().mean(dim=1))
    state.optimizer.zero_grad()
    (loss + config.spread_weight * spread).backward()
    for network in (state.context_encoder, state.predictor):
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
    state.optimizer.step()
    momentum = ema_momentum(config, state.step, total_steps)
    update_target(state.target_encoder, state.context_encoder, momentum)
    state.step += 1
    return loss.detach()


def standardize(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Map [0, 1] to [-1, 1]: mean and deviation 0.5, a choice that fits any data set."""
    return (images - 0.5) / 0.5


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
    dtype: torch.dtype,
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
    total_steps = steps_per_epoch * config.epochs
    while state.step < total_steps:
        epoch, position = divmod(state.step, steps_per_epoch)
        if position == 0:
            state.loss_sum = 0.0
        order = epoch_order(config.seed, epoch, len(images)).to(images.device)
        for index in order[: steps_per_epoch * config.batch_size].split(config.batch_size)[
            position:
        ]:
            at = state.step
            loss = train_step(state, config, images[index], total_steps, dtype).item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {at}")
            position += 1
            state.loss_sum += loss
            yield StepLog(
                step=state.step,
                epoch=state.step // steps_per_epoch,
                end_of_epoch=position == steps_per_epoch,
                mean_loss=state.loss_sum / position,
                lr=learning_rate(config, at, total_steps),
                momentum=ema_momentum(config, at, total_steps),
                weight_decay=weight_decay(config, at, total_steps),
            )


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
    """Watch a run: P@5, effective rank and spread of the embeddings of held-out images."""
    embeddings = embed(encoder, images, dtype)
    neighbors, _ = nearest_neighbors(embeddings, 5)
    return {
        "heldout_precision_at_5": float(precision_at_k(neighbors, labels, 5).mean()),
        "effective_rank": effective_rank(embeddings),
        "target_std": float(embeddings.std(axis=0).mean()),
    }
