"""A gated-delta hybrid is planned, trained and judged without mlx-lm's loop over tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta

from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.evaluation.evaluate import evaluate
from mlx_dpo.training.loop import train
from support.adapters import write_pairs
from support.tiny_models import tiny_model_folder


@pytest.fixture
def no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's loop refuses more than a token; its kernel is not there on a CPU anyway."""
    one_token = gated_delta.gated_delta_ops

    def refuse(q: mx.array, *args: Any, **kwargs: Any) -> Any:
        assert q.shape[1] == 1, "token by token"
        return one_token(q, *args, **kwargs)

    monkeypatch.setattr(gated_delta, "gated_delta_ops", refuse)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_hybrid_learns_without_the_loop(checkpoint: bool, no_loop: None, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_model_folder(tmp_path / "model", "qwen3_5")))
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")), valid_fraction=0)
    train(
        RunConfig(
            model=model,
            data=data,
            lora=LoraConfig(num_layers=2),
            optim=OptimConfig(learning_rate=3e-3, lr_scheduler_type="constant", warmup_ratio=0),
            train=TrainConfig(output=str(tmp_path / "run"), iters=10, grad_checkpoint=checkpoint),
        )
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.2
    tuned = ModelConfig(path=model.path, adapter=str(tmp_path / "run"))
    assert evaluate(tuned, data, LossConfig())["loss"] < 0.2


def test_another_hybrid_as_reference_is_scored_by_the_same_rule(no_loop: None, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_model_folder(tmp_path / "model", "qwen3_5")))
    other = tiny_model_folder(tmp_path / "other", "qwen3_5", seed=3)
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")))
    found = evaluate(model, data, LossConfig(reference=str(other)))
    assert math.isfinite(found["loss"]) and found["kl/token"] > 0
