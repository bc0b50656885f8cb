"""The model card of a run: README.md, made of config.yaml and metrics.jsonl, naming no path of the user's machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_dpo.config import RunConfig
from mlx_dpo.errors import RunError, UsageError
from mlx_dpo.events import OnEvent, Warned
from mlx_dpo.files import written_whole
from mlx_dpo.run.folder import RunFolder
from mlx_dpo.settings import resolve

RESULTS = {
    "eval_rewards/accuracies": ("pairs ranked right by the reward", "{:.1%}"),
    "eval_logps/accuracies": ("pairs ranked right by log-prob", "{:.1%}"),
    "eval_rewards/margins": ("reward margin", "{:.3f}"),
    "eval_loss": ("loss", "{:.4f}"),
    "eval_logps/chosen": ("log-prob of chosen answers, nats", "{:.1f}"),
    "eval_logps/rejected": ("log-prob of rejected answers, nats", "{:.1f}"),
    "eval_kl/token": ("KL from the reference, nats a token", "{:.4f}"),
}
"""What a card shows of the held-out rows: the metric, its name there, its form."""


def card_along(adapter: str | Path, into: Path, *, fused: bool, on_event: OnEvent) -> None:
    """Writes the card beside an export, where the adapter's folder is that of a training.

    An export does not fail for its card: settings that this version does not read are a warning.
    """
    if not RunFolder(Path(adapter)).config.is_file():
        return
    try:
        write_card(adapter, into, fused=fused)
    except UsageError as error:
        on_event(Warned(f"no model card: {error.message}"))


def write_card(run_folder: str | Path, into: Path | None = None, *, fused: bool = False) -> Path:
    """Writes the card of a run as README.md into its folder, or `into` another one; raises as `model_card`."""
    target = (into or Path(run_folder)) / "README.md"
    text = model_card(Path(run_folder), fused=fused)
    with written_whole(target) as beside:
        beside.write_text(text)
    return target


def model_card(run_folder: Path, *, fused: bool = False) -> str:
    """The card's text: metadata for the Hub, what it is, results before and after, how to use it, settings.

    Raises:
        RunError: the folder is no run's.
        UsageError: its config.yaml cannot be read.
    """
    run = RunFolder(run_folder)
    if not run.config.is_file():
        raise RunError(f"{run_folder} is no run folder: it has no config.yaml", "name a folder that train wrote")
    config = resolve(run.config)
    lines = _lines(run.metrics)
    base = _hub_name(config.model.path)
    name = run_folder.resolve().name
    of = f"[{base}](https://huggingface.co/{base})" if base else "a model of its author's"
    kind = {"lora": "LoRA", "dora": "DoRA"}[config.lora.fine_tune_type]
    parts = [
        _metadata(base, fused),
        f"# {name}",
        f"{'A fine-tune of' if fused else f'A {kind} adapter for'} {of}, made on MLX with mlx_dpo: "
        f"loss `{config.loss.type}`, β {config.loss.beta:g}.",
        _results(config, lines),
        _usage(name, base, fused),
        _training(config, lines),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.is_file():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]


def _hub_name(path: str) -> str | None:
    """`owner/name` where that is what the user gave, and no folder."""
    is_name = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    return path if is_name else None


def _metadata(base: str | None, fused: bool) -> str:
    from huggingface_hub import ModelCardData

    tags = ["dpo", "preference-optimization", "mlx-dpo", *([] if fused else ["lora"])]
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=base,
        base_model_relation=("finetune" if fused else "adapter") if base else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _results(config: RunConfig, lines: list[dict[str, Any]]) -> str:
    """A table of the held-out rows before the training and at the step whose adapter this is."""
    found = [line for line in lines if "eval_loss" in line]
    after = [line for line in found if line["step"] > 0]
    if not after:
        return ""
    kept = min(after, key=lambda line: line["eval_loss"]) if config.train.keep_best else after[-1]
    before = next((line for line in found if line["step"] == 0), {})
    same = before.get("eval_rewards/margins") == 0  # then policy and reference were one, and no reward ranked anything
    rows = ["| on held-out rows | before | after |", "| --- | --- | --- |"]
    for key, (label, form) in RESULTS.items():
        if key not in kept:
            continue
        silent = key not in before or (same and key == "eval_rewards/accuracies")
        cells = ["none" if silent else form.format(before[key]), form.format(kept[key])]
        if key == "eval_rewards/accuracies" and "eval_accuracy_low" in kept:
            cells[1] += f" ({kept['eval_accuracy_low']:.1%} to {kept['eval_accuracy_high']:.1%})"
        rows.append(f"| {label} | {cells[0]} | {cells[1]} |")
    compared = kept.get("eval_comparisons")
    note = f"\n\nThe interval is the 95 % one of {compared:.0f} comparisons." if compared else ""
    return "## Results\n\n" + "\n".join(rows) + note


def _usage(name: str, base: str | None, fused: bool) -> str:
    model = name if fused else f"{base or 'BASE'} --adapter-path {name}"
    return f'## Use\n\n```sh\nmlx_lm.generate --model {model} --prompt "…"\n```'


def _training(config: RunConfig, lines: list[dict[str, Any]]) -> str:
    steps = [line for line in lines if "learning_rate" in line]
    last = steps[-1] if steps else {}
    scale = config.lora.scale if config.lora.alpha is None else config.lora.alpha / config.lora.rank
    reference = config.loss.reference
    blocks = "all blocks" if config.lora.num_layers == -1 else f"the top {config.lora.num_layers} blocks"
    rows = {
        "data": Path(config.data.path).name,
        "loss": f"{config.loss.type}, β {config.loss.beta:g}",
        "reference": {"base": "the base model", "start": "the starting adapter", "none": "none"}.get(
            reference, Path(reference).name
        ),
        "adapter": f"rank {config.lora.rank}, scale {scale:g}, {blocks}",
        "optimizer": f"{config.optim.name}, learning rate {config.optim.learning_rate:g}, "
        f"{config.optim.lr_scheduler_type}",
        "batch": f"{config.train.batch_size} × {config.train.grad_accumulation_steps} rows",
        "seed": str(config.train.seed),
    }
    if config.data.chat_template_kwargs:
        rows["chat template given"] = f"`{json.dumps(config.data.chat_template_kwargs)}`"
    if last:
        rows["steps"] = f"{last['step']}, {last['epoch']:.2g} epochs"
        rows["time"] = f"{last['seconds']:.0f} s of training, {last['peak_memory_gb']:.2f} GB at the peak"
    if lines and "early_stopping/best_step" in lines[-1]:
        rows["stopped early"] = f"no better held-out loss after step {lines[-1]['early_stopping/best_step']}"
    if config.model.adapter:
        rows["started from"] = f"the adapter {Path(config.model.adapter).name}"
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    return f"## Training\n\n| setting | value |\n| --- | --- |\n{table}"
