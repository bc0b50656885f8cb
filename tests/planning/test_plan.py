"""What a run will need is foreseen: near to what it takes, for every setting that changes it, and refused in time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_dpo
from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from mlx_dpo.planning.machine import Machine
from mlx_dpo.training.loop import train
from mlx_dpo.training.setup import plan_run
from support.tiny_models import tiny_model_folder

LARGE = Machine(2**40, 2**40, "a large machine")


def some_pairs(file: Path, lengths: tuple[tuple[int, int, int], ...]) -> str:
    """Pairs of so many words a prompt and an answer."""
    rows = [
        {"prompt": f"{i} " * prompt, "chosen": "yes " * chosen, "rejected": "no " * rejected}
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Four rows so unlike each other that they are read in several groups."""
    model = tiny_model_folder(tmp_path / "model", hidden_size=64)
    lengths = ((5, 3, 200), (150, 90, 4), (8, 4, 3), (160, 3, 210))
    return RunConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(path=some_pairs(tmp_path / "pairs.jsonl", lengths), valid_fraction=0.0, max_length=None),
        lora=LoraConfig(num_layers=2, rank=4),
        train=TrainConfig(output=str(tmp_path / "run"), batch_size=4, iters=2, steps_per_eval=None),
    )


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("layers", [2, -1])
def test_the_memory_foreseen_is_what_a_run_takes(layers: int, checkpoint: bool, config: RunConfig) -> None:
    config = changed(config, lora={"num_layers": layers}, train={"grad_checkpoint": checkpoint})
    plan, _, _ = plan_run(config, LARGE)
    assert plan.speed == config.speed and not plan.notes
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    train(config)
    ratio = plan.peak / (mx.get_peak_memory() - base)
    assert 0.85 < ratio < (1.5 if checkpoint else 1.25), (
        "with checkpointing rather too much is foreseen than too little"
    )
    assert sum(plan.parts.values()) == plan.peak and min(plan.parts.values()) >= 0


def test_checkpointing_needs_less(config: RunConfig) -> None:
    config = changed(config, lora={"num_layers": -1})
    plain, _, _ = plan_run(config, LARGE)
    checkpointed, _, _ = plan_run(changed(config, train={"grad_checkpoint": True}), LARGE)
    assert checkpointed.phases["a step"] < plain.phases["a step"]
    assert checkpointed.phases["log-probs"] == plain.phases["log-probs"]


def test_frozen_blocks_are_at_rest_only_where_no_row_needs_them(config: RunConfig, tmp_path: Path) -> None:
    rest, _, _ = plan_run(config, LARGE)
    alone = some_pairs(tmp_path / "alone.jsonl", ((5, 3, 200), (0, 90, 4), (8, 4, 3), (160, 3, 210)))
    needed, _, _ = plan_run(changed(config, data={"path": alone}), LARGE)
    assert rest.parts["weights"] < needed.parts["weights"]


def test_a_reference_model_of_its_own_is_counted_and_takes_its_time(config: RunConfig) -> None:
    own, time, _ = plan_run(config, LARGE)
    other, longer, _ = plan_run(replace(config, loss=LossConfig(reference=config.model.path)), LARGE)
    assert "the reference" not in own.phases
    assert other.phases["the reference"] > own.phases["log-probs"]
    assert time is not None and longer is not None
    name = "reference and frozen blocks, once"
    assert longer.phases[name] > time.phases[name]


def test_what_does_not_fit_is_refused_with_what_would(config: RunConfig) -> None:
    plan, _, change = plan_run(config, Machine(2**20, 2**20, "a small machine"))
    assert not plan.fits(Machine(2**20, 2**20, "a small machine"))
    assert change


@pytest.mark.real_model
@pytest.mark.parametrize("layers", [16, -1])
def test_the_memory_of_the_real_model_is_foreseen_within_15_percent(
    layers: int, demo_model: Path, tmp_path: Path
) -> None:
    rows = Path(mlx_dpo.__file__).parent / "demo" / "data" / "train.jsonl"
    config = RunConfig(
        model=ModelConfig(path=str(demo_model)),
        data=DataConfig(path=str(rows), valid_fraction=0.0),
        lora=LoraConfig(num_layers=layers),
        train=TrainConfig(output=str(tmp_path / "run"), batch_size=2, iters=2, steps_per_eval=None),
    )
    plan, _, _ = plan_run(config)
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    train(config)
    assert plan.peak == pytest.approx(mx.get_peak_memory() - base, rel=0.15)
