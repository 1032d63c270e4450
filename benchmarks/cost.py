"""What intervals, tests and agreement cost on top of the numbers themselves.

    python benchmarks/cost.py --sizes 500 2000 5000 10000 --repeats 5

Two models of 192 and 1280 dimensions on the same synthetic images of ten classes. `numbers` is the
search, the spectra, the silhouettes and every metric of both models; `everything` is `compare`,
which also takes the intervals, the paired tests and the agreement. Both are timed by turns in one
process; medians of its processor seconds, which other programs beside do not add to, are printed as
a Markdown table.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa.comparison import analyze, compare, measure

WIDTHS = {"local": 192, "hf": 1280}


def sample(n, seed=0):
    """Embeddings with class structure and a falling spectrum."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    embeddings = {}
    for name, d in WIDTHS.items():
        means = generator.normal(size=(10, d))
        noise = generator.normal(size=(n, d)) * 3 * np.arange(1, d + 1) ** -0.3
        embeddings[name] = (means[labels] + noise).astype(np.float32)
    return embeddings, labels


def seconds(work):
    """Processor time of one call, all threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main():
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000, 5000, 10000])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("| n | numbers, s | everything, s | added, s |")
    print("| --- | --- | --- | --- |")
    for n in args.sizes:
        embeddings, labels = sample(n)

        def numbers(embeddings=embeddings, labels=labels):
            for name, X in embeddings.items():
                measure(analyze(X, labels, name))

        def everything(embeddings=embeddings, labels=labels):
            compare(embeddings, {}, labels, 0)

        times = [(seconds(numbers), seconds(everything)) for _ in range(args.repeats)]
        plain, whole = (statistics.median(column) for column in zip(*times, strict=True))
        added = statistics.median(b - a for a, b in times)
        print(f"| {n} | {plain:.2f} | {whole:.2f} | {added:.2f} |", flush=True)


if __name__ == "__main__":
    main()
