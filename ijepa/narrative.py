"""The report in words: sentences chosen by rules from the numbers of one run.

A sentence claims a difference only when its 95% interval excludes zero. Names are printed as given.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ijepa.agreement import MAX_SPEARMAN_IMAGES, ratio
from ijepa.comparison import HEADLINES, Comparison, neighbor_confusion
from ijepa.uncertainty import KNN_K, Estimate

P5 = "precision_at_5"
ROWS = {
    "embedding_dim": "Embedding dimension",
    "variance_10pc": "Variance in 10 PCs",
    "variance_50pc": "Variance in 50 PCs",
    "silhouette": "Silhouette score",
    P5: "NN precision@5",
}
PERCENT = ("variance_10pc", "variance_50pc", "precision_at_1", P5, "mutual_knn", "ratio")
PERCENT += ("linear", "knn")
DIGITS = {"embedding_dim": 0, "components_80": 0, "effective_rank": 1, "ratio": 0}
CLAIMS = {
    P5: ("precision@5", "retrieves better than"),
    "variance_10pc": ("variance in 10 PCs", "puts more of its variance into 10 PCs than"),
    "effective_rank": ("effective rank", "uses more dimensions than"),
    "silhouette": ("silhouette", "separates the classes better than"),
    "linear": ("linear-probe accuracy", "classifies better than"),
    "knn": (f"{KNN_K}-NN accuracy with the bank", "classifies better than"),
}
"""By metric: the measure, and what a higher one means."""
MISSING = "n/a"
MAX_NAMES = 6  # in a sentence
INTERVALS = (
    "Brackets hold 95% intervals over images: from stratified half-samples for silhouette and "
    "precision, from the influence of each image for variance and effective rank."
)


def number(metric: str, value: float, sign: str = "", extra: int = 0) -> str:
    """A value as printed: percent with one digit for shares, three digits for most others.

    A `sign` of "+" prints that of positive values too; `extra` digits come after the usual ones.
    """
    if not math.isfinite(value):
        return MISSING
    percent = metric in PERCENT
    digits = DIGITS.get(metric, 1 if percent else 3) + extra
    # Halves round up, as on the page, whatever the last bit of a mean says. Adding 0 turns a
    # negative zero, left by rounding, into a plain one.
    value = round((100 * value if percent else value) + 1e-9, digits) + 0.0
    return f"{value:{sign},.{digits}f}" + ("%" if percent else "")


def interval(metric: str, estimate: Estimate, sign: str = "") -> str:
    """The value and its 95% interval, if any, with up to three more digits for a small error."""
    if not math.isfinite(estimate.se):
        return number(metric, estimate.value, sign)
    percent = metric in PERCENT
    usual, scaled = DIGITS.get(metric, 1 if percent else 3), estimate.se * (100 if percent else 1)
    extra = min(max(math.ceil(-math.log10(scaled)) - usual, 0), 3) if scaled > 0 else 0
    low, high = (number(metric, bound, sign, extra).rstrip("%") for bound in estimate.ci95)
    return f"{number(metric, estimate.value, sign, extra)} [{low}, {high}]"


def p_value(p: float) -> str:
    """A p-value with two significant digits."""
    return f"{p:.2g}" if math.isfinite(p) else MISSING


def gap(metric: str, difference: Estimate) -> str:
    """A difference with its interval: shares differ by points, not by percent."""
    return interval(metric, difference, "+").replace("%", " points")


def verdict(difference: Estimate) -> str:
    """`higher` or `lower` when the interval excludes 0, else `unclear`; without one `unknown`."""
    if not math.isfinite(difference.se):
        return "unknown"
    low, high = difference.ci95
    return "higher" if low > 0 else "lower" if high < 0 else "unclear"


def short_names(comparison: Comparison) -> dict[str, str]:
    """The models' short names, with their roles where the names are equal."""
    names = comparison.names
    if len(set(names.values())) < len(names):
        return {role: f"{name} ({label(role)})" for role, name in names.items()}
    return dict(names)


def label(role: str) -> str:
    """A role or reference as a title."""
    return "HF" if role == "hf" else role.replace("_", " ").capitalize()


