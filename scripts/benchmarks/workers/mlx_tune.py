"""mlx-tune's DPO: it has no callback, so the line that it prints after a step marks the step."""

from __future__ import annotations

import builtins
import os
import re
from contextlib import ExitStack
from typing import Any

import mlx.core as mx

from benchmarks.workers.mlx_world import stand_in_device_info
from benchmarks.workers.probe import Probe, read_spec, write_result


def run(spec: dict[str, Any]) -> None:
    """Trains over the spec's batches and writes what was seen."""
    probe = Probe()
    with probe.stage("imports"):
        stand_in_device_info()
        import mlx_tune.rl_trainers
        from mlx_tune import FastLanguageModel

    mx.random.seed(spec["seed"])
    with probe.stage("load"):
        model, tokenizer = FastLanguageModel.from_pretrained(spec["model"], max_seq_length=spec["max_length"])
        model = FastLanguageModel.get_peft_model(
            model,
            r=spec["rank"],
            target_modules=list(spec["keys"]),
            lora_alpha=int(spec["rank"] * spec["scale"]),
            lora_dropout=0.0,
            use_gradient_checkpointing=spec["checkpoint"],
        )
        model._apply_lora(num_layers=spec["top_layers"])  # its trainer has no such setting
        mx.eval(model.model.parameters())
    reference = ExitStack()

    def printed(*args: Any, **kwargs: Any) -> None:
        line = " ".join(map(str, args))
        if line.startswith("Pre-computing reference"):
            reference.enter_context(probe.stage("reference"))
        elif "Reference log-probs cached" in line:
            reference.close()
        elif "Starting training for" in line:
            probe.start()
        elif step := re.search(r"Step \d+/\d+ \| Loss: ([-\d.einfa]+)", line):
            probe.step(loss=float(step.group(1)))
        builtins.print(*args, **kwargs)

    mlx_tune.rl_trainers.print = printed
    os.chdir(spec["folder"])
    settings = mlx_tune.rl_trainers.DPOConfig(
        beta=spec["beta"],
        learning_rate=spec["learning_rate"],
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        max_steps=len(spec["batches"]),
        warmup_steps=0,
        logging_steps=1,
        save_steps=10**9,
        max_seq_length=spec["max_length"],
        max_prompt_length=spec["max_length"],
        output_dir="mlx-tune",
    )
    rows = [_texts(pair, tokenizer) for batch in spec["batches"] for pair in batch]
    mlx_tune.rl_trainers.DPOTrainer(model=model, train_dataset=rows, tokenizer=tokenizer, args=settings).train()
    write_result(probe, peak_bytes=mx.get_peak_memory())


def _texts(pair: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """The pair as the strings that its template makes of it: it takes no messages."""

    def text(messages: list[dict[str, str]], **settings: Any) -> str:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        return rendered

    prompt = text(pair["prompt"], add_generation_prompt=True)
    answers = {name: text(pair["prompt"] + pair[name])[len(prompt) :] for name in ("chosen", "rejected")}
    return {"prompt": prompt} | answers


if __name__ == "__main__":
    run(read_spec())
