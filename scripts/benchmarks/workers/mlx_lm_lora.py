"""mlx-lm-lora: its `train_dpo`, with a second loaded model as the reference, as its command line does."""

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
        from mlx_lm.utils import load
        from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

    mx.random.seed(spec["seed"])
    with probe.stage("load"):
        model = load(spec["model"])[0]
        adapt(model, spec)
        reference = load(spec["model"])[0]
        reference.freeze()
        mx.eval(reference.parameters())
    batches = Batches([[_row(pair) for pair in batch] for batch in spec["batches"]])

    class Callback(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            probe.step(loss=train_info["train_loss"])
            batches.advance()

    settings = DPOTrainingArgs(
        batch_size=spec["batch"],
        iters=len(spec["batches"]),
        steps_per_report=1,
        steps_per_save=10**9,
        adapter_file=str(Path(spec["folder"]) / "adapters.safetensors"),
        max_seq_length=spec["max_length"],
        grad_checkpoint=spec["checkpoint"],
        beta=spec["beta"],
    )
    probe.start()
    train_dpo(
        model,
        reference,
        optimizers.AdamW(learning_rate=spec["learning_rate"]),
        batches,
        args=settings,
        training_callback=Callback(),
    )
    write_result(probe, peak_bytes=mx.get_peak_memory())


def _row(pair: dict[str, Any]) -> dict[str, Any]:
    prompt = pair["prompt_ids"]
    return {
        "chosen": prompt + pair["chosen_ids"],
        "rejected": prompt + pair["rejected_ids"],
        "chosen_prompt_length": len(prompt),
        "rejected_prompt_length": len(prompt),
    }


if __name__ == "__main__":
    run(read_spec())
