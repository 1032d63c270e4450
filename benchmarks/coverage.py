"""How often the 95% intervals contain the truth, and tests give false alarms, on real images.

    python benchmarks/coverage.py --data-dir data

The population are the 50,000 training images of CIFAR-10, of which disjoint class-balanced samples
are compared as in a run. The truth is the mean over all samples, corrected for the finite
population. The second model is unlike: 384 rectified random features of the first one's embeddings
and of pixels. For the probe a bank of 10,000 images is fixed and the others are queries; smaller
banks are drawn for each sample. For false alarms both models are the embeddings with own noise.
Prints Monte-Carlo standard errors, and which rows are outside 90 to 99.7% by two of them.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa import probe as probes
from ijepa.comparison import METRICS, compare
from ijepa.data import load_split
from ijepa.embeddings import extract
from ijepa.encoders import load_encoder

BANK, SMALL_BANKS, QUERIES = 10_000, (100, 500), 2000
NOISES = (0.15, 0.4, 1.5)  # in standard deviations: two alike models to two unlike ones


def population(args):
    """Embeddings of all training images by three models, and the labels."""
    split = load_split("cifar10", args.data_dir, "train", True)
    encoder = load_encoder(args.checkpoint, "local", device=torch.device("cpu"))
    target = extract([encoder], split, cache=args.cache, progress=tqdm)[0][encoder.name].values
    generator = np.random.default_rng(args.seed)
    raw = split.images.numpy().reshape(len(split), -1).astype(np.float32) / 255
    pixels = probes.principal_components(raw, raw[:1])[0][:, :192]
    mixed = 0.2
    for X, weight in ((target, 1), (pixels, 0.5)):
        directions = generator.normal(size=(X.shape[1], 384)) / X.shape[1] ** 0.5
        mixed = mixed + weight * ((X - X.mean(axis=0)) / X.std()) @ directions
    unlike = np.maximum(mixed, 0).astype(np.float32)
    return {"local": target, "hf": unlike, "pixels": pixels}, split.labels


def partition(labels, n, generator):
    """Disjoint samples of n rows with n / 10 of each class."""
    orders = [generator.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    for end in range(n // 10, min(map(len, orders)) + 1, n // 10):
        yield np.concatenate([order[end - n // 10 : end] for order in orders])


def samples(labels, n, count, seed):
    """As many samples as asked for, of as many partitions as they need."""
    generator, rows = np.random.default_rng(seed), []
    while len(rows) < count:
        rows += partition(labels, n, generator)
    return rows[:count]


def compared(models, labels, rows, seed):
    """Estimates of a comparison by row of the table."""
    pair = {name: models[name][rows] for name in ("local", "hf")}
    found = compare(pair, {"pixels": models["pixels"][rows]}, labels[rows], seed)
    changes = found.differences
    table = {f"{metric}, one model": [found.metrics["local"][metric]] for metric in METRICS}
    table |= {f"{metric}, difference": [changes[metric]["estimate"]] for metric in METRICS}
    table["P@5, ratio"] = [changes["precision_at_5"]["ratio"]]
    table["P@5, gain on pixels"] = [found.gains["pixels"]]
    table["P@5 in one class"] = found.class_precision["local"]
    table["P@5 in one class, difference"] = [row["difference"] for row in found.per_class]
    table["mutual 10-NN"] = [found.agreement["mutual_knn"]]
    table["mutual 10-NN in one class"] = [row["mutual_knn"] for row in found.per_class]
    return table


def probed(models, labels, parts, seed):
    """The probe of two models with the rows of a bank and of queries."""
    embeddings = [{name: models[name][part] for name in ("local", "hf")} for part in parts]
    return probes.probe(*embeddings, *(labels[part] for part in parts), seed)


def answered(correct, labels, rows):
    """Estimates of one sample of queries, as a probe makes them from what is correct."""
    table, classes = {}, [rows[labels[rows] == c] for c in range(10)]
    for m, (where, parts) in product(probes.MEASURES, (("", [rows]), (" in one class", classes))):
        pairs = [[correct[name][m][None, part] for name in ("local", "hf")] for part in parts]
        table[f"{m}{where}, one model"] = [probes.accuracy(local) for local, _ in pairs]
        changes = [probes.difference(hf, local) for local, hf in pairs]
        table[f"{m}{where}, difference"] = [change["estimate"] for change in changes]
    return table


def with_small_bank(models, labels, num_images, seed):
    """Estimates of one bank and one sample of queries, both new."""
    generator = np.random.default_rng((*seed, num_images))
    rows = next(partition(labels, num_images + QUERIES, generator)).reshape(10, -1)
    parts = [part.ravel() for part in np.split(rows, [num_images // 10], axis=1)]
    found = probed(models, labels, parts, seed[-1])
    table, local = {}, found.models["local"]
    for measure, one in (("knn", local["knn"][probes.KS[0]]), ("linear", local["linear"])):
        table[f"{measure}, one model"] = [one]
        table[f"{measure}, difference"] = [found.differences[measure]["estimate"]]
        table[f"{measure}, 1 image per class"] = [local["few_shot"][1][measure]["estimate"]]
    return table


def lines(tables, title, population_share=0.0):
    """Rows of the table from the estimates of all samples."""
    for row in tables[0]:
        found = [table[row] for table in tables]
        parts = [[(e.value, e.se, *e.ci95) for e in estimates] for estimates in found]
        values, errors, *ends = np.moveaxis(np.array(parts), -1, 0)
        if np.isnan(errors).mean() > 0.5:  # such as a rank above half of n
            continue
        # A sample without replacement lies nearer to the mean of its population.
        distance = (values - values.mean(axis=0)) / np.sqrt(1 - population_share)
        covered = np.not_equal(*(end >= values - distance for end in ends)).mean()
        spread = np.square(distance).sum(axis=0) / (len(found) - 1)
        ratio = np.sqrt(np.nanmean(np.square(errors)) / spread.mean())
        error = np.sqrt(max(covered * (1 - covered), 0.01) / len(found))
        verdict = "" if 0.9 - 2 * error <= covered <= 0.997 + 2 * error else " outside"
        yield f"| {row} | {title} | {ratio:.2f} | {covered:.1%} ± {error:.1%}{verdict} |"


def false_alarms(models, labels, rows, noise, seed):
    """Whether each rule finds a difference of two models that have none."""
    X, generator = models["local"][rows], np.random.default_rng(seed)
    noisy = X + noise * X.std(axis=0) * generator.normal(size=(2, *X.shape))
    pair = dict(zip(("local", "hf"), noisy.astype(np.float32), strict=True))
    found = compare(pair, {}, labels[rows], seed[-1])
    halves = np.arange(len(rows)).reshape(-1, 2).T
    with_bank = probed(pair, labels[rows], halves, seed[-1])
    whole, linear = found.differences["precision_at_5"], with_bank.differences["linear"]
    by_class = [row["linear"]["difference"]["holm_p"] for row in with_bank.per_class]
    return {
        "mutual 10-NN (no alarm)": found.agreement["mutual_knn"].value,
        "P@5, interval without 0": np.prod(whole["estimate"].ci95) > 0,
        "P@5, p": whole["p"] < 0.05,
        "P@5, any class after Holm": min(row["holm_p"] for row in found.per_class) < 0.05,
        "P@1, McNemar": found.differences["precision_at_1"]["mcnemar_p"] < 0.05,
        "linear probe, interval without 0": np.prod(linear["estimate"].ci95) > 0,
        "linear probe, p": linear["p"] < 0.05,
        "linear probe, any class after Holm": min(by_class) < 0.05,
    }


def main():
    """Parse the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("%", "%%"))
    parser.add_argument("--data-dir", type=Path, default="data")
    parser.add_argument("--checkpoint", default="checkpoints_300ep/checkpoint_latest.pt")
    parser.add_argument("--cache", type=Path, default="runs/coverage")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000], help="images")
    parser.add_argument("--samples", type=int, nargs="+", default=[400, 200], help="per size")
    parser.add_argument("--probe-samples", type=int, default=200, help="per bank")
    parser.add_argument("--replicates", type=int, default=120, help="per noise and size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (models, labels), seed = population(args), args.seed
    print("| interval | n | SE / true SD | coverage |\n| --- | --- | --- | --- |")
    for n, count in zip(args.sizes, args.samples, strict=True):
        drawn = enumerate(samples(labels, n, count, seed))
        tables = [compared(models, labels, rows, i) for i, rows in drawn]
        print(*lines(tables, n, n / len(labels)), sep="\n", flush=True)
    bank = samples(labels, BANK, 1, seed)[0]
    queries = np.delete(np.arange(len(labels)), bank)
    correct, own = probed(models, labels, (bank, queries), seed).correct, labels[queries]
    for n in args.sizes:
        drawn = samples(own, n, args.probe_samples, seed)
        tables = [answered(correct, own, rows) for rows in drawn]
        title, share = f"{n}, bank of {BANK}", n / len(queries)
        print(*lines(tables, title, share), sep="\n", flush=True)
    for size in SMALL_BANKS:
        seeds = [(seed, i) for i in range(args.probe_samples)]
        tables = [with_small_bank(models, labels, size, one) for one in seeds]
        print(*lines(tables, f"{QUERIES}, new banks of {size}"), sep="\n", flush=True)
    print("\n| false alarms | n | noise | share |\n| --- | --- | --- | --- |")
    for n, noise in product(args.sizes, NOISES):
        drawn = enumerate(samples(labels, n, args.replicates, seed))
        alarms = [false_alarms(models, labels, rows, noise, (seed, i)) for i, rows in drawn]
        for rule in alarms[0]:
            share = float(np.mean([one[rule] for one in alarms]))
            error = (share * (1 - share) / len(alarms)) ** 0.5
            print(f"| {rule} | {n} | {noise} | {share:.1%} ± {error:.1%} |", flush=True)


if __name__ == "__main__":
    main()
