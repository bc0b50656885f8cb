"""`mlx-dpo generate`: answers to prompts, of the tuned model or of both side by side."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mlx_dpo.cli.console import stdout
from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import ADAPTER, Json, require
from mlx_dpo.settings import resolve

if TYPE_CHECKING:
    from mlx_dpo.models.load import LoadedModel
    from mlx_dpo.sampling.generate import Prompt

Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to answer; - reads one prompt a line.")]
Compare = Annotated[bool, typer.Option("--compare", help="Answer without the adapter too, side by side.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", help="The longest answer.")]
Temperature = Annotated[float, typer.Option("--temp", metavar="X", help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens of this share.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="For the same draws again.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]


@with_settings("model", "data.chat_template_kwargs", notes=ADAPTER)
def generate(
    asked: Asked,
    prompts: Prompts,
    compare: Compare = False,
    max_tokens: MaxTokens = 256,
    temp: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    raw: Raw = False,
    as_json: Json = False,
) -> None:
    """Answer prompts.

    \b
    [bold]Examples[/bold]
      mlx-dpo generate --model MODEL --adapter runs/a "What is the capital of Peru?"
      mlx-dpo generate --model MODEL --adapter runs/a --compare "Who wrote Emma?"
      mlx-dpo generate --model MODEL --thinking off "What is 12 * 12?"
      mlx-dpo generate --model MODEL --json - < prompts.txt

    An adapter from a run folder answers with the --thinking it was trained with.
    """
    config = resolve(*asked)
    require(config, "--model", *(["--adapter"] if compare else []))

    from mlx_dpo.sampling.generate import load_tuned

    loaded = load_tuned(config.model)
    questions = [line for prompt in prompts for line in (sys.stdin.read().splitlines() if prompt == "-" else [prompt])]
    how: dict[str, Any] = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed, "raw": raw}
    how["chat_template_kwargs"] = config.data.chat_template_kwargs
    (_compare if compare else _answer)(loaded, questions, how, as_json)


def side_by_side(prompt: str, base: str, tuned: str) -> Table:
    """A prompt over its two answers."""
    table = Table(title=Text(prompt, style="bold"), title_justify="left", box=SIMPLE_HEAD, expand=True, padding=(0, 1))
    table.add_column("before", ratio=1, style="dim")
    table.add_column("after", ratio=1)
    table.add_row(Text(base.strip()), Text(tuned.strip()))
    return table


def _answer(loaded: LoadedModel, questions: list[str], how: dict[str, Any], as_json: bool) -> None:
    from mlx_dpo.sampling.generate import generate

    stream = None if as_json else lambda text: print(text, end="", flush=True)
    for question, answer in zip(questions, generate(loaded, questions, **how, on_token=stream), strict=True):
        print(json.dumps({"prompt": question} | asdict(answer), ensure_ascii=False) if as_json else "", flush=True)


def _compare(loaded: LoadedModel, questions: list[str], how: dict[str, Any], as_json: bool) -> None:
    from mlx_dpo.sampling.generate import compare

    if as_json:
        for found in compare(loaded, questions, **how):
            print(json.dumps(asdict(found), ensure_ascii=False), flush=True)
        return
    for question in questions:
        show_comparison(loaded, question, how)


def show_comparison(loaded: LoadedModel, question: Prompt, how: dict[str, Any]) -> None:
    """Both answers to a question as they come; `how` are the keywords of `mlx_dpo.sampling.generate.generate`."""
    from rich.live import Live

    from mlx_dpo.sampling.generate import compare

    title = question if isinstance(question, str) else question[-1]["content"]
    said = {"base": "", "tuned": ""}
    console = stdout()
    with Live(side_by_side(title, **said), console=console, vertical_overflow="visible") as live:

        def show(side: str, text: str) -> None:
            said[side] += text
            live.update(side_by_side(title, **said))

        list(compare(loaded, [question], **how, on_token=show))
    if not console.is_terminal:
        console.print()  # where nothing is drawn twice, Live leaves the last line open
