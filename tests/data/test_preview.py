"""A preview says of each token what training will make of it: prompt, scored or cut, in the order of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_dpo.config import DataConfig
from mlx_dpo.data.preview import preview
from mlx_dpo.data.records import PreferencePair, Ranking, Record, Unpaired
from mlx_dpo.data.tokenize import encode_record, truncate

PAIR = PreferencePair(id="7", prompt="the answer", chosen=" short words and more", rejected=" clear")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 6, 5, 4])
def test_the_pieces_are_the_whole_text_and_what_is_scored_is_what_training_scores(
    tokenizer: Any, mode: str, max_length: int | None
) -> None:
    seen = preview(PAIR, tokenizer, DataConfig(max_length=max_length, truncation_mode=mode))  # type: ignore[arg-type]
    whole, *_ = encode_record(PAIR, tokenizer)
    row = truncate(whole, max_length, mode)
    assert row is not None and not seen.dropped
    assert list(seen.answers) == ["chosen", "rejected"]
    for k, pieces in enumerate(seen.answers.values()):
        assert sum(piece.tokens for piece in pieces) == len(whole.prompt) + len(whole.completions[k])
        assert [piece.text for piece in pieces if piece.role == "scored"] == [tokenizer.decode(row.completions[k])]
        prompts = [piece.text for piece in pieces if piece.role == "prompt"]
        assert prompts == ([tokenizer.decode(row.context(k))] if row.context(k) else [])


def test_a_row_that_loses_all_its_scored_tokens_is_dropped_and_nothing_of_it_is_scored(tokenizer: Any) -> None:
    seen = preview(PAIR, tokenizer, DataConfig(max_length=1))
    assert seen.dropped
    assert {piece.role for pieces in seen.answers.values() for piece in pieces} == {"cut"}


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (
            Ranking(id="1", prompt="p", responses=(" a", " b", " c"), ranks=(1, 2, 3)),
            ["answer 1", "answer 2", "answer 3"],
        ),
        (Unpaired(id="1", prompt="p", completion=" a", label=True), ["good"]),
        (Unpaired(id="1", prompt="p", completion=" a", label=False), ["bad"]),
    ],
)
def test_answers_are_named_by_what_they_are(tokenizer: Any, record: Record, names: list[str]) -> None:
    assert list(preview(record, tokenizer, DataConfig()).answers) == names
