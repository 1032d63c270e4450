"""On a CUDA GPU: extraction with a ViT-Huge against transformers and the card, training, pairs.

    python benchmarks/gpu.py vit-huge --repeats 5
    python benchmarks/gpu.py training --repeats 5
    python benchmarks/gpu.py pairs --sizes 50000 200000 1000000

`vit-huge` embeds 32 x 32 images, enlarged to 224 pixels on the CPU, with an I-JEPA of random
weights in the shape of ViT-H/14, by turns in our extraction (bfloat16), in the same network alone
on pixels that are on the GPU already, as fast as a GPU that never waits, and in transformers' model
in a loop over batches, in bfloat16 and in float32. Between them it enlarges the images alone, batch
after batch. The ceiling is a product of 8192 x 8192 matrices in bfloat16. `training` makes updates
of the shipped recipe on random images, as the trainer does, compiled and replayed from CUDA graphs,
without the graphs, and with neither. `pairs` looks at all pairs of random embeddings of 1280
numbers, as a comparison of that many images does, once for each number of images.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extraction import WIDTH, batches, some_images, vit_huge_flops, write_vit_huge

from ijepa.data import Split
from ijepa.devices import choose_device
from ijepa.embeddings import extract
from ijepa.encoders import load_encoder
from ijepa.metrics import mean_silhouettes, nearest_neighbors, silhouette_samples
from ijepa.training import TrainConfig, decay_start, init_state, train_step
from ijepa.uncertainty import LIST_LENGTH, NUM_HALVES

GPU = torch.device("cuda")
DEPTH = 32
SIDE = 8192


def seconds_of(work):
    """Wall time until the GPU has done it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def by_turns(works, repeats):
    """Seconds of each work, one list per name; a first unmeasured turn warms everything up."""
    seconds = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            taken = seconds_of(work)
            if turn:
                seconds[name].append(taken)
    return seconds


