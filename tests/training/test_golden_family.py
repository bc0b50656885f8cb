"""Twenty steps of KTO, SFT, ORPO, CPO and SimPO are TRL's twenty steps, but for what differs on purpose.

The differences on purpose stand with their reasons in ARCHITECTURE.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.config import DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.models.load import load
from mlx_dpo.training.loop import train
from mlx_dpo.training.setup import begin

STRINGS = "data/pairs_conversational_as_strings.jsonl"  # with the EOS that TRL's ORPO and CPO append to a conversation

RUNS: dict[str, dict[str, Any]] = {
    # run of TRL's: the loss here, and which of TRL's metrics mean the same
    "kto_unbalanced": {"type": "kto", "same": ["kl", "rewards/chosen", "rewards/rejected", "logps/chosen"]},
    "kto_unbalanced_accum2": {"type": "kto", "same": ["kl"]},
    "apo_zero_unpaired": {"type": "apo_zero_unpaired", "same": ["rewards/chosen", "logps/rejected", "rewards/margins"]},
    "apo_zero_unpaired_unbalanced": {"type": "apo_zero_unpaired", "same": ["rewards/chosen", "logps/rejected"]},
    "apo_zero_unpaired_unbalanced_accum2": {"type": "apo_zero_unpaired", "same": []},
    "sft": {"type": "sft", "same": ["entropy", "mean_token_accuracy"]},
    "sft_accum2": {"type": "sft", "same": []},
    "modified/completion_nll_orpo": {"type": "orpo", "same": ["rewards/chosen", "rewards/margins"]},
    "cpo_sigmoid": {"type": "cpo", "same": ["rewards/chosen", "rewards/margins", "logps/chosen"]},
    "cpo_sigmoid_accum2": {"type": "cpo", "same": ["rewards/rejected", "logps/rejected"]},
    "cpo_sigmoid_beta0.01": {"type": "cpo", "same": ["rewards/chosen", "rewards/margins", "logps/chosen"]},
    "cpo_hinge": {"type": "cpo_hinge", "same": ["rewards/chosen", "rewards/margins", "logps/chosen"]},
    "cpo_hinge_beta0.01": {"type": "cpo_hinge", "same": ["rewards/chosen", "rewards/margins", "logps/chosen"]},
    "cpo_ipo": {"type": "cpo_ipo", "same": ["rewards/chosen", "rewards/margins"]},
    "simpo": {"type": "simpo", "same": ["rewards/chosen", "rewards/margins", "rewards/accuracies"]},
    "simpo_accum2": {"type": "simpo", "same": ["rewards/chosen", "rewards/margins"]},
    "cpo_simpo": {"type": "simpo:1,sft:1", "same": ["rewards/chosen", "rewards/margins"]},
}


def our_config(said: dict[str, Any], loss: str, golden: Path, family: Path, output: Path) -> RunConfig:
    """TRL's settings in our words."""
    pairs = "pairs_conversational" in said["data"]
    options = {"desirable_weight", "undesirable_weight"} & said.keys()
    chosen = {name: said[name] for name in options} | ({"simpo_gamma": said["simpo_gamma"]} if "simpo" in loss else {})
    return RunConfig(
        model=ModelConfig(
            path=str(golden / said["model"]), adapter=str(golden / said["adapter"]), compute_dtype="float32"
        ),
        data=DataConfig(path=str(family / (STRINGS if pairs else said["data"])), valid_fraction=0, max_length=None),
        loss=LossConfig(type=loss, **({"beta": said["beta"]} if "beta" in said else {}), **chosen),
        optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="constant", warmup_ratio=0, max_grad_norm=0),
        train=TrainConfig(
            output=str(output),
            batch_size=said["micro_batch"],
            grad_accumulation_steps=said["gradient_accumulation_steps"],
            iters=20,
            shuffle=False,
            token_metrics=True,
        ),
    )


@pytest.mark.parametrize("name", RUNS)
def test_every_step_and_the_adapter_at_the_end_are_trls(
    name: str, golden: Path, golden_family: Path, tmp_path: Path
) -> None:
    trl = json.loads((golden_family / "family_curves.json").read_text())["runs"][f"{name}/llama/conversational"]
    train(our_config(trl["hyper_parameters"], RUNS[name]["type"], golden, golden_family, tmp_path / "run"))
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [step["step"] for step in trl["steps"]] == list(range(1, 21))
    for ours, theirs in zip(found, trl["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss_full_precision"], rel=2e-5, abs=1e-5), theirs["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4, abs=3e-4), theirs["step"]
        for metric in RUNS[name]["same"]:
            tolerance = 1e-3 if "logps" in metric else 3e-4
            assert ours[metric] == pytest.approx(theirs[metric], rel=3e-5, abs=tolerance), (metric, theirs["step"])
    adapter = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    expected = mx.load(str(golden_family / trl["adapter_out"] / "adapter_model.safetensors"))
    assert len(adapter) == len(expected)
    for key, value in expected.items():
        own = key.removeprefix("base_model.model.").replace(".weight", "")
        own = own.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        np.testing.assert_allclose(np.array(adapter[own]), np.array(value.T), atol=3e-4, err_msg=key)


@pytest.mark.parametrize("name", ["kto", "kto_accum2"])
def test_no_mismatched_answer_of_pairs_made_unpaired_answers_its_own_prompt(
    name: str, golden: Path, golden_family: Path
) -> None:
    """Where good and bad answer alternate, half of TRL's do, and with micro-batches of 2 all of them."""
    said = json.loads((golden_family / "family_curves.json").read_text())["runs"][f"{name}/llama/conversational"]
    config = our_config(said["hyper_parameters"], "kto", golden, golden_family, Path("nowhere"))
    rows = begin(config, lambda model: load(model, lazy=True))[0].rows
    own = {(tuple(row.prompt), tuple(row.completions[0])) for row in rows}
    assert len(rows) == len(own) == 48
    assert not [row.id for row in rows if (tuple(row.prompt), tuple(row.completions[1])) in own]
