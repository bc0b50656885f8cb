"""The tokenizer of a file is read, or refused by name; test_tokenizer_write.py goes there and back with whole ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

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


def test_a_thought_that_ends_ends_no_answer() -> None:
    tokens = ["<|return|>", "<|call|>", "<|end|>", "a"]
    file = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [CONTROL] * 3 + [1]}
    assert eos_token_ids(file | {"tokenizer.ggml.eos_token_id": 0}) == [0, 1]  # gpt-oss
    phi = file | {"tokenizer.ggml.tokens": ["<|endoftext|>", "b", "<|end|>", "a"]}
    assert eos_token_ids(phi | {"tokenizer.ggml.eos_token_id": 0}) == [0, 2]


def test_gemma_4s_tokenizer_has_merges_and_bytes() -> None:
    file = FILE | {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "▁a", "▁", "<0x0A>"],
        "tokenizer.ggml.token_type": [CONTROL, 1, 1, 1, 1, 6],
        "tokenizer.ggml.merges": ["▁ a"],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer, _ = read_tokenizer(file)
    assert tokenizer["model"]["merges"] == [["▁", "a"]]
    assert tokenizer["model"]["byte_fallback"]
    assert Tokenizer.from_str(json.dumps(tokenizer)).encode("b a\n", add_special_tokens=False).ids == [2, 3, 5]


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
