"""Every kind of data trains on the one loop: pairs, rankings, unpaired rows, demonstrations; the paper's two stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.events import Started, Warned
from mlx_dpo.training.loop import TrainResult, train
from support.tiny_models import tiny_model_folder

WORDS = ["short", "clear", "long", "many more words than the question needs", "I am fine", "thank you", "the answer"]


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"question {i}?", "chosen": f" {WORDS[i % 3]} answer", "rejected": f" {WORDS[3 + i % 4]}"}


def ranking(i: int) -> dict[str, Any]:
    count = 2 + i % 3
    return {
        "prompt": f"question {i}?",
        "responses": [f" {WORDS[(i + k) % 7]} {k}" for k in range(count)],
        "ranks": list(range(1, count + 1)),
    }


def unpaired(i: int) -> dict[str, Any]:
    return {"prompt": f"question {i}?", "completion": f" {WORDS[i % 7]}", "label": i % 2 == 0}


def demonstration(i: int) -> dict[str, Any]:
    return {"prompt": f"question {i}?", "completion": f" {WORDS[i % 3]} answer"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))


def run(
    tmp_path: Path, row: Any, name: str = "run", **loss: Any
) -> tuple[TrainResult, list[dict[str, Any]], list[Any]]:
    """Trains a tiny model on 16 rows for 8 steps; the result, the lines of metrics.jsonl and the events."""
    data, model = tmp_path / f"{name}.jsonl", tmp_path / "model"
    data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(16)))
    start = loss.pop("adapter", None)
    config = RunConfig(
        model=ModelConfig(path=str(model if model.exists() else tiny_model_folder(model)), adapter=start),
        data=DataConfig(path=str(data), valid_fraction=0.25),
        lora=LoraConfig(rank=4, num_layers=2),
        loss=LossConfig(**loss),
        optim=OptimConfig(learning_rate=5e-3, lr_scheduler_type="constant", warmup_ratio=0),
        train=TrainConfig(output=str(tmp_path / name), iters=8, steps_per_eval=4, keep_best=False),
    )
    events: list[Any] = []
    result = train(config, on_event=events.append)
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return result, lines, events


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        (pair, "sigmoid"),
        (pair, "sigmoid:0.8,sft:0.2"),
        (pair, "simpo"),
        (pair, "orpo"),
        (pair, "sft"),
        (pair, "kto"),
        (pair, "plackett_luce"),
        (ranking, "plackett_luce"),
        (ranking, "sigmoid"),
        (unpaired, "kto"),
        (demonstration, "sft"),
    ],
)
def test_each_kind_of_data_lowers_its_loss(row: Any, loss: str, tmp_path: Path) -> None:
    result, lines, _ = run(tmp_path, row, type=loss)
    before, after = result.evaluations[0], result.evaluations[-1]
    first, last = steps(lines)[0]["loss"], min(line["loss"] for line in steps(lines)[-3:])
    assert result.steps == 8
    assert last < first
    assert before.keys() - {"rewards/kendall_tau"} == after.keys() - {"rewards/kendall_tau"}, (
        "no order before the first step"
    )


def test_rankings_report_how_far_the_orders_agree(tmp_path: Path) -> None:
    result, _, _ = run(tmp_path, ranking, type="plackett_luce")
    assert -1 <= result.evaluations[-1]["rewards/kendall_tau"] <= 1


def test_ktos_kl_estimate_is_0_at_the_start_and_not_for_ever(tmp_path: Path) -> None:
    _, lines, _ = run(tmp_path, unpaired, type="kto")
    kl = [line["kl"] for line in steps(lines)]
    assert kl[0] == pytest.approx(0, abs=1e-4)
    assert max(kl) > 1e-3


def test_first_sft_then_dpo_from_it(tmp_path: Path) -> None:
    run(tmp_path, demonstration, "sft", type="sft")
    sft = str(tmp_path / "sft")
    _, lines, events = run(tmp_path, pair, "dpo", adapter=sft, reference="start")
    assert steps(lines)[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "policy and reference are one at first"
    started = next(event for event in events if isinstance(event, Started))
    assert started.facts["reference"] == f"the starting adapter {sft}"

    _, lines, events = run(tmp_path, pair, "from-base", adapter=sft)
    assert abs(steps(lines)[0]["loss"] - 0.693147) > 1e-3
    assert any("--reference start" in event.text for event in events if isinstance(event, Warned))

    _, other, _ = run(tmp_path, pair, "by-path", adapter=sft, reference=sft)
    assert steps(other)[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "the same adapter by its path"


def test_another_model_as_reference_must_read_the_same_tokens(tmp_path: Path) -> None:
    other = tiny_model_folder(tmp_path / "other", seed=5)
    _, lines, said = run(tmp_path, pair, "a", reference=str(other))
    assert abs(steps(lines)[0]["loss"] - 0.693147) > 1e-3
    assert not [event for event in said if isinstance(event, Warned) and "one function" in event.text], "nor should be"

    settings = json.loads((other / "tokenizer.json").read_text())
    settings["added_tokens"].append(
        dict(settings["added_tokens"][-1], id=len(settings["model"]["vocab"]), content="<x>")
    )
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="another tokenizer"):
        run(tmp_path, pair, "b", reference=str(other))


def test_a_reference_that_follows_draws_the_loss_back_up(tmp_path: Path) -> None:
    _, still, _ = run(tmp_path, pair, "still", type="sigmoid")
    _, moving, _ = run(tmp_path, pair, "moving", type="sigmoid", ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    assert steps(moving)[2]["loss"] == pytest.approx(0.693147, abs=1e-5), (
        "just moved: policy and reference are one again"
    )
    assert steps(still)[2]["loss"] < 0.69


def test_an_adapter_keeps_its_own_rank_and_a_wish_for_another_is_refused(tmp_path: Path) -> None:
    run(tmp_path, demonstration, "sft", type="sft")
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path / "model"), adapter=str(tmp_path / "sft")),
        data=DataConfig(path=str(tmp_path / "sft.jsonl")),
        lora=LoraConfig(rank=6, num_layers=3),
        loss=LossConfig(type="sft"),
        train=TrainConfig(output=str(tmp_path / "more")),
    )
    with pytest.raises(UsageError, match=r"rank 6 \(it has 4\), num_layers 3 \(it has 2\)"):
        train(config)
