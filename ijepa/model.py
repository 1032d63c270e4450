"""The two networks of I-JEPA: a Vision Transformer encoder and its narrow predictor.

Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture", https://arxiv.org/abs/2301.08243, section 3 and appendix A.1; the blocks are the
pre-norm ones of Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929. There is no class token.
Parameter names are those of the authors' released checkpoints, so weights move across unchanged.

Dimension key: B images, N patches in the grid (row-major), K visible patches, T target blocks of
M patches each, D encoder width, P predictor width.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

# Released I-JEPA weights use this epsilon; transformers' IJepaConfig defaults to 1e-12.
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the encoder; lengths in pixels.

    Raises:
        ValueError: If the patches do not tile the image, or the width does not divide as needed.
    """

    image_size: int = 32
    patch_size: int = 4
    embed_dim: int = 192
    depth: int = 6
    num_heads: int = 3
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if min(self.image_size, self.patch_size, self.embed_dim, self.depth, self.num_heads) < 1:
            raise ValueError(f"every size must be at least 1, got {self}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size, got {self}")
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(
                f"embed_dim must be a multiple of 4 and of num_heads {self.num_heads}, "
                f"got {self.embed_dim}"
            )

    @property
    def grid_size(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes of the predictor; by default narrower than the encoder, as in the paper's A.1."""

    embed_dim: int = 96
    depth: int = 3
    num_heads: int = 3


def sincos_position_embedding(embed_dim: int, grid_size: int) -> Float[Tensor, "1 N D"]:
    """Fixed two-dimensional sine-cosine position code: half of the channels for rows, half columns.

    Vaswani et al. 2017, section 3.5, once per axis, with frequencies 10000^(-2i/(D/2)).
    """
    quarter = embed_dim // 4
    # On the CPU even below `torch.device("meta")`, whose first sum imports a compiler for seconds.
    real = {"dtype": torch.float64, "device": "cpu"}
    frequencies = 10000.0 ** (-torch.arange(quarter, **real) / quarter)
    angles = torch.arange(grid_size, **real)[:, None] * frequencies  # (grid, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    rows = axis[:, None].expand(-1, grid_size, -1)
    columns = axis[None].expand(grid_size, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, grid_size**2, embed_dim).float()


def gather_tokens(
    tokens: Float[Tensor, "B N D"], indices: Int[Tensor, "B K"]
) -> Float[Tensor, "B K D"]:
    """Take the tokens of each image at its own patch indices."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention with one joint query-key-value projection."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Mix every token with every other."""
        B, N, D = tokens.shape
        qkv = self.qkv(tokens).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        if query.is_cuda or torch.is_inference_mode_enabled():
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            # For training on a CPU: the fused kernel's backward pass is slower at these lengths.
            query = query * query.shape[-1] ** -0.5
            mixed = (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        hidden_dim = round(embed_dim * mlp_ratio)
        fc1, fc2 = nn.Linear(embed_dim, hidden_dim), nn.Linear(hidden_dim, embed_dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Attention, then MLP, each added to its input."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """The encoder: normalized images to one token per (visible) patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.embed_dim, config.patch_size
        projection = nn.Conv2d(3, width, kernel_size=size, stride=size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.register_buffer("pos_embed", sincos_position_embedding(width, config.grid_size))
        blocks = (Block(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        initialize(self)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], indices: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B _ D"]:
        """Encode all patches, or only those at `indices` (the others are never seen)."""
        tokens = self.patch_embed(images).flatten(2).mT + self.pos_embed  # patches row by row
        if indices is not None:
            tokens = gather_tokens(tokens, indices)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Predictor(nn.Module):
    """From context tokens and target positions to the target tokens (paper, section 3)."""

    def __init__(self, encoder: ViTConfig, config: PredictorConfig) -> None:
        super().__init__()
        width, grid_size = config.embed_dim, encoder.grid_size
        self.predictor_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_position_embedding(width, grid_size))
        blocks = (Block(width, config.num_heads, encoder.mlp_ratio) for _ in range(config.depth))
        self.predictor_blocks = nn.ModuleList(blocks)
        self.predictor_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.predictor_proj = nn.Linear(width, encoder.embed_dim)
        initialize(self)

    def forward(
        self,
        context: Float[Tensor, "B K D"],
        context_indices: Int[Tensor, "B K"],
        target_indices: Int[Tensor, "B T M"],
    ) -> Float[Tensor, "B T M D"]:
        """Predict each target block on its own from the whole context."""
        B, T, M = target_indices.shape
        positions = self.predictor_pos_embed.expand(B, -1, -1)
        visible = self.predictor_embed(context) + gather_tokens(positions, context_indices)
        masked = self.mask_token + gather_tokens(positions, target_indices.flatten(1))
        # Blocks must not see each other: each becomes a sequence of its own. (B*T, K+M, P)
        tokens = torch.cat(
            [visible.repeat_interleave(T, dim=0), masked.reshape(B * T, M, -1)], dim=1
        )
        for block in self.predictor_blocks:
            tokens = block(tokens)
        predicted = self.predictor_proj(self.predictor_norm(tokens[:, -M:]))
        return predicted.reshape(B, T, M, -1)


def initialize(network: nn.Module) -> None:
    """Set truncated normal weights and zero biases in place; deeper branches start smaller.

    Linear layers use a deviation of 0.02 and, where they end a residual branch, 0.02 / sqrt(2 l) in
    block l, counted from 1. The patch projection uses 1 / sqrt(fan-in): at 0.02 the content of a 4
    x 4 patch would be seven times weaker than its position code. Networks on the meta device stay
    as they are.
    """
    if next(network.parameters()).is_meta:  # only names and shapes are wanted
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            std = 0.02 if isinstance(module, nn.Linear) else 1 / math.sqrt(fan_in)
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(module.bias)
    if isinstance(network, Predictor):
        nn.init.trunc_normal_(network.mask_token, std=0.02, a=-0.04, b=0.04)
    with torch.no_grad():
        blocks = [module for module in network.modules() if isinstance(module, Block)]
        for layer, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
