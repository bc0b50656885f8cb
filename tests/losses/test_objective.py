"""The objective of a step does not depend on how its rows are cut into micro-batches, where it is a mean over them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.data.batching import make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.losses.metrics import averages
from mlx_dpo.losses.objective import batch_loss, batch_weight
from mlx_dpo.types import Kind, TokenLogps

LENGTHS = [(3, 1), (1, 2), (7, 2), (2, 5), (4, 4), (1, 6)]
"""Tokens of the chosen and of the rejected answer, row by row."""

PAIRS = [
    TokenizedRow(str(i), [1, 2], ([3] * chosen, [4] * rejected), (0, 0), (1.0, 2.0))
    for i, (chosen, rejected) in enumerate(LENGTHS)
]
DEMONSTRATIONS = [row._replace(completions=row.completions[:1], starts=(0,), ranks=(1.0,)) for row in PAIRS]


def token_logps(row: TokenizedRow) -> list[list[float]]:
    """A log-prob for each token, another one in every row and place."""
    return [[-0.1 * (int(row.id) + 1) - 0.01 * t - k for t in range(len(ids))] for k, ids in enumerate(row.completions)]


def step(rows: list[TokenizedRow], cut: Sequence[Sequence[int]], config: LossConfig, kind: Kind) -> dict[str, float]:
    """Loss and metrics of a step over the micro-batches `cut`, as the loop takes it; `gradient` as a norm."""
    batches = [make_batch([rows[i] for i in part], part) for part in cut]
    total = sum(batch_weight(batch, config) for batch in batches)
    parts, gradients, loss = [], [], 0.0
    for batch, part in zip(batches, cut, strict=True):
        values = np.zeros(batch.mask.shape, np.float32)
        for r, i in enumerate(part):
            for k, found in enumerate(token_logps(rows[i])):
                values[r, k, : len(found)] = found
        share = batch_weight(batch, config) / total

        def objective(logps: mx.array, batch=batch, share=share) -> mx.array:
            return batch_loss(TokenLogps(logps), mx.zeros_like(logps), batch, config, kind)[0] * share

        loss += objective(mx.array(values)).item()
        gradients += mx.grad(objective)(mx.array(values)).flatten().tolist()
        parts.append(batch_loss(TokenLogps(mx.array(values)), mx.zeros(values.shape), batch, config, kind)[1])
    return averages(parts) | {"of the step": loss, "gradient": float(np.linalg.norm(gradients))}


@pytest.mark.parametrize(
    ("rows", "kind", "loss"),
    [
        (PAIRS, "pair", "sigmoid"),
        (PAIRS, "pair", "simpo"),
        (PAIRS, "pair", "sft"),
        (DEMONSTRATIONS, "demonstration", "sft"),
    ],
)
@pytest.mark.parametrize("cut", [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4, 5]], [[i] for i in range(6)]])
def test_micro_batches_add_up_to_the_whole(
    rows: list[TokenizedRow], kind: Kind, loss: str, cut: list[list[int]]
) -> None:
    config = LossConfig(type=loss)
    whole, parts = step(rows, [list(range(6))], config, kind), step(rows, cut, config, kind)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["of the step"] == pytest.approx(whole["loss"], rel=1e-6)


def test_sft_is_a_mean_over_the_tokens_of_the_step() -> None:
    """18 chosen tokens in all, by hand: every token counts the same, a row of 7 tokens seven times one of 1."""
    total = sum(value for row in DEMONSTRATIONS for value in token_logps(row)[0])
    found = step(DEMONSTRATIONS, [[0, 1], [2, 3, 4, 5]], LossConfig(type="sft"), "demonstration")
    assert found["loss"] == pytest.approx(-total / 18, rel=1e-6)
    by_rows = -sum(np.mean(token_logps(row)[0]) for row in DEMONSTRATIONS) / 6
    assert abs(found["loss"] - by_rows) > 0.001, "a mean over rows is another number"
