"""TR-DPO: the reference moves to the policy, in weights, and its log-probs are then those of the moved reference."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.config import LoraConfig, ModelConfig
from mlx_dpo.data.batching import make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.models import lora
from mlx_dpo.models.load import load
from mlx_dpo.reference.store import batch_ref_logps, score_batch
from mlx_dpo.reference.tr_dpo import MovingReference
from support.tiny_models import tiny_model_folder

ROWS = [
    TokenizedRow("a", [5, 6, 7], ([8, 9, 2], [10, 2]), (0, 0), (1.0, 2.0)),
    TokenizedRow("b", [11, 12], ([13, 2], [14, 15, 2]), (0, 0), (1.0, 2.0)),
]


def set_adapter(model: nn.Module, seed: int) -> None:
    keys = iter(mx.random.split(mx.random.key(seed), 200))
    weights = [
        (name, mx.random.normal(value.shape, scale=0.1, key=next(keys)))
        for name, value in lora.parameters(model).items()
    ]
    model.load_weights(weights, strict=False)
    mx.eval(model.parameters())


def deltas(model: nn.Module) -> dict[str, mx.array]:
    """scale · A B of each adapted module, dense."""
    arrays = lora.parameters(model)
    names = [name.removesuffix(".lora_a") for name in arrays if name.endswith("lora_a")]
    return {name: arrays[f"{name}.lora_a"] @ arrays[f"{name}.lora_b"] for name in names}


def logps(scorer: Scorer) -> np.ndarray:
    return np.array(scorer(make_batch(ROWS, range(2)), gradient=False).logps)


@pytest.fixture
def scorer(tmp_path: Path) -> tuple[Scorer, lora.Adapter]:
    loaded = load(ModelConfig(path=str(tiny_model_folder(tmp_path / "m", "llama"))))
    adapter = lora.attach(loaded.model, LoraConfig(rank=3, num_layers=2), seed=0)
    return Scorer(loaded.model), adapter


def base_reference(scorer: Scorer, adapter: lora.Adapter, alpha: float) -> MovingReference:
    with lora.switched_off(scorer.model):
        known = score_batch(scorer, make_batch(ROWS, range(2)))
    return MovingReference(scorer, ROWS, adapter, known, alpha, from_base=True)


def test_a_reference_that_takes_the_whole_policy_scores_as_the_policy_did(scorer: tuple[Scorer, lora.Adapter]) -> None:
    score, adapter = scorer
    following = base_reference(score, adapter, 1.0)
    batch = make_batch(ROWS, range(2))
    set_adapter(score.model, 1)
    then = logps(score)
    assert np.abs(np.array(batch_ref_logps(following, batch)) - then).max() > 0.1, "not moved yet"
    following.follow()
    set_adapter(score.model, 2)
    now = lora.parameters(score.model)
    np.testing.assert_allclose(np.array(batch_ref_logps(following, batch)), then, atol=1e-5)
    assert all(mx.array_equal(value, now[name]) for name, value in lora.parameters(score.model).items())


def test_a_mixed_reference_is_the_mix_of_the_weights(scorer: tuple[Scorer, lora.Adapter]) -> None:
    """Base W; after following P1 and P2 with α = 0.6: W + 0.6·Δ2 + 0.4·0.6·Δ1."""
    score, adapter = scorer
    following = base_reference(score, adapter, 0.6)
    seen = []
    for seed in (1, 2):
        set_adapter(score.model, seed)
        seen.append(deltas(score.model))
        following.follow()
    found = np.array(batch_ref_logps(following, make_batch(ROWS, range(2))))

    modules = dict(score.model.named_modules())
    with lora.switched_off(score.model):
        for name in seen[0]:
            mixed = 0.6 * seen[1][name] + 0.24 * seen[0][name]
            module = modules[name]
            module.linear.weight = module.linear.weight + module.scale * mixed.T
        np.testing.assert_allclose(found, logps(score), atol=1e-4)


def test_a_saved_reference_goes_on_where_it_was(scorer: tuple[Scorer, lora.Adapter], tmp_path: Path) -> None:
    score, adapter = scorer
    following, again = (base_reference(score, adapter, 0.6) for _ in range(2))
    following.save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors")), "before its first move there is nothing to save"
    set_adapter(score.model, 1)
    following.follow()
    following.save(tmp_path)
    again.restore(tmp_path)
    for place in range(2):
        for a, b in zip(following[place], again[place], strict=True):
            np.testing.assert_array_equal(a, b)
