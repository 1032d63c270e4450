"""The report in sentences, chosen by rules from the numbers of one run.

A sentence claims a difference only when its 95% interval excludes zero. It names models by their
roles, and classes as they are given.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ijepa.agreement import MAX_SPEARMAN_IMAGES
from ijepa.comparison import Comparison
from ijepa.errors import counted
from ijepa.formats import NO_INTERVALS, P5, capital, gap, interval, label, listed, number, p_value
from ijepa.uncertainty import KNN_K, Estimate

CLAIMS = {
    P5: ("precision@5", "retrieves better than"),
    "variance_10pc": ("variance in 10 PCs", "has more of its variance in 10 PCs than"),
    "effective_rank": ("effective rank", "uses more dimensions than"),
    "silhouette": ("silhouette", "separates the classes better than"),
    "linear": ("linear-probe accuracy", "has a higher linear-probe accuracy than"),
    "knn": (f"{KNN_K}-NN accuracy", f"has a higher {KNN_K}-NN accuracy than"),
}
"""By metric: the measure, and what a higher one means."""
RETRIEVAL = "Nearest Neighbor Retrieval Quality"
SIGNIFICANT = 0.05


def verdict(difference: Estimate) -> str:
    """`higher` or `lower` when the interval excludes 0, else `unclear`; without one `unknown`."""
    if not math.isfinite(difference.se):
        return "unknown"
    low, high = difference.ci95
    return "higher" if low > 0 else "lower" if high < 0 else "unclear"


def ruling(metric: str, difference: Estimate, pair: tuple[str, str], n: int) -> str:
    """Which of a pair is ahead in a metric, or that this cannot be shown; ends in the numbers.

    The difference is the first's value less the second's. Without one the ruling is empty.
    """
    if not math.isfinite(difference.value):
        return ""
    measure, is_ahead = CLAIMS[metric]
    first, second = map(called, pair)
    said = {
        "higher": f"{first} {is_ahead} {second}",
        "lower": f"{second} {is_ahead} {first}",
        "unclear": f"no difference in {measure} between {first} and {second} can be shown at "
        f"n = {n:,}",
        "unknown": f"there is no interval, so no verdict, for {measure} of {first} and {second}",
    }[verdict(difference)]
    shown = f"{label(pair[0])} - {label(pair[1])} {gap(metric, difference)}"
    shown = shown if measure in said else f"{measure}, {shown}"
    return f"{capital(said)} ({shown})."


def called(role: str) -> str:
    """A model or a reference inside a sentence."""
    return f"the {label(role)} {'model' if role in ('local', 'hf') else 'baseline'}"


def models_ruling(differences: Mapping[str, Any], metric: str, n: int) -> str:
    """The ruling on HF - local in a metric; empty for one model."""
    if metric not in differences:
        return ""
    return ruling(metric, differences[metric]["estimate"], ("hf", "local"), n)


def reference_rulings(comparison: Comparison) -> list[str]:
    """The rulings on the local model's retrieval and that of each reference."""
    n, gains = count(comparison), comparison.gains.items()
    return [ruling(P5, gain, ("local", name), n) for name, gain in gains]


def probe_rulings(probe: Any) -> list[str]:
    """The rulings on HF - local in the probe's accuracies; empty for one model or no probe."""
    measures = ("linear", "knn") if probe else ()
    return [models_ruling(probe.differences, m, probe.query_images) for m in measures]


def paragraph(*sentences: str) -> str:
    """The sentences that are not empty."""
    return " ".join(filter(None, sentences))


def count(comparison: Comparison) -> int:
    """The number of compared images."""
    return len(comparison.analyses["local"].labels)


def by_model(comparison: Comparison, metric: str) -> str:
    """A metric of each model with its interval."""
    found = comparison.metrics.items()
    return ", ".join(f"{label(role)} {interval(metric, one[metric])}" for role, one in found)


def precision_rows(comparison: Comparison) -> dict[str, Estimate]:
    """Precision@5 of the models, with intervals, then of the references and of chance."""
    rows = {name: metrics[P5] for name, metrics in comparison.metrics.items()}
    others = {name: values[P5] for name, values in comparison.references.items()}
    others["chance"] = comparison.chance_precision
    return rows | {name: Estimate(x, math.nan, (math.nan, math.nan)) for name, x in others.items()}


