import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ijepa

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in (ROOT / "ijepa").glob("*.py") if path.stem != "__init__"}
FILES = [*MODULES.values(), *(ROOT / "scripts").glob("*.py")]
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
    parts = [f"{module}.{name}".split(".") for module, name in imports(path)]
    return {second for first, second, *_ in parts if first == "ijepa"} & MODULES.keys()


def test_imports_point_one_way_and_at_most_eight_levels_deep():
    graph = {name: own_imports(path) for name, path in MODULES.items()}
    level = {}
    for name in TopologicalSorter(graph).static_order():  # raises CycleError
        level[name] = 1 + max((level[below] for below in graph[name]), default=0)
    assert max(level.values()) <= 8, sorted(level.items(), key=lambda item: item[1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_imported_is_declared_and_public(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}
    roots = {module.partition(".")[0] for module, _ in imports(path)}
    third_party = roots - sys.stdlib_module_names - {"ijepa"}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} <= declared
    for module, name in imports(path):
        parts = [*module.split("."), name or ""]
        assert not any(part.startswith("_") and part != "__version__" for part in parts), parts


HEAVY = """
import runpy, sys
import ijepa
for script in ("compare_embeddings", "train_ijepa"):
    for words, code in ((["--help"], 0), (["--version"], 0), (["--seed", "none"], 2)):
        sys.argv = [script, *words]
        try:
            runpy.run_path(f"scripts/{script}.py", run_name="__main__")
        except SystemExit as end:
            assert end.code == code, end.code
heavy = {"torch", "numpy", "PIL", "tqdm", "torchvision", "transformers", "sklearn", "matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_the_package_help_and_usage_errors_load_nothing_heavy():
    subprocess.run([sys.executable, "-c", HEAVY], check=True, cwd=ROOT, capture_output=True)


def test_the_package_exports_five_functions():
    functions = {"load_split", "load_encoder", "extract", "compare", "write_report"}
    assert set(ijepa.__all__) == functions
    assert all(callable(getattr(ijepa, name)) for name in functions)
