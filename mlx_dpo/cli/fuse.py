"""`mlx-dpo fuse`: model and adapter as one model folder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_dpo.cli.console import stderr
from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import SCORED_DATA, Quiet, require
from mlx_dpo.config import Dtype, ModelConfig
from mlx_dpo.settings import resolve

if TYPE_CHECKING:
    from mlx_dpo.export.fuse import FuseReport

MODEL = ("model.path", "model.revision", "model.adapter", "model.trust_remote_code")
NOTES = {
    "model.adapter": "adapter folder (mlx-lm or PEFT) to put into the model",
    "data.path": "rows to check the result with; the package's own without it",
}

Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist yet.")]
AsDtype = Annotated[
    Dtype, typer.Option("--dtype", help="Of the weights; auto: the base's own, 16-bit if it is quantized.")
]
Bits = Annotated[int | None, typer.Option("--quantize-bits", metavar="N", help="Quantize the result.")]
GroupSize = Annotated[
    int | None, typer.Option("--quantize-group-size", metavar="N", help="Weights that share a scale.")
]
Mode = Annotated[
    str | None, typer.Option("--quantize-mode", metavar="WORD", help="MLX's mode: affine, mxfp4, nvfp4, mxfp8.")
]
KeepAdapted = Annotated[
    int | None, typer.Option("--keep-adapted-bits", metavar="N", help="Hold adapted layers in 8 or 16 bits.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Load what was written and compare it with base + adapter.")
]
Rows = Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Rows to compare on.")]


Said = tuple[Iterable[str], Iterable[object]]
"""What an export has to tell: lines for people, who may want it quiet, and the lines of its result."""


def exporter(rows: int) -> Callable[[Callable[..., Said]], Callable[..., None]]:
    """Makes a verb of a function that exports, and gives it the flags of every export, with `rows` to compare on.

    The function gets the model, its adapter, how it is to check and tell what it does, and its own flags. These are
    judged before it imports the export, so that a mistyped one is refused at once.
    """

    def decorate(export: Callable[..., Said]) -> Callable[..., None]:
        def verb(asked: Asked, *, verify: Verify = True, rows: Rows = rows, quiet: Quiet = False, **own: Any) -> None:
            config = resolve(*asked)
            require(config, "--model", "--adapter")

            from mlx_dpo.cli.progress import show_progress

            with show_progress(quiet=quiet) as on_event:
                data = config.data if config.data.path or config.data.chat_template_kwargs else None
                options = {"verify": verify, "data": data, "rows": rows, "on_event": on_event}
                told, result = export(config.model, config.model.adapter, options, **own)
            given = config.data.chat_template_kwargs
            for line in () if quiet else (*told, *_as_trained(given)):
                stderr().print(line)
            for found in result:
                print(found)

        asked, *shared, _ = inspect.signature(verb, eval_str=True).parameters.values()
        own = list(inspect.signature(export, eval_str=True).parameters.values())[3:]
        wraps(export)(verb).__signature__ = inspect.Signature([asked, *own, *shared])  # type: ignore[attr-defined]
        return with_settings(*MODEL, *SCORED_DATA, notes=NOTES)(verb)

    return decorate


def _as_trained(given: Mapping[str, Any] | None) -> Iterator[str]:
    """The chat template goes along as it is: what it was given in training a runtime must give it too."""
    if given:
        yield f"trained with the chat template given {json.dumps(given)}; give it that where it runs:"
        yield f"  mlx_lm.server --chat-template-args, llama-server --chat-template-kwargs '{json.dumps(given)}'"


@exporter(rows=32)
def fuse(
    model: ModelConfig,
    adapter: str,
    options: dict[str, Any],
    output: Output,
    dtype: AsDtype = "auto",
    quantize_bits: Bits = None,
    quantize_group_size: GroupSize = None,
    quantize_mode: Mode = None,
    keep_adapted_bits: KeepAdapted = None,
) -> Said:
    """Make one model folder of a model and its adapter.

    \b
    [bold]Examples[/bold]
      mlx-dpo fuse --model MODEL --adapter runs/a --output fused
      mlx-dpo fuse --model MODEL --adapter runs/a --output fused-4bit --quantize-bits 4

    Rounding to few bits can round the tuning away; how much is measured and said.
    """
    from mlx_dpo.export.fuse import fuse

    report = fuse(
        model, adapter, output,
        dtype=dtype, quantize_bits=quantize_bits, quantize_group_size=quantize_group_size,
        quantize_mode=quantize_mode, keep_adapted_bits=keep_adapted_bits, **options,
    )  # fmt: skip
    return describe(report), [report.output]


def describe(report: FuseReport) -> Iterator[str]:
    """What was written, and what rounding took from the tuning."""
    yield f"weights   {report.form}, {report.size / 1e6:.0f} MB; adapted layers {report.adapted_form}"
    yield f"tuning    {report.kept:.1%} of it arrived, rounding noise {report.error:.2g} of its size"
    if found := report.verified:
        yield (
            f"verified  {found.tokens} tokens of {found.rows} rows: off by {found.error:.2g} nats on average, "
            f"{found.largest:.2g} at most; the adapter itself makes {found.effect:.2g}"
        )
    if report.compared:
        yield f"verified  {report.compared} adapted layers, as written, are base + adapter; the model was not run"
