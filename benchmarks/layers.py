"""Precision@5, silhouette and effective rank after every block of a local encoder, as a table."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ijepa.augmentation import standardize  # noqa: E402
from ijepa.checkpoint import load_checkpoint  # noqa: E402
from ijepa.data import balanced_sample, load_split  # noqa: E402
from ijepa.metrics import (  # noqa: E402
    effective_rank,
    nearest_neighbors,
    precision_at_k,
    silhouette_samples,
)
from ijepa.model import VisionTransformer  # noqa: E402


@torch.inference_mode()
def layer_means(
    encoder: VisionTransformer, images: Float[Tensor, "B 3 H W"]
) -> Iterator[tuple[str, Float[Tensor, "B D"]]]:
    """Mean tokens of the patch embedding, of every block, and of the final norm."""
    tokens = encoder.patch_embed(images) + encoder.pos_embed
    yield "patches and positions", tokens.mean(dim=1)
    for number, block in enumerate(encoder.blocks, start=1):
        tokens = block(tokens)
        yield f"block {number}", tokens.mean(dim=1)
    yield "final norm (the embedding)", encoder.norm(tokens).mean(dim=1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--local-checkpoint", type=Path, default=ROOT / "checkpoints_300ep" / "checkpoint_latest.pt"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--max-samples", type=int, default=2000)
    args = parser.parse_args()
    split = balanced_sample(
        load_split("cifar10", args.data_dir, "test", offline=True), args.max_samples, seed=0
    )
    pixels = standardize(split.images.float() / 255)
    print("| after | target P@5 | context P@5 | target silhouette | target effective rank |")
    print("| --- | --- | --- | --- | --- |")
    columns = {}
    for weights in ("target", "context"):
        encoder = load_checkpoint(args.local_checkpoint, weights).build()
        columns[weights] = list(layer_means(encoder, pixels))
    for (name, target), (_, context) in zip(*columns.values(), strict=True):
        target_p, context_p = (
            precision_at_k(nearest_neighbors(X.numpy(), 5)[0], split.labels, 5).mean()
            for X in (target, context)
        )
        silhouette = silhouette_samples(target.numpy(), split.labels).mean()
        rank = effective_rank(target.numpy())
        print(f"| {name} | {target_p:.3f} | {context_p:.3f} | {silhouette:.3f} | {rank:.1f} |")


if __name__ == "__main__":
    main()
