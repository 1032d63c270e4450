import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ijepa import narrative, plots, tables
from ijepa.page import COLUMNS, TILE, thumbnail
from ijepa.projections import class_similarity

HOSTILE = "<script>alert(1)</script>\"'&</style>"
VOID = {"meta", "img", "input", "br", "link", "wbr"}


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text inside each."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = {"tag": tag, "attrs": dict(attrs), "text": "", "within": list(self.open)}
        self.elements.append(found)
        if tag not in VOID:
            self.open.append(found)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for found in self.open:
            found["text"] += data

    def all(self, tag):
        return [found for found in self.elements if found["tag"] == tag]

    def by_id(self, name):
        return next(e for e in self.elements if e["attrs"].get("id") == name)


@pytest.fixture(scope="module")
def example(make_page):
    return make_page(500, whole=True)


@pytest.fixture(scope="module")
def parsed(example):
    return Page(example.html)


def data_of(html):
    return json.loads(Page(html).by_id("data")["text"])


def test_every_element_is_closed_and_every_id_is_used_once(parsed):
    assert not parsed.open
    ids = [e["attrs"]["id"] for e in parsed.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))


def test_the_policy_allows_exactly_the_script_and_the_style_of_the_page(parsed):
    meta = next(m for m in parsed.all("meta") if "http-equiv" in m["attrs"])
    rules = dict(rule.split(None, 1) for rule in meta["attrs"]["content"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    scripts = [s for s in parsed.all("script") if "type" not in s["attrs"]]
    for found, rule in ((scripts, "script-src"), (parsed.all("style"), "style-src")):
        (inline,) = found
        digest = hashlib.sha256(inline["text"].encode()).digest()
        assert rules[rule] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_nothing_is_loaded_and_nothing_needs_what_the_policy_forbids(parsed):
    for found in parsed.elements:
        assert not any(name == "style" or name.startswith("on") for name in found["attrs"])
        assert found["tag"] not in ("link", "iframe", "object", "base")
        for name in found["attrs"].keys() & {"src", "href"}:
            allowed = ("#", "data:image/webp;", "data:image/svg+xml;")
            assert found["attrs"][name].startswith(allowed)


def shown_table(parsed, caption):
    box = next(e for e in parsed.elements if e["attrs"].get("aria-label") == caption)
    return [
        [c["text"] for c in parsed.elements if c["tag"] in ("th", "td") and row in c["within"]]
        for row in parsed.all("tr")
        if box in row["within"]
    ]


def test_the_page_has_the_tables_sentences_and_numbers_of_the_report(example, parsed):
    comparison, classes, probe = example.comparison, example.split.classes, example.probe
    shown = shown_table(parsed, "The headline numbers")
    assert shown == tables.headline_table(comparison)
    found = tables.finding_tables(comparison, classes, probe)
    assert len(found) == 3
    for captions in found.values():
        for caption, rows in captions.items():
            assert shown_table(parsed, caption) == rows
    body = parsed.all("main")[0]["text"]
    sentences = narrative.findings(comparison, classes, probe).values()
    assert all(body.count(text) == 1 for text in sentences if text)
    assert narrative.answer(comparison) in parsed.all("header")[0]["text"]
    assert parsed.all("h1")[0]["text"] == parsed.all("title")[0]["text"]
    assert parsed.by_id("metrics")["text"] == example.metrics


def test_class_names_are_text_everywhere(make_page):
    page = make_page(classes=(HOSTILE, "b", "c\u2028</title>"))
    parsed = Page(page.html)
    assert len(parsed.all("script")) == 2
    assert len(parsed.all("style")) == 1
    assert "<script>alert" not in page.html
    assert any(found["text"] == HOSTILE for found in parsed.all("th"))
    assert data_of(page.html)["classes"][0] == HOSTILE


@pytest.mark.parametrize(("n", "classes"), [(4, 2), (7, 2), (90, 45)])
def test_no_number_that_is_not_defined_reaches_the_reader(make_page, n, classes):
    parsed = Page(make_page(n, tuple(f"c{i}" for i in range(classes))).html)
    script, data = parsed.all("script")[1]["text"], parsed.by_id("data")["text"]
    texts = [value or "" for e in parsed.elements for value in e["attrs"].values()]
    texts += [parsed.all("body")[0]["text"].replace(script, ""), data]
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", "\n".join(texts))


def test_pictures_are_where_the_script_looks_for_them_and_the_page_stays_small(example, parsed):
    text = parsed.by_id("sprite")["attrs"]["src"]
    file = io.BytesIO(base64.b64decode(text.partition("base64,")[2]))
    sheet = np.asarray(Image.open(file).convert("RGB")).astype(float)
    facts = data_of(example.html)
    assert facts["sprite"] == {"tile": TILE, "columns": COLUMNS}
    assert facts["index"] == example.split.indices.tolist()
    assert facts["points"] == 500
    wanted = example.split.images[:66].numpy().transpose(0, 2, 3, 1)
    for row in range(66):
        left, top = TILE * (row % COLUMNS), TILE * (row // COLUMNS)
        errors = np.abs(sheet[top : top + TILE, left : left + TILE] - wanted).mean(axis=(1, 2, 3))
        assert errors.argmin() == row
        assert errors[row] < 12
    assert len(example.html.encode()) < 1_200_000


@pytest.mark.parametrize("shape", [(3, 7, 7), (3, 100, 40), (3, 1, 300), (3, 32, 32)])
def test_thumbnails_keep_the_shape_of_an_image_and_its_middle(shape):
    image = np.full(shape, 250, np.uint8)
    tile = np.asarray(thumbnail(image))
    assert tile.shape == (TILE, TILE, 3)
    filled = (tile > 200).all(axis=2)
    height, width = filled.any(axis=1).sum(), filled.any(axis=0).sum()
    assert max(height, width) == (28 if max(shape) == 7 else 32)
    assert height / width == pytest.approx(shape[1] / shape[2], rel=0.1, abs=1 / 31)


def test_neighbors_precision_agreement_and_paths_are_those_of_the_comparison(make_page, example):
    sampled = make_page(90, shown=30)  # 60 images are on no map
    facts, rows, split = data_of(sampled.html), sampled.maps.rows, sampled.split
    assert facts["points"] == len(rows) == 30
    index, labels = np.array(facts["index"]), np.array(facts["label"])
    for model in facts["models"]:
        lists, neighbors = sampled.comparison.analyses[model["key"]], np.array(model["neighbors"])
        np.testing.assert_array_equal(index[neighbors], split.indices[lists.neighbors[rows, :5]])
        hits = (labels[neighbors] == labels[:30, None]).sum(axis=1)
        assert hits.tolist() == model["hits"]
        np.testing.assert_allclose(model["similarities"], lists.similarities[rows, :5], atol=6e-3)
        assert model["digits"] == 2
        assert max(len(str(v)) for found in model["similarities"] for v in found) <= len("-0.12")
    assert facts["mutual"] == np.rint(sampled.comparison.mutual[rows] * 10).tolist()
    paths = dict(zip(split.indices.tolist(), split.paths, strict=True))
    assert facts["paths"] == [paths[one] for one in facts["index"]]
    assert data_of(example.html)["paths"] is None


def test_maps_keep_the_shape_of_the_projection_and_fill_the_grid(example):
    placed = np.array(data_of(example.html)["models"][0]["pca"])
    scores = example.maps.pca["local"].coordinates * (1, -1)  # y grows downwards on a screen
    low, high = scores.min(axis=0), scores.max(axis=0)
    expected = 5_000 + 10_000 * (scores - (low + high) / 2) / (high - low).max()
    np.testing.assert_allclose(placed, expected, atol=0.51)


def test_one_model_alone_has_one_panel_no_difference_and_without_a_probe_no_word_of_it(make_page):
    html = make_page(models=("local",)).html
    parsed, facts = Page(html), data_of(html)
    assert len([s for s in parsed.all("section") if "data-model" in s["attrs"]]) == 1
    assert "HF" not in parsed.by_id("results")["text"].replace("local / HF and HF - local", "")
    assert len(facts["models"]) == 1
    assert facts["mutual"] is None
    assert len(shown_table(parsed, "Precision@5 by class")[0]) == 3
    text = parsed.all("main")[0]["text"].lower()
    assert "probe" not in text.replace('"probe": null', "")


def test_every_figure_says_how_to_read_it_and_leads_to_a_definition(parsed):
    anchors = {e["attrs"].get("id") for e in parsed.elements}
    assert len(parsed.all("figure")) == 4
    for figure in parsed.all("figure"):
        assert "How to read it." in figure["text"]
        links = [a["attrs"]["href"] for a in parsed.all("a") if figure in a["within"]]
        assert any(link.startswith("#def-") for link in links)
    for link in parsed.all("a"):
        assert link["attrs"]["href"][1:] in anchors


def test_figures_are_svg_that_turns_dark_and_loads_nothing(parsed):
    kind = "data:image/svg+xml;base64,"
    images = [e["attrs"] for e in parsed.all("img") if e["attrs"]["src"].startswith(kind)]
    assert len(images) == 4
    for image in images:
        assert len(image["alt"]) > 20
        svg = ElementTree.fromstring(base64.b64decode(image["src"].removeprefix(kind)))
        text = ElementTree.tostring(svg, encoding="unicode")
        style = next(svg.iter("{http://www.w3.org/2000/svg}style"))
        light, dark = style.text.split("@media(prefers-color-scheme:dark)")
        for color in (plots.INK, plots.MODEL_COLORS["local"]):
            name = f"--c{color[1:]}"
            assert f"{name}:{color};" in light
            assert f"{name}:" in dark
            assert f"{name}:{color};" not in dark
            assert f": var({name})" in text
            assert f": {color}" not in text.replace(style.text, "")
        for link in re.findall(r'(?:(?:href|src)="|url\()([^")]*)', text):
            assert link.startswith(("#", "data:image/png;"))


def test_figures_are_the_same_bytes_again(example, make_page):
    one, other = (Page(page.html).all("img")[0] for page in (example, make_page(500)))
    assert one["attrs"]["src"] == other["attrs"]["src"]


def test_the_numbers_of_the_figures_are_in_tables(example, parsed):
    for kind in ("raw", "centered"):
        X = example.comparison.analyses["hf"].embeddings
        matrix = class_similarity(X, example.split.labels, centered=kind == "centered")
        shown = [row[1:] for row in shown_table(parsed, f"HF, {kind}")[1:]]
        np.testing.assert_allclose(np.array(shown, float), matrix, atol=5.1e-4)
    rows = shown_table(parsed, "Share of the variance by number of components")
    assert [row[0] for row in rows[1:]] == ["1", "2", "5"]
    shares = example.maps.pca["local"].variance_shares
    assert rows[2][1:3] == [f"{shares[1]:.2%}", f"{shares[:2].sum():.1%}"]
