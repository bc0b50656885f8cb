"""Rows of data sets for the tests of their readers: a few messages, and rows as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is 1 + 1?"}
TWO = {"role": "assistant", "content": "Two."}
THREE = {"role": "assistant", "content": "Three."}
MORE = {"role": "user", "content": "And 1 + 2?"}

ROWS = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