def undefined(comparison: Comparison) -> str:
    """Why there is no precision@5; empty where there is one."""
    if math.isfinite(comparison.metrics["local"][P5].value):
        return ""
    if math.isnan(comparison.chance_precision):
        return "Precision@5 is undefined: no class has two images."
    return "Precision@5 is undefined: with fewer than six images there are no five neighbors."


def answer(comparison: Comparison) -> str:
    """Which model retrieves better, and how well both and the references do."""
    if why := undefined(comparison):
        return why
    found = precision_rows(comparison).items()
    shown = ", ".join(f"{label(name)} {interval(P5, one)}" for name, one in found)
    return paragraph(
        models_ruling(comparison.differences, P5, count(comparison)),
        f"Share of an image's five nearest neighbors that have its class: {shown}.",
    )


def retrieval_finding(comparison: Comparison) -> str:
    """What the answer leaves out: rulings on the references, wins, and first neighbors."""
    if undefined(comparison):
        return ""
    per_image = changed = ""
    if facts := comparison.differences.get(P5):
        halves = f" (p = {p_value(facts['p'])} from half-samples)" * math.isfinite(facts["p"])
        per_image = (
            f"Per image, the HF model is better on {facts['wins']:,}, equal on "
            f"{facts['ties']:,} and worse on {facts['losses']:,}{halves}."
        )
        estimate = comparison.differences["precision_at_1"]["estimate"]
        changed = f", HF - local {gap('precision_at_1', estimate)}"
    first = f"The first neighbor has the image's class: {by_model(comparison, 'precision_at_1')}"
    return paragraph(*reference_rulings(comparison), per_image, f"{first}{changed}.")


def efficiency_finding(comparison: Comparison) -> str:
    """Precision@5 and width of the local model as shares of HF's; empty for one model."""
    if undefined(comparison) or not comparison.differences:
        return ""
    found = comparison.differences[P5]["ratio"]
    if not math.isfinite(found.value):
        return "There is no ratio: precision@5 of the HF model cannot be distinguished from 0."
    local, hf = (a.embeddings.shape[1] for a in comparison.analyses.values())
    dimensions = f"{number('ratio', local / hf)} of its dimensions ({local:,} / {hf:,})"
    dimensions = dimensions if local != hf else f"as many dimensions ({local:,})"
    reached = f"The local model reaches {interval('ratio', found)} of the HF model's precision@5"
    return f"{reached} (local / HF) with {dimensions}."


def variance_finding(comparison: Comparison) -> str:
    """How the variance is spread, and whether the models differ in that."""
    changes, n = comparison.differences, count(comparison)
    widths = {role: a.embeddings.shape[1] for role, a in comparison.analyses.items()}
    ranks = []
    for role, metrics in comparison.metrics.items():
        rank, width = metrics["effective_rank"], widths[role]
        share = f" ({number('share', rank.value / width)})" * math.isfinite(rank.value)
        ranks.append(f"{label(role)} {interval('effective_rank', rank)} of {width:,}{share}")
    pixels = comparison.references.get("pixels", {}).get("variance_10pc", math.nan)
    ten = [f"{number('variance_10pc', 10 / w)} for {called(role)}" for role, w in widths.items()]
    differ = len(set(widths.values())) == 2 and min(widths.values()) >= 10
    return paragraph(
        *(models_ruling(changes, metric, n) for metric in ("variance_10pc", "effective_rank")),
        f"Variance in 10 PCs: {by_model(comparison, 'variance_10pc')}.",
        f"Variance in 50 PCs: {by_model(comparison, 'variance_50pc')}.",
        f"PCs for 80% of the variance: {by_model(comparison, 'components_80')}.",
        f"Effective rank: {', '.join(ranks)}.",
        f"Of all dimensions, 10 PCs are {listed(ten)}." * differ,
        f"Raw pixels reach {number('variance_10pc', pixels)} in 10 PCs." * math.isfinite(pixels),
    )


def separability_ruling(comparison: Comparison) -> str:
    """The ruling on silhouettes; none is better where no model is shown to separate the classes."""
    found, n = [metrics["silhouette"] for metrics in comparison.metrics.values()], count(comparison)
    if len(found) == 2 and all(one.ci95[0] <= 0 for one in found):
        return f"No model is shown to separate the classes (silhouette) at n = {n:,}."
    return models_ruling(comparison.differences, "silhouette", n)