def listed(names: Sequence[str]) -> str:
    """Names as `a, b and c`, at most `MAX_NAMES` of them."""
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        shown[-1] = f"{len(names) - MAX_NAMES + 1} more"
    return " and ".join(part for part in (", ".join(shown[:-1]), *shown[-1:]) if part)


def count(comparison: Comparison) -> int:
    """Images compared."""
    return len(comparison.analyses["local"].labels)


def by_model(comparison: Comparison, metric: str) -> str:
    """A metric of each model with its interval."""
    return ", ".join(
        f"{name} {interval(metric, comparison.metrics[role][metric])}"
        for role, name in short_names(comparison).items()
    )


def ruling(metric: str, difference: Estimate, first: str, second: str, where: str) -> str:
    """Which of two is ahead, or that this cannot be shown; `where` is the direction and n."""
    measure, claim = CLAIMS[metric]
    direction, n = where.split("|")
    shown, found = f"{direction} {gap(metric, difference)}", verdict(difference)
    if found == "unknown":
        return f"The {measure} differs by {shown}; without an interval this is no verdict."
    if found == "unclear":
        return (
            f"No difference in {measure} of {first} and {second} can be shown at n = {n} ({shown})."
        )
    ahead, behind = (first, second) if found == "higher" else (second, first)
    return f"{ahead} {claim} {behind} ({measure}, {shown})."


def models_ruling(comparison: Comparison, metric: str, difference: Any = None) -> str:
    """The ruling on HF - local in a metric, or on a given difference; empty without one."""
    found = difference or comparison.differences.get(metric, {}).get("estimate")
    if found is None or not math.isfinite(found.value):
        return ""
    names = short_names(comparison)
    change = Estimate(found.value, found.se, found.ci95)
    return ruling(metric, change, names["hf"], names["local"], f"HF - local|{count(comparison):,}")


def paragraph(*sentences: str) -> str:
    """Those sentences that say something."""
    return " ".join(sentence for sentence in sentences if sentence)


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
        widths = [float(result[role]["embedding_dim"]) for role in ("local", "hf")]
        quotients = {name: comparison.differences[name]["ratio"].value for name in HEADLINES}
        result["ratio"] = {"embedding_dim": ratio(*widths), **quotients}
    return result


def class_means(comparison: Comparison) -> dict[str, float]:
    """By model: the mean over classes of their precision@5, where classes differ in size."""
    sizes = np.unique(comparison.analyses["local"].labels, return_counts=True)[1]
    if sizes.min() == sizes.max():
        return {}
    values = {r: [row.value for row in rows] for r, rows in comparison.class_precision.items()}
    defined = {role: [x for x in shares if math.isfinite(x)] for role, shares in values.items()}
    return {role: float(np.mean(x)) if x else math.nan for role, x in defined.items()}


def table(comparison: Comparison) -> list[list[str]]:
    """The headline table as cells, its header first; chance and references next to the models."""
    head, names = summary(comparison), short_names(comparison)
    paired = "hf" in head
    header = ["Metric", *names.values()]
    header += ["local / HF", "HF - local [95%]"] if paired else []
    rows = [[*header, "Chance", *map(label, comparison.references)]]
    for metric, title in ROWS.items():
        row = [title, *(number(metric, float(head[role][metric])) for role in names)]
        if paired:
            quotient = head["ratio"][metric]
            row.append(f"{quotient:.2f}x" if math.isfinite(quotient) else MISSING)
            difference = comparison.differences.get(metric)
            row.append(gap(metric, difference["estimate"]) if difference else "")
        row.append(number(P5, comparison.chance_precision) if metric == P5 else "")
        references = comparison.references.values()
        rows.append(row + [number(metric, values.get(metric, math.nan)) for values in references])
    if means := class_means(comparison):
        row = [f"{ROWS[P5]}, mean over classes", *(number(P5, value) for value in means.values())]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def question(comparison: Comparison) -> str:
    """The question in the page's title."""
    if "hf" in comparison.metrics:
        return "Which of the two encoders brings images of the same class closer together?"
    return "How well does the local encoder bring images of the same class together?"


