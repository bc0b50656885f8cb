"""PEFT's adapter folders read as what they compute, whatever their ranks, alphas and kinds; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.errors import ModelError
from mlx_dpo.models import lora
from mlx_dpo.models.merge import adapted_layers, base_of, full_weight, merged_weight
from support.tiny_models import tiny_model_folder

Q, V, DOWN = (f"model.layers.3.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
SIZES = {Q: (64, 64), V: (64, 32), DOWN: (128, 64), "lm_head": (64, 320)}


def write_peft(
    folder: Path,
    ranks: dict[str, int],
    *,
    dora: bool = False,
    extra: dict[str, mx.array] | None = None,
    **settings: Any,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A PEFT folder for the tiny Llama with random factors; gives A [r, in] and B [out, r] of each module."""
    random = np.random.default_rng(0)
    factors, tensors = {}, dict(extra or {})
    for module, rank in ranks.items():
        wide, tall = SIZES[module]
        a, b = random.normal(size=(rank, wide)), random.normal(size=(tall, rank))
        factors[module] = (a, b)
        tensors[f"base_model.model.{module}.lora_A.weight"] = mx.array(a.astype(np.float32))
        tensors[f"base_model.model.{module}.lora_B.weight"] = mx.array(b.astype(np.float32))
        if dora:
            magnitude = random.uniform(1, 2, size=tall).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = mx.array(magnitude)
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "use_dora": dora} | settings
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return factors


@pytest.fixture
def model(tiny_llama: Path) -> nn.Module:
    from mlx_lm.utils import load_model

    return load_model(tiny_llama)[0]


def added(model: nn.Module) -> dict[str, np.ndarray]:
    """What the adapter adds to each weight."""
    return {
        name: np.array(merged_weight(module) - full_weight(base_of(module))) for name, module in adapted_layers(model)
    }


def check(model: nn.Module, factors: dict[str, tuple[np.ndarray, np.ndarray]], scales: dict[str, float]) -> None:
    found = added(model)
    assert found.keys() == factors.keys()
    for name, (a, b) in factors.items():
        np.testing.assert_allclose(found[name], scales[name] * b @ a, rtol=1e-4, atol=1e-4)


def test_alpha_over_rank_is_the_scale(model: nn.Module, tmp_path: Path) -> None:
    factors = write_peft(tmp_path, {Q: 4, DOWN: 4})
    lora.load(model, tmp_path)
    check(model, factors, {Q: 16 / 4, DOWN: 16 / 4})


def test_with_rslora_it_is_alpha_over_the_root_of_the_rank(model: nn.Module, tmp_path: Path) -> None:
    factors = write_peft(tmp_path, {Q: 4}, use_rslora=True)
    lora.load(model, tmp_path)
    check(model, factors, {Q: 16 / 2})


def test_each_module_may_have_its_own_rank_and_alpha(model: nn.Module, tmp_path: Path) -> None:
    factors = write_peft(
        tmp_path, {Q: 2, V: 4, DOWN: 8},
        rank_pattern={"q_proj": 2, "down_proj": 8}, alpha_pattern={"self_attn.q_proj": 5, "mlp.down_proj": 12},
    )  # fmt: skip
    lora.load(model, tmp_path)
    check(model, factors, {Q: 5 / 2, V: 16 / 4, DOWN: 12 / 8})


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        (r"layers\.\d+\.self_attn\.q_proj", True),
        ("^model.layers.3.self_attn.q_proj", True),
        ("_proj", False),  # only whole parts of a name, from its end
        ("self_attn", False),
        ("layers.2.self_attn.q_proj", False),
    ],
)
def test_a_pattern_means_the_end_of_a_name(pattern: str, matches: bool, model: nn.Module, tmp_path: Path) -> None:
    factors = write_peft(tmp_path, {Q: 4}, alpha_pattern={pattern: 40})
    lora.load(model, tmp_path)
    check(model, factors, {Q: (40 if matches else 16) / 4})


def test_of_several_patterns_the_first_that_fits_counts(model: nn.Module, tmp_path: Path) -> None:
    factors = write_peft(tmp_path, {Q: 4}, alpha_pattern={"v_proj": 1, "q_proj": 2, "self_attn.q_proj": 3})
    lora.load(model, tmp_path)
    check(model, factors, {Q: 2 / 4})


