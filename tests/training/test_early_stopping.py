"""A run ends when its held-out loss has stopped falling, with the best adapter, and says so where it leaves a trace."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.events import Event, Stepped
from mlx_dpo.training.checkpoint import TrainerState
from mlx_dpo.training.early_stopping import check_early_stopping, stops_early
from mlx_dpo.training.loop import train
from support.adapters import write_pairs


def state(*losses: float, every: int = 10) -> TrainerState:
    """What a run knows after evaluations with these losses, the first of them before step 1."""
    found = [{"step": float(i * every), "loss": loss} for i, loss in enumerate(losses)]
    best = min(found[1:], key=lambda one: one["loss"], default=None)
    return TrainerState(evaluations=found, best=best, best_step=int(best["step"]) if best else 0)


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ((0.69,), 1, False),
        ((0.69, 0.80), 1, False),  # worse than before, and yet the best of those that count
        ((0.69, 0.60, 0.61), 1, True),
        ((0.69, 0.60, 0.60), 1, True),  # no better is not better
        ((0.69, 0.60, 0.61), 2, False),
        ((0.69, 0.60, 0.61, 0.62), 2, True),
        ((0.69, 0.60, 0.61, 0.59), 2, False),
        ((0.69, 0.60, 0.61, 0.59, 0.60), 2, False),  # counted anew from the best one
        ((0.69, 0.60, 0.61, 0.62), None, False),
    ],
)
def test_patience_counts_evaluations_since_the_best_one(
    losses: tuple[float, ...], patience: int | None, ends: bool
) -> None:
    assert stops_early(TrainConfig(early_stopping_patience=patience), state(*losses)) == ends


def config(model: Path, folder: Path, **train_settings: Any) -> RunConfig:
    """A rate that ruins the held-out loss after a few steps."""
    return RunConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(path=str(write_pairs(folder / "pairs.jsonl")), valid_fraction=0.4),
        lora=LoraConfig(num_layers=2, rank=4),
        optim=OptimConfig(learning_rate=0.5, warmup_steps=8),
        train=TrainConfig(
            **{
                "output": str(folder / "run"), "batch_size": 2, "iters": 30, "steps_per_eval": 1, "eval_samples": 0,
                "save_every": 100, "early_stopping_patience": 2,
            }
            | train_settings
        ),
    )  # fmt: skip


def adapters(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "adapters.safetensors"))


def test_a_run_that_gets_worse_ends_with_its_best_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    result = train(config(tiny_llama, tmp_path, save_every=3, keep_checkpoints=30))
    assert result.best_step == 3 and result.stopped_early and not result.interrupted
    assert result.steps == result.best_step + 2 < 30
    losses = [found["loss"] for found in result.evaluations]
    assert losses[result.best_step] == min(losses[1:])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"step": result.steps, "early_stopping/best_step": result.best_step}
    card = (tmp_path / "run/README.md").read_text()
    assert f"| stopped early | no better held-out loss after step {result.best_step} |" in card
    ours, theirs = (adapters(tmp_path / "run" / at) for at in ("", f"checkpoints/step-{result.best_step:07d}"))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / f"run/checkpoints/step-{result.steps:07d}").is_dir(), "the last step can be gone on from"


def test_a_run_in_pieces_ends_at_the_same_step(tiny_llama: Path, tmp_path: Path) -> None:
    straight = train(config(tiny_llama, tmp_path))

    def break_off(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == straight.steps:
            raise SystemExit

    pieces = config(tiny_llama, tmp_path, output=str(tmp_path / "pieces"), save_every=1)
    with contextlib.suppress(SystemExit):
        train(pieces, on_event=break_off)
    result = train(pieces, resume=True)
    assert (result.steps, result.best_step, result.stopped_early) == (straight.steps, straight.best_step, True)
    again = train(pieces, resume=True)
    assert (again.steps, again.stopped_early, again.interrupted) == (straight.steps, True, False)
    lines = (tmp_path / "pieces/metrics.jsonl").read_text()
    assert lines.count("early_stopping/best_step") == 1
    longer = config(tiny_llama, tmp_path, output=str(tmp_path / "pieces"), early_stopping_patience=4)
    assert train(longer, resume=True).steps > straight.steps, "with more patience it goes on"
    assert "stopped early" not in (tmp_path / "pieces/README.md").read_text(), "since it did go on"


@pytest.mark.parametrize(
    ("settings", "held_out", "steps", "said"),
    [
        ({}, 0, 100, "nothing is held out"),
        ({"steps_per_eval": 100}, 5, 100, "nothing is evaluated before the last"),
        ({"steps_per_eval": 500}, 5, 100, "the run takes 100 steps"),
    ],
)
def test_a_patience_that_can_never_end_is_refused(
    settings: dict[str, Any], held_out: int, steps: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        check_early_stopping(TrainConfig(early_stopping_patience=3, **settings), held_out, steps)
    assert caught.value.remedy
    check_early_stopping(TrainConfig(**settings), held_out, steps)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_best": False}, "train.keep_best is off"),
        ({"steps_per_eval": None}, "train.steps_per_eval is null"),
        ({"early_stopping_patience": 0}, "must be at least 1"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    settings: dict[str, Any], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        train(config(tiny_llama, tmp_path, **settings))


def test_nothing_held_out_is_refused_before_a_run_folder_is_left(tiny_llama: Path, tmp_path: Path) -> None:
    asked = config(tiny_llama, tmp_path)
    with pytest.raises(UsageError, match="nothing is held out"):
        train(replace(asked, data=replace(asked.data, valid_fraction=0.0)))
    assert not (tmp_path / "run").exists()
