"""How often the 95 % intervals contain the truth, on synthetic data whose truth is known.

    python benchmarks/coverage.py --sizes 500 2000 --simulations 200 100

Two models see the same images: ten classes, a shared signal inside the classes, and a part of each
model's own; the variances of the dimensions fall as a power law. A fresh sample of images is drawn
for every simulation. The truth at n images is the mean of the statistic over further samples of n
images, because precision, mutual kNN and the spectrum depend on n. Prints a Markdown table with the
coverage and with the mean standard error over the true standard deviation.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa import metrics, uncertainty
from ijepa.agreement import mutual_knn

NUM_CLASSES = 10
WIDTHS = {"local": 192, "hf": 256}
METRIC_LABELS = {
    "precision_at_5": "P@5",
    "knn_accuracy": "kNN accuracy",
    "silhouette": "silhouette, Euclidean",
    "silhouette_cosine": "silhouette, cosine",
    "variance_10pc": "EV(10)",
    "variance_50pc": "EV(50)",
    "effective_rank": "effective rank",
}


class World:
    """A population of images and two models: fixed class means and mixing matrices."""

    def __init__(self, seed):
        generator = np.random.default_rng(seed)
        self.class_means = 0.7 * generator.normal(size=(NUM_CLASSES, 16))
        self.mixing = {name: generator.normal(size=(16, d)) / 4 for name, d in WIDTHS.items()}
        # Different decays give the models different spectra; both carry an offset, as encoders do.
        self.scales = {
            name: 6.0 * np.arange(1, d + 1) ** decay
            for (name, d), decay in zip(WIDTHS.items(), (-0.4, -0.25), strict=True)
        }

    def sample(self, n, generator):
        """Embeddings of both models for n new images, and their labels."""
        labels = np.arange(n) % NUM_CLASSES
        # A chi-square factor per image makes the tails heavier than Gaussian.
        spread = np.sqrt(generator.chisquare(8, size=(n, 1)) / 8)
        signal = self.class_means[labels] + spread * generator.normal(size=(n, 16))
        embeddings = {}
        for name, d in WIDTHS.items():
            own = spread * generator.normal(size=(n, d)) * self.scales[name]
            embeddings[name] = (0.5 + signal @ self.mixing[name] + own).astype(np.float32)
        return embeddings, labels


def point_values(X, lists, labels):
    """The statistics of one model on all images."""
    eigenvalues = metrics.covariance_spectrum(X)
    correct = metrics.knn_correct(lists.neighbors, lists.similarities, labels)
    return {
        "precision_at_5": metrics.precision_at_k(lists.neighbors, labels, 5).mean(),
        "knn_accuracy": correct.mean(),
        "silhouette": metrics.silhouette_samples(X, labels).mean(),
        "silhouette_cosine": metrics.silhouette_samples(X, labels, "cosine").mean(),
        "variance_10pc": metrics.explained_variance(eigenvalues, 10),
        "variance_50pc": metrics.explained_variance(eigenvalues, 50),
        "effective_rank": metrics.effective_rank(X),
    }


def replicate_values(X, lists, labels, halves, blocks):
    """The same statistics on the halves, or their jackknife replicates."""
    values = uncertainty.neighbor_halves(lists, labels, halves)
    values |= uncertainty.spectrum_replicates(X, blocks)
    values["silhouette"] = uncertainty.silhouette_halves(X, labels, halves)
    values["silhouette_cosine"] = uncertainty.silhouette_halves(X, labels, halves, "cosine")
    return {name: values[name] for name in METRIC_LABELS}


def with_pairs(by_model, mutual):
    """Rows of the table: one model, hf - local, and mutual kNN, from per-model values."""
    rows = {f"{METRIC_LABELS[name]}, one model": by_model["local"][name] for name in METRIC_LABELS}
    for name, label in METRIC_LABELS.items():
        rows[f"{label}, paired difference"] = by_model["hf"][name] - by_model["local"][name]
    return rows | {"mutual 10-NN": mutual}


def measure(world, n, seed, resampling_seed=None):
    """Point values of one sample, and with a second seed the standard errors also."""
    embeddings, labels = world.sample(n, np.random.default_rng(seed))
    lists = {name: uncertainty.list_neighbors(X) for name, X in embeddings.items()}
    points = {name: point_values(X, lists[name], labels) for name, X in embeddings.items()}
    mutual = mutual_knn(lists["local"].neighbors, lists["hf"].neighbors).mean()
    values = with_pairs(points, mutual)
    if resampling_seed is None:
        return values
    halves = uncertainty.half_samples(labels, seed=resampling_seed)
    blocks = uncertainty.jackknife_blocks(labels, seed=resampling_seed)
    replicates = {
        name: replicate_values(X, lists[name], labels, halves, blocks)
        for name, X in embeddings.items()
    }
    mutual_on_halves = uncertainty.mutual_knn_halves(lists["local"], lists["hf"], halves)
    rows = with_pairs(replicates, mutual_on_halves)
    return {row: uncertainty.estimate(float(values[row]), rows[row]) for row in rows}


def study(n, num_simulations, num_truth, seed):
    """Lines of the table for samples of n images."""
    world = World(seed)
    truths = [measure(world, n, (seed, n, 0, i)) for i in range(num_truth)]
    simulations = [measure(world, n, (seed, n, 1, i), i) for i in range(num_simulations)]
    for row in truths[0]:
        truth = np.mean([values[row] for values in truths])
        estimates = [simulation[row] for simulation in simulations]
        covered = np.mean([e.ci95[0] <= truth <= e.ci95[1] for e in estimates])
        deviation = np.std([e.value for e in estimates] + [v[row] for v in truths], ddof=1)
        ratio = np.mean([e.se for e in estimates]) / deviation
        yield f"| {row} | {n} | {num_simulations} | {truth:.4f} | {ratio:.2f} | {covered:.1%} |"


def main():
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("%", "%%"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000], help="images")
    parser.add_argument("--simulations", type=int, nargs="+", default=[200, 100], help="per size")
    parser.add_argument("--truth-samples", type=int, default=400, help="samples behind the truth")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| interval | n | simulations | truth | mean SE / true SD | coverage |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n, num_simulations in zip(args.sizes, args.simulations, strict=True):
        for line in study(n, num_simulations, args.truth_samples, args.seed):
            print(line, flush=True)


if __name__ == "__main__":
    main()