def vit_huge(args):
    """Ours, the network alone, and transformers' loops."""
    from transformers import AutoImageProcessor, IJepaModel

    images = some_images(args.images)
    names = tuple("ab")
    labels = np.zeros(args.images, np.int64)
    split = Split("random", "test", names, torch.stack(images), labels, np.arange(args.images))
    with tempfile.TemporaryDirectory() as folder:
        with GPU:
            write_vit_huge(folder, DEPTH)
        encoder = load_encoder(folder, "hf", device=GPU, dtype="bfloat16")
        processor = AutoImageProcessor.from_pretrained(folder)
        models = [
            IJepaModel.from_pretrained(folder, dtype=dtype).to(GPU).eval()
            for dtype in (torch.bfloat16, torch.float32)
        ]
    groups = batches(images, args.batch_size)
    peers_groups = batches(images[: args.peers_images], args.batch_size)
    resident = encoder.prepare(groups[0]).to(GPU)

    @torch.inference_mode()
    def network():
        for _ in groups:
            encoder.network(resident)

    def loop(model):
        @torch.inference_mode()
        def run():
            for group in peers_groups:
                pixels = processor(group, return_tensors="pt")["pixel_values"]
                tokens = model(pixels.to(GPU, model.dtype)).last_hidden_state
                tokens.float().mean(dim=1).cpu()

        return run

    def silent(**_):
        return nullcontext(SimpleNamespace(update=lambda _: None))

    left, right = (torch.randn(SIDE, SIDE, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    works = {
        "ours, bfloat16": lambda: extract(encoder, split, args.batch_size, None, silent),
        "the network alone": network,
        "preparing alone, on the CPU": lambda: list(map(len, map(encoder.prepare, groups))),
        "transformers' loop, bfloat16": loop(models[0]),
        "transformers' loop, float32": loop(models[1]),
        "ceiling": lambda: [left @ right for _ in range(50)],
    }
    seconds = by_turns(works, args.repeats)
    ceiling = 50 * 2 * SIDE**3 / statistics.median(seconds.pop("ceiling"))
    print(f"ceiling {ceiling / 1e12:.0f} TFLOP/s\n")
    print("| work | images/s | of the ceiling | ours is faster |")
    print("| --- | --- | --- | --- |")
    rates = {
        name: [(args.peers_images if "loop" in name else args.images) / one for one in times]
        for name, times in seconds.items()
    }
    for name, values in rates.items():
        rate = statistics.median(values)
        share = rate * vit_huge_flops(DEPTH) / ceiling
        pairs = zip(rates["ours, bfloat16"], values, strict=True)
        ratio = statistics.median(ours / one for ours, one in pairs)
        print(f"| {name} | {rate:.0f} | {share:.1%} | {ratio:.2f}x |")


def training(args):
    """Updates with and without compilation and graphs, on views of 20 patches and whole ones."""
    steps_per_epoch = 10**4
    print("| update | images/s | ms | x the first |")
    print("| --- | --- | --- | --- |")
    for batch_size in args.batch_sizes:
        config = TrainConfig(batch_size=batch_size)
        size = (batch_size, 3, config.vit.image_size, config.vit.image_size)
        images = torch.randint(0, 256, size, dtype=torch.uint8, device=GPU)
        whole = decay_start(config, steps_per_epoch)
        for views, first in (("20 patches", 0), ("whole", whole)):
            states = [init_state(config, GPU, torch.bfloat16) for _ in range(2)]
            with mock.patch("ijepa.training.can_compile", return_value=False):
                states.append(init_state(config, GPU, torch.bfloat16))
            states[1].graphs = states[2].graphs = None

            def updates(state, first=first, config=config, images=images):
                state.step = first
                for _ in range(args.steps):
                    train_step(state, config, images, steps_per_epoch)

            names = ("compiled, replayed", "compiled", "neither")
            works = {
                name: partial(updates, state) for name, state in zip(names, states, strict=True)
            }
            seconds = by_turns(works, args.repeats)
            base = seconds[names[0]]
            for name, times in seconds.items():
                one = statistics.median(times) / args.steps
                ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
                print(
                    f"| {batch_size} images, {views}, {name} | {batch_size / one:.0f} "
                    f"| {1000 * one:.2f} | {ratio:.2f} |",
                    flush=True,
                )


def pairs(args):
    """Neighbours and Euclidean silhouettes of all images, and silhouettes of their halves."""
    generator = np.random.default_rng(0)
    print("| images | 64 neighbours, s | silhouettes, s | of 200 halves, s | GPU, GiB |")
    print("| --- | --- | --- | --- | --- |")
    for n in (10_000, *args.sizes):  # the first warms everything up
        labels = np.arange(n) % 10
        halves = generator.random((NUM_HALVES, n)) < 0.5
        X = generator.standard_normal((n, WIDTH), dtype=np.float32)
        for label, center in enumerate(generator.standard_normal((10, WIDTH), dtype=np.float32)):
            X[label::10] += 3 * center
        works = (
            partial(nearest_neighbors, X, LIST_LENGTH, str(GPU)),
            partial(silhouette_samples, X, labels, device=str(GPU)),
            partial(mean_silhouettes, X, labels, halves, device=str(GPU)),
        )
        torch.cuda.reset_peak_memory_stats()
        shown = print if n in args.sizes else lambda *_, **__: None
        shown(f"| {n} |", end="", flush=True)
        for work in works:
            shown(f" {seconds_of(work):.1f} |", end="", flush=True)
        shown(f" {torch.cuda.max_memory_allocated() / 2**30:.1f} |", flush=True)


def main():
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("vit-huge")
    one.set_defaults(work=vit_huge)
    one.add_argument("--images", type=int, default=2048)
    one.add_argument("--peers-images", type=int, default=256, help="for the loops, which are slow")
    one.add_argument("--batch-size", type=int, default=64)
    two = commands.add_parser("training")
    two.set_defaults(work=training)
    two.add_argument("--steps", type=int, default=200)
    two.add_argument("--batch-sizes", type=int, nargs="+", default=[256])
    for command in (one, two):
        command.add_argument("--repeats", type=int, default=5)
    three = commands.add_parser("pairs")
    three.set_defaults(work=pairs)
    three.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000, 1_000_000])
    args = parser.parse_args()
    choose_device(str(GPU))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    args.work(args)


if __name__ == "__main__":
    main()
