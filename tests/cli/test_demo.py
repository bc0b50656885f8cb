"""`mlx-dpo demo`, with a model small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dpo.cli import demo as demo_verb
from mlx_dpo.config import LoraConfig, RunConfig
from support.command_line import call
from support.tiny_models import tiny_model_folder


def test_the_demo_goes_all_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(model: Path, output: Path) -> RunConfig:
        config = settings(model, output)
        return replace(config, lora=LoraConfig(num_layers=1), train=replace(config.train, iters=2, batch_size=2))

    settings = demo_verb.demo_config
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = tiny_model_folder(tmp_path / "model", **shape, num_key_value_heads=1)
    monkeypatch.setattr(demo_verb, "demo_config", small)
    monkeypatch.setattr(demo_verb, "LONGEST_ANSWER", 4)
    monkeypatch.setattr("mlx_dpo.demo.model.fetch_demo_model", lambda progress: model)
    shown = call("demo", "--output", tmp_path / "run").stdout
    assert "What is the largest ocean on Earth?" in shown
    assert "51 unseen pairs ranked right" in shown and "KL from the base" in shown
    assert "adapters.safetensors" in shown


def test_a_second_demo_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert demo_verb.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert demo_verb.free_folder(tmp_path / "demo") == tmp_path / "demo-2"
