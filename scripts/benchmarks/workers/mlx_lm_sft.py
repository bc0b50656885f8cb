"""mlx-lm's own supervised step on the same tokens: chosen and rejected answers as 2B rows, prompts masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.workers.mlx_world import Batches, adapt, stand_in_device_info
from benchmarks.workers.probe import Probe, read_spec, write_result


def run(spec: dict[str, Any]) -> None:
    """Trains over the spec's batches and writes what was seen."""
    probe = Probe()
    with probe.stage("imports"):
        stand_in_device_info()
        import mlx.optimizers as optimizers
        from mlx_lm.tuner.callbacks import TrainingCallback
        from mlx_lm.tuner.trainer import TrainingArgs, train
        from mlx_lm.utils import load

    mx.random.seed(spec["seed"])
    with probe.stage("load"):
        model = load(spec["model"])[0]
        adapt(model, spec)
    batches = Batches(
        [
            [
                (p["prompt_ids"] + p[answer], len(p["prompt_ids"]))
                for answer in ("chosen_ids", "rejected_ids")
                for p in batch
            ]
            for batch in spec["batches"]
        ]
    )

    class Callback(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            probe.step(loss=train_info["train_loss"])
            batches.advance()

    settings = TrainingArgs(
        batch_size=2 * spec["batch"],
        iters=len(spec["batches"]),
        steps_per_report=1,
        steps_per_save=10**9,
        adapter_file=str(Path(spec["folder"]) / "adapters.safetensors"),
        max_seq_length=spec["max_length"] + 64,  # it pads to multiples of 32 and one more
        grad_checkpoint=spec["checkpoint"],
    )
    probe.start()
    train(
        model,
        optimizers.AdamW(learning_rate=spec["learning_rate"]),
        batches,
        args=settings,
        training_callback=Callback(),
    )
    write_result(probe, peak_bytes=mx.get_peak_memory())


if __name__ == "__main__":
    run(read_spec())
