"""The report in words: sentences chosen by rules from the numbers of one run.

A sentence claims a difference only when its 95 % interval leaves out zero; without an interval it
states numbers and no verdict. Nothing here is typed in by hand that a run can measure.
"""

import math
from collections.abc import Sequence

import numpy as np

from ijepa.agreement import MAX_SPEARMAN_IMAGES, ratio
from ijepa.comparison import HEADLINES, Comparison, neighbor_confusion
from ijepa.uncertainty import Estimate

ROWS = {
    "embedding_dim": "Embedding dimension",
    "variance_10pc": "Variance in 10 PCs",
    "variance_50pc": "Variance in 50 PCs",
    "silhouette": "Silhouette score",
    "precision_at_5": "NN precision@5",
}
PERCENT = (
    "variance_10pc",
    "variance_50pc",
    "precision_at_1",
    "precision_at_5",
    "mutual_knn",
    "ratio",
)
DIGITS = {"embedding_dim": 0, "effective_rank": 1, "ratio": 0}
MISSING = "n/a"
CONCLUDED = {
    "higher": "higher with the HF model:",
    "lower": "higher with the local model:",
    "unclear": "no difference can be shown in:",
}
MODELS = ("local", "hf")
TOO_FEW = "With fewer than six images there are no five nearest neighbours to judge by."
SIGNIFICANT = 0.05
INTERVALS = (
    "Brackets hold 95 % intervals over images: from stratified half-samples for silhouette and "
    "precision, from influence functions for variance and effective rank."
)


def number(metric: str, value: float, sign: str = "", extra: int = 0) -> str:
    """A value as printed: percent with one digit for shares, three digits for most others.

    Args:
        metric: Decides on percent and digits.
        value: What to print.
        sign: "+" to print the sign of positive values also.
        extra: Digits beyond the usual.
    """
    if not math.isfinite(value):
        return MISSING
    percent = metric in PERCENT
    digits = DIGITS.get(metric, 1 if percent else 3) + extra
    # Adding 0 turns a negative zero, left by rounding, into a plain one.
    value = round(100 * value if percent else value, digits) + 0.0
    return f"{value:{sign}.{digits}f}" + ("%" if percent else "")


def interval(metric: str, estimate: Estimate, sign: str = "") -> str:
    """The value and, where there is one, its 95 % interval in brackets."""
    if not math.isfinite(estimate.se):
        return number(metric, estimate.value, sign)
    extra = extra_digits(metric, estimate.se)
    low, high = (number(metric, bound, sign, extra).rstrip("%") for bound in estimate.ci95)
    return f"{number(metric, estimate.value, sign, extra)} [{low}, {high}]"


def extra_digits(metric: str, se: float) -> int:
    """Digits beyond the usual that show a standard error: at most three, none for an error of 0."""
    percent = metric in PERCENT
    scaled = 100 * se if percent else se
    usual = DIGITS.get(metric, 1 if percent else 3)
    return min(max(math.ceil(-math.log10(scaled)) - usual, 0), 3) if scaled > 0 else 0


def gap(metric: str, difference: Estimate) -> str:
    """A difference with its interval: shares differ by points, not by percent."""
    return interval(metric, difference, "+").replace("%", " points")


def verdict(difference: Estimate) -> str:
    """`higher` or `lower` for hf when the interval leaves out 0, `unclear`, or `unknown`."""
    if not math.isfinite(difference.se):
        return "unknown"
    low, high = difference.ci95
    return "higher" if low > 0 else "lower" if high < 0 else "unclear"


def summary(comparison: Comparison) -> dict[str, dict[str, float | int]]:
    """The five headline numbers of each model and local / hf."""
    result = {
        name: {
            "embedding_dim": analysis.embeddings.shape[1],
            **{metric: comparison.metrics[name][metric].value for metric in HEADLINES},
        }
        for name, analysis in comparison.analyses.items()
    }
    if "hf" in result:
        result["ratio"] = {
            metric: comparison.differences[metric]["ratio"].value
            if metric in comparison.differences
            else ratio(float(result["local"][metric]), float(result["hf"][metric]))
            for metric in ROWS
        }
    return result


