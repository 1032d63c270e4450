"""What a vote of neighbors and a linear map find in embeddings, with a bank of training images.

The protocol of most papers: the share of queries that are given their class. Nothing is chosen on
the queries. All models share the random parts, so that differences are paired. Intervals hold for
new queries, given this bank. A bank of fewer than `ENOUGH` images is itself a draw that matters:
complementary halves of it then add its part, as in `ijepa.uncertainty`.

Dimension key: N images of the bank, n queries, d width, r principal axes, C classes, B banks (the
whole one, then both halves of each pair), R draws of a few images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.optimize import minimize
from scipy.special import ndtri, stdtr, stdtrit
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors

from ijepa import metrics
from ijepa.agreement import add_holm, mcnemar_exact_p
from ijepa.data import Split, balanced_rows
from ijepa.errors import counted
from ijepa.images import FolderImages
from ijepa.metrics import SILENT, Embeddings, Labels, Progress, knn_vote, unit_rows
from ijepa.uncertainty import Estimate, half_deviations

KS = (20, 10, 100, 200)  # numbers of neighbors; the first is the headline
L2_GRID = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Penalties per image, strongest first: each fit starts from the one before."""
PIXEL_COMPONENTS = 512
ENOUGH = 2000  # images of a bank from which on another bank would change less than other queries
FEW_IMAGES = (1, 10)
NUM_PAIRS, NUM_DRAWS = 10, 20
BLOCK = 2**20  # entries of `cross_entropy` at once
MEASURES = {"knn": f"knn_{KS[0]}", "linear": "linear"}
_NORMAL, _BANK_T = float(ndtri(0.975)), float(stdtrit(NUM_PAIRS - 1, 0.975))

Bank = Float[np.ndarray, "N d"]
BankLabels = Int[np.ndarray, " N"]
Keep = Bool[np.ndarray, " N"]
Parts = tuple[Keep, list[Keep], dict[int, list[Keep]]]
"""A tenth of the bank, pairs of halves of it, and draws by images of each class."""
Rows = Float[np.ndarray, "m r"]  # of the bank or the queries, on the principal axes
Codes = Int[np.ndarray, " m"]  # classes numbered from 0
Weights = Float[np.ndarray, "r+1 C"]  # of the linear map; the last row are the offsets
Scores = Bool[np.ndarray, "B n"]  # which queries are given their class with each bank


@dataclass(frozen=True)
class Probe:
    """Accuracies in [0, 1] with intervals. Differences are hf - local, gains local - reference."""

    bank_images: int
    query_images: int
    seed: int
    bank_in_intervals: bool
    """Whether intervals hold for other banks of this size too, or only for this bank."""
    models: dict[str, dict[str, Any]]
    """By model: `knn` by k, `linear`, the chosen `l2`, `held_out_accuracy` by l2, `few_shot`."""
    differences: dict[str, Any]
    gains: dict[str, dict[str, Any]]
    per_class: list[dict[str, Any]]
    """By class of the queries and measure: accuracy of each model and the difference."""
    notes: list[str]  # what was capped or left out, one sentence each
    correct: dict[str, dict[str, Bool[np.ndarray, " n"]]] = field(repr=False)
    """By model and measure, which queries are given their class."""


@dataclass(frozen=True)
class Answers:
    """One model's answers by measure: with the whole bank and its halves, and with few images."""

    scores: dict[str, Scores]
    few: dict[int, dict[str, Bool[np.ndarray, "R n"]]]
    fewest: int  # images of the bank's smallest class
    chosen: dict[str, Any]


