"""`report.html`: one file, without server or network, in which both embeddings can be explored.

Words, table and figures are written here and are there without scripts; `static/` holds the frame,
the style sheet and the scripts that draw the maps. The page may load nothing and run nothing but
the one script and the one style sheet whose hashes its policy names. The maps are plain canvas
without a library: what they need is small, and nothing has to be built or kept up to date.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from ijepa import narrative
from ijepa.charts import retrieval_strip
from ijepa.class_charts import hatching
from ijepa.comparison import Comparison
from ijepa.data import Split
from ijepa.explorer import data_uri, explorable, sprite_sheet
from ijepa.figures import figures
from ijepa.markup import Markup, breakable, element, join, table
from ijepa.plots import MODEL_NAMES
from ijepa.projections import Maps

SCRIPTS = ("state.js", "map.js", "neighbours.js", "page.js")
"""In the order in which they run."""


def page(
    comparison: Comparison,
    maps: Maps,
    split: Split,
    facts: Mapping[str, Any],
    caveats: Sequence[str],
    metrics: str,
) -> str:
    """The whole file.

    Args:
        comparison: The numbers.
        maps: Where the images lie.
        split: The images.
        facts: `run`, `dataset`, `models` and `settings` as in metrics.json.
        caveats: Sentences that limit what the numbers mean.
        metrics: The text of metrics.json, without this page among its artifacts.
    """
    style = static("page.css")
    script = "".join(static(name) for name in SCRIPTS)
    paired = "hf" in comparison.metrics
    where = f"{split.name}, {split.split} split, {len(split):,} images"
    parts = {
        "policy": policy(script, style),
        "style": Markup(style),
        "script": Markup(script),
        "where": where,
        "question": narrative.question(comparison),
        "answer": narrative.answer(comparison),
        "strip": retrieval_strip(comparison),
        "table": table(narrative.table(comparison), "The five headline numbers"),
        "intervals": narrative.INTERVALS
        if comparison.num_halves
        else "There are too few images per class for intervals.",
        "compared": compared(facts),
        "command": facts["run"]["command"],
        "caveats": bullets(caveats),
        "findings": findings(comparison, split.classes),
        "panels": join(*(panel(name) for name in comparison.analyses)),
        "figures": join(hatching(), *figures(comparison, maps.pca, split.classes)),
        "provenance": provenance(facts),
        "caveats_all": bullets(json.loads(metrics)["caveats"]),
        "metrics": metrics,
        "data": script_data(explorable(comparison, maps, split)),
        "sprite": data_uri(sprite_sheet(maps.rows.tolist(), lambda i: split.images[i].numpy())),
        "pair": "pair" if paired else "alone",
    }
    return Template(static("page.html")).substitute({k: join(v) for k, v in parts.items()})


def static(name: str) -> str:
    """A file that the page is made of."""
    return (files("ijepa") / "static" / name).read_text(encoding="utf-8")


def policy(script: str, style: str) -> str:
    """The Content-Security-Policy: no network, no script and no style but these."""
    return (
        f"default-src 'none'; script-src {fingerprint(script)}; style-src {fingerprint(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def fingerprint(text: str) -> str:
    """A source expression that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def script_data(value: Any) -> Markup:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def panel(name: str) -> Markup:
    """One model's map, to be drawn by the script."""
    title = MODEL_NAMES[name]
    return element(
        "section",
        element("h3", title, element("span", class_="note")),
        element(
            "div",
            element("canvas", class_="base"),
            element("canvas", class_="over"),
            class_="map",
            role="application",
            tabindex="0",
            aria_label=f"Map of the {title}'s embeddings",
            aria_roledescription="scatter plot",
            aria_describedby="keys",
        ),
        class_=f"panel {name}",
        data_model=name,
    )


def bullets(sentences: Sequence[str]) -> Markup:
    """Sentences as a list."""
    return element("ul", *(element("li", sentence) for sentence in sentences))


def pairs(values: Mapping[str, Any]) -> Markup:
    """Names and values as a description list; what is not known is left out."""
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", breakable(str(value))))
            for name, value in values.items()
            if value is not None
        ),
    )


def compared(facts: Mapping[str, Any]) -> Markup:
    """The models and the images, each on a card."""
    cards = [
        card(f"{narrative.label(name)} model", name, pairs(about(model)))
        for name, model in facts["models"].items()
    ]
    data = facts["dataset"]
    images = {
        "Data set": data["name"],
        "Split": data["split"],
        "Images": f"{data['n']:,} of {len(data['classes'])} classes",
        "SHA-256": data["sha256"][:16] if "sha256" in data else None,
        "Seed": facts["run"]["seed"],
    }
    return join(*cards, card("Images", "data", pairs(images)))


def card(title: str, class_: str, content: Markup) -> Markup:
    """A titled box."""
    return element("section", element("h3", title), content, class_=f"card {class_}")


def about(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know of a model; hashes are whole in the provenance."""
    planned, epochs = model.get("planned_epochs"), model.get("epochs")
    unfinished = planned not in (None, epochs)
    hashed = model.get("sha256")
    return {
        "Source": model["source"],
        "Encoder": model.get("weights"),
        "Dimensions": f"{model['embedding_dim']:,}",
        "Parameters": f"{model['parameters'] / 1e6:.1f} million" if "parameters" in model else None,
        "Input": f"{model['input_size']} px, {model['dtype']}" if "input_size" in model else None,
        "Epochs": f"{epochs} of {planned} planned" if unfinished else epochs,
        "Revision": model.get("revision"),
        "SHA-256": hashed[:16] if hashed else None,
    }


def findings(comparison: Comparison, classes: Sequence[str]) -> Markup:
    """The sentences of the report, chosen by rules from the numbers."""
    sections = {
        "Retrieval": narrative.retrieval_finding(comparison),
        "Separability": narrative.separability_finding(comparison),
        "Variance": narrative.variance_finding(comparison),
        "Confusions": unescaped(narrative.confusion_finding(comparison, classes)),
    }
    if "hf" in comparison.metrics:
        sections["Efficiency"] = narrative.efficiency_finding(comparison)
        sections["Agreement"] = narrative.agreement_finding(comparison)
    if comparison.seeds:
        sections["Training seeds"] = narrative.seeds_finding(comparison)
    return join(*(card(title, "finding", element("p", said)) for title, said in sections.items()))


def unescaped(sentence: str) -> str:
    """A sentence made for Markdown without the backslashes that kept names from being markup."""
    return re.sub(r"\\(.)", r"\1", sentence)


def provenance(facts: Mapping[str, Any]) -> Markup:
    """Versions, settings and hashes, as they stand in metrics.json."""
    shown = {"Run": facts["run"], "Data": facts["dataset"], "Settings": facts["settings"]}
    shown |= {f"{narrative.label(name)} model": model for name, model in facts["models"].items()}
    return join(
        *(
            card(title, "wide", pairs({k: told(v) for k, v in values.items()}))
            for title, values in shown.items()
        )
    )


def told(value: Any) -> str | None:
    """A value of metrics.json in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {told(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value is None else str(value)
