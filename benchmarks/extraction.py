"""Extraction against plain loops: speed, share of the machine's ceiling, and what bfloat16 changes.

    python benchmarks/extraction.py vit-huge --depth 2 --images 8 --repeats 5
    python benchmarks/extraction.py local --images 256 --repeats 5
    python benchmarks/extraction.py photographs --images 256 --batch-size 32 --repeats 5
    python benchmarks/extraction.py fidelity --data-dir data --images 2000

Ours is in the dtype that `compare_embeddings.py` chooses: bfloat16 where the processor multiplies
it, else float32. `vit-huge` makes an I-JEPA of random weights with the widths of ViT-H/14 at 224
pixels and the given depth (the real one has 32 blocks) and embeds 32 x 32 images by turns with our
extraction, with transformers' model as it loads by default (float32) in a loop over batches, and
with `pipeline("image-feature-extraction")`. `local` does the same for the bundled checkpoint
against a float32 loop. The ceiling is a matrix product of the network's largest shape in our dtype,
timed between the others. `photographs` embeds JPEG files of 500 x 375 pixels with the bundled
checkpoint as `compare_embeddings.py` does, and in a loop that decodes a batch and then embeds it,
and tells what decoding and preparing take alone; its times are of the wall clock, as one processor
decodes while another embeds. `fidelity` compares bfloat16 with float32: embeddings of a random
ViT-H of `--depth` blocks, P@5 and silhouette of the bundled checkpoint on CIFAR-10 test images.

The other times are CPU seconds of the process over all threads, so that other programs on the
machine do not count: with one thread (`OMP_NUM_THREADS=1`) they are the wall time of an idle core.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa import embeddings
from ijepa.data import balanced_sample, load_split
from ijepa.devices import choose_dtype
from ijepa.encoders import load_encoder
from ijepa.metrics import nearest_neighbors, precision_at_k, silhouette_samples

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints_300ep" / "checkpoint_latest.pt"
CPU = torch.device("cpu")
DTYPE = str(choose_dtype("auto", CPU)).removeprefix("torch.")
OURS = f"ours, {DTYPE}"
TOKENS, WIDTH, HIDDEN, PATCH = 256, 1280, 5120, 14


def write_vit_huge(folder, depth):
    """A directory with random weights in the shape of ViT-H/14, and its processor."""
    from transformers import IJepaConfig, IJepaModel, ViTImageProcessor

    torch.manual_seed(0)
    config = IJepaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=16,
        intermediate_size=HIDDEN,
        image_size=224,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    IJepaModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)


def vit_huge_flops(depth):
    """Operations of one image: a multiplication and an addition count as two."""
    block = 2 * TOKENS * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN) + 4 * TOKENS**2 * WIDTH
    return depth * block + 2 * TOKENS * 3 * PATCH**2 * WIDTH


def some_images(count):
    """Random 32 x 32 images; their content does not change the time."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator))


def batches(images, size):
    """The images in lists of at most this many."""
    return [images[at : at + size] for at in range(0, len(images), size)]


def ceiling(rows):
    """Operations per CPU second of a product of the network's largest shape in our dtype."""
    left = torch.randn(rows, WIDTH, dtype=getattr(torch, DTYPE))
    right = torch.randn(HIDDEN, WIDTH, dtype=getattr(torch, DTYPE))
    torch.nn.functional.linear(left, right)
    began = time.process_time()
    for _ in range(3):
        torch.nn.functional.linear(left, right)
    return 3 * 2 * rows * WIDTH * HIDDEN / (time.process_time() - began)


def timed_by_turns(works, repeats, clock=time.process_time):
    """Seconds of each work, one list per name; a first unmeasured turn warms everything up."""
    seconds = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            began = clock()
            result = work()
            if turn:
                seconds[name].append(clock() - began if result is None else result)
    return seconds


def print_table(seconds, count, base, unit="CPU s"):
    """Median time per image of each work, and the median of its ratio to ours."""
    print(f"| work | {unit} per image | x ours |")
    print("| --- | --- | --- |")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[base], strict=True))
        print(f"| {name} | {statistics.median(times) / count:.5f} | {ratio:.2f} |")