def undefined(comparison: Comparison) -> str:
    """Why there is no precision@5, or nothing where there is one."""
    if math.isfinite(comparison.metrics["local"][P5].value):
        return ""
    if np.unique(comparison.analyses["local"].labels, return_counts=True)[1].max() < 2:
        return "Precision@5 is undefined: no class has two images."
    return "Precision@5 is undefined: with fewer than six images there are no five neighbors."


def answer(comparison: Comparison) -> str:
    """Who retrieves better, the shares, chance, and whether even pixels do better."""
    if why := undefined(comparison):
        return why
    best = max(values[P5].value for values in comparison.metrics.values())
    below = [
        f"{label(name).lower()} ({number(P5, values[P5])})"
        for name, values in comparison.references.items()
        if best < values[P5]
    ]
    said = models_ruling(comparison, P5)
    if said and below:
        said = f"{said[:-1]}, but both are below {listed(below)}."
    means, names = class_means(comparison), short_names(comparison)
    over_classes = ", ".join(f"{names[role]} {number(P5, x)}" for role, x in means.items())
    return paragraph(
        said,
        f"Of the five nearest neighbors of an image, this share has its class: "
        f"{by_model(comparison, P5)}; chance is {number(P5, comparison.chance_precision)}.",
        over_classes and f"Mean over classes: {over_classes}.",
    )


def references_finding(comparison: Comparison) -> str:
    """Whether the local model retrieves better than each reference."""
    local, n, sentences = short_names(comparison)["local"], f"{count(comparison):,}", []
    for name, estimate in comparison.gains.items():
        words = label(name).lower()
        second = f"{words} ({number(P5, comparison.references[name][P5])})"
        sentences.append(ruling(P5, estimate, local, second, f"local - {words}|{n}"))
    return paragraph(*sentences)


def retrieval_finding(comparison: Comparison) -> str:
    """The answer, the references, and tests on single images."""
    said = answer(comparison)
    if not undefined(comparison):
        said = paragraph(said, references_finding(comparison))
    if "wins" not in comparison.differences.get(P5, {}):
        return said
    facts, names = comparison.differences[P5], short_names(comparison)
    p, first = facts.get("p", math.nan), comparison.differences["precision_at_1"]
    tested = f" (p = {p_value(p)} from half-samples)" * math.isfinite(p)
    return paragraph(
        said,
        f"Per image, {names['hf']} is better on {facts['wins']:,}, equal on {facts['ties']:,} and "
        f"worse on {facts['losses']:,}{tested}.",
        f"The first neighbor has the right class for: {by_model(comparison, 'precision_at_1')} "
        f"(McNemar p = {first['mcnemar_p']:.2g}).",
    )


def efficiency_finding(comparison: Comparison) -> str:
    """What share of the HF model's retrieval the local dimensions buy."""
    if why := undefined(comparison):
        return why
    names, facts = short_names(comparison), comparison.differences[P5]
    widths = [comparison.analyses[role].embeddings.shape[1] for role in ("local", "hf")]
    dimensions = f"as many dimensions ({widths[0]:,})"
    if widths[0] != widths[1]:
        share = number("ratio", widths[0] / widths[1])
        dimensions = f"{share} of its dimensions ({widths[0]:,} against {widths[1]:,})"
    if not math.isfinite(facts["ratio"].value):
        return f"There is no ratio: precision@5 of {names['hf']} cannot be distinguished from 0."
    reached = f"{names['local']} reaches {interval('ratio', facts['ratio'])} of the precision@5"
    return f"{reached} of {names['hf']} with {dimensions}."


