"""`mlx-dpo train`: an adapter from preferences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_dpo.cli.console import stderr
from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import Quiet, require
from mlx_dpo.settings import resolve

if TYPE_CHECKING:
    from mlx_dpo.config import RunConfig
    from mlx_dpo.training.loop import TrainResult

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --output from its newest checkpoint.")]


@with_settings("model", "data", "lora", "loss", "optim", "train")
def train(asked: Asked, resume: Resume = False, quiet: Quiet = False) -> None:
    """Train a LoRA adapter on preferences.

    \b
    [bold]Examples[/bold]
      mlx-dpo train --model MODEL --data pairs.jsonl --output runs/a
      mlx-dpo train --config run.yaml --beta 0.3 --output runs/b
      mlx-dpo train --output runs/a --resume
      mlx-dpo train --model MODEL --data pairs.jsonl --loss sigmoid:1.0,sft:0.2

    The run folder gets the adapter, config.yaml, metrics.jsonl, samples.jsonl and checkpoints.
    Ctrl-C saves a checkpoint and ends the run; --resume goes on from it.
    """
    run_training(asked, resume=resume, quiet=quiet)


def run_training(asked: Asked, *, resume: bool, quiet: bool) -> None:
    """Trains as asked, with progress and the result on standard error and the run folder on standard output."""
    # A run that goes on takes its own config.yaml, so that --resume needs no flag repeated; flags still win over it.
    config = resolve(asked.file or (_recorded(asked) if resume else None), asked.flags, asked.assignments)
    require(config, "--model", "--data")

    from mlx_dpo.cli.progress import show_progress
    from mlx_dpo.training.loop import train

    rows = config.train.batch_size * config.train.grad_accumulation_steps
    with show_progress(quiet=quiet, rows_per_step=rows) as on_event:
        result = train(config, resume=resume, on_event=on_event)
    if not quiet:
        show_result(result, config)
    print(result.output)
    if result.interrupted:
        raise typer.Exit(130)


def show_result(result: TrainResult, config: RunConfig) -> None:
    """How the run ended, and what to do next."""
    from mlx_dpo.cli.progress import in_words

    console = stderr()
    if result.interrupted:
        console.print(f"stopped after step {result.steps} of {result.total_steps}; go on with")
        console.print(f"  mlx-dpo train --output {result.output} --resume")
        return
    if result.stopped_early:
        console.print(
            f"stopped early, after step {result.steps} of {result.total_steps}: no better held-out loss than step "
            f"{result.best_step}'s in {config.train.early_stopping_patience} evaluations; its adapter is kept"
        )
    kept = result.best_step if config.train.keep_best else result.steps
    for evaluation in result.evaluations:
        if evaluation["step"] in (0, kept):
            console.print(f"held out, {'before' if not evaluation['step'] else ' after'}: {in_words(evaluation)}")
    console.print("see it answer with")
    console.print(f'  mlx-dpo generate --model {config.model.path} --adapter {result.output} --compare "…"')


def _recorded(asked: Asked) -> Path | None:
    """The settings that the run to go on with was started with."""
    output = next((value for _, key, value in asked.flags if key == "train.output"), None)
    file = Path(output) / "config.yaml" if output else None
    return file if file and file.is_file() else None
