"""Twenty steps of training are TRL's twenty steps: every loss, norm and metric, and the adapter at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.config import DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.training.loop import train

PER_TOKEN = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
RENAMED = {"loss_full_precision": "loss"}
UNLOGGED = {"step", "micro_losses", "loss"}  # `loss` is TRL's log, rounded by its averaging; the full one is compared


@pytest.fixture(scope="module", params=["sgd", "adamw", "sgd_ref_is_starting_adapter", "sgd_accum2"])
def runs(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, float]], Path]:
    """TRL's run, the metrics of ours with the same settings, and our run folder."""
    all_runs = json.loads((golden / "train_curve.json").read_text())["runs"]
    trl = all_runs[request.param]
    if request.param == "sgd_accum2":
        # TRL averages the means of two micro-batches; here they are means over all tokens, as in the undivided batch
        for step, undivided in zip(trl["steps"], all_runs["sgd"]["steps"], strict=True):
            step.update({name: undivided[name] for name in PER_TOKEN})
    said = trl["hyper_parameters"]
    folder = tmp_path_factory.mktemp("golden") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DPO_CACHE", str(folder.parent / "cache"))
        train(
            RunConfig(
                model=ModelConfig(
                    path=str(golden / "models/llama"),
                    adapter=str(golden / "adapters/llama"),
                    compute_dtype="float32",
                ),
                data=DataConfig(path=str(golden / "data/conversational.jsonl"), valid_fraction=0, max_length=None),
                loss=LossConfig(beta=said["beta"], reference="start" if "starting" in request.param else "base"),
                optim=OptimConfig(
                    name="adamw" if request.param == "adamw" else "sgd",
                    learning_rate=said["learning_rate"],
                    weight_decay=said["weight_decay"],
                    lr_scheduler_type="constant",
                    warmup_ratio=0,
                    max_grad_norm=0,
                ),
                train=TrainConfig(
                    output=str(folder),
                    batch_size=said["micro_batch"],
                    grad_accumulation_steps=said["gradient_accumulation_steps"],
                    iters=said["steps"],
                    shuffle=False,
                    token_metrics=True,
                ),
            )
        )
    return trl, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], folder


def test_every_step_has_trls_loss_gradient_norm_and_metrics(runs: Any) -> None:
    trl, found, _ = runs
    assert [line["step"] for line in found] == [step["step"] for step in trl["steps"]] == list(range(1, 21))
    for ours, theirs in zip(found, trl["steps"], strict=True):
        expected = {RENAMED.get(name, name): value for name, value in theirs.items() if name not in UNLOGGED}
        assert {"loss", "grad_norm", "rewards/chosen", "logps/rejected", "num_tokens", "epoch"} <= expected.keys()
        if expected["rewards/margins"] == 0:
            del expected["rewards/accuracies"]  # policy and reference are one: rounding alone ranks the pairs
        for name, value in expected.items():
            tolerance = 1e-3 if "logps" in name else 3e-4
            assert ours[name] == pytest.approx(value, rel=3e-5, abs=tolerance), (name, theirs["step"])


def test_the_adapter_at_the_end_is_trls(runs: Any, golden: Path) -> None:
    trl, _, folder = runs
    ours = mx.load(str(folder / "adapters.safetensors"))
    theirs = mx.load(str(golden / trl["adapter_out"] / "adapter_model.safetensors"))
    assert len(ours) == len(theirs)
    for name, value in theirs.items():
        name = name.removeprefix("base_model.model.").replace(".weight", "")
        name = name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        np.testing.assert_allclose(np.array(ours[name]), np.array(value.T), atol=1e-4, err_msg=name)