def variance_finding(comparison: Comparison) -> str:
    """How the variance is spread, and whether the models differ in that."""
    parts = [models_ruling(comparison, metric) for metric in ("variance_10pc", "effective_rank")]
    widths = {role: a.embeddings.shape[1] for role, a in comparison.analyses.items()}
    for role, name in short_names(comparison).items():
        m, width = comparison.metrics[role], widths[role]
        rank = m["effective_rank"]
        share = f" ({100 * rank.value / width:.0f}%)" if math.isfinite(rank.value) else ""
        parts.append(
            f"{name}: {interval('variance_10pc', m['variance_10pc'])} of the variance in 10 PCs, "
            f"{interval('variance_50pc', m['variance_50pc'])} in 50; PCs for 80%: "
            f"{number('components_80', m['components_80'].value)}; "
            f"effective rank {interval('effective_rank', rank)} of {width:,}{share}."
        )
    if len(set(widths.values())) == 2 and min(widths.values()) >= 10:
        shares = [f"{1000 / widths[r]:.1f}% for {n}" for r, n in short_names(comparison).items()]
        parts.append(f"Of all dimensions, 10 PCs are {listed(shares)}.")
    if "pixels" in comparison.references:
        share = number("variance_10pc", comparison.references["pixels"]["variance_10pc"])
        parts.append(f"This describes a shape, not quality: raw pixels reach {share} in 10 PCs.")
    return paragraph(*parts)


def separability_finding(comparison: Comparison) -> str:
    """Whether one model separates the classes better, and the silhouettes."""
    small = all(abs(m["silhouette"].value) < 0.1 for m in comparison.metrics.values())
    return paragraph(
        models_ruling(comparison, "silhouette"),
        "Mean silhouette with the true labels, -1 to 1, higher is better: "
        f"{by_model(comparison, 'silhouette')}.",
        f"By cosine distance: {by_model(comparison, 'silhouette_cosine')}.",
        "Values this close to 0 mean overlapping classes, however good the neighbors." * small,
    )


def confusion_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """The purest class and the most common confusions among the five nearest neighbors."""

    def halves(share: float) -> str:
        return f"; so in {100 * share:.0f}% of half-samples" if math.isfinite(share) else ""

    parts = []
    for role, name in short_names(comparison).items():
        confusion = neighbor_confusion(comparison.analyses[role], len(classes))
        own = confusion.diagonal().copy()
        np.fill_diagonal(confusion, 0)
        ranked = getattr(comparison, "rankings", {}).get(role, {})
        first = ranked.get("purest_class", {}).get("share_of_halves", math.nan)
        best = int(own.argmax())
        parts.append(
            f"{name}: {classes[best]} has the purest neighborhoods ({100 * own[best]:.0f}% of "
            f"neighbors share its class{halves(first)})."
        )
        worst = np.unravel_index(np.argsort(-confusion, axis=None)[:3], confusion.shape)
        pairs = [
            f"{classes[a]} -> {classes[b]} ({100 * confusion[a, b]:.0f}%)"
            for a, b in zip(*worst, strict=True)
            if confusion[a, b] > 0
        ]
        if pairs:
            same = halves(ranked.get("confusions_share_of_halves", math.nan))
            parts.append(f"Most common confusions: {', '.join(pairs)}{same}.")
    return paragraph(*parts)


def class_groups_finding(comparison: Comparison, classes: Sequence[str]) -> str:
    """The two groups of classes, the pair that merges first, and how alike the two trees are."""
    groups, said = getattr(comparison, "class_groups", None) or {}, {}
    for role, name in short_names(comparison).items():
        if role in groups:
            sides = [sorted(classes[row] for row in side) for side in groups[role]["top"]]
            small, large = map(listed, sorted(sides, key=lambda side: (len(side), side)))
            first, second, _ = groups[role]["merges"][0]
            merged = listed(sorted(classes[row] for row in [*first, *second]))
            said[name] = f"{small} from {large}; {merged} merge first."
    parts = [f"{name} separates {sentence}" for name, sentence in said.items()]
    if len(said) == 2 and len(set(said.values())) == 1:
        parts = [f"Both models separate {next(iter(said.values()))}"]
    if math.isfinite(r := groups.get("cophenetic", math.nan)):
        p = p_value(groups["p"])
        parts.append(f"The trees have a cophenetic correlation of {r:.2f} (permutation p = {p}).")
    return paragraph(*parts)


