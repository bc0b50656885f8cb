"""`mlx-dpo plan`: how much memory a run will need, before it is begun."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_dpo.cli.console import show_warning, stderr, stdout
from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import Json, require
from mlx_dpo.settings import resolve

if TYPE_CHECKING:
    from mlx_dpo.planning.machine import Machine
    from mlx_dpo.planning.plan import Plan

Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Of another machine, a Mac with so much, e.g. 16GB.")
]


@with_settings("model", "data", "lora", "loss", "optim", "train")
def plan(asked: Asked, memory: Memory = None, as_json: Json = False) -> None:
    """Foresee the memory that a run will need.

    \b
    [bold]Examples[/bold]
      mlx-dpo plan --model MODEL --data pairs.jsonl
      mlx-dpo plan --config run.yaml --memory 16GB
      mlx-dpo plan --model MODEL --data pairs.jsonl --auto --json

    No weight is read: a model on the Hub is not even fetched. If the run does not
    fit, it says with what settings it does, and the exit status is 1.
    """
    config = resolve(*asked)
    require(config, "--model", "--data")

    from mlx_dpo.cli.progress import show_progress
    from mlx_dpo.logprobs.scorer import optimizations_on
    from mlx_dpo.planning.machine import apple_machine, this_machine
    from mlx_dpo.training.setup import plan_run

    machine = apple_machine(memory) if memory else this_machine()
    with show_progress(quiet=True) as on_event:
        found, change = plan_run(config, machine, on_event=on_event)
    fits = found.fits(machine)
    if as_json:
        said = {"machine": machine._asdict(), "fits": fits, "change": change} | asdict(found)
        said["largest"] = found.largest._asdict() if found.largest else None
        print(json.dumps(said, ensure_ascii=False))
    else:
        _show(found, machine)
        off = [name for name in optimizations_on(config.speed) if name not in optimizations_on(found.speed)]
        without = [f"without speed.{name}, which this model's code does not take" for name in off]
        for note in (*found.notes, *without):
            show_warning(stderr(), note)
        if not fits:
            print(f"it does not fit: {change}")
        elif change:
            print(f"with {change}")
    if not fits:
        raise typer.Exit(1)


def _show(found: Plan, machine: Machine) -> None:
    from rich.table import Column, Table

    from mlx_dpo.planning.machine import in_gb

    highest = max(found.phases, key=lambda name: found.phases[name])
    shape = found.largest
    tokens = f"{shape.rows} × ({shape.prompt} + {shape.answers} × {shape.completion}) tokens" if shape else ""
    lines: list[tuple[str, str, str]] = [(name, in_gb(nbytes), "") for name, nbytes in found.parts.items()]
    room = f"in {highest}, of {in_gb(machine.usable)} that {machine.name} has for arrays"
    lines.append(("memory", in_gb(found.peak), room))
    if found.buffer_cache >= 1e8:
        lines.append(
            ("buffer cache", in_gb(found.buffer_cache), "that MLX keeps for new arrays, as far as there is room")
        )
    for size, where in ((found.cache_in_memory, "in memory, outside MLX"), (found.cache_on_disk, "on disk")):
        lines += [("activation cache", in_gb(size), where)] if size else []
    lines += [(f"in {name}", in_gb(nbytes), "") for name, nbytes in found.phases.items() if name != highest]
    lines += [("largest micro-batch", tokens, "")] if tokens else []
    table = Table.grid("", Column(justify="right"), "", padding=(0, 2))
    for line in lines:
        table.add_row(*line, style="bold" if line[0] == "memory" else "")
    stdout().print(table)
