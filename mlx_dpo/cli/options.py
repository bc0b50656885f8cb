"""Options that several verbs share, and what they have in common to refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_dpo.errors import UsageError

if TYPE_CHECKING:
    from mlx_dpo.config import RunConfig

SCORED_DATA = ("data.path", "data.max_length", "data.truncation_mode", "data.chat_template_kwargs")
"""The settings of data from which nothing is held out."""

ADAPTER = {"model.adapter": "adapter folder (mlx-lm or PEFT); without it the model as it is"}
"""What --adapter means to a verb that does not train."""

Json = Annotated[bool, typer.Option("--json", help="For programs: JSON, an object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only warnings, and the result.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Rows that are computed at once.")]
Split = Annotated[
    Literal["auto", "train", "valid", "test"],
    typer.Option("--split", help="Which rows; auto: the test file, else the valid file, else all."),
]
ReferenceAdapter = Annotated[
    str | None,
    typer.Option("--reference-adapter", metavar="TEXT", help="Measure from this adapter, not from the base model."),
]


def require(config: RunConfig, *flags: str) -> None:
    """Refuses a command line that lacks what the verb cannot do without; `flags` of --model, --adapter and --data.

    Raises:
        UsageError: names all that is missing.
    """
    known = {"--model": config.model.path, "--adapter": config.model.adapter, "--data": config.data.path}
    missing = [flag for flag in flags if not known[flag]]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be given", "as flags, or in a file with --config")
