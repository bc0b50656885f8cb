"""`mlx-dpo score`: log-probs and rewards, row by row."""

from __future__ import annotations

import json

from mlx_dpo.cli.eval import measuring
from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import ADAPTER, BatchSize, Json, Quiet, ReferenceAdapter, Split


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
    with measuring(asked, quiet, split, reference_adapter, batch_size) as (what, how):
        from mlx_dpo.evaluation.evaluate import score

        for number, row in enumerate(score(*what, **how)):
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
