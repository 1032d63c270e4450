"""How long the page lets its reader wait: the longest task of its main thread.

    python benchmarks/frames.py --page comparison_results/digits.html --repeats 5

Opens the page in headless Chromium with the network off, moves, pans and zooms over a map, then
draws a lasso and switches maps, colours and classes, and reads Chromium's trace. A task runs
through without letting a frame be drawn, so the longest bounds every frame: under 50 ms nothing is
felt as a wait. Medians over the repeats of the longest task's processor time, and of its wall time,
in which other programs of the machine count too. Needs what `make test-browser` needs.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PAGE = Path(__file__).resolve().parents[1] / "comparison_results" / "digits.html"


def frames(events):
    """Wall and processor milliseconds of each task of the page's main thread, from the trace.

    A task runs through without letting a frame be drawn, so the longest bounds every frame.
    """
    main = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    names = ("RunTask", "ThreadControllerImpl::RunTask")
    tasks = [
        (event["dur"] / 1000, event["tdur"] / 1000)
        for event in events
        if event["name"] in names
        and (event["pid"], event["tid"]) in main
        and {"dur", "tdur"} <= event.keys()
    ]
    return np.array(tasks)


def middle_of_a_map(page):
    """Where on the screen it is."""
    box = page.locator('[data-model="hf"] .map')
    box.scroll_into_view_if_needed()
    frame = box.bounding_box()
    return frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2


def hover_pan_and_zoom(page):
    """The pointer over a map, then the map under it."""
    x, y = middle_of_a_map(page)
    for step in range(40):
        page.mouse.move(x + 120 * np.cos(step), y + 100 * np.sin(1.7 * step))
        time.sleep(0.02)
    page.mouse.down()
    for step in range(40):
        page.mouse.move(x + 3 * step, y + 2 * step)
        time.sleep(0.02)
    page.mouse.up()
    page.keyboard.down("Control")
    for step in range(20):
        page.mouse.wheel(0, -40 if step < 10 else 40)
        time.sleep(0.02)
    page.keyboard.up("Control")


def select_filter_and_switch(page):
    """A lasso, the other maps and colours, one class, all classes."""
    x, y = middle_of_a_map(page)
    page.get_by_role("radio", name="Lasso").check()
    page.mouse.move(x - 150, y)
    page.mouse.down()
    for step in range(40):
        page.mouse.move(x - 150 * np.cos(step / 6.4), y - 150 * np.sin(step / 6.4))
        time.sleep(0.02)
    page.mouse.up()
    for name in ("PCA", "Precision@5", "t-SNE", "Class", "Pan"):
        page.get_by_role("radio", name=name, exact=True).check()
        page.wait_for_timeout(500)
    chips = page.locator("#tools .chips button")
    for button in (chips.nth(1), chips.nth(0), page.get_by_role("button", name="Clear selection")):
        button.click()
        page.wait_for_timeout(100)


def traced(browser, page, path, explore):
    """Times of all tasks while somebody explores."""
    categories = ["toplevel", "devtools.timeline", "__metadata"]
    browser.start_tracing(page=page, path=path, categories=categories)
    explore(page)
    browser.stop_tracing()
    return frames(json.loads(path.read_text())["traceEvents"])


def main():
    """Parse the arguments and print the table."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    names = filter(None, [os.environ.get("CHROMIUM"), "chromium", "google-chrome"])
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        sys.exit("no Chromium: set CHROMIUM")
    longest = {hover_pan_and_zoom: [], select_filter_and_switch: []}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        for _ in range(args.repeats):
            for explore, times in longest.items():
                context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
                page = context.new_page()
                page.goto(args.page.resolve().as_uri())
                page.wait_for_selector("body[data-ready]")
                times.append(
                    traced(browser, page, Path(folder) / "trace.json", explore).max(axis=0)
                )
                context.close()
        browser.close()
    print("| exploring | longest task, processor ms | wall ms |")
    print("| --- | --- | --- |")
    for explore, times in longest.items():
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {explore.__name__.replace('_', ' ')} | {processor:.0f} | {wall:.0f} |")


if __name__ == "__main__":
    main()
