"""TRL's DPO with a PEFT adapter, on PyTorch in float32: the reference is computed before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.workers.probe import Probe, read_spec, write_result


def run(spec: dict[str, Any]) -> None:
    """Trains over the spec's batches and writes what was seen."""
    probe = Probe()
    with probe.stage("imports"):
        import datasets
        import torch
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import DPOConfig, DPOTrainer

    class Callback(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            probe.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            probe.step()

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                probe.steps[-1]["loss"] = float(logs["loss"])

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            with probe.stage("reference"):
                return super()._precompute_ref_logps(*args, **kwargs)

    torch.manual_seed(spec["seed"])
    with probe.stage("load"):
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = [{name: p[name] for name in ("prompt", "chosen", "rejected")} for batch in spec["batches"] for p in batch]
    blocks, top = spec["blocks"], spec["top_layers"]
    adapter = LoraConfig(
        r=spec["rank"],
        lora_alpha=int(spec["rank"] * spec["scale"]),
        lora_dropout=0.0,
        target_modules=spec["keys"],
        task_type="CAUSAL_LM",
        layers_to_transform=list(range(blocks - top, blocks)) if top < blocks else None,
    )
    settings = DPOConfig(
        output_dir=str(Path(spec["folder"]) / "trl"),
        per_device_train_batch_size=spec["batch"],
        max_steps=len(spec["batches"]),
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=spec["checkpoint"],
        beta=spec["beta"],
        max_length=spec["max_length"],
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        seed=spec["seed"],
    )
    with probe.stage("prepare"):  # the reference is in it
        trainer = Timed(
            model=model,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Callback()],
        )
    trainer.train()
    write_result(probe)


if __name__ == "__main__":
    run(read_spec())
