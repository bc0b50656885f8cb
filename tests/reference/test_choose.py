"""Which model the reference is: one answer, for a run and for whoever evaluates it later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.evaluation.evaluate import evaluate
from mlx_dpo.events import Event, Progressed
from mlx_dpo.reference.choose import is_other_model, reference_model, started_from
from mlx_dpo.training.loop import train
from support.adapters import write_adapter, write_pairs
from support.tiny_models import tiny_model_folder

POLICY = ModelConfig(path="owner/model", revision="v2", adapter="runs/a")


def test_each_name_is_one_model(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = str(write_adapter(tiny_llama, tmp_path / "other"))
    assert reference_model("base", POLICY, None) == replace(POLICY, adapter=None)
    assert reference_model("start", POLICY, "runs/sft") == replace(POLICY, adapter="runs/sft")
    assert reference_model("start", POLICY, None) == reference_model("base", POLICY, None), "it started from nothing"
    assert reference_model(adapter, POLICY, None) == replace(POLICY, adapter=adapter)
    assert reference_model("owner/larger", POLICY, None) == ModelConfig(path="owner/larger")


def test_only_what_is_neither_the_policy_nor_its_base_is_loaded_beside_it() -> None:
    assert not is_other_model(POLICY, POLICY)
    assert not is_other_model(replace(POLICY, adapter=None), POLICY)
    assert is_other_model(replace(POLICY, adapter="runs/sft"), POLICY)
    assert is_other_model(ModelConfig(path="owner/larger"), POLICY)


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> RunConfig:
    """A finished run from a starting adapter that was its reference."""
    config = RunConfig(
        model=ModelConfig(path=str(tiny_llama), adapter=str(write_adapter(tiny_llama, tmp_path / "sft"))),
        data=DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")), valid_fraction=0),
        lora=LoraConfig(),
        loss=LossConfig(reference="start"),
        optim=OptimConfig(learning_rate=1e-3),
        train=TrainConfig(output=str(tmp_path / "run"), iters=4),
    )
    train(config)
    return config


def test_a_run_folder_knows_what_its_training_started_from(run: RunConfig) -> None:
    """Evaluation with the run's own settings measures from the start, as the run did, by the numbers it stored."""
    model = replace(run.model, adapter=run.train.output)
    assert started_from(run.train.output) == run.model.adapter
    heard: list[Event] = []
    found = evaluate(model, run.data, run.loss, on_event=heard.append)
    named = evaluate(model, run.data, run.loss, reference_adapter=run.model.adapter)
    assert found["rewards/margins"] == named["rewards/margins"] != 0
    assert found["rewards/margins"] != evaluate(model, run.data, LossConfig())["rewards/margins"]
    passes = [e for e in heard if isinstance(e, Progressed) and e.name == "reference log-probs"]
    assert {e.total for e in passes} == {0}, "all of them were stored while training"


def test_an_adapter_that_no_run_left_does_not_say_where_it_began(run: RunConfig) -> None:
    (Path(run.train.output) / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"it has no config\.yaml") as caught:
        evaluate(replace(run.model, adapter=run.train.output), run.data, run.loss)
    assert "name its folder" in caught.value.remedy


def test_a_reference_that_reads_other_tokens_is_refused_in_training_and_in_evaluation(
    run: RunConfig, tiny_llama: Path, tmp_path: Path
) -> None:
    other = tiny_model_folder(tmp_path / "other", seed=5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][-1], id=size, content="<x>"))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.rmtree(run.train.output)
    config = replace(run, loss=LossConfig(reference=str(other)))
    for attempt in (lambda: train(config), lambda: evaluate(config.model, config.data, config.loss)):
        with pytest.raises(ModelError, match="has another tokenizer than"):
            attempt()