def probe(
    banks: Mapping[str, Float[np.ndarray, "N _"]],
    queries: Mapping[str, Float[np.ndarray, "n _"]],
    bank_labels: BankLabels,
    query_labels: Labels,
    seed: int,
    progress: Progress = SILENT,
) -> Probe:
    """Measure kNN and a linear probe of each model.

    The models are `local`, `hf` and references. The bank's principal components replace `pixels`.
    Both labels number the classes alike. The seed is that of the random parts of the bank.

    Raises:
        UserError: Embeddings are not finite or zero.
    """
    for name, X in [*banks.items(), *queries.items()]:
        metrics.validate_embeddings(X, name)
    codes = np.unique(bank_labels, return_inverse=True)[1]
    parts, found = draw_parts(codes, seed), {}
    with progress(total=len(banks) * len(query_labels), desc="probe") as bar:
        for name, X in banks.items():
            pair = X, queries[name]
            pair = principal_components(*pair) if name == "pixels" else pair
            found[name] = answer(*pair, bank_labels, query_labels, parts)
            bar.update(len(query_labels))
    paired = {"local", "hf"} <= found.keys()
    references = sorted(found.keys() - {"local", "hf"}) if "local" in found else []
    return Probe(
        bank_images=len(codes),
        query_images=len(query_labels),
        seed=seed,
        bank_in_intervals=bool(parts[1]),
        models={name: summary(answers) for name, answers in found.items()},
        differences=change(found["hf"], found["local"]) if paired else {},
        gains={name: change(found["local"], found[name]) for name in references},
        per_class=per_class(found, query_labels),
        notes=notes(codes, int((~np.isin(query_labels, bank_labels)).sum()), found),
        correct={
            name: {m: answers.scores[key][0] for m, key in MEASURES.items()}
            for name, answers in found.items()
        },
    )


def notes(codes: BankLabels, num_missing: int, models: Mapping[str, Answers]) -> list[str]:
    """What was capped or left out."""
    edge = [name for name, answers in models.items() if answers.chosen["l2"] == L2_GRID[-1]]
    weak = ", ".join(name.replace("_", " ") for name in edge)
    n, counts = len(codes), np.bincount(codes)
    fewest, singles = int(counts.min()), int((counts < 2).sum())
    none, some = singles == len(counts), n < ENOUGH and 0 < singles < len(counts)
    capped = ", ".join(str(k) for k in sorted(KS) if k > n)
    skipped = ", ".join(str(m) for m in FEW_IMAGES if 2 * m > fewest)
    missing = counted(num_missing, "compared image")
    found = {
        f"The bank lacks the class of {missing}, counted as wrong.": num_missing,
        f"A weaker L2 than the weakest tried may give a better linear probe: {weak}.": weak,
        f"k = {capped} means the whole bank of {counted(n, 'image')}.": capped,
        f"The bank has {counted(fewest, 'image')} of a class: no draws of {skipped}.": skipped,
        "No class has two images: no L2 is chosen; intervals hold for this bank only.": none,
        f"Both halves of the bank keep the image of {counted(singles, 'class')} with one.": some,
    }
    return [sentence for sentence, applies in found.items() if applies]