def table(comparison: Comparison) -> list[list[str]]:
    """The headline table as cells, its header first."""
    head = summary(comparison)
    paired = "hf" in head
    header = ["Metric", "Local I-JEPA"]
    header += ["HF I-JEPA", "Ratio", "HF - local [95 %]"] if paired else []
    header += ["Pixels", "Random weights"]
    widths = {"pixels": 3072, "random_weights": head["local"]["embedding_dim"]}
    rows = [header]
    for metric, title in ROWS.items():
        row = [title, number(metric, float(head["local"][metric]))]
        if paired:
            quotient = head["ratio"][metric]
            row += [number(metric, float(head["hf"][metric]))]
            row += [f"{quotient:.2f}x" if math.isfinite(quotient) else MISSING]
            difference = comparison.differences.get(metric)
            row += [interval(metric, difference["estimate"], "+") if difference else ""]
        for reference, metrics in comparison.references.items():
            row.append(number(metric, metrics.get(metric, float(widths[reference]))))
        rows.append(row)
    return rows


def console_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def retrieval_finding(comparison: Comparison) -> str:
    """Who retrieves better, and what that means beside chance and the references."""
    local = comparison.metrics["local"]["precision_at_5"]
    if not math.isfinite(local.value):
        return TOO_FEW
    text = (
        f"Of the five nearest neighbours of an image, {interval('precision_at_5', local)} share "
        f"its class with the local model; chance is {100 * comparison.chance_precision:.1f}%. "
        f"{references_finding(comparison)}"
    )
    if "hf" not in comparison.metrics:
        return text
    hf = comparison.metrics["hf"]["precision_at_5"]
    facts = comparison.differences["precision_at_5"]
    shown = gap("precision_at_5", facts["estimate"])
    text += f" With the HF model it is {interval('precision_at_5', hf)}"
    text += {
        "higher": f": the HF model retrieves better (HF - local {shown}).",
        "lower": f": the local model retrieves better (HF - local {shown}).",
        "unclear": f"; HF - local is {shown}, so no difference can be shown at "
        f"n = {count(comparison)}.",
        "unknown": "; there are too few images for an interval, so this is no verdict.",
    }[verdict(facts["estimate"])]
    first = [
        number("precision_at_1", comparison.metrics[m]["precision_at_1"].value) for m in MODELS
    ]
    test = f" (p = {facts['p']:.2g})" if math.isfinite(facts["p"]) else ""
    return text + (
        f" Image by image the HF model does better on {facts['wins']}, as well on {facts['ties']} "
        f"and worse on {facts['losses']}{test}. The nearest "
        f"neighbour alone is right for {first[0]} with the local and {first[1]} with the HF model "
        f"(exact McNemar p = {comparison.differences['precision_at_1']['mcnemar_p']:.2g})."
    )


def references_finding(comparison: Comparison) -> str:
    """Whether the local model retrieves better than each reference."""
    sentences = []
    for name, estimate in comparison.gains.items():
        reference = number("precision_at_5", comparison.references[name]["precision_at_5"])
        shown = gap("precision_at_5", estimate)
        more = interval("precision_at_5", estimate).replace("%", " points")
        words = name.replace("_", " ")
        sentences.append(
            {
                "higher": f"The local model is better than {words} ({reference}) by {more}.",
                "lower": f"The local model is worse than {words} ({reference}): local - {words} "
                f"is {shown}.",
                "unclear": f"No difference between the local model and {words} ({reference}) can "
                f"be shown ({shown}).",
                "unknown": f"{words.capitalize()} give {reference}.",
            }[verdict(estimate)]
        )
    return " ".join(sentences)


def question(comparison: Comparison) -> str:
    """What the answer answers."""
    if "hf" in comparison.metrics:
        return "Which of the two encoders brings images of the same class closer together?"
    return "How well does the local encoder bring images of the same class together?"


