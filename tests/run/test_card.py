"""The model card says what was learnt from what, and names nothing of the user's machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from mlx_dpo.errors import RunError
from mlx_dpo.run.card import card_along, model_card, write_card
from mlx_dpo.settings import to_yaml

BEFORE = {"step": 0, "eval_loss": 0.6931, "eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.0}
BEFORE |= {"eval_logps/accuracies": 0.48, "eval_comparisons": 40.0}


def evaluated(step: int, loss: float, accuracy: float) -> dict[str, Any]:
    return {
        "step": step, "eval_loss": loss, "eval_rewards/margins": 1.5, "eval_rewards/accuracies": accuracy,
        "eval_accuracy_low": accuracy - 0.1, "eval_accuracy_high": accuracy + 0.05, "eval_comparisons": 40.0,
        "eval_logps/accuracies": 0.61,
    }  # fmt: skip


def write_run(folder: Path, lines: list[dict[str, Any]], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {
        "model": ModelConfig(path="owner/model"),
        "data": DataConfig(path="/home/someone/secret/pairs.jsonl"),
        "train": TrainConfig(output=str(folder)),
    }
    (folder / "config.yaml").write_text(to_yaml(RunConfig(**settings | config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


STEPS = [{"step": 20, "learning_rate": 0.0, "epoch": 1.0, "seconds": 61.2, "peak_memory_gb": 1.234}]


def test_the_table_shows_the_rows_before_and_at_the_step_that_was_kept(tmp_path: Path) -> None:
    lines = [BEFORE, evaluated(10, 0.41, 0.9), evaluated(20, 0.52, 0.95), *STEPS]
    card = model_card(write_run(tmp_path / "run", lines))
    assert "| pairs ranked right by the reward | none | 90.0% (80.0% to 95.0%) |" in card  # step 10's loss is lower
    assert "| pairs ranked right by log-prob | 48.0% | 61.0% |" in card
    assert "| loss | 0.6931 | 0.4100 |" in card
    assert "95 % one of 40 comparisons" in card
    last = model_card(write_run(tmp_path / "run", lines, train=TrainConfig(keep_best=False)))
    assert "| loss | 0.6931 | 0.5200 |" in last


def test_settings_and_cost_are_told(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", STEPS,
        loss=LossConfig(type="ipo", beta=0.2), lora=LoraConfig(rank=8, alpha=4.0, num_layers=-1),
    )  # fmt: skip
    card = model_card(run)
    for line in (
        "| data | pairs.jsonl |",
        "| loss | ipo, β 0.2 |",
        "| reference | the base model |",
        "| adapter | rank 8, scale 0.5, all blocks |",
        "| steps | 20, 1 epochs |",
        "| time | 61 s of training, 1.23 GB at the peak |",
    ):
        assert line in card
    assert "## Results" not in card  # nothing was held out


def test_the_hub_can_read_it(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = write_run(tmp_path / "run", STEPS)
    path = write_card(run)
    assert path == run / "README.md"
    data = ModelCard.load(path).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("owner/model", "mlx", "text-generation")
    assert "lora" in data.tags
    assert yaml.safe_load(path.read_text().split("---")[1])["base_model_relation"] == "adapter"
    write_card(run, tmp_path, fused=True)
    fused = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(fused.split("---")[1])["base_model_relation"] == "finetune"
    assert "A fine-tune of [owner/model]" in fused


def test_no_path_of_the_users_machine_is_in_it(tmp_path: Path) -> None:
    config = {
        "model": ModelConfig(path=str(tmp_path / "models" / "private"), adapter="/home/someone/runs/first"),
        "loss": LossConfig(reference="/home/someone/runs/sft"),
    }
    card = model_card(write_run(tmp_path / "run", STEPS, **config))
    assert "/home" not in card
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "| reference | sft |" in card
    assert "| started from | the adapter first |" in card


def test_a_line_that_was_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 21, "learn')
    assert "| steps | 20, 1 epochs |" in model_card(run)
    (run / "metrics.jsonl").unlink()
    assert "| seed | 0 |" in model_card(run)


def test_a_folder_of_no_run_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        write_card(tmp_path)


def test_an_export_does_not_fail_for_settings_that_this_version_does_not_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS)
    (run / "config.yaml").write_text("train:\n  sed: 7\n")
    said: list[Any] = []
    card_along(run, tmp_path, fused=True, on_event=said.append)
    assert "no model card" in said[0].text
    assert not (tmp_path / "README.md").exists()
    card_along(tmp_path, tmp_path, fused=True, on_event=said.append)  # no run's folder: nothing to say
    assert len(said) == 1
