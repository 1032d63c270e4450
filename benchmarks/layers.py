"""Precision@5, silhouette and effective rank after every block of a local encoder, as a table.

python benchmarks/layers.py --data-dir data
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa.augmentation import standardize
from ijepa.checkpoint import load_checkpoint
from ijepa.data import balanced_sample, load_split
from ijepa.metrics import all_pairs, covariance_spectrum, effective_rank, precision_at_k

ROOT = Path(__file__).resolve().parents[1]


@torch.inference_mode()
def layer_means(encoder, images):
    """Mean tokens of the patch embedding, of every block, and of the final norm."""
    tokens = encoder.patch_embed(images).flatten(2).mT + encoder.pos_embed
    yield "patches and positions", tokens.mean(dim=1)
    for number, block in enumerate(encoder.blocks, start=1):
        tokens = block(tokens)
        yield f"block {number}", tokens.mean(dim=1)
    yield "final norm (the embedding)", encoder.norm(tokens).mean(dim=1)


def main():
    """Measure and print."""
    bundled = ROOT / "checkpoints_300ep" / "checkpoint_latest.pt"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--local-checkpoint", type=Path, default=bundled)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--max-samples", type=int, default=2000)
    args = parser.parse_args()
    split = load_split("cifar10", args.data_dir, "test", offline=True)
    split = balanced_sample(split, args.max_samples, seed=0)
    pixels = standardize(split.images.float() / 255)
    print("| weights | after | P@5 | silhouette | effective rank |")
    print("| --- | --- | --- | --- | --- |")
    for weights in ("target", "context"):
        encoder = load_checkpoint(args.local_checkpoint, weights).build()
        for name, means in layer_means(encoder, pixels):
            X = means.numpy()
            pairs, rank = all_pairs(X, 5, split.labels), effective_rank(covariance_spectrum(X))
            precision = precision_at_k(pairs.neighbors, split.labels, 5).mean()
            silhouette = pairs.silhouettes.mean()
            print(f"| {weights} | {name} | {precision:.3f} | {silhouette:.3f} | {rank:.1f} |")


if __name__ == "__main__":
    main()