def vit_huge(args):
    """Ours, the default loop and the pipeline on the same random ViT-H."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, pipeline

    images = some_images(args.images)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with tempfile.TemporaryDirectory() as folder:
        write_vit_huge(folder, args.depth)
        encoder = load_encoder(folder, "hf", device=CPU, dtype=DTYPE)
        processor, model = (
            kind.from_pretrained(folder) for kind in (AutoImageProcessor, AutoModel)
        )
        pipe = pipeline("image-feature-extraction", model=folder, image_processor=folder)

        def ours():
            for batch in batches(images, args.batch_size):
                encoder.embed(batch)

        @torch.no_grad()
        def default_loop():
            for batch in batches(pictures, args.batch_size):
                model(**processor(batch, return_tensors="pt")).last_hidden_state.mean(dim=1)

        works = {
            OURS: ours,
            "transformers, default float32 loop": default_loop,
            "transformers, pipeline": lambda: [pipe(picture) for picture in pictures] and None,
            "ceiling": lambda: ceiling(TOKENS * args.batch_size),
        }
        seconds = timed_by_turns(works, args.repeats)
    rates = seconds.pop("ceiling")
    print_table(seconds, args.images, OURS)
    work = args.images * vit_huge_flops(args.depth)
    ours_times = seconds[OURS]
    share = statistics.median(work / a / b for a, b in zip(ours_times, rates, strict=True))
    print(
        f"\nceiling {statistics.median(rates) / 1e9:.0f} GFLOP/s; ours reaches {share:.0%} of it "
        f"with {vit_huge_flops(args.depth) / 1e9:.1f} GFLOP per image of {args.depth} blocks"
    )


def local(args):
    """The bundled checkpoint against a float32 loop over the same batches."""
    images = some_images(args.images)
    fast = load_encoder(CHECKPOINT, "local", device=CPU, dtype=DTYPE)
    plain = load_encoder(CHECKPOINT, "local", device=CPU, dtype="float32")

    def ours():
        for batch in batches(images, args.batch_size):
            fast.embed(batch)

    @torch.no_grad()
    def loop():
        for batch in batches(images, args.batch_size):
            plain.network(plain.preprocess(batch)).mean(dim=1)

    seconds = timed_by_turns({OURS: ours, "float32 loop": loop}, args.repeats)
    print_table(seconds, args.images, OURS)


def write_photographs(folder, count):
    """JPEG files as large as many photographs, smooth like them, in two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        path = Path(folder) / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def photographs(args):
    """Files through the bundled checkpoint, decoded beside the network or before it."""
    encoder = load_encoder(CHECKPOINT, "local", device=CPU, dtype=DTYPE)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, args.images)
        split = load_split(folder, Path(), "test", offline=True)
        rows = range(len(split))
        chunks = [rows[at : at + embeddings.CHUNK] for at in range(0, len(split), embeddings.CHUNK)]

        def loop():
            for batch in batches(rows, args.batch_size):
                encoder.embed([split.images[row] for row in batch])

        def ours():
            for _ in embeddings.embed_chunks(encoder, split, chunks, args.batch_size):
                pass

        def host():
            for part in chunks:
                for batch in embeddings.batches(split, part, args.batch_size):
                    encoder.prepare(batch)

        works = {"ours, decoding beside": ours, "loop, decoding before": loop}
        works["ours, without the network"] = host
        seconds = timed_by_turns(works, args.repeats, time.perf_counter)
    print_table(seconds, args.images, "ours, decoding beside", "wall s")


def embeddings_in_both(load, images, size):
    """Float32 and bfloat16 embeddings of the same images."""
    both = []
    for dtype in ("float32", "bfloat16"):
        encoder = load(dtype)
        both.append(torch.cat([encoder.embed(batch) for batch in batches(images, size)]).numpy())
    return both


def fidelity(args):
    """What bfloat16 changes, for a random ViT-H and for the bundled checkpoint."""
    if args.depth:
        with tempfile.TemporaryDirectory() as folder:
            write_vit_huge(folder, args.depth)
            exact, fast = embeddings_in_both(
                lambda dtype: load_encoder(folder, "hf", device=CPU, dtype=dtype),
                some_images(args.huge_images),
                args.batch_size,
            )
        print(
            f"random ViT-H of {args.depth} blocks, {args.huge_images} images: smallest cosine of "
            f"bfloat16 to float32 {smallest_cosine(exact, fast):.6f}"
        )
    if not args.images:
        return
    split = balanced_sample(load_split("cifar10", args.data_dir, "test", True), args.images, 0)
    exact, fast = embeddings_in_both(
        lambda dtype: load_encoder(CHECKPOINT, "local", device=CPU, dtype=dtype),
        list(split.images),
        args.batch_size,
    )
    print(
        f"bundled checkpoint, n = {len(split)}: cosine at least {smallest_cosine(exact, fast):.6f}"
    )
    for name, metric in (("P@5", precision), ("silhouette", silhouette)):
        a, b = metric(exact, split.labels), metric(fast, split.labels)
        print(f"{name}: float32 {a:.4f}, bfloat16 {b:.4f}, difference {b - a:+.4f}")


def smallest_cosine(X, Y):
    """Of all rows with their counterparts."""
    X, Y = X.astype(np.float64), Y.astype(np.float64)
    lengths = np.linalg.norm(X, axis=1) * np.linalg.norm(Y, axis=1)
    return float(((X * Y).sum(axis=1) / lengths).min())


def precision(X, labels):
    """Mean P@5."""
    return precision_at_k(nearest_neighbors(X, 5)[0], labels, 5).mean()


def silhouette(X, labels):
    """Mean Euclidean silhouette."""
    return silhouette_samples(X, labels).mean()


def main():
    """Parse the arguments and run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    works = {
        "vit-huge": vit_huge,
        "local": local,
        "photographs": photographs,
        "fidelity": fidelity,
    }
    parser.add_argument("work", choices=works)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the ViT-H; 0 leaves it out")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--huge-images", type=int, default=2, help="through the ViT-H of fidelity")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    args = parser.parse_args()
    works[args.work](args)


if __name__ == "__main__":
    main()
