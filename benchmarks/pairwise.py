"""Neighbors, silhouettes and their half-samples against another checkout and scikit-learn.

    python benchmarks/pairwise.py --sizes 2000 10000 20000 --halves 200 --against ../older
    python benchmarks/pairwise.py --sizes 10000 50000 --against ../older
    python benchmarks/pairwise.py --device cuda --sizes 50000 --widths 1280 --halves 200

The k most similar images of each, both silhouettes (Euclidean and cosine) and, if asked for, the
neighbors and silhouettes of half-samples, on synthetic float32 embeddings of ten classes.
scikit-learn has no half-samples and takes part without them. Median seconds of the processor, the
peak memory of the process, precision@5, and the mean silhouettes.
"""

from itertools import product

from cost import sample
from versions import THIS, median, parse, race, serve

NEIGHBORS = 64  # as many as a comparison lists
PEER = "scikit-learn"


def ours(n, d, num_halves, device):
    """This package; the function of version 2979812 and before is the second one."""
    from ijepa import metrics, uncertainty

    X, labels = sample(n, d)
    halves = uncertainty.half_samples(labels, num_halves) if num_halves else None

    def now():
        pairs = metrics.all_pairs(X, NEIGHBORS, labels, halves, device)
        cosine = metrics.cosine_silhouettes(X, labels)
        if num_halves:
            uncertainty.neighbor_halves(pairs.neighbors, pairs.similarities, labels, halves)
        precision = metrics.precision_at_k(pairs.neighbors, labels, 5).mean()
        return [float(precision), float(pairs.silhouettes.mean()), float(cosine.mean())]

    def before():
        lists, silhouettes = uncertainty.list_neighbors(X, device), []
        if num_halves:
            uncertainty.neighbor_halves(lists, labels, halves)
        for metric in ("euclidean", "cosine"):
            silhouettes.append(metrics.silhouette_samples(X, labels, metric, device).mean())
            if num_halves:
                metrics.mean_silhouettes(X, labels, halves, metric, device)
        precision = metrics.precision_at_k(lists.neighbors, labels, 5).mean()
        return [float(precision), *map(float, silhouettes)]

    return now if hasattr(metrics, "all_pairs") else before


def peer(n, d, **_):
    """The same by scikit-learn."""
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    X, labels = sample(n, d)

    def work():
        found = NearestNeighbors(n_neighbors=NEIGHBORS, metric="cosine").fit(X).kneighbors()[1]
        precision = (labels[found[:, :5]] == labels[:, None]).mean()
        silhouettes = [silhouette_score(X, labels, metric=one) for one in ("euclidean", "cosine")]
        return [float(precision), *map(float, silhouettes)]

    return work


def main():
    """Print the table."""
    serve({THIS: ours, PEER: peer})

    def add(argument):
        argument("--sizes", type=int, nargs="+", default=[2000, 10_000])
        argument("--widths", type=int, nargs="+", default=[192, 1280])
        argument("--device", default="cpu", help="cpu or cuda, then in seconds of the clock")
        argument("--halves", type=int, default=0, help="half-samples (a comparison has 200)")

    args = parse(__doc__, add)
    clock = "cpu" if args.device == "cpu" else "wall"
    print("| n | d | halves | version | s | ours / it | GiB | P@5 | Euclidean | cosine |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for n, d in product(args.sizes, args.widths):
        settings = {"n": n, "d": d, "num_halves": args.halves, "device": args.device}
        turns = race(args, settings, () if args.halves else (PEER,))
        for name, them in turns.items():
            seconds = median(them, clock)
            numbers = [seconds, median(turns[THIS], clock) / seconds, them[-1]["peak"]]
            cells = [f"{number:.2f}" for number in numbers]
            cells += [f"{value:.6f}" for value in them[0]["result"]]
            print(f"| {n} | {d} | {args.halves} | {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
