"""Rows judged by a model at hand: accuracy with its interval, rewards, log-probs, KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_dpo.config import LossConfig
from mlx_dpo.data.batching import Batch, batches_by_length
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.events import OnEvent, ignore
from mlx_dpo.logprobs.precision import SURE
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.losses.metrics import Mean, Sums, averages, ranked_accuracy, wilson_interval
from mlx_dpo.losses.objective import batch_loss
from mlx_dpo.reference import store
from mlx_dpo.reference.store import RefLogps
from mlx_dpo.types import Kind, TokenLogps

Score = Callable[..., TokenLogps]
"""What gives a batch's token log-probs: a `Scorer`, or something that is called like one."""


def replay(ref_logps: RefLogps) -> Score:
    """What was computed once, in a scorer's place: exactly the same numbers, however rows are batched."""

    def score(batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool = False) -> TokenLogps:
        return TokenLogps(store.batch_ref_logps(ref_logps, batch))

    return score


def score_rows(
    score: Score, rows: Sequence[TokenizedRow], batch_size: int, row_indices: Sequence[int] | None = None
) -> RefLogps:
    """Token log-probs of the rows at `row_indices` (of all without them), in that order; the model is in eval mode."""
    found: dict[int, list[np.ndarray]] = {}
    for batch in batches_by_length(rows, batch_size, row_indices):
        found.update(zip(batch.index.tolist(), store.score_batch(cast(Scorer, score), batch), strict=True))
    return [found[i][: len(rows[i].completions)] for i in (range(len(rows)) if row_indices is None else row_indices)]


def describe_pair(
    row: TokenizedRow, policy: list[np.ndarray], ref_logps: list[np.ndarray] | None, beta: float
) -> dict[str, Any]:
    """A pair's line of `score`."""
    found = describe_answers(row, policy, ref_logps, beta)
    chosen, rejected = found["rewards"]
    line: dict[str, Any] = {"id": row.id}
    for name, key in (("logps", "logps"), ("logps", "ref_logps"), ("tokens", "tokens")):
        values = found[key] or (None, None)
        prefix = "ref_" if key == "ref_logps" else ""
        line |= {f"{prefix}chosen_{name}": values[0], f"{prefix}rejected_{name}": values[1]}
    return line | {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}


def describe_answers(
    row: TokenizedRow, policy: list[np.ndarray], ref_logps: list[np.ndarray] | None, beta: float
) -> dict[str, Any]:
    """A ranking's, an unpaired row's or a demonstration's line of `score`; KTO's mismatched answer is left out."""
    judged = [k for k, rank in enumerate(row.ranks) if rank > 0]
    logps = [float(policy[k].sum(dtype=np.float64)) for k in judged]
    reference = None if ref_logps is None else [float(ref_logps[k].sum(dtype=np.float64)) for k in judged]
    line: dict[str, Any] = {
        "id": row.id,
        "logps": logps,
        "ref_logps": reference,
        "tokens": [len(row.completions[k]) - (not row.context(k)) for k in judged],
        "rewards": [beta * (own - ref) for own, ref in zip(logps, reference or [0.0] * len(logps), strict=True)],
    }
    if row.label:
        line["label"] = row.label > 0
    elif len(judged) > 1:
        line["ranks"] = list(row.ranks)
    return line


def evaluate_rows(
    score: Score,
    rows: Sequence[TokenizedRow],
    ref_logps: RefLogps | None,
    loss: LossConfig,
    kind: Kind,
    *,
    batch_size: int,
    row_indices: Sequence[int] | None = None,
    noise: float = 0.0,
    on_event: OnEvent = ignore,
) -> dict[str, float]:
    """TRL's metrics over the rows at `row_indices` (of all without them), as if they were one batch.

    The policy that `score` reads is in evaluation mode.

    Beside them `accuracy_low` and `accuracy_high`, the 95 % Wilson interval of rewards/accuracies over `comparisons`
    pairs, and of pairs and rankings how log-probs alone rank them, and with `noise` (`within_noise`) what share of the
    comparisons rounding may have decided. `ref_logps` are those of all rows, None for losses without a reference.
    """
    parts: list[Sums] = []
    for batch in batches_by_length(rows, batch_size, row_indices, work="evaluation", on_event=on_event):
        policy = score(batch, gradient=False)
        reference = None if ref_logps is None else store.batch_ref_logps(ref_logps, batch)
        _, sums = batch_loss(policy, reference, batch, loss, kind)
        sums |= within_noise(policy.logps, reference, batch, noise)
        if kind in ("pair", "ranking"):
            mask, rank = mx.array(batch.mask), mx.array(batch.rank)
            sums |= logp_accuracies("logps", policy.logps, mask, rank)
            sums |= logp_accuracies("ref_logps", reference, mask, rank) if reference is not None else {}
        mx.eval(sums)
        parts.append(sums)
    return averages(parts) | accuracy_interval(parts)


def logp_accuracies(name: str, logps: mx.array, mask: mx.array, rank: mx.array) -> Sums:
    """Pairs whose better answer the model finds likelier, by the sum over tokens and by the mean; `logps [R, K, C]`.

    It needs no reference: how a model ranks before any training. A sum favours short answers, a mean does not.
    """
    total = logps.sum(-1)
    return {
        f"{name}/accuracies": ranked_accuracy(total, rank),
        f"{name}/accuracies_per_token": ranked_accuracy(total / mx.maximum(mask.sum(-1), 1), rank),
    }


def within_noise(logps: mx.array, reference: mx.array | None, batch: Batch, noise: float) -> Sums:
    """The share of a batch's comparisons that rounding may have decided: `rewards/within_noise`.

    `logps` and `reference` `[R, K, C]`. Rounding moves a token's log-prob by `noise` nats (root mean square), each
    token's by itself, so a margin of n tokens by √n of that; a margin within `SURE` times as much says nothing. Nothing
    without noise or a reference, or of rows that are compared with no other.
    """
    if not noise or reference is None:
        return {}
    rank, tokens = mx.array(batch.rank), mx.array(batch.mask).sum(-1)
    drift = mx.stop_gradient((logps - reference).sum(-1))
    margin = mx.abs(drift[:, :, None] - drift[:, None, :])
    rounding = SURE * noise * mx.sqrt(tokens[:, :, None] + tokens[:, None, :])
    compared = (rank[:, :, None] < rank[:, None, :]) & (rank[:, :, None] > 0)
    unsure = (compared & (margin <= rounding)).sum().astype(mx.float32)
    return {"rewards/within_noise": Mean(unsure, compared.sum().astype(mx.float32))}


def accuracy_interval(parts: Sequence[Sums]) -> dict[str, float]:
    """The 95 % interval of the accuracy over all parts; empty where nothing was compared."""
    counted = [part["rewards/accuracies"] for part in parts if "rewards/accuracies" in part]
    comparisons = sum(float(mean.number) for mean in counted)
    if not comparisons:
        return {}
    low, high = wilson_interval(sum(float(mean.total) for mean in counted), comparisons)
    return {"accuracy_low": low, "accuracy_high": high, "comparisons": comparisons}
