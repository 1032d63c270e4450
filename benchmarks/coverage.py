"""How often the 95 % intervals contain the truth, on synthetic data whose truth is known.

    python benchmarks/coverage.py --sizes 500 2000 --simulations 800 400

Two models see the same images: ten classes, a shared signal inside the classes, and a part of each
model's own whose variance falls over the dimensions. Variance, precision and silhouette are like
those reported for a small I-JEPA (192 dimensions) and a large one (here 384). A fresh sample of
images is drawn for every simulation, and its intervals are those of a comparison. The truth at n
images is the mean of the statistic over the simulations, because precision, mutual kNN and the
spectrum depend on n; with 400 of them its error is a twentieth of a standard error. Prints a
Markdown table with the coverage and with the root mean square of the standard errors over the true
standard deviation. Rows of classes hold all ten, each with a truth of its own.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa import comparison

NUM_CLASSES = 10
WIDTHS = {"local": 192, "hf": 384}
METRIC_LABELS = {
    "precision_at_1": "P@1",
    "precision_at_5": "P@5",
    "precision_at_10": "P@10",
    "precision_at_20": "P@20",
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
        self.mixing = {
            name: strength * generator.normal(size=(16, WIDTHS[name]))
            for name, strength in (("local", 0.32), ("hf", 0.25))
        }
        self.scales = {
            "local": 6 * np.exp(-np.arange(WIDTHS["local"]) / 64),
            "hf": 6 * np.arange(1, WIDTHS["hf"] + 1) ** -0.45,
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
            # An offset, as encoders have.
            embeddings[name] = (0.5 + signal @ self.mixing[name] + own).astype(np.float32)
        return embeddings, labels


def intervals(world, n, seed):
    """The estimates of one simulation by row of the table; those of classes are ten."""
    embeddings, labels = world.sample(n, np.random.default_rng(seed))
    analyses = {name: comparison.analyze(X, labels, name) for name, X in embeddings.items()}
    parts = comparison.resample(labels, seed[-1])
    by_class = {name: comparison.class_deviations(a, parts) for name, a in analyses.items()}
    deviating = {
        name: comparison.deviations(a, by_class[name], parts) for name, a in analyses.items()
    }
    values = {name: comparison.measure(a) for name, a in analyses.items()}
    changes = comparison.changes(values, deviating)
    pair = comparison.paired_deviations(analyses, by_class, parts)
    gains = analyses["hf"].precisions(5) - analyses["local"].precisions(5)
    agreed = comparison.mutual_per_image(analyses)
    rows = {}
    for metric, label in METRIC_LABELS.items():
        value, deviation = values["local"][metric], deviating["local"][metric]
        rows[f"{label}, one model"] = [comparison.with_interval(value, deviation)]
        rows[f"{label}, paired difference"] = [changes[metric]["estimate"]]
    rows["P@5, ratio of two models"] = [changes["precision_at_5"]["ratio"]]
    rows["P@5 in one class, paired difference"] = of_classes(gains, labels, pair["precision_at_5"])
    common = comparison.overall(pair["mutual_knn"], labels)
    rows["mutual 10-NN"] = [comparison.with_interval(float(agreed.mean()), common)]
    rows["mutual 10-NN in one class"] = of_classes(agreed, labels, pair["mutual_knn"])
    return rows


def of_classes(scores, labels, deviating):
    """Estimates of the mean score of each class."""
    return [
        comparison.with_interval(float(scores[labels == label].mean()), deviating[:, label])
        for label in range(NUM_CLASSES)
    ]


def lines(simulations, n):
    """Lines of the table from the simulations of n images."""
    for row in simulations[0]:
        found = [estimates[row] for estimates in simulations]
        values, errors = (
            np.array([[getattr(e, name) for e in estimates] for estimates in found])
            for name in ("value", "se")
        )
        ends = np.array([[e.ci95 for e in estimates] for estimates in found])
        truth = values.mean(axis=0)
        covered = ((ends[..., 0] <= truth) & (truth <= ends[..., 1])).mean()
        ratio = np.sqrt(np.square(errors).mean() / values.var(axis=0, ddof=1).mean())
        yield (
            f"| {row} | {n} | {len(simulations)} | {truth.mean():.4f} | {ratio:.2f} "
            f"| {covered:.1%} |"
        )


def main():
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("%", "%%"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000], help="images")
    parser.add_argument("--simulations", type=int, nargs="+", default=[800, 400], help="per size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| interval | n | simulations | truth | SE / true SD | coverage |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n, num_simulations in zip(args.sizes, args.simulations, strict=True):
        world = World(args.seed)
        found = [intervals(world, n, (args.seed, n, i)) for i in range(num_simulations)]
        for line in lines(found, n):
            print(line, flush=True)


if __name__ == "__main__":
    main()
