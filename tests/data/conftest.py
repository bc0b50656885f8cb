"""A file of rows, as JSON lines or as the bytes that a test wants; chat templates, stand-ins and real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.templates import BESIDE, real, stand_in


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines, or bytes as they are, and gives the path."""

    def write(content: list[Any] | bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
        return path

    return write


@pytest.fixture(params=["stand-in", "real"])
def template_of(request: pytest.FixtureRequest) -> Any:
    """A family's template by name: this project's, or the real one where it is to be had."""

    def get(family: str) -> str:
        template = stand_in(family) if request.param == "stand-in" else real(family)
        if template is None:
            pytest.skip(f"no real template of {family}: neither in {BESIDE} nor in an installed TRL")
        return template

    return get