def agreement_finding(comparison: Comparison) -> str:
    """Whether the two models see the same neighbors and the same geometry."""
    return paragraph(neighbors_in_common(comparison), geometry_in_common(comparison))


def neighbors_in_common(comparison: Comparison) -> str:
    """Mutual 10-NN with chance and the level of the classes; a verdict from its interval."""
    names = ("mutual_knn", "mutual_knn_chance", "mutual_knn_class_only")
    mutual, chance, class_only = (comparison.agreement[name] for name in names)
    if not math.isfinite(mutual.value):
        return "There are too few images for mutual 10-NN."
    said = f"No agreement beyond chance can be shown at n = {count(comparison):,}"
    if not math.isfinite(mutual.se):
        said = "Without an interval there is no verdict on agreement"
    elif mutual.ci95[0] > class_only:
        said = "The models agree on more than the classes"
    elif mutual.ci95[0] > chance:
        said = "The models agree beyond chance, but not demonstrably beyond the classes"
    levels = [number("mutual_knn", level) for level in (chance, class_only)]
    return (
        f"{said}: they share {interval('mutual_knn', mutual)} of their 10 nearest neighbors. "
        f"Chance is {levels[0]}; models that agree only on classes would share {levels[1]}."
    )


def geometry_in_common(comparison: Comparison) -> str:
    """CKA with its permutation null, and the rank correlation of similarities."""
    facts, parts = comparison.agreement, []
    cka, null, rho = facts["cka"], facts["cka_null_p99"], facts["similarity_spearman"]
    if math.isfinite(cka):
        more = "show more" if cka > null else "do not show more"
        p = facts.get("cka_null_p", math.nan)
        parts.append(
            f"The geometries {more} in common than the classes: debiased linear CKA is "
            f"{number('cka', cka)}; 99% of shuffles within classes stay below "
            f"{number('cka', null)}" + (f" (p = {p:.2g})." if math.isfinite(p) else ".")
        )
    if math.isfinite(facts["cka_class_demeaned"]):
        parts.append(f"Without class means CKA is {number('cka', facts['cka_class_demeaned'])}.")
    if math.isfinite(rho):
        used = min(count(comparison), MAX_SPEARMAN_IMAGES)
        parts.append(
            f"The similarities of all pairs of {used:,} images have a Spearman correlation of "
            f"{number('similarity_spearman', rho)}."
        )
    return paragraph(*parts)


def seeds_finding(comparison: Comparison) -> str:
    """What another training seed changes, next to what other images would change."""
    spread, error = comparison.seeds[P5], comparison.metrics["local"][P5].se
    trainings, mean = len(spread.values), number(P5, spread.mean)
    sd, se = (number(P5, x, extra=1).replace("%", " points") for x in (spread.sd, error))
    return paragraph(
        f"Over {trainings} trainings precision@5 of the local model averages {mean} "
        f"with a standard deviation of {sd}.",
        f"The standard error over images is {se}; intervals include only this one."
        * math.isfinite(error),
        f"So few trainings ({trainings}) give the deviation only roughly." * (trainings < 5),
    )


def probe_finding(comparison: Comparison, probe: Any) -> str:
    """Which model classifies better with a bank of labeled images, by linear map and by kNN."""
    names, parts = short_names(comparison), []
    for measure in ("linear", "knn"):
        if measure in probe.differences:
            parts.append(models_ruling(comparison, measure, probe.differences[measure]["estimate"]))
        shown = ", ".join(
            f"{names.get(role, label(role).lower())} {accuracy(model, measure)}"
            for role, model in probe.models.items()
        )
        title = CLAIMS[measure][0]
        parts.append(f"{title[0].upper()}{title[1:]}: {shown}.")
    given = "and other banks of this size" if probe.bank_in_intervals else "given this bank"
    bank = f"The bank has {probe.bank_images:,} labeled images"
    return paragraph(*parts, f"{bank}; intervals hold for new images, {given}.")


def accuracy(model: Any, measure: str) -> str:
    """A probe's accuracy with its interval: `linear`, or of kNN with the headline's k."""
    found = model["linear"] if measure == "linear" else model["knn"][KNN_K]
    return interval("linear", found)
