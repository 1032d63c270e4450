"""The page in a real browser, opened from the disk with the network off.

Run with `make test-browser`. Without Chromium or Playwright every test is skipped and says why.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ijepa.formats import P5, number

ROOT = Path(__file__).resolve().parent.parent
AXE = ROOT / ".venv" / "npm" / "node_modules" / "axe-core" / "axe.min.js"
HOSTILE = "<script>alert(1)</script>"
N = 2000

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    wanted = os.environ.get("CHROMIUM")
    names = [wanted] if wanted else ["chromium", "google-chrome"]
    binary = next(filter(None, map(shutil.which, names)), None)
    # A machine may be without a browser, unless one is named.
    assert binary or not wanted, f"CHROMIUM={wanted} is no program"
    if binary is None:
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        # Containers run as root, where Chromium's own sandbox refuses to start.
        options = {"args": ["--no-sandbox"], "timeout": 120_000}
        browser = playwright.chromium.launch(executable_path=binary, **options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def example(make_page):
    classes = (HOSTILE, "bird", "cat", "dog", "frog")
    return make_page(N, classes, whole=True)


@pytest.fixture(scope="module")
def address(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(example.html, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(chromium, address, tmp_path):
    """Opens a page; afterwards nothing may have been said on the console or asked for."""
    contexts, said, asked = [], [], []

    def open_page(fragment="", *, of=None, scripts=True, width=1280, height=900, **options):
        at = address
        if of:
            (tmp_path / "report.html").write_text(of.html, encoding="utf-8")
            at = (tmp_path / "report.html").as_uri()
        options |= {"viewport": {"width": width, "height": height}}
        # The page scrolls smoothly to what a link names, and a pointer would miss what still moves.
        options |= {"reduced_motion": "reduce"}
        context = chromium.new_context(offline=True, java_script_enabled=scripts, **options)
        contexts.append(context)
        context.set_default_timeout(120_000)  # of milliseconds, for busy machines
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{at}#{fragment}" if fragment else at)
        if scripts:
            page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def state(page):
    # The address follows a change after 250 ms: before a longer timer that begins later.
    page.evaluate("new Promise((done) => setTimeout(done, 300))")
    return page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")


def ink(page, model, layer="over"):
    """The number of pixels that are drawn on a layer of a map."""
    return page.evaluate(
        """([key, layer]) => {
            const canvas = document.querySelector(`[data-model="${key}"] .${layer}`);
            const copy = new OffscreenCanvas(canvas.width, canvas.height);
            const g = copy.getContext("2d", { willReadFrequently: true });
            g.drawImage(canvas, 0, 0);
            const bytes = g.getImageData(0, 0, canvas.width, canvas.height).data;
            return bytes.filter((value, at) => at % 4 === 3 && value > 0).length;
        }""",
        [model, layer],
    )


@pytest.fixture(scope="module")
def index(example):
    """An image far from the others on the map, so that a pointer cannot miss it."""
    points = example.maps.pca["local"].coordinates
    row = np.linalg.norm(points - points.mean(axis=0), axis=1).argmax()
    return int(example.split.indices[row])


def test_hover_shows_an_image_with_its_neighbors_in_both_models(opened, example, index):
    page = opened()
    row = example.split.indices.tolist().index(index)
    assert ink(page, "hf") == 0
    x, y = page.evaluate("(index) => panels[0].place(rowOf(index))", index)
    page.locator('[data-model="local"] .map').hover(position={"x": x, "y": y})
    page.wait_for_selector("#chosen .query")
    assert f"image {index}" in page.locator("#chosen").inner_text()
    for name in ("local", "hf"):
        analysis = example.comparison.analyses[name]
        words = page.locator(f"#chosen .{name} .tile").all_text_contents()
        shown = [int(re.search(r"image (\d+)", word)[1]) for word in words]
        assert shown == example.split.indices[analysis.neighbors[row, :5]].tolist()
        right = sum("right class" in word for word in words)
        assert right == round(5 * analysis.precisions(5)[row])
        assert ink(page, name) > 0
    page.mouse.move(2, 2)
    page.wait_for_selector("#chosen .empty")
    assert ink(page, "hf") == 0


def test_a_lasso_in_one_map_selects_the_same_images_in_the_other(opened):
    page = opened()
    page.get_by_role("radio", name="Lasso").check()
    page.locator('[data-model="local"] .map').scroll_into_view_if_needed()
    # The canvas, and not the map's border, is what the lasso is drawn on.
    frame = page.locator('[data-model="local"] .base').bounding_box()
    corners = [(0.02, 0.02), (0.5, 0.02), (0.5, 0.98), (0.02, 0.98)]
    before = ink(page, "hf", "base")
    for turn, (u, v) in enumerate(corners):
        page.mouse.move(frame["x"] + u * frame["width"], frame["y"] + v * frame["height"], steps=6)
        if not turn:
            page.mouse.down()
    page.mouse.up()
    x = np.array(page.evaluate("panels[0].model.tsne.map((point) => point[0])"))
    page.wait_for_selector("#selection p")
    count = int(page.locator("#selection p").inner_text().split()[0])
    assert count == pytest.approx((x < 5000).sum(), abs=2)
    assert page.evaluate("state.selected.size") == count
    assert ink(page, "hf", "base") != before
    assert f"{count:,} selected images" in page.locator("#found").inner_text()
    page.locator("#clear").click()
    assert page.evaluate("state.selected") is None


def test_filters_leave_only_what_they_say(opened, example):
    page = opened()
    # A class named like a script is text.
    assert page.get_by_role("button", name=f"{HOSTILE} 400").is_visible()
    assert page.locator("script").count() == 2
    page.get_by_role("button", name="cat 400").click()
    assert page.locator("#status").inner_text().startswith("400 of 2,000 images shown")
    local, hf = (example.comparison.analyses[name].precisions(5) for name in ("local", "hf"))
    cats = example.split.labels == 2
    assert f"small (target) {100 * local[cats].mean():.1f}%" in page.locator("#status").inner_text()
    page.get_by_label("Only where they disagree").check()
    left = int((cats & (local != hf)).sum())
    assert page.locator("#status").inner_text().startswith(f"{left} of 2,000")
    assert page.locator("#found").inner_text().startswith(f"{left} images")
    assert state(page) == {"classes": "2", "differ": "1"}
    page.get_by_role("button", name="All classes").click()
    assert state(page) == {"differ": "1"}


def test_the_browser_is_sorted_by_disagreement_and_found_by_index(opened, example):
    page = opened()
    local, hf = (example.comparison.analyses[name].precisions(5) for name in ("local", "hf"))
    gaps = dict(zip(example.split.indices.tolist(), np.abs(hf - local), strict=True))
    first = page.locator("#queries .query").evaluate_all(
        "rows => rows.map((row) => Number(row.getAttribute('aria-label').match(/\\d+/)[0]))"
    )
    assert [gaps[index] for index in first] == [max(gaps.values())] * len(first)
    index = str(example.split.indices[17])
    page.get_by_role("textbox").fill(index)
    page.keyboard.press("Enter")
    assert f"image {index}" in page.locator("#chosen").inner_text()
    assert state(page)["image"] == index
    page.get_by_role("textbox").fill("99999999")
    page.keyboard.press("Enter")
    assert page.locator("#missing").inner_text() == "image 99999999 is not on this page"
    page.get_by_label("Sorted by").select_option("index")
    assert not page.locator("#missing").is_visible()
    page.get_by_role("button", name="Next").click()
    page.get_by_role("radio", name="Agreement").check()  # another color, the same images
    expected = {"image": index, "sort": "index", "page": "2", "color": "mutual"}
    assert state(page) == expected
    legend = page.locator("#legend > span").all_inner_texts()
    assert legend[1:] == ["0", "1–2", "3–4", "5–6", "7–8", "9–10"]
    signs = page.evaluate("Array.from({ length: 11 }, (_, n) => signOf(n / 10).join())")
    assert [signs[n] for n in (1, 3, 5, 7, 9)] == [signs[n] for n in (2, 4, 6, 8, 10)]
    assert len(set(signs)) == 6


def test_everything_can_be_done_by_keyboard(opened):
    page = opened()
    focused = page.locator(".map:focus")
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused.count():
            break
    assert focused.evaluate("map => getComputedStyle(map).outlineStyle") == "solid"
    spoken = []
    for key in ("Home", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
        spoken.append(page.locator("#spoken").inner_text())
    assert spoken[0].startswith("Image ")
    assert "Precision@5" in spoken[0]
    assert len(set(spoken)) >= 4
    page.keyboard.press("Space")
    assert page.evaluate("state.selected.size") == 1
    page.keyboard.press("Enter")
    chosen = state(page)["image"]
    page.keyboard.press("ArrowLeft")
    for _ in range(2):  # over the other map to the first neighbor, and on from neighbor to it
        page.keyboard.press("Tab")
    assert page.evaluate("byId('chosen').contains(document.activeElement)")
    page.keyboard.press("Enter")
    assert state(page)["image"] != chosen
    assert page.evaluate("document.activeElement.className").startswith("tile")
    page.locator('[data-model="local"] .map').focus()
    page.keyboard.press("+")
    page.keyboard.press("Shift+ArrowLeft")
    assert "view-local" in state(page)
    page.keyboard.press("0")
    page.keyboard.press("Escape")
    assert "image" not in state(page)
    assert "view-local" not in state(page)


def test_an_address_brings_back_what_was_seen(opened, index):
    expected = {"projection": "pca", "color": "hits", "classes": "1 3", "image": str(index)}
    expected |= {"sort": "shared", "page": "2", "view-hf": "0.4 0.5 2"}
    page = opened("&".join(f"{k}={v.replace(' ', '+')}" for k, v in expected.items()))
    assert page.get_by_role("radio", name="PCA").is_checked()
    assert page.get_by_role("radio", name="Precision@5").is_checked()
    assert page.get_by_role("button", name="bird 400").get_attribute("aria-pressed") == "true"
    assert f"image {index}" in page.locator("#chosen").inner_text()
    assert page.locator("#page").inner_text() == "2 of 100"
    assert {k: v for k, v in state(page).items() if k != "view-local"} == expected
    page.evaluate("location.hash = 'projection=tsne&color=mutual'")
    page.wait_for_function("() => state.color === 'mutual'")
    assert page.locator("#chosen .empty").count() == 1


@pytest.mark.parametrize("fragment", ["", "classes=1"])
def test_back_from_a_definition_keeps_the_selection(opened, fragment):
    page = opened(fragment)
    page.evaluate("select(new Set(shownRows().slice(0, 3)))")
    page.locator("a[href='#def-silhouette']").first.click()
    page.wait_for_timeout(400)  # meanwhile the state returns to the address
    page.go_back()
    assert page.evaluate("[state.selected.size, state.classes.size]") == [3, len(fragment) // 9]


def test_a_link_to_an_image_opens_at_the_map(opened, index):
    page = opened(f"image={index}")

    def in_view(selector):
        return 0 <= page.locator(selector).bounding_box()["y"] < page.viewport_size["height"]

    page.wait_for_timeout(100)
    assert in_view('[data-model="local"] .map')
    assert f"image {index}" in page.locator("#chosen").inner_text()
    assert not page.locator("#missing").is_visible()
    page.evaluate("location.hash = 'image=99999'")
    page.wait_for_selector("#missing:visible")
    assert page.locator("#missing").inner_text() == "image 99999 is not on this page"
    assert in_view("#missing")
    assert page.locator("#chosen .empty").count() == 1


@pytest.mark.parametrize(
    "fragment",
    [
        "projection=x&color=&classes=99+-1+a&image=abc&sort=no&page=-4&view-local=1+2",
        "=&=&&&=&view-hf=NaN+NaN+NaN&page=1e99",
    ],
)
def test_a_damaged_address_is_ignored(opened, fragment):
    page = opened(fragment)
    assert page.locator("#status").inner_text().startswith("2,000 of 2,000")
    assert page.locator("#queries .query").count() > 0


def test_percentages_are_rounded_as_in_the_report(opened):
    sums = np.arange(0, 2001, 7)
    page = opened("projection=pca")
    assert page.evaluate("scrollY") == 0  # without an image in the link
    shown = page.evaluate("(sums) => sums.map((sum) => rounded(sum / 2000))", sums.tolist())
    assert shown == [number(P5, total / 2000) for total in sums.tolist()]
    hits = [3] * 265 + [4] + [5] * 134
    set_hits = "(hits) => { models[0].hits = hits; return means(hits.map((_, row) => row)); }"
    text = page.evaluate(set_hits, hits)
    assert text.startswith(f"small (target) {number(P5, np.mean(hits) / 5)},")


def test_zoom_and_pan_move_one_map_and_reset_brings_both_back(opened):
    page = opened()
    box = page.locator('[data-model="local"] .map')
    box.hover()
    top = page.evaluate("scrollY")
    page.mouse.wheel(0, 120)
    page.wait_for_function("(place) => scrollY === place", arg=top + 120)
    assert "view-local" not in state(page)
    box.hover()
    frame = box.bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    page.keyboard.down("Control")
    page.mouse.wheel(0, -240)
    page.keyboard.up("Control")
    page.mouse.down()
    page.mouse.move(x + 60, y + 30, steps=4)
    page.mouse.up()
    x, y, zoom = map(float, state(page)["view-local"].split())
    assert zoom > 2
    assert max(x, y) < 0.5
    assert "view-hf" not in state(page)
    page.get_by_role("button", name="Reset").click()
    assert "view-local" not in state(page)


def test_without_javascript_table_figures_and_words_are_there(opened):
    page = opened(scripts=False)
    assert page.get_by_text("need JavaScript").is_visible()
    assert page.locator("h1").is_visible()
    assert page.locator("#results table").first.is_visible()
    pictures = page.locator("#figures img").all()
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.is_visible()
        assert picture.evaluate("image => image.naturalWidth") > 0
    assert not page.locator("#tools").is_visible()
    assert not page.locator(".map").first.is_visible()


@pytest.mark.parametrize("width", [320, 360, 400, 1000, 1280, 1440, 1920, 3840])
def test_maps_tables_and_cosines_of_four_decimals_fit_on_a_screen(opened, width):
    page = opened(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.locator(".map").evaluate_all("maps => maps.map((map) => map.clientWidth)")
    assert min(sizes) >= 250
    page.evaluate("panels.forEach((panel) => { panel.model.digits = 4; }); choose(0);")
    texts = page.locator("#chosen .tile b").all_inner_texts()
    assert len(texts) == 10
    assert all(re.fullmatch(r"[✓✗]\s−?[01]\.\d{4}", text) for text in texts)
    over = page.locator("#chosen .tile b").evaluate_all(
        """(texts) => texts.filter((text) => text.getBoundingClientRect().right
            > text.parentElement.getBoundingClientRect().right + 1).length"""
    )
    assert over == 0
    wide = page.evaluate(
        """() => {
            for (const part of document.querySelectorAll("details")) part.open = true;
            for (const row of document.querySelectorAll("#results .results tbody tr"))
                row.children[4].textContent = "+0.041 points [+0.038, +0.043]";
            const boxes = [...document.querySelectorAll(".scroll")];
            const wide = boxes.filter((box) => box.scrollWidth > box.clientWidth);
            return wide.map((box) => box.ariaLabel);
        }"""
    )
    assert not wide or width < 1280  # there they scroll


def test_what_is_wider_than_a_phone_scrolls_by_keyboard(opened):
    page = opened(width=400)
    boxes = page.locator("#figures .scroll")
    assert boxes.count() > 3
    assert set(boxes.evaluate_all("boxes => boxes.map((box) => box.tabIndex)")) == {0}
    boxes.first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.scrollLeft > 0")


@pytest.mark.parametrize(("width", "height"), [(1440, 780), (1920, 1080), (3840, 2160)])
def test_controls_maps_and_neighbors_fit_on_one_screen(opened, index, width, height):
    page = opened(f"image={index}&color=mutual", width=width, height=height)
    page.locator(".stage").first.evaluate("stage => stage.scrollIntoView()")
    places = (".map", "#chosen .query", "#tools")
    maps, query, tools = (page.locator(name).first.bounding_box() for name in places)
    assert 0 < maps["y"] < query["y"] + query["height"] <= height
    assert 0 < tools["y"] < height / 4
    cut = page.locator("#tools .segments, #results .scroll").evaluate_all(
        """(parts) => parts.filter((part) => part.scrollWidth > part.clientWidth
            || part.offsetWidth > part.parentElement.clientWidth).length"""
    )
    assert cut == 0


def test_a_neighbor_under_the_pointer_is_ringed_on_both_maps(opened, index):
    page = opened(f"image={index}")

    def inks():
        page.wait_for_timeout(100)
        return np.array([ink(page, name) for name in ("local", "hf")])

    before = inks()
    page.locator("#chosen .local .tile").first.hover()
    assert (inks() > before).all()
    page.mouse.move(2, 2)
    assert (inks() == before).all()


def test_dark_is_dark_and_paper_is_light(opened):
    def ground(page):
        """The color behind everything."""
        shown = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return [int(part) for part in re.findall(r"\d+", shown)[:3]]

    assert sum(ground(opened(color_scheme="light"))) > 700
    page = opened(color_scheme="dark")
    assert sum(ground(page)) < 120
    page.emulate_media(media="print", color_scheme="dark")
    assert ground(page) == [255] * 3
    assert not page.locator("#tools .segments").first.is_visible()


def test_the_policy_lets_nothing_out_and_nothing_in(chromium, address):
    page, said, asked = chromium.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    page.evaluate(
        """() => {
            new Image().src = "http://127.0.0.1:9/image.png";
            fetch("http://127.0.0.1:9/data").catch(() => {});
            const script = document.createElement("script");
            script.textContent = "window.broken = true";
            const style = document.createElement("style");
            style.textContent = "body { display: none }";
            document.body.append(script, style);
        }"""
    )
    page.wait_for_timeout(300)
    assert page.evaluate("window.broken") is None
    assert page.locator("h1").is_visible()
    assert len([text for text in said if "Content Security Policy" in text]) >= 4
    assert not [url for url in asked if url.startswith("http")]
    page.close()


def test_metrics_can_be_saved_from_the_page(opened, example):
    page = opened()
    page.locator("#provenance summary").click()
    with page.expect_download() as download:
        page.locator("#download").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved == json.loads(example.metrics)


def test_one_model_alone_and_four_images_are_enough(opened, make_page):
    page = opened(of=make_page(models=("local",)))
    assert page.locator(".map").count() == 1
    assert not page.get_by_label("Only where they disagree").is_visible()
    assert page.locator("#queries .query ol").count() == 8
    page.get_by_role("radio", name="PCA").check()
    page = opened(of=make_page(4, ("a", "b")))
    assert page.locator("#queries .query").count() == 4
    assert "not defined" in page.locator("#queries").inner_text()
    assert not re.search(r"\b(NaN|null)\b", page.locator("body").inner_text())


def test_neighbors_without_a_picture_and_all_paths_are_named(opened, make_page):
    example = make_page(90, shown=30, classes=("<b>", "c"))
    page = opened(f"image={example.split.indices[3]}", of=example)
    page.locator("#chosen .absent").first.hover()
    assert page.evaluate("pointed") == -1
    assert page.locator("#chosen .image .path").inner_text() == "x/0003.png"
    nearest = example.comparison.analyses["local"].neighbors[3, :5]
    shown = page.locator("#chosen .local .path").all_inner_texts()
    assert shown == [example.split.paths[row] for row in nearest]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_axe_finds_no_violation(opened, index, scheme, width):
    if not AXE.exists():
        pytest.skip(f"axe-core is not at {AXE} (make test-browser fetches it by npm)")
    # The page's policy would refuse the checker.
    page = opened(f"image={index}&color=hits", width=width, color_scheme=scheme, bypass_csp=True)
    page.evaluate("select(new Set([0, 1, 2]))")
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    rules = {v["id"]: [node["failureSummary"] for node in v["nodes"]] for v in found["violations"]}
    assert not rules
