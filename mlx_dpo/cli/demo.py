"""`mlx-dpo demo`: a real model learns to answer directly, before your eyes."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mlx_dpo.cli.console import stderr, stdout
from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from mlx_dpo.events import OnEvent

DATA = Path(str(files("mlx_dpo"))) / "demo" / "data"
SHOWN = (0, 5, 27, 44)
"""Row indices of the unseen prompts that are answered before and after."""
LONGEST_ANSWER = 60
MEASURES = {
    "by the answer's log-prob per token": "logps/accuracies_per_token",
    "by the reward, log π - log π_ref": "rewards/accuracies",
}

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; runs/demo, or the next that is free.")]


def demo(output: Output = None) -> None:
    """Watch a real model learn a preference, in a few minutes.

    SmolLM2-135M-Instruct learns from 136 pairs to answer directly and concisely.
    It is fetched once, some 100 MB, and kept in MLX_DPO_CACHE (~/.cache/mlx_dpo).

    \b
    [bold]Examples[/bold]
      mlx-dpo demo
      mlx-dpo demo --output runs/mine
    """
    from mlx_dpo.cli.progress import show_progress
    from mlx_dpo.demo.model import fetch_demo_model
    from mlx_dpo.training.loop import train

    console = stderr()
    began = time.perf_counter()
    config = demo_config(fetch_demo_model(progress=console.print), output or free_folder(Path("runs/demo")))
    with show_progress(rows_per_step=config.train.batch_size) as on_event:
        before = judge(config, None, on_event)
        if train(config, on_event=on_event).interrupted:
            raise KeyboardInterrupt
        after = judge(config, config.train.output, on_event)
    show_answers(config)
    show_accuracy(before, after)
    show_files(config)
    console.print(f"in {time.perf_counter() - began:.0f} seconds", style="dim")


def demo_config(model: Path, output: Path) -> RunConfig:
    """The settings of the demo; its run folder holds them too.

    The sft term keeps the chosen answers likely: DPO alone, at a rate that teaches in two minutes, breaks the language.
    At 3e-4 and more the same rows take the model 0.7 nats a token and more from its base, at 2e-4 only 0.16.
    """
    return RunConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(path=str(DATA / "train.jsonl"), valid_fraction=0.0, max_length=512),
        lora=LoraConfig(num_layers=8),
        loss=LossConfig(type="sigmoid:1.0,sft:0.5"),
        optim=OptimConfig(learning_rate=2.5e-4),
        train=TrainConfig(output=str(output), batch_size=4, epochs=2.0, save_every=1000, eval_samples=0),
    )


def free_folder(wanted: Path) -> Path:
    """`wanted`, or with the first number behind it that makes it a folder that is not there."""
    names = (wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}") for n in count(1))
    return next(path for path in names if not path.exists())


def judge(config: RunConfig, adapter: str | None, on_event: OnEvent) -> dict[str, Any]:
    """How the model ranks the held-out pairs."""
    from mlx_dpo.evaluation.evaluate import evaluate

    data = replace(config.data, path=str(DATA / "test.jsonl"))
    return evaluate(replace(config.model, adapter=adapter), data, config.loss, on_event=on_event)


def show_answers(config: RunConfig) -> None:
    """Unseen prompts with the answers before and after, as they come."""
    from mlx_dpo.cli.generate import show_comparison
    from mlx_dpo.data.load import load_prompts
    from mlx_dpo.sampling.generate import load_tuned

    loaded = load_tuned(replace(config.model, adapter=config.train.output))
    prompts = load_prompts(DATA / "test.jsonl")
    for i in SHOWN:
        show_comparison(loaded, prompts[i].prompt, {"max_tokens": LONGEST_ANSWER})


def show_accuracy(before: dict[str, Any], after: dict[str, Any]) -> None:
    """How many of the held-out pairs are ranked right, with 95 % intervals."""
    from mlx_dpo.losses.metrics import wilson_interval

    title = f"{after['rows']} unseen pairs ranked right"
    table = Table("", "before", "after", title=title, title_justify="left", title_style="bold")
    for label, key in MEASURES.items():
        cells = []
        for found in (before, after):
            low, high = wilson_interval(found.get(key, 0.0) * found["rows"], found["rows"])
            cells.append(f"{found[key]:.0%} ({low:.0%} to {high:.0%})" if key in found else "none yet: all are 0")
        table.add_row(label, *cells)
    table.add_row("KL from the base, nats a token", "0.00", f"{after['kl/token']:.2f}")
    stdout().print(table)


def show_files(config: RunConfig) -> None:
    """Where the adapter lies, and what to do with it."""
    output = Path(config.train.output)
    print(f"\nWritten to {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    print("Ask it yourself:")
    print(f'  mlx-dpo generate --model {config.model.path} --adapter {output} --compare "Who wrote Emma?"')
