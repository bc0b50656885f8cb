"""`mlx-dpo check`: what is in the data, and what the model is going to read of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from mlx_dpo import settings
from mlx_dpo.cli.console import show_warning, stderr, stdout
from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import SCORED_DATA, require
from mlx_dpo.config import ModelConfig, RunConfig
from mlx_dpo.data.doctor import examine
from mlx_dpo.data.load import Splits, load_splits
from mlx_dpo.data.preview import Preview, preview
from mlx_dpo.data.tokenize import encode_records
from mlx_dpo.errors import ModelError, UsageError

STYLES = {"prompt": "", "scored": "green", "cut": "red strike"}

Rows = Annotated[int, typer.Option("--preview", metavar="N", min=0, help="Show so many rows as the model reads them.")]


@with_settings("model.path", "model.revision", "model.trust_remote_code", *SCORED_DATA)
def check(asked: Asked, preview: Rows = 0) -> None:
    """Look at the data before training on it.

    \b
    [bold]Examples[/bold]
      mlx-dpo check --data pairs.jsonl
      mlx-dpo check --data pairs.jsonl --model MODEL --preview 3

    Every row that cannot be used is named with its line. With --model the tokens
    are counted, --preview shows what is prompt, what is scored, what was cut, and
    rows are named whose answers the chat template changes.
    """
    config = settings.resolve(*asked)
    require(config, "--data")
    if preview and not config.model.path:
        raise UsageError("--preview needs a --model, whose tokenizer and chat template it shows")

    splits = load_splits(config.data.path, valid_fraction=0)
    show_rows(splits)
    if config.model.path:
        show_tokens(splits, config, preview)


def show_rows(splits: Splits) -> None:
    """What each split holds, and what in it deserves a look."""
    for name, records in splits._asdict().items():
        if records:
            report = examine(records, splits.valid if name == "train" else ())
            kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
            shapes = ", ".join(f"{shape} ({count})" for shape, count in report.shapes.items())
            print(f"{name}: {kinds} rows, {report.prompts} different prompts, written as {shapes}")
            print(
                f"{name}: mean characters: prompt {report.mean_prompt:.0f}, "
                f"first answer {report.mean_first:.0f}, last {report.mean_last:.0f}"
            )
            for text in report.warnings():
                show_warning(stderr(), f"{name}: {text}")


def show_tokens(splits: Splits, config: RunConfig, rows: int) -> None:
    """What tokenizing makes of each split, and a look at the first rows."""
    tokenizer = _load_tokenizer(config.model)
    for name, records in splits._asdict().items():
        if records:
            _, report = encode_records(records, tokenizer, config.data)
            print(
                f"{name}: {report.prompt_tokens} prompt tokens, {report.completion_tokens} scored, "
                f"{report.longest} in the longest answer with its prompt"
            )
            for text in (*report.warnings(config.data.max_length), *report.template_warnings(10)):
                show_warning(stderr(), f"{name}: {text}")
    for record in [*splits.train, *splits.valid, *splits.test][:rows]:
        stdout().print(draw(preview(record, tokenizer, config.data)))


def _load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer with its chat template alone: looking at data needs no weights, which may not even be here."""
    from transformers import AutoTokenizer

    from mlx_dpo.models.load import model_folder

    folder = model_folder(config.path, config.revision, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers and the model's own code raise of every kind
        raise ModelError(f"the tokenizer in {folder} cannot be read: {error}", "fetch the model again") from error


def draw(row: Preview) -> Table:
    """The pieces of a row one below the other; colours say the same as the words beside them."""
    title = f"row {row.id}" + (", dropped: no scored token is left" if row.dropped else "")
    columns = ("answer", Column("tokens", justify="right"), "read as", Column("text", ratio=1))
    table = Table(*columns, title=title, title_justify="left", title_style="bold", expand=True, show_lines=True)
    for name, pieces in row.answers.items():
        for piece in pieces:
            style = STYLES[piece.role]
            table.add_row(name, str(piece.tokens), Text(piece.role, style), Text(piece.text, style))
    return table
