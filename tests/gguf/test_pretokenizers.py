"""Ways to cut words are known by llama.cpp's names; test_tokenizer_write.py holds each against llama.cpp."""

from __future__ import annotations

from mlx_dpo.gguf.pretokenizers import PRETOKENIZERS, SAME_AS, pretokenizer_named


def test_other_names_of_a_way_to_cut_mean_that_way() -> None:
    assert pretokenizer_named("llama3") is PRETOKENIZERS["llama-bpe"]
    assert SAME_AS.keys().isdisjoint(PRETOKENIZERS)
    assert all(pretokenizer_named(name) for name in SAME_AS)


def test_an_unknown_name_is_not_guessed() -> None:
    assert pretokenizer_named("klingon") is None
