"""`mlx-dpo score`: log-probs and rewards, row by row."""

from __future__ import annotations

import json

from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import ADAPTER, BatchSize, Json, Quiet, ReferenceAdapter, Split, require
from mlx_dpo.settings import resolve


@with_settings("model", "data", "loss.beta", "loss.reference", notes=ADAPTER)
def score(
    asked: Asked,
    split: Split = "auto",
    reference_adapter: ReferenceAdapter = None,
    batch_size: BatchSize = 8,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the log-probs and rewards of every row.

    \b
    [bold]Examples[/bold]
      mlx-dpo score --model MODEL --data pairs.jsonl
      mlx-dpo score --model MODEL --adapter runs/a --data pairs.jsonl --json

    Log-probs are summed over an answer's tokens, in nats. A reward is
    β (log π - log π_ref); the margin is the chosen reward less the rejected one.
    """
    config = resolve(*asked)
    require(config, "--model", "--data")

    from mlx_dpo.cli.progress import show_progress
    from mlx_dpo.evaluation.evaluate import score

    with show_progress(quiet=quiet) as on_event:
        rows = score(
            config.model, config.data, config.loss, split=split,
            reference_adapter=reference_adapter, batch_size=batch_size, on_event=on_event,
        )  # fmt: skip
        for number, row in enumerate(rows):
            if as_json:
                print(json.dumps(row, ensure_ascii=False), flush=True)
                continue
            if number == 0:
                print("\t".join(row))
            print("\t".join(_cell(value) for value in row.values()), flush=True)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
