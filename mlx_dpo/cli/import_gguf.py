"""`mlx-dpo import`: a model folder from a GGUF file, or an mlx-lm adapter from a PEFT one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlx_dpo.cli.console import stderr
from mlx_dpo.cli.options import Quiet
from mlx_dpo.errors import ModelError, UsageError

Source = Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file, or the folder of a PEFT adapter.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist yet.")]
AsDtype = Annotated[
    Literal["keep", "float32", "float16", "bfloat16"],
    typer.Option("--dtype", help="Of a GGUF file's weights; keep: quantized ones as they are where MLX has that form."),
]
Base = Annotated[str | None, typer.Option("--model", "-m", help="The model that a PEFT adapter is for.")]


def import_model(
    file: Source, output: Output, dtype: AsDtype = "keep", model: Base = None, quiet: Quiet = False
) -> None:
    """Make a model folder of a GGUF file, or mlx-lm's form of a PEFT adapter.

    \b
    [bold]Examples[/bold]
      mlx-dpo import smollm2.q4_1.gguf --output smollm2
      mlx-dpo import smollm2.q4_1.gguf --output smollm2-float32 --dtype float32
      mlx-dpo import peft-adapter --model MODEL --output runs/theirs
    """
    if not file.exists():
        raise ModelError(f"there is no {file}", "give a GGUF file, or the folder of a PEFT adapter")
    if file.is_dir():
        _import_adapter(file, output, dtype, model, quiet)
        return
    if model is not None:
        raise UsageError("--model is for the folder of a PEFT adapter; a GGUF file is a model itself", "leave it out")
    from mlx_dpo.gguf.read import import_gguf

    report = import_gguf(file, output, dtype=dtype)
    if not quiet:
        tensors = ", ".join(f"{count} {name}" for name, count in report.tensors.items())
        kept = f", {report.kept_quantized} kept as they are" if dtype == "keep" else ""
        stderr().print(
            f"{report.name} ({report.model_type}, {report.parameters / 1e6:.0f} M parameters): {tensors}{kept}"
        )
    print(report.folder)


def _import_adapter(folder: Path, output: Path, dtype: str, model: str | None, quiet: bool) -> None:
    if model is None:
        raise UsageError(f"{folder} is a folder, so an adapter: for which model?", "name it with --model")
    if dtype != "keep":
        raise UsageError(f"--dtype {dtype} is for GGUF files; an adapter stays as it is", "leave it out")
    from mlx_dpo.config import ModelConfig
    from mlx_dpo.export.peft import import_peft

    adapter = import_peft(ModelConfig(path=model), folder, output)
    if not quiet:
        stderr().print(f"rank {adapter.rank}, scale {adapter.scale:g}, on {', '.join(adapter.keys)}")
    print(output)
