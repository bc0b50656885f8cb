"""The verbs in one program, and what becomes of errors on the way out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlx_dpo import __version__
from mlx_dpo.cli import check, demo, eval, export, fuse, generate, import_gguf, plan, score, sft, train
from mlx_dpo.cli.console import show_error
from mlx_dpo.errors import MlxDpoError, device_errors
from mlx_dpo.macos import set_environment

HELP = """
Teach a language model what you prefer, on your own machine.

\b
[bold]Examples[/bold]
  [dim]# watch a real model learn a preference[/dim]
  mlx-dpo demo
  [dim]# see what the model is going to read, then train an adapter[/dim]
  mlx-dpo check --data pairs.jsonl --model MODEL --preview 3
  mlx-dpo train --model MODEL --data pairs.jsonl --output runs/a
  [dim]# how many unseen pairs it ranks right, and what it answers now[/dim]
  mlx-dpo eval --model MODEL --adapter runs/a --data test.jsonl
  mlx-dpo generate --model MODEL --adapter runs/a --compare "Hello"
  [dim]# one model folder for other programs[/dim]
  mlx-dpo fuse --model MODEL --adapter runs/a --output fused
  mlx-dpo export gguf --model MODEL --adapter runs/a --output tuned.gguf

MODEL is a folder or a Hub name of any model that mlx-lm loads.
Results go to standard output, everything else to standard error.
"""

VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "check": check.check,
    "plan": plan.plan,
    "sft": sft.sft,
    "train": train.train,
    "eval": eval.evaluate,
    "score": score.score,
    "generate": generate.generate,
    "fuse": fuse.fuse,
    "import": import_gguf.import_model,
}


class Verbs(TyperGroup):
    """Turns what stops a verb into a message and an exit status: 130 for Ctrl-C, else the error's own."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb; any other exception is a bug and keeps its traceback."""
        try:
            with device_errors():
                return super().invoke(ctx)
        except MlxDpoError as error:
            show_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="mlx-dpo",
    cls=Verbs,
    help=HELP,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mlx-dpo {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Holds what belongs to no verb."""


for name, verb in VERBS.items():
    app.command(name)(verb)
app.add_typer(export.app, name="export")


def main() -> None:
    """The program `mlx-dpo`."""
    set_environment()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    app()
