"""`mlx-dpo import`: a model folder from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlx_dpo.cli.console import stderr
from mlx_dpo.cli.options import Quiet

File = Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist yet.")]
AsDtype = Annotated[
    Literal["keep", "float32", "float16", "bfloat16"],
    typer.Option("--dtype", help="Of the weights; keep: quantized ones as they are where MLX has that form."),
]


def import_model(file: File, output: Output, dtype: AsDtype = "keep", quiet: Quiet = False) -> None:
    """Make a model folder of a GGUF file.

    \b
    [bold]Examples[/bold]
      mlx-dpo import smollm2.q4_1.gguf --output smollm2
      mlx-dpo import smollm2.q4_1.gguf --output smollm2-float32 --dtype float32
    """
    from mlx_dpo.gguf.read import import_gguf

    report = import_gguf(file, output, dtype=dtype)
    if not quiet:
        tensors = ", ".join(f"{count} {name}" for name, count in report.tensors.items())
        kept = f", {report.kept_quantized} kept as they are" if dtype == "keep" else ""
        stderr().print(
            f"{report.name} ({report.model_type}, {report.parameters / 1e6:.0f} M parameters): {tensors}{kept}"
        )
    print(report.folder)