def answer(comparison: Comparison) -> str:
    """One sentence on precision@5, with a winner only where the interval leaves out zero."""
    local = comparison.metrics["local"]["precision_at_5"]
    if not math.isfinite(local.value):
        return TOO_FEW
    others = " and ".join(
        f"{name.replace('_', ' ')} {number('precision_at_5', metrics['precision_at_5'])}"
        for name, metrics in comparison.references.items()
    )
    beside = f"chance gives {100 * comparison.chance_precision:.1f}%, {others}"
    if "hf" not in comparison.metrics:
        shown = interval("precision_at_5", local)
        return f"{shown} of an image's five nearest neighbours share its class; {beside}."
    hf = comparison.metrics["hf"]["precision_at_5"]
    shown = [number("precision_at_5", value) for value in (local.value, hf.value)]
    difference = comparison.differences["precision_at_5"]["estimate"]
    change = gap("precision_at_5", difference)
    first = {
        "higher": f"The HF model: {shown[1]} of an image's five nearest neighbours share its class,"
        f" against {shown[0]} with the local model (HF - local {change})",
        "lower": f"The local model: {shown[0]} of an image's five nearest neighbours share its "
        f"class, against {shown[1]} with the HF model (HF - local {change})",
        "unclear": f"No difference can be shown: {shown[0]} of an image's five nearest neighbours "
        f"share its class with the local model and {shown[1]} with the HF model "
        f"(HF - local {change})",
        "unknown": "There are too few images for a verdict: of an image's five nearest neighbours "
        f"{shown[0]} share its class with the local model and {shown[1]} with the HF model",
    }[verdict(difference)]
    return f"{first}; {beside}."


def efficiency_finding(comparison: Comparison) -> str:
    """What share of the HF model's retrieval the local dimensions buy."""
    head, facts = summary(comparison), comparison.differences["precision_at_5"]
    widths = [int(head[name]["embedding_dim"]) for name in MODELS]
    if not math.isfinite(facts["estimate"].value):
        return TOO_FEW
    if not math.isfinite(facts["ratio"].value):
        return "With the HF model no neighbour shares the class of its image: there is no ratio."
    share = interval("ratio", facts["ratio"])
    text = f"The local model reaches {share} of the HF model's precision@5 "
    if widths[0] == widths[1]:
        return text + f"with as many dimensions ({widths[0]})."
    share = number("ratio", widths[0] / widths[1])
    return text + f"with {share} of its dimensions ({widths[0]} against {widths[1]})."


def variance_finding(comparison: Comparison) -> str:
    """How the variance is spread, and whether the models differ in that."""
    parts = []
    for name, analysis in comparison.analyses.items():
        m, width = comparison.metrics[name], analysis.embeddings.shape[1]
        rank = m["effective_rank"]
        parts.append(
            f"{label(name)}: {interval('variance_10pc', m['variance_10pc'])} of the variance in 10 "
            f"PCs, {interval('variance_50pc', m['variance_50pc'])} in 50; "
            f"PCs for 80 %: {whole(m['components_80'].value)}; effective rank "
            f"{interval('effective_rank', rank)} of {width}"
            + (f" ({100 * rank.value / width:.0f}%)." if math.isfinite(rank.value) else ".")
        )
    if "hf" in comparison.metrics:
        parts += [concentration(comparison), spread(comparison)]
    parts.append(
        "Explained variance describes a shape and not a quality: raw pixels reach "
        f"{number('variance_10pc', comparison.references['pixels']['variance_10pc'])} in 10 PCs."
    )
    return " ".join(parts)


def concentration(comparison: Comparison) -> str:
    """Which model puts more of its variance into few directions, and of how many they are few."""
    difference = comparison.differences["variance_10pc"]["estimate"]
    text = {
        "higher": "The HF model puts more of its variance into 10 PCs",
        "lower": "The local model puts more of its variance into 10 PCs",
        "unclear": "No difference in 10 PCs can be shown",
        "unknown": "Without an interval, no verdict on 10 PCs is given",
    }[verdict(difference)]
    text += f" (HF - local {gap('variance_10pc', difference)})"
    widths = [analysis.embeddings.shape[1] for analysis in comparison.analyses.values()]
    if widths[0] == widths[1] or min(widths) < 10:
        return text + "."
    shares = [f"{1000 / width:.1f}%" for width in widths]
    return (
        text + f"; they are {shares[0]} of the local and {shares[1]} of the HF model's dimensions."
    )


def spread(comparison: Comparison) -> str:
    """Which model uses more dimensions."""
    difference = comparison.differences["effective_rank"]["estimate"]
    text = {
        "higher": "The HF model uses more dimensions",
        "lower": "The local model uses more dimensions",
        "unclear": "No difference in effective rank can be shown",
        "unknown": "Without an interval, no verdict on effective rank is given",
    }[verdict(difference)]
    return text + f" (effective rank, HF - local {gap('effective_rank', difference)})."