def draw_parts(codes: BankLabels, seed: int) -> Parts:
    """A tenth to choose on, halves of a small bank, and draws of a few images of each class.

    Each part is balanced. If a class has a single image, it is in both halves and is not held out.
    There are no halves from `ENOUGH` images on, and no draws above half of the smallest class.
    """
    generator, counts = np.random.default_rng(seed), np.bincount(codes)

    def ranks() -> BankLabels:
        """Place of each image in a random order of its class."""
        order = np.lexsort((generator.random(len(codes)), codes))
        places = np.empty(len(codes), np.int64)
        places[order] = np.arange(len(codes)) - (np.cumsum(counts) - counts)[codes[order]]
        return places

    held_out = ranks() < np.maximum(counts // 10, counts > 1)[codes]
    orders = [ranks() for _ in range(NUM_DRAWS)]
    sizes = [size for size in FEW_IMAGES if 2 * size <= counts.min()]
    halves: list[Keep] = []
    for _ in range(NUM_PAIRS if len(codes) < ENOUGH and counts.max() > 1 else 0):
        # Classes of odd size round up in either half.
        first = (ranks() + generator.integers(0, 2, len(counts))[codes]) % 2 == 0
        halves += [half | (counts == 1)[codes] for half in (first, ~first)]
    return held_out, halves, {size: [order < size for order in orders] for size in sizes}


def answer(
    X: Bank, Q: Embeddings, bank_labels: BankLabels, query_labels: Labels, parts: Parts
) -> Answers:
    """What one model answers with every bank."""
    held_out, halves, draws = parts
    classes, codes = np.unique(bank_labels, return_inverse=True)
    linear, chosen = linear_answers(X, codes, Q, held_out)

    def of(keep: Keep, ks: Sequence[int], l2: float) -> list[Labels]:
        part = X[keep], codes[keep], Q
        return [linear_answers(*part, l2=l2)[0], *knn_answers(*part, ks)]

    def scores(answers: list[list[Labels]], ks: Sequence[int]) -> dict[str, Scores]:
        right = (classes[np.array(answers)] == query_labels).swapaxes(0, 1)
        return dict(zip(["linear", *(f"knn_{k}" for k in ks)], right, strict=True))

    # Each image of a half counts for two.
    on_halves = [of(keep, [k // 2 for k in KS], chosen["l2"]) for keep in halves]
    whole = scores([[linear, *knn_answers(X, codes, Q, KS)], *on_halves], KS)
    few = {
        size: scores([of(keep, KS[:1], L2_GRID[0]) for keep in kept], KS[:1])
        for size, kept in draws.items()
    }
    return Answers(whole, few, int(np.bincount(codes).min()), chosen)


def knn_answers(X: Bank, codes: BankLabels, Q: Embeddings, ks: Sequence[int]) -> list[Labels]:
    """For each k, `knn_vote` of each query's k nearest by cosine, or of all images if fewer."""
    # Of unit length: scikit-learn takes rows shorter than about 1e-6 for zero.
    X, Q = (unit_rows(rows).astype(np.float32) for rows in (X, Q))
    search = NearestNeighbors(n_neighbors=min(max(ks), len(X)), metric="cosine").fit(X)
    distances, nearest = search.kneighbors(Q)
    num_classes = int(codes.max()) + 1
    return [knn_vote(codes[nearest[:, :k]], 1 - distances[:, :k], num_classes) for k in ks]


def principal_components(X: Bank, Q: Embeddings) -> list[Float[np.ndarray, "_ r"]]:
    """Bank and queries on the first `PIXEL_COMPONENTS` principal axes of the bank.

    Axes on which the bank has only rounding errors are left out: standardized, the position of a
    query on them would be noise of any size.
    """
    mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)
    variances, axes = principal_axes(X - mean)
    axes = axes[:, variances >= 1e-10 * variances[0]][:, :PIXEL_COMPONENTS]
    return [(rows - mean) @ axes for rows in (X, Q)]


def principal_axes(X: Bank) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, "d r"]]:
    """Variances of centered rows along their min(N, d) principal axes, descending; the axes."""
    if len(X) < X.shape[1]:
        lengths, axes = np.linalg.svd(X, full_matrices=False)[1:]
        return np.square(lengths) / len(X), axes.T
    variances, axes = np.linalg.eigh((X.T @ X / len(X)).astype(np.float64))
    return np.maximum(variances, 0)[::-1], axes[:, ::-1].astype(np.float32)


def linear_answers(
    X: Bank, codes: BankLabels, Q: Embeddings, held_out: Keep | None = None, l2: float = L2_GRID[0]
) -> tuple[Labels, dict[str, Any]]:
    """Class of each query by multinomial logistic regression on standardized columns.

    The answers come from a fit to the whole bank, and with them the penalty `l2` and, by penalty,
    `held_out_accuracy`. With a part to hold out, fits to the rest choose: the strongest penalty of
    `L2_GRID` that is there at most one standard error less accurate than the best (Breiman et al.
    1984, "Classification and Regression Trees", section 3.4). The best by itself would be chance
    among near ties, and two models that are alike would seem to differ.
    """
    mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)
    Z, W = X - mean, Q - mean
    scale = np.sqrt(np.square(Z).mean(axis=0, dtype=np.float64)).astype(np.float32)
    # A constant column holds the rounding error of its mean.
    scale[scale <= 1e-6 * np.abs(mean)] = np.inf
    Z /= scale
    variances, axes = principal_axes(Z)
    # A rotation changes no L2 penalty, and with a scale for each axis L-BFGS needs few steps.
    Z, W = Z @ axes, (W / scale) @ axes
    accuracy, solutions, weights = {}, {}, np.zeros((Z.shape[1] + 1, codes.max() + 1))
    if held_out is not None and held_out.any():
        for l2 in L2_GRID:
            weights = fit(Z[~held_out], codes[~held_out], l2, weights, variances)
            solutions[l2] = weights
            accuracy[l2] = float((predict(Z[held_out], weights) == codes[held_out]).mean())
        best = max(accuracy.values())
        error = (best * (1 - best) / held_out.sum()) ** 0.5
        l2 = next(l2 for l2 in L2_GRID if accuracy[l2] >= best - error)
    weights = fit(Z, codes, l2, solutions.get(l2, weights), variances)
    return predict(W, weights), {"l2": l2, "held_out_accuracy": accuracy}


def predict(Z: Rows, weights: Weights) -> Codes:
    """The most probable class of each row."""
    return (Z @ weights[:-1] + weights[-1]).argmax(axis=1)


