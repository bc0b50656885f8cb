"""How large a micro-batch is, by hand."""

from __future__ import annotations

from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.planning.batch_shape import BatchShape, batch_shape


def row(prompt: int, *answers: int) -> TokenizedRow:
    ids = tuple([1] * n for n in answers)
    return TokenizedRow("", [1] * prompt, ids, (0,) * len(answers), (0.0,) * len(answers), None)


def test_a_prompt_counts_once_and_attention_by_the_square() -> None:
    # 3 + (2 + 4) and 5 + 1 tokens; scores: 3·3 + 2·(3 + 2) + 4·(3 + 4), and 5·5 + 1·(5 + 1)
    assert batch_shape([row(3, 2, 4), row(5, 1)]) == BatchShape(
        rows=2, answers=2, prompt=5, completion=4, tokens=9 + 6, scores=47 + 31
    )


def test_one_long_row_may_have_more_attention_and_fewer_tokens_than_many_short_ones() -> None:
    long, short = batch_shape([row(30, 10)]), batch_shape([row(5, 5, 5)] * 4)
    assert long.tokens < short.tokens and long.scores > short.scores