def separability_finding(comparison: Comparison) -> str:
    """Whether one model separates the classes better, and the silhouettes."""
    small = all(abs(m["silhouette"].value) < 0.1 for m in comparison.metrics.values())
    return paragraph(
        separability_ruling(comparison),
        f"Mean silhouette, from -1 to 1: {by_model(comparison, 'silhouette')}.",
        f"By cosine distance: {by_model(comparison, 'silhouette_cosine')}.",
        "Values this close to 0 mean that an image is hardly nearer to its own class than to the "
        "next; its neighbors may be pure all the same." * small,
    )


def confusion_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """The purest class and the most common confusions among the five nearest neighbors."""
    parts = []
    for role, ranked in comparison.rankings.items():
        if not ranked:  # precision@5 is not defined
            continue
        best, share = ranked["purest_class"].values()
        purities = [one.value for one in comparison.class_precision[role]]
        tied = purities.count(max(purities))
        first = f"{tied:,} classes have" if tied > 1 else f"{classes[best]} has"
        again = f", also in {number('share', share)} of half-samples"
        again *= tied == 1 and math.isfinite(share)
        parts.append(
            f"In {called(role)}, {first} the purest neighborhoods: "
            f"{number('share', max(purities))} of neighbors share the class{again}."
        )
        pairs = [
            f"{classes[pair['from']]} -> {classes[pair['to']]} ({number('share', pair['share'])})"
            for pair in ranked["confusions"]
        ]
        share = ranked["confusions_share_of_halves"]
        same = f", the same in {number('share', share)} of half-samples" * math.isfinite(share)
        parts.append(f"Most common confusions: {', '.join(pairs)}{same}." * bool(pairs))
    return paragraph(*parts)


def class_groups_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """Which groups of classes join last and first, and how alike the two trees are."""
    groups, said = comparison.class_groups, {}
    for role in comparison.analyses if groups else ():
        sides = [sorted(classes[row] for row in side) for side in groups[role]["top"]]
        sides.sort(key=lambda side: (len(side), side))
        (small, large), verb = map(listed, sides), "joins" if len(sides[0]) == 1 else "join"
        first, second, _ = groups[role]["merges"][0]
        merged = listed(sorted(classes[row] for row in [*first, *second]))
        said[role] = f"{small} {verb} {large} last; {merged} join first."
    parts = [f"In {called(role)}, {sides}" for role, sides in said.items()]
    if len(said) == 2 and len(set(said.values())) == 1:
        parts = [f"In both models, {said['local']}"]
    if math.isfinite(r := groups.get("cophenetic", math.nan)):
        shown = f"{number('cophenetic', r)} (permutation p = {p_value(groups['p'])})"
        parts.append(f"The two trees of classes have a cophenetic correlation of {shown}.")
    return paragraph(*parts)


def agreement_ruling(comparison: Comparison) -> str:
    """Whether the models share more neighbors than chance and the classes explain."""
    facts = comparison.agreement
    mutual = facts["mutual_knn"]
    if not math.isfinite(mutual.value):
        return "There are too few images for mutual 10-NN."
    if not math.isfinite(mutual.se):
        return "There is no interval, so no verdict, for mutual 10-NN of the two models."
    if mutual.ci95[0] > max(facts["mutual_knn_class_only"], facts["mutual_knn_chance"]):
        return "The models share more nearest neighbors than the classes explain."
    if mutual.ci95[0] > facts["mutual_knn_chance"]:
        return "The models agree beyond chance, but not demonstrably beyond the classes."
    return f"No agreement in mutual 10-NN beyond chance can be shown at n = {count(comparison):,}."