def fit(
    Z: Rows, codes: Codes, l2: float, start: Weights, variances: Float[np.ndarray, " r"]
) -> Weights:
    """Minimum of the mean cross-entropy plus l2 / 2 times the squared weights without offsets.

    As scikit-learn's `LogisticRegression` with C = 1 / (l2 m).
    """
    # About the inverse root of the curvature along each axis.
    scale = np.append(1 / np.sqrt(0.1 * variances + l2), 1.0)[:, None]
    limits = {"maxiter": 1000, "ftol": 1e-6, "gtol": 1e-5}
    at = (start / scale).ravel()
    data = Z, codes, l2, np.broadcast_to(scale, start.shape)
    found = minimize(cross_entropy, at, data, jac=True, method="L-BFGS-B", options=limits)
    return found.x.reshape(start.shape) * scale


def cross_entropy(
    flat: Float[np.ndarray, " p"], Z: Rows, codes: Codes, l2: float, scale: Weights
) -> tuple[float, Float[np.ndarray, " p"]]:
    """What `fit` minimizes and its gradient, for weights over their scale in one row."""
    weights = flat.reshape(scale.shape) * scale
    step = max(1, BLOCK // sum(scale.shape))
    slopes, offsets = weights[:-1].astype(np.float32), weights[-1].astype(np.float32)
    loss, gradient = 0.0, np.zeros_like(weights)
    for at in range(0, len(Z), step):
        rows = Z[at : at + step]
        logits = rows @ slopes + offsets
        logits -= logits.max(axis=1, keepdims=True)
        own = np.arange(len(logits)), codes[at : at + step]
        loss -= float(logits[own].sum(dtype=np.float64))
        np.exp(logits, out=logits)
        totals = logits.sum(axis=1, keepdims=True)
        loss += float(np.log(totals).sum(dtype=np.float64))
        logits /= totals
        logits[own] -= 1
        gradient[:-1] += rows.T @ logits
        gradient[-1] += logits.sum(axis=0)
    gradient /= len(Z)
    gradient[:-1] += l2 * weights[:-1]
    penalty = l2 / 2 * float(np.square(weights[:-1]).sum())
    return loss / len(Z) + penalty, (gradient * scale).ravel()


def summary(answers: Answers) -> dict[str, Any]:
    """One model's entry of `Probe.models`."""
    knn = {k: accuracy(answers.scores[f"knn_{k}"]) for k in sorted(KS)}
    linear = accuracy(answers.scores["linear"])
    return {"knn": knn, "linear": linear, **answers.chosen, "few_shot": few_shot(answers)}


def change(first: Answers, second: Answers) -> dict[str, Any]:
    """First less second, by measure, with the whole bank and on the same draws."""
    found = {m: difference(first.scores[key], second.scores[key]) for m, key in MEASURES.items()}
    return found | {"few_shot": few_shot(first, second)}


def few_shot(first: Answers, second: Answers | None = None) -> dict[int, dict[str, Any]]:
    """Accuracies by images per class and measure, or how far they exceed the second model's."""
    found: dict[int, dict[str, Any]] = {size: {} for size in first.few}
    for size, scores in first.few.items():
        for m, key in MEASURES.items():
            gains = scores[key] * 1.0 - (second.few[size][key] if second else 0.0)
            found[size][m] = over_draws(gains, size / first.fewest, -1.0 if second else 0.0)
    return found


def bank_se(means: Float[np.ndarray, " B"]) -> float:
    """The bank's part of a standard error, from the whole bank's mean and those of its halves."""
    return float(np.sqrt(np.square(half_deviations(means[1:])).mean())) if len(means) > 1 else 0.0


def accuracy(scores: Scores) -> Estimate:
    """Share of correct answers with the whole bank; Wilson's interval and the bank's part."""
    n, means = scores.shape[1], scores.mean(axis=1)
    value, bank = float(means[0]), bank_se(means)
    wilson = binomtest(int(scores[0].sum()), n).proportion_ci(method="wilson")
    low = max(0.0, value - float(np.hypot(value - wilson.low, _BANK_T * bank)))
    high = min(1.0, value + float(np.hypot(wilson.high - value, _BANK_T * bank)))
    return Estimate(value, float(np.sqrt(value * (1 - value) / n + bank**2)), (low, high))


def difference(first: Scores, second: Scores) -> dict[str, Any]:
    """First less second on the same queries.

    `p` is McNemar's, exact for this bank. With the part of a small bank it is Student's, scaled so
    that it is below 0.05 where the interval excludes 0.
    """
    means = first.mean(axis=1) - second.mean(axis=1)
    wins, losses = int((first[0] & ~second[0]).sum()), int((second[0] & ~first[0]).sum())
    n, value, bank = first.shape[1], float(means[0]), bank_se(means)
    # One disagreement more: without it 50 queries that both models nearly always get right had an
    # interval that held the truth in 66% of samples.
    images = np.sqrt(((wins + losses + 1) / n - value**2) / n)
    margin, se = (float(np.hypot(z * images, t * bank)) for z, t in ((_NORMAL, _BANK_T), (1, 1)))
    found = Estimate(value, se, (value - margin, value + margin))
    mcnemar = mcnemar_exact_p(first[0], second[0])
    student = 2 * float(stdtr(NUM_PAIRS - 1, -_BANK_T * abs(value) / margin))
    p = student if bank else mcnemar
    return {"estimate": found, "wins": wins, "losses": losses, "mcnemar_p": mcnemar, "p": p}


def over_draws(scores: Shaped[np.ndarray, "R n"], share: float, lowest: float) -> dict[str, Any]:
    """`estimate`, the mean over draws and queries, with the variances of both; `sd` over draws.

    Draws of a share of the bank overlap by this share. Scores lie between `lowest` and 1.
    """
    num_draws, n = scores.shape
    mean, sd = float(scores.mean()), float(scores.mean(axis=1).std(ddof=1))
    drawn = sd * np.sqrt(1 / num_draws + share / (1 - share))
    images = scores.mean(axis=0).std() / np.sqrt(n)
    margin = float(np.hypot(_NORMAL * images, stdtrit(num_draws - 1, 0.975) * drawn))
    ci95 = (max(lowest, mean - margin), min(1.0, mean + margin))
    return {"estimate": Estimate(mean, float(np.hypot(images, drawn)), ci95), "sd": sd}


def per_class(found: Mapping[str, Answers], labels: Labels) -> list[dict[str, Any]]:
    """Accuracies and differences by class of the queries; p-values also after Holm."""
    rows: list[dict[str, Any]] = []
    paired = {"local", "hf"} <= found.keys()
    for label in np.unique(labels):
        own = labels == label
        row: dict[str, Any] = {"label": int(label), "n": int(own.sum())}
        for measure, key in MEASURES.items():
            scores = {name: answers.scores[key][:, own] for name, answers in found.items()}
            row[measure] = {name: accuracy(one) for name, one in scores.items()}
            if paired:
                row[measure]["difference"] = difference(scores["hf"], scores["local"])
        rows.append(row)
    for measure in MEASURES if paired else ():
        add_holm([row[measure]["difference"] for row in rows], "p", "holm_p")
    return rows


def select_bank(train: Split, compared: Split, limit: int, seed: int) -> tuple[Split, int]:
    """The labeled images for a probe of the compared ones, and how many it must not have.

    Classes get equal shares. They are matched by name, and those that are not compared get numbers
    of their own. Images that are compared too are left out before the draw. Banks of one seed are
    nested: a smaller one is part of every larger one. A limit of 0 keeps all.
    """
    names = dict.fromkeys((*compared.classes, *train.classes))
    number = {name: code for code, name in enumerate(names)}
    labels = np.array([number[name] for name in train.classes])[train.labels]
    shared = shared_images(train, compared)
    rows = np.flatnonzero(~shared)
    rows = rows[balanced_rows(labels[rows], len(number), limit or len(rows), seed)]
    return replace(train.take(rows), labels=labels[rows]), int(shared.sum())


def shared_images(split: Split, other: Split) -> Bool[np.ndarray, " n"]:
    """Which images of a split are also in another one; of files only those of equal size are read.

    Raises:
        UserError: If such a file cannot be read.
    """
    keys, shared = set(other.image_keys), np.zeros(len(split), bool)
    if not (isinstance(split.images, FolderImages) and isinstance(other.images, FolderImages)):
        return np.array([key in keys for key in split.image_keys], bool)
    own, others = split.images.sizes(), other.images.sizes()
    rows = np.flatnonzero((own > 0) & np.isin(own, others))
    shared[rows] = [key in keys for key in split.take(rows).image_keys]
    return shared
