"""mlx_dpo itself: its training loop as it is, timed from one event to the next; or with `part: reference` what comes
before the first step."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.workers.probe import Probe, read_spec, write_result
from mlx_dpo.config import (
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SpeedConfig,
    TrainConfig,
)
from mlx_dpo.events import Event, Progressed, Started, Stepped, Warned

STAGES = {"frozen blocks": "frozen_blocks", "reference log-probs": "reference"}
"""What comes before the first step, by the name that mlx_dpo's events have for it."""


def run_config(spec: dict[str, Any]) -> RunConfig:
    """The settings of a run over the spec's batches, in their order; the rows are written to a file first."""
    folder = Path(spec["folder"])
    rows = [pair for batch in spec["batches"] for pair in batch]
    texts = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    options = spec["options"]
    return RunConfig(
        model=ModelConfig(path=spec["model"]),
        data=DataConfig(path=str(folder / "rows.jsonl"), valid_fraction=0.0, max_length=spec["max_length"]),
        lora=LoraConfig(
            rank=spec["rank"], scale=spec["scale"], num_layers=spec["top_layers"], keys=tuple(spec["keys"])
        ),
        loss=LossConfig(beta=spec["beta"]),
        optim=OptimConfig(
            learning_rate=spec["learning_rate"], weight_decay=0.01, lr_scheduler_type="constant", warmup_ratio=0.0
        ),
        train=TrainConfig(
            output=str(folder / "run"),
            batch_size=spec["batch"],
            shuffle=False,
            seed=spec["seed"],
            grad_checkpoint=spec["checkpoint"],
            steps_per_eval=None,
            save_every=10**9,
        ),
        speed=SpeedConfig(**options.get("speed", {})),
    )


def run(spec: dict[str, Any]) -> None:
    """Prepares, or trains, and writes what was seen."""
    probe, under_way = Probe(), ExitStack()
    warnings: list[str] = []
    peaks: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            warnings.append(event.text)
        elif isinstance(event, Progressed) and event.name in STAGES:
            if event.done == 0:
                under_way.enter_context(probe.stage(STAGES[event.name]))
            if event.done == event.total:
                under_way.close()
        elif isinstance(event, Started):
            peaks.append(mx.get_peak_memory())
            mx.reset_peak_memory()
            probe.start()
        elif isinstance(event, Stepped):
            probe.step(loss=event.metrics["loss"], accuracy=event.metrics["rewards/accuracies"])

    config = run_config(spec)
    if spec["options"].get("part") == "reference":
        from mlx_dpo.training.setup import prepare

        with probe.stage("prepare"):
            prepare(config, ExitStack(), listen)
    else:
        from mlx_dpo.training.loop import train

        train(config, on_event=listen)
    peaks.append(mx.get_peak_memory())
    write_result(
        probe,
        peak_bytes=max(peaks),
        peak_steps_mb=peaks[-1] / 2**20,
        warnings=warnings,
    )


if __name__ == "__main__":
    run(read_spec())
