"""DoRA by a flag, the whole way: trained, gone on with, judged, fused and exported as what was trained."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.evaluation.evaluate import evaluate
from mlx_dpo.events import Event, Started, Stepped
from mlx_dpo.export.fuse import fuse
from mlx_dpo.export.gguf import export_gguf_adapter
from mlx_dpo.export.peft import export_peft
from mlx_dpo.training.loop import train
from support.adapters import write_pairs


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")), valid_fraction=0.0),
        lora=LoraConfig(num_layers=2, rank=4, fine_tune_type="dora", dropout=0.1),
        optim=OptimConfig(learning_rate=3e-3, lr_scheduler_type="constant", warmup_ratio=0),
        train=TrainConfig(output=str(tmp_path / "run"), iters=8, eval_samples=0),
    )


def test_a_dora_is_trained_and_goes_where_a_lora_goes(config: RunConfig, tmp_path: Path) -> None:
    said: list[Event] = []
    train(config, on_event=said.append)
    (started,) = [event for event in said if isinstance(event, Started)]
    assert started.facts["adapter"].startswith("DoRA of rank 4")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] < 0.5
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["fine_tune_type"] == "dora"
    assert "A DoRA adapter for" in (tmp_path / "run/README.md").read_text()
    fresh = mx.load(str(tmp_path / "run/adapters.safetensors"))
    assert any(name.endswith(".m") for name in fresh)

    tuned = replace(config.model, adapter=str(tmp_path / "run"))
    found = evaluate(tuned, config.data, LossConfig())
    assert found["loss"] < 0.5
    fused = fuse(config.model, tmp_path / "run", tmp_path / "fused", data=config.data)
    assert fused.verified and fused.verified.holds
    again = evaluate(ModelConfig(path=str(tmp_path / "fused")), config.data)
    assert again["logps/chosen"] == pytest.approx(found["logps/chosen"], abs=1e-3)
    exported = export_peft(config.model, tmp_path / "run", tmp_path / "peft", data=config.data)
    assert exported.verified[0].holds
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["use_dora"] is True
    with pytest.raises(ModelError, match="DoRA") as refusal:
        export_gguf_adapter(config.model, tmp_path / "run", tmp_path / "adapter.gguf", verify=False)
    assert "mlx-dpo fuse" in refusal.value.remedy


def test_an_interrupted_dora_ends_where_a_straight_one_does(config: RunConfig, tmp_path: Path) -> None:
    train(config)

    def stop(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            signal.raise_signal(signal.SIGINT)

    pieces = replace(config, train=replace(config.train, output=str(tmp_path / "pieces")))
    assert train(pieces, on_event=stop).interrupted
    train(pieces, resume=True)
    ours, theirs = (mx.load(str(tmp_path / run / "adapters.safetensors")) for run in ("run", "pieces"))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_starts_from_a_lora_cannot_become_a_dora(config: RunConfig, tmp_path: Path) -> None:
    train(replace(config, lora=replace(config.lora, fine_tune_type="lora")))
    second = replace(
        config,
        model=replace(config.model, adapter=str(tmp_path / "run")),
        lora=LoraConfig(fine_tune_type="dora"),
        train=replace(config.train, output=str(tmp_path / "second")),
    )
    with pytest.raises(UsageError, match=r"fine_tune_type dora \(it has lora\)"):
        train(second)


def test_a_moving_reference_is_refused_at_once(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lora\.fine_tune_type: a reference that follows the policy"):
        train(replace(config, loss=LossConfig(ref_model_sync_steps=2)))
    assert not (tmp_path / "run").exists()
