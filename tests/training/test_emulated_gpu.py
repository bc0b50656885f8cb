"""Whole runs in 16 bits as they will be on a Mac: nothing is left out, nothing warns falsely, and it learns."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.cli.demo import DATA
from mlx_dpo.config import DataConfig, Dtype, LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.evaluation.evaluate import evaluate, score
from mlx_dpo.events import Started, Warned
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS
from mlx_dpo.models.trees import read_arrays
from mlx_dpo.training.loop import train
from support.adapters import write_pairs
from support.emulated_gpu import emulated_gpu
from support.tiny_models import tiny_model_folder

ONE_OF_A_KIND = ("llama", "gemma3", "smollm3", "qwen3_moe", "lfm2", "qwen3_5", "mamba2")


@pytest.mark.parametrize("arch", ONE_OF_A_KIND)
def test_a_run_in_bfloat16_learns_and_is_judged_the_same_by_eval_and_score(arch: str, tmp_path: Path) -> None:
    model = ModelConfig(
        path=str(tiny_model_folder(tmp_path / "model", arch, quantize_bits=4)), compute_dtype="bfloat16"
    )
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")), valid_fraction=0)
    events: list[object] = []
    config = RunConfig(
        model=model,
        data=data,
        lora=LoraConfig(num_layers=2),
        optim=OptimConfig(learning_rate=3e-3, lr_scheduler_type="constant", warmup_ratio=0),
        train=TrainConfig(output=str(tmp_path / "run"), iters=12),
    )
    with emulated_gpu():
        train(config, on_event=events.append)
        tuned = ModelConfig(path=model.path, adapter=str(tmp_path / "run"), compute_dtype="bfloat16")
        found = evaluate(tuned, data, LossConfig())
        rows = list(score(tuned, data, LossConfig()))
    assert found["loss"] < 0.3
    warned = [event.text for event in events if isinstance(event, Warned) and "language may break" not in event.text]
    assert not warned
    (started,) = (event for event in events if isinstance(event, Started))
    assert "moves a token's log-prob by" in started.facts["rounding"]
    assert found["rewards/within_noise"] < 0.5
    assert found["rewards/accuracies"] == np.mean([row["margin"] > 0 for row in rows])
    assert found["rewards/margins"] == pytest.approx(np.mean([row["margin"] for row in rows]), abs=1e-5)


def test_the_real_small_model_takes_the_same_way_in_bfloat16_as_in_float32(demo_model: Path, tmp_path: Path) -> None:
    """The same rows by three updates: every optimization is kept, and the adapters point the same way."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join((DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:12]), encoding="utf-8")

    def trained(dtype: Dtype) -> tuple[list[object], mx.array]:
        events: list[object] = []
        config = RunConfig(
            model=ModelConfig(path=str(demo_model), compute_dtype=dtype),
            data=DataConfig(path=str(rows), valid_fraction=0, max_length=160),
            lora=LoraConfig(num_layers=2),
            optim=OptimConfig(name="sgd", learning_rate=1e-2, warmup_ratio=0, lr_scheduler_type="constant"),
            train=TrainConfig(output=str(tmp_path / dtype), batch_size=4, save_every=1000),
        )
        train(config, on_event=events.append)
        learned = read_arrays(tmp_path / dtype / "adapters.safetensors")
        return events, mx.concatenate([learned[name].reshape(-1) for name in sorted(learned) if "lora_b" in name])

    _, expected = trained("float32")
    with emulated_gpu():
        events, found = trained("bfloat16")
    assert not [event.text for event in events if isinstance(event, Warned)]
    (started,) = (event for event in events if isinstance(event, Started))
    assert all(name.replace("_", " ") in started.facts["optimizations"] for name in OPTIMIZATIONS)
    cosine = (found * expected).sum() / mx.linalg.norm(found) / mx.linalg.norm(expected)
    assert cosine.item() > 0.98
    assert mx.linalg.norm(found).item() == pytest.approx(mx.linalg.norm(expected).item(), rel=0.05)
