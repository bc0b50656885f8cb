"""soup-cli's DPO on MLX: the reference is computed before the first step, the order of batches is given to it."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx

from benchmarks.workers.mlx_world import stand_in_device_info
from benchmarks.workers.probe import Probe, module_names, read_spec, write_result


def run(spec: dict[str, Any]) -> None:
    """Trains over the spec's batches and writes what was seen."""
    probe = Probe()
    with probe.stage("imports"):
        stand_in_device_info()
        from soup_cli.config.schema import SoupConfig
        from soup_cli.trainer.mlx_dpo import MLXDPOTrainerWrapper

    class Timed(MLXDPOTrainerWrapper):
        def _plan_batches(self, n_rows: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
            return [list(range(i, i + batch_size)) for i in range(0, n_rows, batch_size)]

        def _prepare_objective(self, *args: Any) -> None:
            with probe.stage("reference"):
                super()._prepare_objective(*args)
            probe.start()

        def _report(self, *args: Any, loss: float, metrics: dict[str, float], **kwargs: Any) -> None:
            probe.step(loss=loss, accuracy=metrics["reward_accuracy"])

    os.chdir(spec["folder"])  # it writes below the working folder
    trainer = Timed(SoupConfig(**_settings(spec)))
    with probe.stage("load"):
        rows = [
            {name: p[name] for name in ("prompt", "chosen", "rejected")} for batch in spec["batches"] for p in batch
        ]
        trainer.setup({"train": rows})
        mx.eval(trainer.model.parameters())
    trainer.train()
    write_result(probe, peak_bytes=mx.get_peak_memory())


def _settings(spec: dict[str, Any]) -> dict[str, Any]:
    keys, blocks = module_names(spec), spec["blocks"]
    if spec["top_layers"] < blocks:  # it has no number of top blocks, but takes whole module paths
        top = range(blocks - spec["top_layers"], blocks)
        keys = [f"model.layers.{block}.{key}" for block in top for key in keys]
    return {
        "base": spec["model"],
        "task": "dpo",
        "backend": "mlx",
        "output": "soup",
        # prompts are cut to half of max_length: doubled, all stay whole
        "data": {"train": "rows.jsonl", "format": "dpo", "max_length": 2 * spec["max_length"]},
        "training": {
            "epochs": 1,
            "lr": spec["learning_rate"],
            "batch_size": spec["batch"],
            "gradient_accumulation_steps": 1,
            "lora": {
                "r": spec["rank"],
                "alpha": int(spec["rank"] * spec["scale"]),
                "dropout": 0.0,
                "target_modules": keys,
            },
            "quantization": "none",
            "optimizer": "adamw_torch",
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.01,
            "logging_steps": 1,
            "save_steps": 10**6,
            "dpo_beta": spec["beta"],
            "seed": spec["seed"],
            "gradient_checkpointing": spec["checkpoint"],
        },
    }


if __name__ == "__main__":
    run(read_spec())