def separability_finding(comparison: Comparison) -> str:
    """Silhouettes, and whether one model separates the classes better."""
    shown = ", ".join(
        f"{label(name)} {interval('silhouette', comparison.metrics[name]['silhouette'])}"
        for name in comparison.analyses
    )
    text = f"Mean silhouette with the true labels, from -1 to 1, higher is better: {shown}."
    if "hf" in comparison.metrics:
        difference = comparison.differences["silhouette"]["estimate"]
        shown = gap("silhouette", difference)
        text += {
            "higher": f" The HF model separates the classes better (HF - local {shown}).",
            "lower": f" The local model separates the classes better (HF - local {shown}).",
            "unclear": f" No difference can be shown at n = {count(comparison)} "
            f"(HF - local {shown}).",
            "unknown": " Without an interval this is no verdict.",
        }[verdict(difference)]
    cosine = ", ".join(
        f"{label(name)} {interval('silhouette', numbers['silhouette_cosine'])}"
        for name, numbers in comparison.metrics.items()
    )
    text += f" By cosine instead of Euclidean distance: {cosine}."
    if all(abs(m["silhouette"].value) < 0.1 for m in comparison.metrics.values()):
        text += " Values this near to 0 mean classes that overlap, however good the neighbours are."
    return text


def confusion_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """The classes that each model confuses most among its five nearest neighbours."""
    parts = []
    for name, analysis in comparison.analyses.items():
        confusion = neighbor_confusion(analysis, len(classes))
        hits = confusion.diagonal().copy()
        np.fill_diagonal(confusion, 0)
        worst = np.unravel_index(np.argsort(-confusion, axis=None)[:3], confusion.shape)
        pairs = ", ".join(
            f"{literal(classes[a])} to {literal(classes[b])} ({100 * confusion[a, b]:.0f}%)"
            for a, b in zip(*worst, strict=True)
            if confusion[a, b] > 0
        )
        present = np.unique(analysis.labels)
        best = present[hits[present].argmax()]
        parts.append(
            f"{label(name)}: the purest neighbourhoods are those of {literal(classes[best])} "
            f"({100 * hits[best]:.0f}% of the five neighbours are of the same class)"
            + (f"; neighbours stray most from {pairs}." if pairs else "; none stray.")
        )
    return " ".join(parts)


def agreement_finding(comparison: Comparison) -> str:
    """Whether the two models see the same neighbours and the same geometry."""
    return f"{neighbors_in_common(comparison)} {geometry_in_common(comparison)}".rstrip()


def neighbors_in_common(comparison: Comparison) -> str:
    """Mutual 10-NN beside chance and the level of the classes, with a verdict from its interval."""
    facts = comparison.agreement
    mutual, chance = facts["mutual_knn"], facts["mutual_knn_chance"]
    class_only = facts["mutual_knn_class_only"]
    if not math.isfinite(mutual.value):
        return "There are too few images for mutual 10-NN."
    text = (
        f"The models share {interval('mutual_knn', mutual)} of their 10 nearest neighbours; "
        f"{number('mutual_knn', chance)} would be chance and {number('mutual_knn', class_only)} "
        "the level of two models that agree on the classes and on nothing else"
    )
    if not math.isfinite(mutual.se):
        return text + "; without an interval this is no verdict."
    low = mutual.ci95[0]
    if low > class_only:
        return text + ", so they agree on more than the classes."
    if low > chance:
        return text + (", so they agree beyond chance; whether on more than classes is open.")
    return text + ", so no agreement beyond chance can be shown."


def geometry_in_common(comparison: Comparison) -> str:
    """CKA beside its permutation null, and the rank correlation of similarities."""
    facts, text = comparison.agreement, ""
    cka, demeaned, null = facts["cka"], facts["cka_class_demeaned"], facts["cka_null_p99"]
    if math.isfinite(cka):
        text = (
            f"Debiased linear CKA of the two geometries is {number('cka', cka)}; shuffling images "
            f"inside their classes gives at most {number('cka', null)} in 99 % of cases, so "
        )
        text += (
            "they have more than the classes in common."
            if cka > null
            else "nothing beyond the classes is shown to be in common."
        )
    if math.isfinite(demeaned):
        text += f" With the class means taken out CKA is {number('cka', demeaned)}."
    rho = facts["similarity_spearman"]
    if math.isfinite(rho):
        used = min(count(comparison), MAX_SPEARMAN_IMAGES)
        text += (
            f" The cosine similarities of all pairs of {used} images have a Spearman correlation "
            f"of {number('similarity_spearman', rho)}."
        )
    return text.strip()


