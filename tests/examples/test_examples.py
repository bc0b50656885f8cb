"""The examples that people copy run as they stand, here on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dpo.config import ModelConfig
from mlx_dpo.settings import resolve
from mlx_dpo.training.loop import train
from support.adapters import PAIRS, write_pairs
from support.tiny_models import tiny_model_folder

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str, folder: Path) -> str:
    """What the script prints when it runs in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_and_compare_shows_accuracy_and_answers_before_and_after(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", num_hidden_layers=8)
    write_pairs(tmp_path / "train.jsonl", PAIRS[:4])
    write_pairs(tmp_path / "test.jsonl", PAIRS[4:])
    said = run("train_and_compare.py", str(model), str(tmp_path), folder=tmp_path)
    assert "of 2 unseen pairs ranked right" in said
    assert said.count("before:") == said.count("after:") == 2
    assert (tmp_path / "runs" / "example" / "adapters.safetensors").is_file()


def test_sweep_beta_prints_a_line_for_each_and_computes_the_reference_once(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    said = run("sweep_beta.py", str(tiny_llama), str(data), "0.1", "0.5", folder=tmp_path)
    assert [line.split()[0] for line in said.splitlines()] == ["β", "0.1", "0.5"]
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"beta-0.1", "beta-0.5"}


def test_the_own_data_configuration_trains_on_its_rows(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)  # its path is relative to the checkout
    config = resolve(EXAMPLES / "own_data.yaml", assignments=["lora.num_layers=2", f"train.output={tmp_path / 'run'}"])
    result = train(replace(config, model=ModelConfig(path=str(tiny_llama))))
    assert result.steps == result.total_steps == 12  # six of eight rows in batches of two, four times
    assert result.evaluations[-1]["comparisons"] == 2
