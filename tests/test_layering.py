"""The direction of imports: a module knows those before it on the way from row to adapter, never those after it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_dpo

PACKAGE = Path(mlx_dpo.__file__).parent

LEVELS = (
    "errors records arrays events interrupt",
    "config settings run metrics",
    "data encode batching losses",
    "parts blocks prefix layout peft model lora optim graph memory machine trunk",
    "logprobs speed extents gguf",
    "reference scoring following checkpoint demo_model preview phases plan timing",
    "sample prepare evaluate export label report",
    "train",
    "cli",
)
"""From the ground up; a module imports from its own level or from those below."""

LEVEL = {name: height for height, names in enumerate(LEVELS) for name in names.split()}
FOR_PEOPLE = ("typer", "rich", "argparse", "click")
MODULES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 1
)
MODULES += sorted(Path(path.name) for path in PACKAGE.glob("*.py") if not path.name.startswith("__"))


def imported(module: Path) -> set[str]:
    """Every module that `module` imports, at its top or inside a function."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stage(module: str) -> str:
    """The file or folder of the package that a dotted name lies in."""
    return module.split(".")[1] if module.startswith("mlx_dpo.") else ""


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_from_its_own_level_or_below(module: Path) -> None:
    own = module.parts[0].removesuffix(".py")
    above = {name for name in map(stage, imported(module)) if name in LEVEL and LEVEL[name] > LEVEL[own]}
    assert not above, f"{module} (level {own}) must not know {sorted(above)}"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.parts[0] != "cli" and m != Path("label/terminal.py")], ids=str
)
def test_nothing_below_the_command_line_prints_parses_flags_or_exits(module: Path) -> None:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "input", "exit", "quit", "sys.exit", "os._exit"}
    assert not {name.split(".")[0] for name in imported(module)} & set(FOR_PEOPLE)


def test_every_module_has_its_place() -> None:
    assert {module.parts[0].removesuffix(".py") for module in MODULES} <= LEVEL.keys()


def test_help_and_version_come_without_loading_anything_heavy() -> None:
    code = """
import sys
from mlx_dpo.cli.app import app
app(["--help"], standalone_mode=False)
heavy = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "tokenizers", "yaml", "rich.progress"}
print("loaded:", sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.splitlines()[-1] == "loaded: []"