def test_without_an_alpha_pefts_own_default_counts(model: nn.Module, tmp_path: Path) -> None:
    factors = write_peft(tmp_path, {Q: 4})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    del settings["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lora.load(model, tmp_path)
    check(model, factors, {Q: 8 / 4})


def test_doras_magnitudes_come_along(model: nn.Module, tmp_path: Path) -> None:
    factors = write_peft(tmp_path, {Q: 4, V: 2}, dora=True)
    magnitudes = {name: mx.load(str(tmp_path / "adapter_model.safetensors")) for name in factors}
    assert lora.load(model, tmp_path).fine_tune_type == "dora"
    for name, module in adapted_layers(model):
        a, b = factors[name]
        weight = np.array(full_weight(base_of(module))) + 16 / a.shape[0] * b @ a
        learnt = np.array(magnitudes[name][f"base_model.model.{name}.lora_magnitude_vector"])
        expected = learnt[:, None] * weight / np.linalg.norm(weight, axis=1)[:, None]
        np.testing.assert_allclose(np.array(merged_weight(module)), expected, rtol=1e-4, atol=1e-4)


def test_a_head_is_adapted_and_the_copy_of_it_that_peft_saves_left_alone(model: nn.Module, tmp_path: Path) -> None:
    copy = {"base_model.model.lm_head.base_layer.weight": mx.zeros((320, 64))}
    factors = write_peft(tmp_path, {Q: 4, "lm_head": 4}, extra=copy)
    lora.load(model, tmp_path)
    check(model, factors, {Q: 4.0, "lm_head": 4.0})


def test_a_tied_model_has_no_head_to_adapt(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    tied = load_model(tiny_model_folder(tmp_path / "tied", "llama_tied"))[0]
    write_peft(tmp_path / "adapter", {"lm_head": 4})
    with pytest.raises(ModelError, match="ties its head to its embedding"):
        lora.load(tied, tmp_path / "adapter")


def test_a_text_models_names_are_found_inside_a_multimodal_one(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    model = load_model(tiny_model_folder(tmp_path / "model", "qwen3_5"))[0]
    name = "language_model.model.layers.3.mlp.down_proj"
    assert name in dict(model.named_modules())
    for theirs in ("model.layers.3.mlp.down_proj", "model.language_model.layers.3.mlp.down_proj"):
        fresh = load_model(tmp_path / "model")[0]
        wide = (128, 64)
        SIZES[theirs] = wide
        factors = write_peft(tmp_path / "adapter", {theirs: 4})
        lora.load(fresh, tmp_path / "adapter")
        check(fresh, {name: factors[theirs]}, {name: 4.0})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "a bias on B"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"alora_invocation_tokens": [1, 2]}, "only the tokens after an invocation"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "replicated layers"),
        ({"trainable_token_indices": [5], "use_qalora": True}, "trained tokens, QALoRA"),
    ],
)
def test_what_computes_something_else_is_refused_with_the_reason(
    settings: dict[str, Any], reason: str, model: nn.Module, tmp_path: Path
) -> None:
    write_peft(tmp_path, {Q: 4}, **settings)
    with pytest.raises(ModelError, match=reason) as refusal:
        lora.load(model, tmp_path)
    assert "merge" in refusal.value.remedy


def test_what_is_no_lora_of_a_linear_layer_is_named(model: nn.Module, tmp_path: Path) -> None:
    write_peft(tmp_path, {Q: 4}, extra={"base_model.model.model.embed_tokens.lora_embedding_A": mx.zeros((4, 320))})
    with pytest.raises(ModelError, match=r"embed_tokens\.lora_embedding_A"):
        lora.load(model, tmp_path)
    write_peft(tmp_path, {Q: 4}, extra={f"base_model.model.{V}.lora_A.weight": mx.zeros((4, 64))})
    with pytest.raises(ModelError, match=r"v_proj \(half of a pair\)"):
        lora.load(model, tmp_path)


def test_an_adapter_for_another_model_or_without_weights_says_so(model: nn.Module, tmp_path: Path) -> None:
    SIZES["model.layers.3.block_sparse_moe.gate"] = (64, 4)
    write_peft(tmp_path, {"model.layers.3.block_sparse_moe.gate": 4})
    with pytest.raises(ModelError, match=r"adapts model\.layers\.3\.block_sparse_moe\.gate, which this one lacks"):
        lora.load(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot be read"):
        lora.load(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no adapter weights"):
        lora.load(model, tmp_path)
