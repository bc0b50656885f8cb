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
from mlx_dpo.errors import RunError
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
    plan, _ = plan_run(config, LARGE)
    assert plan.speed == config.speed and not plan.notes
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    train(config)
    ratio = plan.peak / (mx.get_peak_memory() - base)
    assert 0.85 < ratio < 1.25
    assert sum(plan.parts.values()) == plan.peak and min(plan.parts.values()) >= 0


def test_checkpointing_needs_less(config: RunConfig) -> None:
    config = changed(config, lora={"num_layers": -1})
    plain, _ = plan_run(config, LARGE)
    checkpointed, _ = plan_run(changed(config, train={"grad_checkpoint": True}), LARGE)
    assert checkpointed.phases["a step"] < plain.phases["a step"]
    assert checkpointed.phases["log-probs"] == plain.phases["log-probs"]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("arch", ["qwen3_5", "lfm2", "mamba2", "gemma4"])
def test_of_hybrids_and_shared_keys_all_is_counted(
    arch: str, checkpoint: bool, config: RunConfig, tmp_path: Path
) -> None:
    """With the states and keys that their prompts leave for the answers."""
    path = tiny_model_folder(tmp_path / arch, arch)
    plan, _ = plan_run(changed(config, model={"path": str(path)}, train={"grad_checkpoint": checkpoint}), LARGE)
    assert plan.notes == []
    assert plan.speed.shared_prompt


def test_frozen_blocks_are_unloaded_only_where_no_row_needs_them(config: RunConfig, tmp_path: Path) -> None:
    unloaded, _ = plan_run(config, LARGE)
    alone = some_pairs(tmp_path / "alone.jsonl", ((5, 3, 200), (0, 90, 4), (8, 4, 3), (160, 3, 210)))
    needed, _ = plan_run(changed(config, data={"path": alone}), LARGE)
    assert unloaded.parts["weights"] < needed.parts["weights"]


def test_a_reference_model_of_its_own_is_counted(config: RunConfig) -> None:
    own, _ = plan_run(config, LARGE)
    other, _ = plan_run(replace(config, loss=LossConfig(reference=config.model.path)), LARGE)
    assert "the reference" not in own.phases
    assert other.phases["the reference"] > own.phases["log-probs"]


def test_experts_gradients_are_not_counted_and_it_says_so(config: RunConfig, tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "experts", "qwen3_moe")
    keys = ("self_attn.q_proj", "mlp.switch_mlp.gate_proj")
    config = changed(config, model={"path": str(model)}, lora={"keys": keys})
    plan, _ = plan_run(config, LARGE)
    assert plan.notes == ["what the gradients of the experts' adapters take is not counted"]
    assert plan.parts["activations"] > plan.parts["weights"]


@pytest.mark.parametrize("bits", [None, 4])
def test_of_a_mixture_without_adapted_experts_all_is_counted(
    bits: int | None, config: RunConfig, tmp_path: Path
) -> None:
    """Gradients go through experts that have no adapter: MLX can describe that, and what it takes is foreseen."""
    model = tiny_model_folder(tmp_path / "model", "qwen2_moe", hidden_size=256, moe_intermediate_size=512)
    asked = {"path": str(model), "quantize_bits": bits, "quantize_group_size": 32}
    config = changed(config, model=asked, lora={"num_layers": -1}, train={"iters": 2})
    plan, _ = plan_run(config)
    assert plan.notes == []
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    train(config)
    assert (mx.get_peak_memory() - base) / plan.peak == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_dora_is_foreseen_without_reading_a_weight(arch: str, config: RunConfig, tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", arch)
    config = changed(config, model={"path": str(model)})
    plain, _ = plan_run(config, LARGE)
    (model / "model.safetensors").unlink()
    dora, _ = plan_run(changed(config, lora={"fine_tune_type": "dora"}), LARGE)
    assert dora.parts["adapter"] > plain.parts["adapter"]


def test_answers_are_foreseen_with_all_weights_in_memory(config: RunConfig) -> None:
    plan, _ = plan_run(config, LARGE)
    without, _ = plan_run(changed(config, train={"eval_samples": 0}), LARGE)
    assert "sampled answers" in plan.phases and "sampled answers" not in without.phases


def test_an_optimization_that_the_models_code_does_not_take_is_left_out(config: RunConfig, tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "gemma2", "gemma2")
    plan, _ = plan_run(changed(config, model={"path": str(model)}, lora={"num_layers": -1}), LARGE)
    assert not plan.speed.shared_prompt


def small(peak: int) -> Machine:
    return Machine(total=2**40, usable=peak, name="a small machine")


def test_what_does_not_fit_is_refused_with_what_would(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(config, lora={"num_layers": -1})
    machine = small(plan_run(config, LARGE)[0].peak - 1)
    plan, change = plan_run(config, machine)
    assert not plan.fits(machine)
    assert change.startswith("--batch-size 2 --grad-accumulation-steps 2 needs ")
    monkeypatch.setattr("mlx_dpo.training.setup.this_machine", lambda: machine)
    with pytest.raises(RunError, match="this run does not fit"):
        train(config)


def test_with_auto_the_same_step_is_taken_in_parts_that_fit(config: RunConfig) -> None:
    config = changed(config, lora={"num_layers": -1}, train={"auto": True})
    halves = changed(config, train={"batch_size": 2, "grad_accumulation_steps": 2, "auto": False})
    for machine in (small(plan_run(halves, LARGE)[0].peak), LARGE):
        plan, change = plan_run(config, machine)
        assert plan.fits(machine)
        assert change == ("" if machine is LARGE else "--batch-size 2 --grad-accumulation-steps 2")


def test_where_nothing_with_the_same_mathematics_fits_less_is_trained(config: RunConfig) -> None:
    one = changed(config, lora={"num_layers": -1}, train={"batch_size": 1, "grad_checkpoint": True})
    machine = small(int(0.8 * plan_run(one, LARGE)[0].peak))
    plan, change = plan_run(one, machine)
    assert not plan.fits(machine) and change.startswith("it takes less to train: ")
    nothing = plan_run(one, small(1))[1]
    assert nothing.startswith("take a smaller model")


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
    plan, _ = plan_run(config)
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    train(config)
    assert plan.peak == pytest.approx(mx.get_peak_memory() - base, rel=0.15)
