"""ARCHITECTURE.md is kept true: its list of files is the package's, and imports go only the way that it states."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlx_dpo"
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
FILES = sorted(str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
FOR_PEOPLE = ("typer", "rich", "argparse", "click")


def stated_order() -> list[str]:
    """The stages of the package from the ground up: the lines of the one code block that begins with `errors.py`."""
    block = re.search(r"^    errors\.py.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert block, "ARCHITECTURE.md has no list of stages"
    return [line.split("#")[0].strip() for line in block[0].strip("\n").splitlines()]


HEIGHT = {
    name.removesuffix(".py").rstrip("/"): height for height, line in enumerate(stated_order()) for name in line.split()
}


def stage(module: str) -> str:
    """The file or folder of the package that a dotted name or a path lies in."""
    parts = module.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "mlx_dpo" and len(parts) > 1 else ""


def imported(file: str) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_files_named_are_the_files_there_are() -> None:
    named = re.findall(r"`(mlx_dpo/[\w/]+\.py)`", TEXT)
    assert sorted(set(named)) == FILES


def test_every_stage_stands_in_the_order_and_no_other() -> None:
    assert {stage(file) for file in FILES} == HEIGHT.keys()


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_its_own_stage_or_from_earlier_ones(file: str) -> None:
    own = HEIGHT[stage(file)]
    wrong = {name for name in imported(file) if HEIGHT.get(stage(name), -1) > own}
    assert not wrong
    beside = {name for name in map(stage, imported(file)) if HEIGHT.get(name) == own and name != stage(file)}
    assert all((PACKAGE / f"{name}.py").is_file() for name in beside), f"{beside} are folders on one height"


@pytest.mark.parametrize("file", [file for file in FILES if stage(file) != "cli"])
def test_nothing_but_the_command_line_prints_parses_flags_or_exits(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "input", "exit", "quit", "sys.exit", "os._exit"}
    assert not {name.split(".")[0] for name in imported(file)} & set(FOR_PEOPLE)


@pytest.mark.parametrize("file", FILES)
def test_every_file_has_a_test_of_its_name_or_a_line_that_says_where_it_is_tested(file: str) -> None:
    inside = Path(file).relative_to("mlx_dpo")
    own = Path("tests") / inside.with_name(f"test_{inside.name}")
    if (ROOT / own).is_file():
        return
    row = re.search(rf"^\| `{re.escape(file)}` \|.*\| `(tests/[\w/]+\.py)`", TEXT, re.MULTILINE)
    assert row, f"there is no {own}, and ARCHITECTURE.md does not say where {file} is tested"
    assert (ROOT / row[1]).is_file()


@pytest.mark.parametrize("file", FILES)
def test_every_file_opens_with_the_sentence_that_stands_there(file: str) -> None:
    opening = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
    row = re.search(rf"^\| `{re.escape(file)}` \| (.+) \| `", TEXT, re.MULTILINE)
    assert row and " ".join(opening.split()).startswith(f"{row[1]}.")


def test_help_and_version_come_without_loading_anything_heavy() -> None:
    code = """
import sys
from mlx_dpo.cli.app import app
app(["--help"], standalone_mode=False)
heavy = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "tokenizers", "yaml", "rich.progress"}
print("loaded:", sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded: []"
