"""Rows of token log-probs, small enough to reckon by hand or random, for the tests of the losses and metrics."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.types import Kind, TokenLogps

PAIR_RANK = [1.0, 2.0]


def rows_of(answers: list[list[list[float]]]) -> tuple[mx.array, mx.array]:
    """Token log-probs [R, K, C] and their mask from rows of answers of tokens, padded on the right."""
    width = max(len(tokens) for row in answers for tokens in row)
    logps = [[tokens + [0.0] * (width - len(tokens)) for tokens in row] for row in answers]
    mask = [[[1.0] * len(tokens) + [0.0] * (width - len(tokens)) for tokens in row] for row in answers]
    return mx.array(logps), mx.array(mask)


def loss_of(
    kind: str,
    policy: list[list[list[float]]],
    reference: list[list[list[float]]] | None = None,
    rank: list[list[float]] | None = None,
    label: list[float] | None = None,
    **options: Any,
) -> float:
    """The loss of rows of token log-probs under policy and reference; pairs unless ranks say otherwise."""
    logps, mask = rows_of(policy)
    ranks = mx.array(rank) if rank else mx.broadcast_to(mx.array(PAIR_RANK), mask.shape[:2])
    labels = None if label is None else mx.array(label)
    base = None if reference is None else rows_of(reference)[0]
    return compute_loss(TokenLogps(logps), base, mask, ranks, labels, LossConfig(type=kind, **options)).loss.item()


def pair(
    chosen_ratio: float, rejected_ratio: float, chosen_length: int = 1, rejected_length: int = 1
) -> tuple[Any, Any]:
    """Policy and reference of one pair whose log-ratios are these, spread evenly over its tokens."""
    reference = [[[-3.0] * chosen_length, [-2.0] * rejected_length]]
    policy = [
        [
            [-3.0 + chosen_ratio / chosen_length] * chosen_length,
            [-2.0 + rejected_ratio / rejected_length] * rejected_length,
        ]
    ]
    return policy, reference


def random_batch(
    kind: Kind, rows: int = 4, seed: int = 0
) -> tuple[TokenLogps, mx.array, mx.array, mx.array, mx.array | None]:
    """Policy, reference, mask, rank and label of rows that a loss of this kind takes."""
    answers = {"pair": 2, "ranking": 4, "unpaired": 2, "demonstration": 1}[kind]
    chance = random.Random(seed)

    def tokens(length: int) -> list[float]:
        return [chance.uniform(-4, 0) for _ in range(length)]

    lengths = [[chance.randint(2, 6) for _ in range(answers)] for _ in range(rows)]
    policy, mask = rows_of([[tokens(length) for length in row] for row in lengths])
    reference, _ = rows_of([[tokens(length) for length in row] for row in lengths])
    ranks = {"pair": [1.0, 2.0], "ranking": [1.0, 2.0, 2.0, 3.0], "unpaired": [1.0, 0.0], "demonstration": [1.0]}[kind]
    rank = mx.broadcast_to(mx.array(ranks), (rows, answers))
    label = mx.where(mx.arange(rows) % 2 == 0, 1.0, -1.0) if kind == "unpaired" else None
    return TokenLogps(policy, log_sum_p2=policy * 0.5), reference, mask, rank, label
