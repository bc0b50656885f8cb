"""What a run warns of, and that it says what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.nn as nn
import pytest
from mlx_lm.models import mamba

from mlx_dpo.config import LoraConfig, LossConfig, ModelConfig, RunConfig
from mlx_dpo.models import lora
from mlx_dpo.models.load import load
from mlx_dpo.training.checkpoint import TrainerState
from mlx_dpo.training.report import LARGE_KL, _not_adapted, warn_of_drift, warn_of_kl
from mlx_dpo.training.setup import warn_of_loop
from support.tiny_models import tiny_model_folder


def test_a_falling_chosen_log_prob_is_told_once_with_what_to_do() -> None:
    state = TrainerState()
    assert warn_of_drift(state, {"logps/chosen": -105.0, "logps/chosen_drift": -5.0}) is None
    said = warn_of_drift(state, {"logps/chosen": -130.0, "logps/chosen_drift": -30.0})
    assert said and "-100.0 → -130.0" in said and "sigmoid:1,sft:0.2" in said
    assert warn_of_drift(state, {"logps/chosen": -130.0, "logps/chosen_drift": -30.0}) is None, "once"


def test_a_large_kl_is_told_once_with_what_to_do() -> None:
    state, config = TrainerState(step=7), RunConfig()
    assert warn_of_kl(TrainerState(step=1), config, {"kl/token": 9.0}, "rows") is None, "before the first update"
    assert warn_of_kl(state, config, {"loss": 0.1}, "rows") is None, "no reference"
    assert warn_of_kl(state, config, {"kl/token": LARGE_KL}, "rows") is None
    said = warn_of_kl(state, config, {"kl/token": 1.16}, "the held-out rows")
    assert said and said.startswith("step 7: the held-out rows are 1.16 nats a token from the reference")
    for what in ("--beta (now 0.1)", "--learning-rate (now 0.0001)", "--epochs", "sft:0.2"):
        assert what in said
    assert warn_of_kl(state, config, {"kl/token": 5.0}, "rows") is None, "once"


def test_who_imitates_already_is_not_told_to() -> None:
    config = RunConfig(loss=LossConfig(type="sigmoid:1.0,sft:0.5"))
    said = warn_of_kl(TrainerState(step=7), config, {"kl/token": 1.7}, "rows")
    assert said and "--loss" not in said


@pytest.mark.parametrize(
    ("arch", "keys", "said"),
    [
        (
            "qwen3_moe",
            None,
            "experts (mlp.switch_mlp.down_proj, mlp.switch_mlp.up_proj, mlp.switch_mlp.gate_proj) and router "
            "(mlp.gate); to adapt them too, name all that is to be adapted with --keys",
        ),
        ("qwen3_moe", ("q_proj", "switch_mlp.down_proj", "up_proj", "gate_proj"), "router (mlp.gate); to adapt"),
        ("llama", None, ""),
    ],
)
def test_what_of_a_mixture_has_no_adapter_is_said_with_how_to_ask_for_it(
    arch: str, keys: tuple[str, ...] | None, said: str, tmp_path: Path
) -> None:
    loaded = load(ModelConfig(path=str(tiny_model_folder(tmp_path, arch))))
    adapter = lora.attach(loaded.model, LoraConfig(num_layers=2, keys=keys), seed=0)
    prepared = cast(Any, SimpleNamespace(loaded=loaded, adapter=adapter, config=RunConfig()))
    assert _not_adapted(prepared).get("not adapted", "").startswith(said)
    assert bool(_not_adapted(prepared)) == bool(said)


def test_what_reads_token_by_token_is_said_before_the_run() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "state_size": 4, "num_hidden_layers": 1, "conv_kernel": 4}
    args = mamba.ModelArgs(
        model_type="mamba", vocab_size=16, use_bias=False, use_conv_bias=True, time_step_rank="auto", **sizes
    )
    said = warn_of_loop(mamba.Model(args))
    assert said and said.startswith("mamba blocks") and "--max-length" in said
    assert warn_of_loop(nn.Linear(2, 2)) is None
