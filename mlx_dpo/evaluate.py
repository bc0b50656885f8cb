"""How a model ranks held-out preferences: accuracy with its interval, rewards, log-probs, KL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo import lora, reference
from mlx_dpo.arrays import Kind
from mlx_dpo.batching import Batch, length, make_batch
from mlx_dpo.config import DataConfig, LossConfig, ModelConfig
from mlx_dpo.data.load import load_records
from mlx_dpo.encode import EncodeReport, TokenizedRow, encode_records
from mlx_dpo.events import OnEvent, Phase, Warned, ignore
from mlx_dpo.logprobs import Scorer
from mlx_dpo.losses import compute_loss
from mlx_dpo.metrics import Sums, averages, batch_metrics, wilson_interval
from mlx_dpo.model import LoadedModel, load
from mlx_dpo.reference import Reference


def by_length(rows: Sequence[TokenizedRow], batch_size: int) -> Iterator[Batch]:
    """Batches of like length and number of answers, for passes in which order does not matter."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].completions), length(rows[i])))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        yield make_batch([rows[i] for i in places], places)


def evaluate_rows(
    scorer: Scorer,
    rows: Sequence[TokenizedRow],
    known: Reference | None,
    loss: LossConfig,
    kind: Kind,
    *,
    batch_size: int,
    stats: tuple[str, ...] = (),
    on_event: OnEvent = ignore,
) -> dict[str, float]:
    """TRL's metrics over all `rows`, as if they were one batch, for a policy in evaluation mode.

    Beside them `accuracy_low` and `accuracy_high`, the 95 % Wilson interval of rewards/accuracies over `comparisons`
    pairs. `known` are the rows' reference log-probs; None for losses without a reference.
    """
    parts: list[Sums] = []
    done = 0
    for batch in by_length(rows, batch_size):
        on_event(Phase("evaluation", done, len(rows), "rows"))
        policy = scorer(batch, stats, gradient=False)
        base = reference.reference_batch(known, batch) if known is not None else None
        mask, rank, label = mx.array(batch.mask), mx.array(batch.rank), labels(batch, kind)
        output = compute_loss(policy, base, mask, rank, label, loss)
        sums = batch_metrics(output, policy, base, mask, rank, label, kind)
        mx.eval(sums)
        parts.append(sums)
        done += len(batch.index)
    on_event(Phase("evaluation", done, len(rows), "rows"))
    return averages(parts) | accuracy_interval(parts)


def labels(batch: Batch, kind: Kind) -> mx.array | None:
    """The judgements of unpaired rows, `[R]` float; None for every other kind."""
    return mx.array(batch.label.astype(np.float32)) if kind == "unpaired" else None


def accuracy_interval(parts: Sequence[Sums]) -> dict[str, float]:
    """The 95 % interval of the accuracy over all parts; empty where nothing was compared."""
    counted = [part["rewards/accuracies"] for part in parts if "rewards/accuracies" in part]
    comparisons = sum(mean.number.item() for mean in counted)
    if not comparisons:
        return {}
    low, high = wilson_interval(sum(mean.total.item() for mean in counted), comparisons)
    return {"accuracy_low": low, "accuracy_high": high, "comparisons": comparisons}
