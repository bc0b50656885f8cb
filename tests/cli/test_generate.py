"""`mlx-dpo generate`: answers as they come, as JSON, and side by side."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import call


def test_generate_streams_an_answer_or_both(run: Path, tiny_llama: Path) -> None:
    asked = ("generate", "--model", tiny_llama, "--adapter", run, "--max-tokens", "5", "Hello", "you")
    plain = call(*asked).stdout
    answers = [json.loads(line) for line in call(*asked, "--json").stdout.splitlines()]
    assert plain == "".join(answer["text"] + "\n" for answer in answers)
    both = [json.loads(line) for line in call(*asked, "--json", "--compare").stdout.splitlines()]
    assert [found["prompt"] for found in both] == ["Hello", "you"]
    assert [found["tuned"]["text"] for found in both] == [answer["text"] for answer in answers]
    assert "before" in call(*asked, "--compare").stdout
