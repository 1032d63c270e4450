import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in (ROOT / "ijepa").glob("*.py") if path.stem != "__init__"}
SCRIPTS = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
FILES = [*MODULES.values(), *SCRIPTS.values()]
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def imports(path):
    """Every (module, name) that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in {path.name}:{node.lineno}"
            yield from ((node.module, alias.name) for alias in node.names)


def own_imports(path):
    found = set()
    for module, name in imports(path):
        if module == "ijepa" and name in MODULES:
            found.add(name)
        elif module.startswith("ijepa."):
            found.add(module.split(".")[1])
    return found


def third_party(path):
    roots = {module.partition(".")[0] for module, _ in imports(path)}
    return roots - sys.stdlib_module_names - {"ijepa"}


def test_imports_point_one_way_and_at_most_eight_levels_deep():
    graph = {name: own_imports(path) for name, path in MODULES.items()}
    level = {}
    for name in TopologicalSorter(graph).static_order():  # raises CycleError
        level[name] = 1 + max((level[below] for below in graph[name]), default=0)
    assert max(level.values()) <= 8, sorted(level.items(), key=lambda item: item[1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_imported_is_declared(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party(path)} <= declared


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_private_name_of_another_package_is_imported(path):
    for module, name in imports(path):
        parts = [*module.split("."), name or ""]
        assert not any(part.startswith("_") and part != "__version__" for part in parts), parts


@pytest.mark.parametrize("name", ["metrics", "uncertainty", "agreement", "comparison", "narrative"])
def test_numbers_know_neither_files_nor_figures_nor_models(name):
    assert not third_party(MODULES[name]) & {"matplotlib", "PIL", "transformers", "torchvision"}


@pytest.mark.parametrize("name", MODULES)
def test_the_package_neither_prints_nor_exits_nor_reads_arguments(name):
    tree = ast.parse(MODULES[name].read_text())
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"print", "input", "exit", "quit", "breakpoint"}
    assert "argparse" not in {module for module, _ in imports(MODULES[name])}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    }
    assert not read & {"stdout", "stderr", "argv", "exit"}


def test_importing_the_package_loads_nothing_heavy_and_exports_four_names():
    code = """
import sys, ijepa
assert not {"torch", "numpy", "matplotlib", "transformers"} & set(sys.modules)
assert set(ijepa.__all__) == {"compare", "extract", "load_encoder", "write_report"}
from ijepa import compare, extract, load_encoder, write_report
assert all(map(callable, (compare, extract, load_encoder, write_report)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", ["compare_embeddings", "train_ijepa"])
def test_help_loads_nothing_heavy(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("scripts/{script}.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "numpy", "matplotlib", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
