"""The tokenizer of a file is read, or refused by name; test_tokenizer_write.py goes there and back with whole ones."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.tokenizer_read import CONTROL, eos_token_ids, read_tokenizer

FILE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "<|im_end|>", "<end_of_turn>"],
    "tokenizer.ggml.token_type": [CONTROL, 1, 1, 1, CONTROL, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}


def test_control_tokens_that_close_a_turn_end_an_answer_beside_the_files_own() -> None:
    assert eos_token_ids(FILE) == [0, 4]  # <end_of_turn> is an ordinary token here
    assert eos_token_ids(FILE | {"tokenizer.ggml.eot_token_id": 4}) == [0, 4]


def test_tokens_merges_and_special_tokens_are_the_files() -> None:
    tokenizer, settings = read_tokenizer(FILE)
    assert tokenizer["model"]["vocab"]["ab"] == 3
    assert tokenizer["model"]["merges"] == [["a", "b"]]
    assert [token["content"] for token in tokenizer["added_tokens"]] == ["<s>", "<|im_end|>"]
    assert settings["eos_token"] == "<s>"


@pytest.mark.parametrize(("key", "value"), [("model", "bert"), ("pre", "klingon")])
def test_what_would_cut_text_otherwise_is_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ModelError, match=value):
        read_tokenizer(FILE | {f"tokenizer.ggml.{key}": value})
