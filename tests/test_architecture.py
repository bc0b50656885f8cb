"""ARCHITECTURE.md is kept true: every module stands in it, and it names no module that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules() -> set[str]:
    files = (ROOT / "mlx_dpo").rglob("*.py")
    return {file.name for file in files if not file.name.startswith("__")}


def test_every_module_is_named() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert {name for name in modules() if f"`{name}`" not in text} == set()


def test_every_named_module_is_there() -> None:
    named = set(re.findall(r"`(\w+\.py)`", (ROOT / "ARCHITECTURE.md").read_text()))
    assert named - modules() == set()