def classes_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """On which classes a model is better, all looked at together."""
    better: dict[str, list[str]] = {"higher": [], "lower": []}
    for row in comparison.per_class:
        found = verdict(row["difference"])
        if found in better and row["holm_p"] < SIGNIFICANT:
            better[found].append(literal(classes[row["label"]]))
    total = len(comparison.per_class)
    rest = total - sum(map(len, better.values()))
    parts = [
        f"the {model} model retrieves better on {', '.join(names)}"
        for model, names in (("HF", better["higher"]), ("local", better["lower"]))
        if names
    ]
    if not comparison.num_halves:
        parts = ["there are too few images per class for a verdict"]
    elif not parts:
        parts = ["no difference can be shown on any class"]
    elif rest:
        parts.append(f"no difference can be shown on the other {rest}")
    return (
        f"Of {total} classes looked at together: {'; '.join(parts)}. A difference counts when its "
        f"interval leaves out 0 and its sign-flip p, corrected after Holm, is below {SIGNIFICANT}."
    )


def conclusions(comparison: Comparison) -> list[str]:
    """What can be said in the end, a sentence each."""
    found = [answer(comparison)]
    if found == [TOO_FEW]:
        return found
    found.append(references_finding(comparison))
    if "hf" not in comparison.metrics:
        return found
    found.append(efficiency_finding(comparison))
    shown: dict[str, list[str]] = {"higher": [], "lower": [], "unclear": []}
    for metric in HEADLINES:
        word = verdict(comparison.differences[metric]["estimate"])
        shown.get(word, []).append(ROWS[metric])
    parts = [
        f"{words} {', '.join(shown[word])}" for word, words in CONCLUDED.items() if shown[word]
    ]
    if parts:
        found.append(f"In the table, {'; '.join(parts)}.")
    found.append(neighbors_in_common(comparison))
    return found


def seeds_finding(comparison: Comparison) -> str:
    """What another training seed changes, beside what other images would change."""
    spread = comparison.seeds["precision_at_5"]
    error = comparison.metrics["local"]["precision_at_5"].se
    trainings = len(spread.values)
    text = (
        f"Over {trainings} trainings of the local model precision@5 is "
        f"{number('precision_at_5', spread.mean)} in the mean, with a standard deviation of "
        f"{points(spread.sd)} over trainings"
    )
    if math.isfinite(error):
        text += f"; the standard error over images is {points(error)}"
    text += ". The intervals hold the latter alone."
    if trainings < 5:
        text += f" {trainings} trainings know the deviation only roughly."
    return text


def points(share: float) -> str:
    """A deviation of a share."""
    return number("precision_at_5", share, extra=1).replace("%", " points")


def headline_lines(comparison: Comparison) -> list[str]:
    """What the console says under the table: agreement, and wins, ties and losses."""
    if "hf" not in comparison.metrics:
        return []
    facts, retrieval = comparison.agreement, comparison.differences["precision_at_5"]
    lines = []
    if math.isfinite(facts["mutual_knn"].value):
        lines.append(
            f"agreement: mutual 10-NN {facts['mutual_knn'].value:.3f} (chance "
            f"{facts['mutual_knn_chance']:.3f}, same classes {facts['mutual_knn_class_only']:.3f})"
            + (f", debiased CKA {facts['cka']:.3f}" if math.isfinite(facts["cka"]) else "")
        )
    if "wins" in retrieval:
        lines.append(
            f"precision@5 by image: hf better on {retrieval['wins']}, equal on "
            f"{retrieval['ties']}, local better on {retrieval['losses']}"
        )
    return lines


def count(comparison: Comparison) -> int:
    """Images compared."""
    return len(comparison.analyses["local"].labels)


def label(name: str) -> str:
    """A model's name in a sentence."""
    return "HF" if name == "hf" else name.replace("_", " ").capitalize()


def whole(value: float) -> str:
    """A count, or a word where there is none."""
    return f"{value:.0f}" if math.isfinite(value) else MISSING


def literal(text: str) -> str:
    """A class name or path inside Markdown: shown as it is, never as markup."""
    single_line = " ".join(text.split())
    for character in "\\`*_[]<>|#&":
        single_line = single_line.replace(character, "\\" + character)
    return single_line
