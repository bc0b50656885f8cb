"""`mlx-dpo eval`: how a model ranks preferences it has not seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import ADAPTER, BatchSize, Json, Quiet, ReferenceAdapter, Split, require
from mlx_dpo.settings import resolve


@with_settings("model", "data", "loss", notes=ADAPTER)
def evaluate(
    asked: Asked,
    split: Split = "auto",
    reference_adapter: ReferenceAdapter = None,
    batch_size: BatchSize = 8,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how many preferences a model ranks right.

    \b
    [bold]Examples[/bold]
      mlx-dpo eval --model MODEL --adapter runs/a --data test.jsonl
      mlx-dpo eval --config runs/a/config.yaml --adapter runs/a --json

    Accuracy comes with its 95 % interval, beside margins, rewards, log-probs
    and an estimate of the distance (KL) from the reference.
    """
    with measuring(asked, quiet, split, reference_adapter, batch_size) as (what, how):
        from mlx_dpo.evaluation.evaluate import evaluate

        found = evaluate(*what, **how)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:<{width}}  {_value(value)}" for name, value in found.items()))


@contextmanager
def measuring(
    asked: Asked, quiet: bool, split: str, reference_adapter: str | None, batch_size: int
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Model, data and loss as they are asked for, and how to measure with them."""
    config = resolve(*asked)
    require(config, "--model", "--data")

    from mlx_dpo.cli.progress import show_progress

    with show_progress(quiet=quiet) as on_event:
        how = {"split": split, "reference_adapter": reference_adapter, "batch_size": batch_size, "on_event": on_event}
        yield (config.model, config.data, config.loss), how


def _value(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:g}" if value.is_integer() else f"{value:.4f}"
