"""How large a micro-batch is, from the lengths of its rows: which one of a run needs the most memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlx_dpo.data.tokenize import TokenizedRow


class BatchShape(NamedTuple):
    """How large a micro-batch is: `rows` of up to `answers`, the longest prompt and the longest completion.

    `tokens` are read if each prompt is read once. `scores` is the size of attention's matrices in one head of one
    layer: for each token, the tokens of its own sequence.
    """

    rows: int
    answers: int
    prompt: int
    completion: int
    tokens: int
    scores: int


def batch_shape(rows: Sequence[TokenizedRow]) -> BatchShape:
    """The shape of a micro-batch of these rows."""
    lengths = [(len(row.prompt), [len(ids) for ids in row.completions]) for row in rows]
    return BatchShape(
        rows=len(rows),
        answers=max(len(answers) for _, answers in lengths),
        prompt=max(prompt for prompt, _ in lengths),
        completion=max(max(answers) for _, answers in lengths),
        tokens=sum(prompt + sum(answers) for prompt, answers in lengths),
        scores=sum(prompt**2 + sum(n * (prompt + n) for n in answers) for prompt, answers in lengths),
    )
