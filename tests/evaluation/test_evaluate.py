"""How a model ranks preferences, held against TRL's numbers and against what must hold of any model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_dpo.config import DataConfig, LossConfig, ModelConfig
from mlx_dpo.errors import DataError, UsageError
from mlx_dpo.evaluation.evaluate import evaluate, score
from mlx_dpo.events import Warned
from support.adapters import PAIRS, write_adapter, write_pairs


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    adapter = write_adapter(tiny_llama, tmp_path_factory.mktemp("adapters") / "random")
    return ModelConfig(path=str(tiny_llama), adapter=str(adapter))


@pytest.fixture
def pairs(tmp_path: Path) -> DataConfig:
    return DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl")))


@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_every_pair_has_trls_log_probs_and_rewards(golden: Path, form: str) -> None:
    model = ModelConfig(path=str(golden / "models" / "llama"), adapter=str(golden / "adapters" / "llama"))
    data = DataConfig(path=str(golden / "data" / f"{form}.jsonl"), max_length=None)
    expected = json.loads((golden / "golden.json").read_text())["cases"][f"llama/{form}"]["pairs"]
    found = list(score(model, data, batch_size=5))
    assert len(found) == len(expected) == 24
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("chosen", "rejected"):
            assert ours[f"{name}_tokens"] == theirs[f"n_{name}"]
            for us, them in ((f"{name}_logps", f"policy_{name}_logp"), (f"ref_{name}_logps", f"ref_{name}_logp")):
                # TRL sums in float32: its sums of -1000 cannot be finer than one unit in the last place
                unit = float(np.spacing(np.float32(abs(theirs[them]))))
                assert ours[us] == pytest.approx(theirs[them], abs=max(1e-4, unit))
            reward = theirs["metrics_beta0p1"][f"rewards/{name}"]
            assert ours[f"{name}_reward"] == pytest.approx(reward, abs=1e-4)
        assert ours["margin"] == pytest.approx(theirs["metrics_beta0p1"]["rewards/margins"], abs=1e-4)


@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_the_summary_is_the_mean_of_trls_pairs(golden: Path, form: str) -> None:
    model = ModelConfig(path=str(golden / "models" / "llama"), adapter=str(golden / "adapters" / "llama"))
    data = DataConfig(path=str(golden / "data" / f"{form}.jsonl"), max_length=None)
    pairs = json.loads((golden / "golden.json").read_text())["cases"][f"llama/{form}"]["pairs"]
    found = evaluate(model, data, batch_size=7)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert found[name] == pytest.approx(np.mean([pair["metrics_beta0p1"][name] for pair in pairs]), rel=1e-4)
    assert found["loss"] == pytest.approx(np.mean([pair["loss_sigmoid_beta0p1"] for pair in pairs]), rel=1e-4)
    likelier = [pair["policy_chosen_logp"] > pair["policy_rejected_logp"] for pair in pairs]
    assert found["logps/accuracies"] == pytest.approx(np.mean(likelier))
    before = [pair["ref_chosen_logp"] > pair["ref_rejected_logp"] for pair in pairs]
    assert found["ref_logps/accuracies"] == pytest.approx(np.mean(before))
    per_token = [
        pair["policy_chosen_logp"] / pair["n_chosen"] > pair["policy_rejected_logp"] / pair["n_rejected"]
        for pair in pairs
    ]
    assert found["logps/accuracies_per_token"] == pytest.approx(np.mean(per_token))
    assert found["comparisons"] == 24
    assert found["accuracy_low"] < found["rewards/accuracies"] < found["accuracy_high"]


def test_without_an_adapter_every_reward_is_exactly_zero_and_the_loss_ln_2(
    tuned: ModelConfig, pairs: DataConfig
) -> None:
    base = ModelConfig(path=tuned.path)
    found = evaluate(base, pairs, batch_size=4)
    assert found["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert found["rewards/chosen"] == found["rewards/margins"] == found["kl/token"] == 0
    assert "rewards/accuracies" not in found
    assert found["logps/accuracies"] == found["ref_logps/accuracies"] == 1  # the shorter answers are the likelier ones
    assert {row["margin"] for row in score(base, pairs)} == {0}


def test_an_adapter_may_be_the_reference(tuned: ModelConfig, pairs: DataConfig) -> None:
    against_itself = evaluate(tuned, pairs, LossConfig(reference="start"), reference_adapter=tuned.adapter)
    assert against_itself["rewards/margins"] == 0
    base = ModelConfig(path=tuned.path)
    forth, back = list(score(tuned, pairs)), list(score(base, pairs, reference_adapter=tuned.adapter))
    for there, here in zip(forth, back, strict=True):  # the base against the adapter: every reward turned round
        assert here["chosen_reward"] == pytest.approx(-there["chosen_reward"], abs=1e-5)
        assert here["ref_rejected_logps"] == pytest.approx(there["rejected_logps"], abs=1e-4)


def test_a_starting_adapter_that_nobody_named_cannot_be_the_reference(tuned: ModelConfig, pairs: DataConfig) -> None:
    with pytest.raises(UsageError, match="which one that was is not said"):
        evaluate(tuned, pairs, LossConfig(reference="start"))


def test_without_a_reference_rewards_are_of_log_probs_alone(tuned: ModelConfig, pairs: DataConfig) -> None:
    for row in score(tuned, pairs, LossConfig(type="simpo", beta=0.5, reference="none")):
        assert row["ref_chosen_logps"] is None
        assert row["chosen_reward"] == 0.5 * row["chosen_logps"]
    assert "kl/token" not in evaluate(tuned, pairs, LossConfig(type="simpo"))


def test_rows_come_in_file_order_whatever_the_batch_size(tuned: ModelConfig, pairs: DataConfig) -> None:
    one, many = list(score(tuned, pairs, batch_size=1)), list(score(tuned, pairs, batch_size=4))
    assert [row["id"] for row in one] == [row["id"] for row in many] == [str(i + 1) for i in range(6)]
    for a, b in zip(one, many, strict=True):
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-5)


def test_rankings_are_scored_answer_by_answer(tuned: ModelConfig, tmp_path: Path) -> None:
    row = {"prompt": "Which?", "responses": ["short", "a longer one", "no"], "ranks": [2, 1, 3]}
    found = list(score(tuned, DataConfig(path=str(write_pairs(tmp_path / "rankings.jsonl", [row])))))
    assert found[0]["ranks"] == sorted(found[0]["ranks"])  # best first
    assert len(found[0]["logps"]) == len(found[0]["rewards"]) == len(found[0]["tokens"]) == 3
    metrics = evaluate(tuned, DataConfig(path=str(tmp_path / "rankings.jsonl")), LossConfig(type="plackett_luce"))
    assert metrics["comparisons"] == 3
    assert -1 <= metrics["rewards/kendall_tau"] <= 1


def test_judged_answers_are_scored_with_their_label(tuned: ModelConfig, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Which?", "completion": "short", "label": True},
        {"prompt": "Why?", "completion": "a longer one", "label": False},
        {"prompt": "How?", "completion": "so", "label": True},
    ]
    data = DataConfig(path=str(write_pairs(tmp_path / "judged.jsonl", rows)))
    found = list(score(tuned, data, LossConfig(type="kto")))
    assert [row["label"] for row in found] == [True, False, True]
    assert all(
        len(row["logps"]) == 1 for row in found
    )  # another row's answer, from which KTO takes its KL, is not shown
    assert evaluate(tuned, data, LossConfig(type="kto"))["rows"] == 3


def test_a_folders_test_file_is_judged_by_before_its_valid_file(tuned: ModelConfig, tmp_path: Path) -> None:
    for name, count in (("train", 3), ("valid", 2), ("test", 1)):
        write_pairs(tmp_path / f"{name}.jsonl", PAIRS[:count])
    data = DataConfig(path=str(tmp_path))
    assert evaluate(tuned, data)["rows"] == 1
    assert evaluate(tuned, data, split="valid")["rows"] == 2
    assert evaluate(tuned, data, split="train")["rows"] == 3


def test_of_a_file_valid_is_what_training_holds_out(tuned: ModelConfig, pairs: DataConfig) -> None:
    assert evaluate(tuned, pairs)["rows"] == 6
    assert evaluate(tuned, pairs, split="valid")["rows"] == 1  # a tenth of six prompts, and at least one


def test_what_was_cut_and_dropped_is_counted_and_said(tuned: ModelConfig, tmp_path: Path) -> None:
    rows = [*PAIRS[:2], {**PAIRS[2], "prompt": [{"role": "user", "content": "question " * 30}]}]
    data = DataConfig(path=str(write_pairs(tmp_path / "long.jsonl", rows)), max_length=40)
    said: list[str] = []
    found = evaluate(tuned, data, on_event=lambda event: said.append(event.text) if isinstance(event, Warned) else None)
    assert (found["rows"], found["dropped"]) == (2, 1)
    assert found["cut_rows"] > 0
    assert found["cut_tokens"] > 0
    assert any("dropped" in text for text in said)
    with pytest.raises(DataError, match="none of 3 rows"):
        evaluate(tuned, DataConfig(path=data.path, max_length=5))
