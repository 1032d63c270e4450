import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in (ROOT / "ijepa").glob("*.py") if path.stem != "__init__"}
SCRIPTS = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}

# Each module imports only from those before it. A new one finds its place here.
ORDER = [
    "errors",
    "files",
    "devices",
    "provenance",
    "data",
    "augmentation",
    "parallel",
    "graphs",
    "model",
    "masking",
    "muon",
    "metrics",
    "uncertainty",
    "agreement",
    "projections",
    "plots",
    "checkpoint",
    "runs",
    "training",
    "hub",
    "huggingface",
    "encoders",
    "embeddings",
    "comparison",
    "narrative",
    "markdown",
    "markup",
    "charts",
    "class_charts",
    "figures",
    "explorer",
    "page",
    "report",
]

# Where a third-party package may be imported; one that is not listed may be used anywhere.
BORDERS = {
    "huggingface_hub": {"hub", "huggingface"},
    "matplotlib": {"plots", "report"},
    "PIL": {"data", "explorer", "huggingface"},
    "safetensors": {"huggingface"},
    "sklearn": {"data", "projections"},
    "torchvision": {"data", "encoders"},
    "transformers": {"huggingface"},
    "tqdm": set(),
}
# Tensors end where embeddings begin; only pairs of images, in metrics, are computed by torch.
ARRAYS_ALONE = {
    *("agreement", "uncertainty", "projections", "plots", "comparison"),
    *("narrative", "markdown", "markup", "charts", "class_charts", "figures", "explorer", "page"),
}

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def imported_names(path):
    """Every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in {path.name}:{node.lineno}"
            if node.module == "ijepa":
                yield from (f"ijepa.{alias.name}" for alias in node.names)
            else:
                yield node.module


def own_imports(path):
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("ijepa.")}


def third_party_imports(path):
    roots = {name.partition(".")[0] for name in imported_names(path)}
    return roots - sys.stdlib_module_names - {"ijepa"}


def test_every_module_has_a_place_in_the_order():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    assert own_imports(MODULES[name]) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", MODULES)
def test_third_party_packages_stay_behind_their_borders(name):
    allowed = {package for package, modules in BORDERS.items() if name in modules}
    assert not (third_party_imports(MODULES[name]) & BORDERS.keys()) - allowed
    if name in ARRAYS_ALONE:
        assert "torch" not in third_party_imports(MODULES[name])


def test_every_border_is_in_use():
    used = {
        package: {name for name in MODULES if package in third_party_imports(MODULES[name])}
        for package in BORDERS
    }
    assert used == BORDERS


@pytest.mark.parametrize("path", [*MODULES.values(), *SCRIPTS.values()], ids=lambda path: path.stem)
def test_what_is_imported_is_declared(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}
    needed = {DISTRIBUTIONS.get(name, name) for name in third_party_imports(path)}
    assert needed <= declared


@pytest.mark.parametrize("name", MODULES)
def test_the_package_neither_prints_nor_exits_nor_reads_arguments(name):
    tree = ast.parse(MODULES[name].read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"print", "input", "exit", "quit", "breakpoint"}
    assert "argparse" not in set(imported_names(MODULES[name]))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    }
    assert not read & {"stdout", "stderr", "argv", "exit"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_only_the_standard_library_at_the_top(name):
    tree = ast.parse(SCRIPTS[name].read_text())
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    roots = {
        (alias.name if isinstance(node, ast.Import) else node.module).partition(".")[0]
        for node in top.body
        for alias in node.names
    }
    assert roots <= sys.stdlib_module_names
