"""`mlx-dpo check`: what the model is going to read of the data."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import call


def test_check_shows_what_is_prompt_what_is_scored_and_what_was_cut(tiny_llama: Path, tmp_path: Path) -> None:
    row = {"prompt": "Hello", "chosen": " there, how are you today?", "rejected": " you"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    asked = ("check", "--data", tmp_path / "pairs.jsonl", "--model", tiny_llama)
    whole = call(*asked, "--preview", "1").stdout
    assert "1 pair rows" in whole
    assert "scored" in whole
    assert "cut" not in whole
    assert "today" in whole
    cut = call(*asked, "--preview", "1", "--max-length", "6")
    assert "cut" in cut.stdout
    assert "1 of 1 rows cut to max_length 6" in cut.stderr
    assert (
        "--preview needs a --model" in call("check", "--data", tmp_path / "pairs.jsonl", "--preview", 1, code=2).stderr
    )


def test_what_is_piped_in_is_looked_at(tiny_llama: Path) -> None:
    row = {"prompt": "Hello", "chosen": " there", "rejected": " you"}
    asked = ("check", "--data", "-", "--model", tiny_llama, "--preview", "1")
    assert "there" in call(*asked, piped=json.dumps(row)).stdout
