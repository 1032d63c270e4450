"""What all numbers and intervals of two models cost, against another checkout.

    python benchmarks/cost.py --sizes 2000 10000 --against ../older

Two models of 192 and 1280 dimensions on the same synthetic images of ten classes: `compare` gives
every metric, interval, paired test and agreement. Median seconds of the processor, and for both
versions the difference of the models in precision@5 with its standard error.
"""

import numpy as np
from versions import OTHER, THIS, median, parse, race, serve

WIDTHS = {"local": 192, "hf": 1280}


def sample(n, d, seed=0):
    """Float32 embeddings with class structure (P@5 about 0.6), a falling spectrum, and labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    X = generator.standard_normal((n, d), dtype=np.float32)
    X *= 3 * np.arange(1, d + 1, dtype=np.float32) ** -0.3
    X += 4 / np.sqrt(d, dtype=np.float32) * generator.standard_normal((10, d), np.float32)[labels]
    return X, labels


def everything(n):
    """All numbers and intervals."""
    from ijepa.comparison import compare

    embeddings = {name: sample(n, d)[0] for name, d in WIDTHS.items()}
    labels = sample(n, 1)[1]

    def work():
        found = compare(embeddings, {}, labels, 0).differences["precision_at_5"]["estimate"]
        return [found.value, found.se]

    return work


def main():
    """Print the table."""
    serve({THIS: everything})
    sizes = {"type": int, "nargs": "+", "default": [500, 2000, 10_000]}
    args = parse(__doc__, lambda add: add("--sizes", **sizes))
    print("| n | version | s | x the other | difference in P@5 |")
    print("| --- | --- | --- | --- | --- |")
    for n in args.sizes:
        turns = race(args, {"n": n})
        base = median(turns.get(OTHER, turns[THIS]))
        for name, them in turns.items():
            (value, se), seconds = them[0]["result"], median(them)
            cells = f"{seconds:.2f} | {seconds / base:.2f} | {value:+.4f} ± {se:.4f}"
            print(f"| {n} | {name} | {cells} |")


if __name__ == "__main__":
    main()
