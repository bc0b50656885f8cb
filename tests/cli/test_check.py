"""`mlx-dpo check`: what the model is going to read of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command_line import call
from support.templates import tokenizer_of


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


@pytest.fixture(scope="module")
def reasoning_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the chat template of DeepSeek-R1's distilled models; a look at data needs no more."""
    folder = tmp_path_factory.mktemp("r1")
    tokenizer_of("deepseek_r1_distill").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def test_rows_whose_reasoning_the_template_removes_are_named(reasoning_model: Path, tmp_path: Path) -> None:
    def pair(name: str, chosen: str, rejected: str) -> str:
        said = [{"role": "user", "content": "Is it so?"}]
        sides = {side: [{"role": "assistant", "content": text}] for side, text in (("c", chosen), ("r", rejected))}
        return json.dumps({"id": name, "prompt": said, "chosen": sides["c"], "rejected": sides["r"]})

    rows = [
        pair("fine", "Yes.", "No."),
        pair("lost", "<think>It is.</think>Yes.", "No."),
        pair("same", "<think>It is.</think>Yes.", "<think>It is not.</think>Yes."),
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    done = call("check", "--data", tmp_path / "pairs.jsonl", "--model", reasoning_model, "--preview", "3")
    said = " ".join(done.stderr.split())
    assert "1 of 3 rows have answers that the chat template makes equal: nothing to learn (rows same)" in said
    assert "2 of 3 rows lose reasoning that stands in an answer's text" in said
    assert "removes it ('It is.') (rows lost, same); write prompt and answers as plain strings" in said
    assert "It is." not in done.stdout, "the preview shows what is read"


def test_a_switch_that_the_template_lacks_is_refused(reasoning_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hello", "chosen": " there", "rejected": " you"}))
    asked = ("check", "--data", tmp_path / "pairs.jsonl", "--model", reasoning_model, "--thinking", "off")
    assert "thinking cannot be switched on or off" in call(*asked, code=2).stderr
