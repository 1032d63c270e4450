"""Extraction against another checkout and plain loops: speed, and what the dtype changes.

    python benchmarks/extraction.py vit-huge --images 8 --batch-size 4 --against ../older
    python benchmarks/extraction.py local --images 256 --batch-size 32 --against ../older
    python benchmarks/extraction.py jpeg --images 256 --batch-size 32 --against ../older
    python benchmarks/extraction.py vit-huge --depth 32 --images 2048 --device cuda

`vit-huge` embeds 32 x 32 images with an I-JEPA of random weights and the widths of ViT-H/14 at 224
pixels, but `--depth` blocks (the real one has 32), against transformers' model as it loads by
default, in a loop over batches. `local` takes the bundled checkpoint, against the same network in a
float32 loop; `jpeg` the same from files of 500 x 375 pixels, against a loop that decodes a batch
and then embeds it. `--dtype` is that of both versions; the loops are in float32.

Seconds are those of the processor, but for `jpeg`, where decoding overlaps with the network, and on
a GPU those of the clock. `cosine` is the smallest one of an image's embedding to that of the loop.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from versions import ROOT, THIS, median, parse, race, serve

CHECKPOINT = ROOT / "checkpoints_300ep" / "checkpoint_latest.pt"
LOOP = "plain loop"


def write_vit_huge(folder, depth):
    """A directory with random weights in the shape of ViT-H/14, and its processor."""
    from transformers import IJepaConfig, IJepaModel, ViTImageProcessor

    torch.manual_seed(0)
    sizes = {"hidden_size": 1280, "num_hidden_layers": depth, "num_attention_heads": 16}
    sizes |= {"intermediate_size": 5120, "image_size": 224, "patch_size": 14}
    IJepaModel(IJepaConfig(**sizes, layer_norm_eps=1e-6)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)


def write_photographs(folder, count):
    """JPEG files as large as many photographs, smooth like them, in two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        path = Path(folder) / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def images_of(work, folder, count):
    """The images of a work as a split."""
    from ijepa.data import Split, load_split

    if work == "jpeg":
        return load_split(str(folder), Path(), "test", offline=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    rows = np.arange(count)
    return Split("random", "test", ("a", "b"), images, rows % 2, rows)


def load(work, folder, device, dtype):
    """The encoder of a work; version 2979812 had a function for each kind."""
    from ijepa import encoders

    role, source = ("hf", str(folder)) if work == "vit-huge" else ("local", CHECKPOINT)
    if not hasattr(encoders, "load_local_encoder"):
        return encoders.load_encoder(str(source), role, device=device, dtype=dtype, offline=True)
    dtype = getattr(torch, dtype)
    if role == "hf":
        return encoders.load_huggingface_encoder(source, device, dtype, offline=True)
    return encoders.load_local_encoder(source, "target", device, dtype)


def ours(work, folder, count, batch_size, device, dtype):
    """This package; version 2979812 extracted the embeddings of one encoder at a time."""
    from tqdm import tqdm

    from ijepa import embeddings

    encoder = load(work, folder, torch.device(device), dtype)
    split, quiet = images_of(work, folder, count), partial(tqdm, disable=True)
    if hasattr(embeddings, "embed_chunks"):
        return lambda: embeddings.extract(encoder, split, batch_size, None, quiet).values.tolist()
    options = {"cache": None, "batch_size": batch_size, "progress": quiet}
    extract = partial(embeddings.extract, [encoder], split, **options)
    return lambda: extract()[0][encoder.name].values.tolist()


def plain_loop(work, folder, count, batch_size, device, **_):
    """A batch is decoded and prepared, then embedded in float32, then the next one is decoded."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    split, device = images_of(work, folder, count), torch.device(device)
    if work == "vit-huge":
        processor = AutoImageProcessor.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder).to(device)
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images]

        def embed(rows):
            pixels = processor([pictures[row] for row in rows], return_tensors="pt")
            return model(**pixels.to(device)).last_hidden_state.mean(dim=1)
    else:
        encoder = load(work, folder, device, "float32")

        def embed(rows):
            return encoder.embed([split.images[row] for row in rows])

    @torch.no_grad()
    def loop():
        starts = range(0, count, batch_size)
        parts = [embed(range(at, min(at + batch_size, count))) for at in starts]
        return torch.cat(parts).float().tolist()

    return loop


def main():
    """Print the table of one work."""
    serve({THIS: ours, LOOP: plain_loop})

    def add(argument):
        argument("work", choices=["vit-huge", "local", "jpeg"])
        argument("--depth", type=int, default=2, help="blocks of the ViT-H")
        argument("--images", type=int, default=8)
        argument("--batch-size", type=int, default=8)
        argument("--device", default="cpu")
        argument("--dtype", choices=["bfloat16", "float32"], default="float32")

    args = parse(__doc__, add)
    with tempfile.TemporaryDirectory() as folder:
        if args.work == "vit-huge":
            write_vit_huge(folder, args.depth)
        if args.work == "jpeg":
            write_photographs(folder, args.images)
        settings = {"work": args.work, "folder": folder, "count": args.images}
        settings |= {name: getattr(args, name) for name in ("batch_size", "device", "dtype")}
        turns = race(args, settings, (LOOP,))
    clock = "cpu" if args.work != "jpeg" and args.device == "cpu" else "wall"
    print("| version | ms per image | ours / it | cosine |")
    print("| --- | --- | --- | --- |")
    for name, them in turns.items():
        milliseconds = 1000 * median(them, clock) / args.images
        ratio = median(turns[THIS], clock) / median(them, clock)
        pair = (torch.tensor(turns[one][0]["result"]).double() for one in (name, LOOP))
        cosine = torch.cosine_similarity(*pair).min()
        print(f"| {name} | {milliseconds:.3f} | {ratio:.2f} | {cosine:.6f} |")


if __name__ == "__main__":
    main()
