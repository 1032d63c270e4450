"""Time and memory of every stage on embeddings in a file: 50,000 to 1,000,000 images.

    python benchmarks/scale.py --sizes 50000 200000 1000000 --folder runs

Synthetic clustered float32 embeddings of 1280 numbers (a second model has 192 of them) are written
to a temporary file under --folder, 5 GB for a million images, and removed at the end. Each stage
runs in a process of its own, which maps the file as a comparison does. Times are its CPU seconds.
The memory is the highest RssAnon of its /proc/PID/status seen 50 times a second: all that it holds
but pages of files, which the system takes back at will; 0.1 to 0.2 GB of it are the interpreter and
its libraries.

What looks at all pairs of images is run to its end up to --pairs images. Beyond, the first --tiles
tiles are run, which need the memory of all, and the time is that of the largest whole run times the
square of how many more images there are: an extrapolation, marked with ~.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WIDTH, NARROW, CLASSES = 1280, 192, 10
HALVES, SHUFFLES = 200, 10


def write_sample(path, n):
    """Clusters with a falling spectrum, row by row as a comparison's file of embeddings."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((CLASSES, WIDTH), dtype=np.float32)
    falling = 3 * np.arange(1, WIDTH + 1, dtype=np.float32) ** -0.3
    with path.open("wb") as file:
        for start in range(0, n, 10_000):
            rows = np.arange(start, min(start + 10_000, n))
            noise = generator.standard_normal((len(rows), WIDTH), dtype=np.float32)
            file.write(noise * falling + centers[rows % CLASSES])


def extract(X, *_):
    """A stand-in encoder into a file of embeddings, without a cache."""
    import torch

    from ijepa.embeddings import extract

    encoder = SimpleNamespace(
        name="x", embed_dim=WIDTH, embed=lambda batch: torch.ones(len(batch), WIDTH)
    )
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(len(X), -1, -1, -1)

    class Split(SimpleNamespace):
        def __len__(self):
            return len(X)

    bar = SimpleNamespace(update=int)
    extract(encoder, Split(images=images), 64, None, lambda **_: nullcontext(bar), Path.cwd())


def save(X, labels, _):
    """The file of embeddings that a user gets."""
    from ijepa.embeddings import save_embeddings

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        split = SimpleNamespace(indices=np.arange(len(X)), labels=labels)
        save_embeddings(Path(folder) / "embeddings.npz", X, split)


def spectra(X, *_):
    """Check, spectrum and both effective ranks."""
    from ijepa import metrics

    metrics.validate_embeddings(X, "hf")
    metrics.covariance_spectrum(X)
    metrics.effective_rank(X, centered=False)


def jackknife(X, labels, _):
    """Errors of the spectrum."""
    from ijepa.uncertainty import jackknife_blocks, spectrum_deviations

    spectrum_deviations(X, jackknife_blocks(labels))


def cosine(X, labels, _):
    """Cosine silhouettes of all images and of the halves."""
    from ijepa.metrics import mean_silhouettes, silhouette_samples
    from ijepa.uncertainty import half_samples

    silhouette_samples(X, labels, "cosine")
    mean_silhouettes(X, labels, half_samples(labels, HALVES), "cosine")


def agreement(X, labels, _):
    """Both CKA and 10 of the 200 shuffles."""
    from ijepa.agreement import cka_null, linear_cka, similarity_spearman

    Y = X[:, :NARROW]
    linear_cka(X, Y)
    linear_cka(X, Y, labels)
    cka_null(X, Y, labels, SHUFFLES)
    similarity_spearman(X, Y)


def figures(X, labels, _):
    """Principal components and class means."""
    from ijepa.plots import class_similarity, project_pca

    project_pca(X, 2)
    for centered in (False, True):
        class_similarity(X, labels, centered=centered)


def first_tiles(metrics, tiles):
    """Let only some tiles of all pairs be computed, unless it is 0."""
    every = metrics._tile_pairs
    if tiles:
        metrics._tile_pairs = lambda *of: islice(every(*of), tiles)


def neighbors(X, _, tiles):
    """The 64 nearest of each image."""
    from ijepa import metrics

    first_tiles(metrics, tiles)
    metrics.nearest_neighbors(X, 64)


def silhouettes(X, labels, tiles):
    """Euclidean silhouettes of all images."""
    from ijepa import metrics

    first_tiles(metrics, tiles)
    metrics.silhouette_samples(X, labels)


def silhouettes_of_halves(X, labels, tiles):
    """Euclidean silhouettes of 200 halves; of the tiles, a whole row of them."""
    from ijepa import metrics
    from ijepa.uncertainty import half_samples

    rows = metrics._silhouette_tiles(X, labels, half_samples(labels, HALVES), "euclidean")
    for _ in islice(rows, 1 if tiles else None):
        pass


def lists_of_halves(X, labels, _):
    """Precision@k and kNN accuracy on the halves, from made-up lists of neighbours."""
    from ijepa.uncertainty import NeighborLists, half_samples, neighbor_halves

    generator = np.random.default_rng(0)
    listed = generator.integers(0, len(X), (len(X), 64), dtype=np.int32)
    similarities = np.ones(listed.shape, np.float32)
    lists = NeighborLists(X, listed, similarities)
    # Four instead of 200: each is as large as the others.
    neighbor_halves(lists, labels, half_samples(labels, 4))


STAGES = {
    stage.__name__: stage
    for stage in (extract, save, spectra, jackknife, cosine, agreement, figures)
}
STAGES |= {"lists_of_halves": lists_of_halves}
PAIRS = {stage.__name__: stage for stage in (neighbors, silhouettes, silhouettes_of_halves)}


def run_stage(name, path, tiles):
    """In a process of its own: print its CPU seconds."""
    X = np.memmap(path, np.float32, "r").reshape(-1, WIDTH)
    labels = np.arange(len(X)) % CLASSES
    began = time.process_time()
    (STAGES | PAIRS)[name](X, labels, tiles)
    print(time.process_time() - began)


def anonymous_bytes(process):
    """What a process holds now that no file backs; 0 once it has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def measure(name, path, tiles):
    """CPU seconds of a stage and the most that it held, in GiB."""
    command = [
        sys.executable,
        Path(__file__).resolve(),
        "--stage",
        name,
        "--file",
        path,
        "--tiles",
        tiles,
    ]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=path.parent
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{name} failed")
    return float(process.stdout.read()), peak / 2**30


def main():
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000, 1_000_000])
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--tiles", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="+", default=[*STAGES, *PAIRS])
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        run_stage(args.stage, args.file, args.tiles)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    print("| images | stage | CPU s | memory, GiB |")
    print("| --- | --- | --- | --- |")
    whole_runs = {}
    for n in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder).resolve() / "embeddings"
            write_sample(path, n)
            for name in args.only:
                whole = name in STAGES or n <= args.pairs
                seconds, peak = measure(name, path, 0 if whole else args.tiles)
                if whole:
                    whole_runs[name] = n, seconds
                else:
                    most, seconds = whole_runs[name]
                    seconds *= (n / most) ** 2
                about = "" if whole else "~"
                print(f"| {n:,} | {name} | {about}{seconds:,.0f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
