import functools
import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa.files import sha256

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / "comparison_results" / "digits.html").read_text()
REPORT = (ROOT / "comparison_results" / "report.md").read_text()


def fenced(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@functools.cache
def usage(script):
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    env = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_the_table_of_flags_is_the_usage():
    documented = re.findall(r"^\| `(--[a-z-]+)` \|", README, re.MULTILINE)
    offered = set(re.findall(r"--[a-z][a-z-]*", usage("compare_embeddings.py"))) - {"--help"}
    assert set(documented) == offered


def test_the_results_and_the_command_beside_them_are_those_of_the_committed_report():
    rows = re.findall(r"^\| (?:Metric|Embedding|Variance in|Silh|NN ).*$", README, re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        assert row in REPORT
    for name, of_report in (("Linear probe", "Linear"), ("kNN, k = 20", "kNN, k = 20")):
        (cells,) = re.findall(rf"^\| {name} \| (.*) \|$", README, re.MULTILINE)
        assert f"| {of_report} | {cells} |" in REPORT
    assert REPORT.split("```bash\n")[1].split("\n```")[0] in README


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_every_option_of_a_printed_command_exists():
    lines = "\n".join(fenced("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python")]
    assert len(commands) >= 3
    for command in commands:
        offered = usage(Path(command[1]).name)
        assert all(word in offered for word in command if word.startswith("--"))


def test_the_printed_output_is_that_of_the_committed_page():
    shown = html.unescape(re.sub(r"<[^>]*>", "", EXAMPLE.replace("</t", " </t")))
    shown = " ".join(shown.split())
    (printed,) = fenced("text")[:1]
    lines = [line for line in printed.splitlines() if not line.startswith("---")]
    assert len(lines) == 12
    for line in lines:
        assert " ".join(line.split()).removesuffix(".") in shown


def test_nothing_committed_holds_a_path_of_the_machine_that_made_it():
    others = ("comparison_results/metrics.json", "checkpoints_300ep/README.md")
    for text in (README, REPORT, EXAMPLE, *((ROOT / name).read_text() for name in others)):
        assert str(Path.home()) not in text
        assert "/tmp/" not in text


def test_the_committed_page_is_small_and_of_the_checkpoint_that_ships():
    assert len(EXAMPLE.encode()) < 2_400_000
    shown = re.search(r'<pre id="metrics"[^>]*>(.*?)</pre>', EXAMPLE, re.DOTALL)[1]
    metrics = json.loads(html.unescape(shown))
    assert metrics["dataset"]["name"] == "digits"
    shipped = sha256(ROOT / "checkpoints_300ep" / "checkpoint_latest.pt")
    assert metrics["models"]["local"]["sha256"] == shipped, "make example"
