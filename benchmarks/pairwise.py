"""P@5 and both silhouettes against scikit-learn: time, peak memory and equal answers.

    python benchmarks/pairwise.py --sizes 10000 --widths 192 1280 --repeats 5

Ours and scikit-learn's run by turns in one process on the same synthetic float32 embeddings of ten
classes. Times are CPU seconds of the process over all threads, so that other programs on the
machine do not count: with one thread (`OMP_NUM_THREADS=1`) they are the wall time of an idle core.
Medians, the median ratio ours / scikit-learn, the largest difference between both answers and, for
the first size, the peak memory of the process after our first run (data included) are printed as a
Markdown table. The system tells only the highest peak of a process, so each size needs its own.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa.metrics import nearest_neighbors, precision_at_k, silhouette_samples

WORK = ("euclidean silhouette", "cosine silhouette", "precision@5")


def sample(n, d, seed=0):
    """Float32 embeddings with class structure and a falling spectrum, made without copies."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    X = generator.standard_normal((n, d), dtype=np.float32)
    X *= 3 * np.arange(1, d + 1, dtype=np.float32) ** -0.3
    X += generator.standard_normal((10, d), dtype=np.float32)[labels]
    return X, labels


def ours(X, labels):
    """Each piece of work by this package."""
    yield silhouette_samples(X, labels, "euclidean").mean()
    yield silhouette_samples(X, labels, "cosine").mean()
    yield precision_at_k(nearest_neighbors(X, 5)[0], labels, 5).mean()


def peer(X, labels, metrics, neighbors):
    """The same by scikit-learn."""
    yield metrics.silhouette_score(X, labels, metric="euclidean")
    yield metrics.silhouette_score(X, labels, metric="cosine")
    found = neighbors.NearestNeighbors(n_neighbors=5, metric="cosine").fit(X).kneighbors()[1]
    yield (labels[found] == labels[:, None]).mean()


def timed(work):
    """CPU seconds and answer of each piece of work."""
    seconds, answers = [], []
    began = time.process_time()
    for answer in work:
        answers.append(float(answer))
        seconds.append(time.process_time() - began)
        began = time.process_time()
    return seconds, answers


def measure(n, d, repeats):
    """Print the lines of one size; its peak memory is known before scikit-learn has run."""
    peak = None if "sklearn.metrics" not in sys.modules else ""
    X, labels = sample(n, d)
    mine, theirs, difference = [], [], [0.0] * len(WORK)
    for _ in range(repeats):
        seconds, values = timed(ours(X, labels))
        if peak is None:
            peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"
        mine.append([*seconds, sum(seconds)])
        from sklearn import metrics, neighbors  # after our peak, before its clock starts

        seconds, expected = timed(peer(X, labels, metrics, neighbors))
        theirs.append([*seconds, sum(seconds)])
        gaps = [abs(a - b) for a, b in zip(values, expected, strict=True)]
        difference = [max(a, b) for a, b in zip(difference, gaps, strict=True)]
    for column, name in enumerate([*WORK, "all three"]):
        a, b = [row[column] for row in mine], [row[column] for row in theirs]
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        gap = f"{difference[column]:.1e}" if column < len(WORK) else ""
        memory = "" if column < len(WORK) else peak
        print(
            f"| {n} | {d} | {name} | {statistics.median(a):.2f} | {statistics.median(b):.2f} "
            f"| {ratio:.2f} | {gap} | {memory} |",
            flush=True,
        )


def main():
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 1280])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("| n | d | work | ours, s | scikit-learn, s | ratio | difference | peak, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for n in args.sizes:
        for d in args.widths:
            measure(n, d, args.repeats)


if __name__ == "__main__":
    main()
