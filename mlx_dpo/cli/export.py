"""`mlx-dpo export`: what was trained, in the form of another program, and checked there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlx_dpo.cli.fuse import Said, exporter
from mlx_dpo.cli.options import Quiet
from mlx_dpo.config import ModelConfig

if TYPE_CHECKING:
    from mlx_dpo.gguf.verify import VerifyReport

HELP = """
Take what was trained to another program.

\b
[bold]Examples[/bold]
  mlx-dpo export gguf --model MODEL --adapter runs/a --output tuned.gguf
  mlx-dpo export gguf-adapter --model MODEL --adapter runs/a --output adapter.gguf
  mlx-dpo export ollama --model MODEL --adapter runs/a --output tuned
  mlx-dpo export lmstudio --model MODEL --adapter runs/a --name tuned
  mlx-dpo export peft --model MODEL --adapter runs/a --output peft
  mlx-dpo export hub --folder runs/a --repo me/tuned --dry-run

Each checks what it wrote in the program that it is for, where that is installed.
"""

app = typer.Typer(help=HELP, rich_markup_mode="rich", no_args_is_help=True)

Options = dict[str, Any]
File = Annotated[Path, typer.Option("--output", "-o", help="The file to write; it must not exist yet.")]
Folder = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist yet.")]
OutType = Annotated[
    str,
    typer.Option("--outtype", metavar="WORD", help="f16, f32, bf16, q8_0, q4_1 (the base's own bits), or a K-quant."),
]
ModelForm = Annotated[
    Literal["f16", "f32", "bf16", "q8_0", "q4_1"],
    typer.Option("--outtype", metavar="WORD", help="f16, f32, bf16, q8_0 or q4_1 (the base's own bits)."),
]
AdapterForm = Annotated[Literal["f32", "f16"], typer.Option("--outtype", metavar="WORD", help="f32 or f16.")]
OllamaName = Annotated[str | None, typer.Option("--name", help="What Ollama will call it; the folder's name.")]
StudioName = Annotated[str, typer.Option("--name", help="What LM Studio will call it.")]
Publisher = Annotated[str, typer.Option("--publisher", help="The folder above it, as LM Studio shows it.")]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", help="Where PEFT will find the base model; --model without it.")
]
RunFolder = Annotated[Path, typer.Option("--folder", help="An adapter's or a model's folder.")]
Repo = Annotated[str, typer.Option("--repo", help="Where to: owner/name.")]
Public = Annotated[bool, typer.Option("--public", help="For everybody to see; private without it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go, and send nothing.")]


@app.command("gguf")
@exporter(rows=4)
def gguf(model: ModelConfig, adapter: str, options: Options, output: File, outtype: OutType = "f16") -> Said:
    """Write base and adapter as one GGUF file, for llama.cpp and all that is built on it."""
    from mlx_dpo.export.gguf import export_gguf

    report = export_gguf(model, adapter, output, outtype=outtype, **options)
    return [_check(report.verified)], [report.path]


@app.command("gguf-adapter")
@exporter(rows=4)
def gguf_adapter(
    model: ModelConfig, adapter: str, options: Options, output: File, outtype: AdapterForm = "f32"
) -> Said:
    """Write the adapter alone as a GGUF file, for `llama-cli --lora`."""
    from mlx_dpo.export.gguf import export_gguf_adapter

    report = export_gguf_adapter(model, adapter, output, dtype=outtype, **options)
    return [_check(report.verified)], [report.path]


@app.command("peft")
@exporter(rows=8)
def peft(model: ModelConfig, adapter: str, options: Options, output: Folder, base_model: BaseModel = None) -> Said:
    """Write the adapter as a PEFT folder, for transformers, vLLM and others."""
    from mlx_dpo.export.peft import export_peft

    report = export_peft(model, adapter, output, base_model=base_model, **options)
    checks = (
        f"verified in {found.runtime}: off by {found.largest:.2g} nats at most over {found.tokens} tokens; "
        f"the adapter itself makes {found.effect:.2g}"
        for found in report.verified
    )
    return checks, [report.output]


@app.command("ollama")
@exporter(rows=4)
def ollama(
    model: ModelConfig,
    adapter: str,
    options: Options,
    output: Folder,
    name: OllamaName = None,
    outtype: ModelForm = "f16",
) -> Said:
    """Write a fused GGUF file and a Modelfile for Ollama, and the commands that make it known there."""
    from mlx_dpo.export.ollama import export_ollama

    report = export_ollama(model, adapter, output, name=name, outtype=outtype, **options)
    unlike = "the chat template has no known counterpart; Ollama reads the one inside the GGUF file"
    return [_check(report.verified), *([] if report.has_template else [unlike])], report.commands


@app.command("lmstudio")
@exporter(rows=4)
def lmstudio(
    model: ModelConfig,
    adapter: str,
    options: Options,
    name: StudioName,
    publisher: Publisher = "local",
    outtype: ModelForm = "f16",
) -> Said:
    """Write a fused GGUF file where LM Studio finds it."""
    from mlx_dpo.export.lmstudio import export_lmstudio

    report = export_lmstudio(model, adapter, name, publisher=publisher, outtype=outtype, **options)
    return [_check(report.verified)], [report.path]


@app.command("hub")
def hub(folder: RunFolder, repo: Repo, public: Public = False, dry_run: DryRun = False, quiet: Quiet = False) -> None:
    """Send an adapter's or a model's folder with its card to the Hub; private unless asked otherwise."""
    from mlx_dpo.cli.progress import show_progress
    from mlx_dpo.export.hub import push

    with show_progress(quiet=quiet) as on_event:
        report = push(folder, repo, private=not public, dry_run=dry_run, on_event=on_event)
    for name, size in report.files:
        print(f"{size / 1e6:10.2f} MB  {name}")
    where = report.url or f"{report.repo} ({'private' if report.private else 'public'}; nothing was sent)"
    print(where)


def _check(found: VerifyReport | None) -> str:
    if found is None:
        return "not checked in llama.cpp; `pip install 'mlx-dpo[verify]'` makes that possible"
    control = "" if found.control is None else f"; with the adapter off it would differ by {found.control:.2g}"
    return (
        f"verified in llama.cpp: off by {found.largest:.2g} nats at most ({found.tolerance:g} allowed), "
        f"{found.mean:.2g} on average over {found.positions} positions{control}"
    )
