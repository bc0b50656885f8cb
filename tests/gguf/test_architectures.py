"""Names of tensors go to GGUF and come back; test_read.py and test_llamacpp.py do so with whole models."""

from __future__ import annotations

import pytest

from mlx_dpo.gguf.architectures import (
    ARCHITECTURES,
    LLAMA3_DEFAULTS,
    llama3_factors,
    model_type_of,
    to_gguf_name,
)

NAMES = {
    "llama": {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.3.self_attn.q_proj.bias": "blk.3.attn_q.bias",
        "model.layers.12.self_attn.o_proj.weight": "blk.12.attn_output.weight",
        "model.layers.3.post_attention_layernorm.weight": "blk.3.ffn_norm.weight",
        "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
    },
    "qwen3": {"model.layers.3.self_attn.k_norm.weight": "blk.3.attn_k_norm.weight"},
    "qwen3_moe": {
        "model.layers.3.mlp.gate.weight": "blk.3.ffn_gate_inp.weight",
        "model.layers.3.mlp.switch_mlp.up_proj.weight": "blk.3.ffn_up_exps.weight",
    },
    "gemma2": {
        "model.layers.3.post_attention_layernorm.weight": "blk.3.post_attention_norm.weight",
        "model.layers.3.pre_feedforward_layernorm.weight": "blk.3.ffn_norm.weight",
        "model.layers.3.post_feedforward_layernorm.weight": "blk.3.post_ffw_norm.weight",
    },
    "phi3": {
        "model.layers.3.self_attn.qkv_proj.weight": "blk.3.attn_qkv.weight",
        "model.layers.3.mlp.gate_up_proj.weight": "blk.3.ffn_up.weight",
    },
}


@pytest.mark.parametrize("model_type", NAMES)
def test_names_are_those_that_llama_cpp_looks_for(model_type: str) -> None:
    names = NAMES[model_type]
    assert {name: to_gguf_name(ARCHITECTURES[model_type], name) for name in names} == names


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_is_one_that_the_gguf_package_names_tensors_of(model_type: str) -> None:
    name = "model.layers.9.self_attn.o_proj.weight"
    assert to_gguf_name(ARCHITECTURES[model_type], name) == "blk.9.attn_output.weight"


def test_what_has_no_place_has_no_name() -> None:
    assert to_gguf_name(ARCHITECTURES["llama"], "model.layers.0.mixer.weight") is None
    assert model_type_of("mamba") is None


def test_llama_3_stretches_long_waves_and_leaves_short_ones() -> None:
    # frequency 0 has wavelength 2π, far below 8192 / 4; the last, 2π · 500000^(126/128), far above 8192 / 1
    factors = llama3_factors(128, 500000.0, LLAMA3_DEFAULTS | {"factor": 8.0})
    assert factors.shape == (64,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