def agreement_finding(comparison: Comparison) -> str:
    """Whether the two models see the same neighbors and the same geometry; empty for one model."""
    if not (facts := comparison.agreement):
        return ""
    parts = [agreement_ruling(comparison)]
    if math.isfinite(facts["mutual_knn"].value):
        shown = interval("mutual_knn", facts["mutual_knn"])
        levels = ("mutual_knn_chance", "mutual_knn_class_only")
        chance, class_only = (number("mutual_knn", facts[level]) for level in levels)
        only = f"; models that agree only on classes would share {class_only}"
        only *= math.isfinite(facts["mutual_knn_class_only"])
        parts += [
            f"They share {shown} of their 10 nearest neighbors (mutual 10-NN).",
            f"Chance is {chance}{only}.",
        ]
    cka, null, p = (facts[name] for name in ("cka", "cka_null_p99", "cka_null_p"))
    if math.isfinite(cka) and not math.isfinite(p):
        parts.append(f"Debiased linear CKA is {number('cka', cka)}.")
    elif math.isfinite(cka):
        parts += [
            f"The geometries {'show' if p < SIGNIFICANT else 'do not show'} more in common than "
            f"the classes (debiased linear CKA {number('cka', cka)}, p = {p_value(p)}).",
            f"In 99% of shuffles within classes, CKA is at most {number('cka', null)}.",
        ]
    if math.isfinite(facts["cka_class_demeaned"]):
        parts.append(f"Without class means, CKA is {number('cka', facts['cka_class_demeaned'])}.")
    if math.isfinite(rho := facts["similarity_spearman"]):
        used = min(count(comparison), MAX_SPEARMAN_IMAGES)
        parts.append(
            f"The similarities of all pairs of {used:,} images have a Spearman correlation of "
            f"{number('similarity_spearman', rho)}."
        )
    return paragraph(*parts)


def classes_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """On which classes a model is better, all classes tested together; empty for one model."""
    rows, n = comparison.per_class, count(comparison)
    if not rows or not comparison.num_halves:
        return "There are no intervals, so no verdict on classes." if rows else ""
    better: dict[str, list[str]] = {"higher": [], "lower": []}
    for row in rows:
        found = verdict(row["difference"])
        if found in better and row["holm_p"] < SIGNIFICANT:
            better[found].append(classes[row["label"]])
    parts = [
        f"{capital(called(role))} retrieves better on {listed(better[found])} (precision@5)."
        for role, found in (("hf", "higher"), ("local", "lower"))
        if better[found]
    ]
    if rest := len(rows) - sum(map(len, better.values())):
        which = f"{rest} of {len(rows)} classes" if parts else "any class"
        parts.append(f"No difference in precision@5 can be shown on {which} at n = {n:,}.")
    rule = f"A difference counts if its interval excludes 0 and Holm's p is below {SIGNIFICANT}."
    return paragraph(*parts, rule)


def seeds_finding(comparison: Comparison) -> str:
    """How to read the spread over training seeds; empty for one training."""
    if not comparison.seeds:
        return ""
    trainings = len(comparison.seeds[P5]["values"])
    return paragraph(
        f"The local model was trained {trainings} times with different seeds.",
        f"The deviation of {trainings} trainings is only rough." * (trainings < 5),
    )


def probe_finding(probe: Any) -> str:
    """A paragraph on which model classifies better with the bank; empty without a probe."""
    if not probe:
        return ""
    given = "and other banks of this size" if probe.bank_in_intervals else "given this bank"
    bank = f"The bank has {counted(probe.bank_images, 'labeled image')}."
    return paragraph(*probe_rulings(probe), bank, f"Intervals hold for new images {given}.")


def findings(comparison: Comparison, classes: Sequence[str], probe: Any = None) -> dict[str, str]:
    """The findings by title, some empty; what `answer` says is not among them."""
    # In quotation marks if a name could be read as a number of the sentence.
    classes = [name if any(map(str.isalpha, name)) else f'"{name}"' for name in classes]
    learned = [class_groups_finding(comparison, classes), confusion_finding(comparison, classes)]
    return {
        "Representation Efficiency": efficiency_finding(comparison),
        "Variance Structure": variance_finding(comparison),
        "Class Separability": separability_finding(comparison),
        "What the Embeddings Learn": paragraph(*learned),
        RETRIEVAL: retrieval_finding(comparison),
        "Probe with Labeled Images": probe_finding(probe),
        "Agreement of the Two Models": agreement_finding(comparison),
        "Class by Class": classes_finding(comparison, classes),
        "Spread over Training Seeds": seeds_finding(comparison),
    }


def conclusions(comparison: Comparison, probe: Any = None) -> list[str]:
    """The verdicts without their numbers, or why there are none."""
    found = [undefined(comparison) or NO_INTERVALS]
    if comparison.num_halves:
        found = [
            undefined(comparison) or models_ruling(comparison.differences, P5, count(comparison)),
            *reference_rulings(comparison),
            separability_ruling(comparison),
            agreement_ruling(comparison) if comparison.agreement else "",
        ]
    found += probe_rulings(probe)
    # The numbers are the parentheses at the end.
    return [re.sub(r" \([^()]*\)\.$", ".", sentence) for sentence in found if sentence]
