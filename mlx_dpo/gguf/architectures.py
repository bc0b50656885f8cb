"""The architectures that go into and out of GGUF: names of settings, and what differs in the numbers.

Adding one is an entry in `ARCHITECTURES`; the `gguf` package knows the names of its tensors. Facts are those of
llama.cpp's loader (src/llama-model.cpp) and converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import gguf
import numpy as np

COMMON_SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
SLIDING = {"attention.sliding_window": "sliding_window"}

LAYER = re.compile(r"layers\.(\d+)\.")
name_map = cache(gguf.get_tensor_name_map)

LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one `model_type` of config.json is in a GGUF file."""

    gguf: str  # general.architecture
    model_class: str  # config.json's "architectures"
    settings: Mapping[str, str] = field(default_factory=lambda: dict(COMMON_SETTINGS))  # GGUF key to config.json key
    constants: Mapping[str, Any] = field(default_factory=dict)  # config.json keys that GGUF leaves to the architecture
    interleaved_rope: bool = False  # rows of q and k in pairs: ggml rotates neighbours, Hugging Face halves
    norm_offset: bool = False  # norms are kept as weight + 1
    untied_head: bool = True  # whether an output matrix of its own may exist
    own_rounding: float = 0.0  # nats that llama.cpp's own float32 costs: it looks GELU up in a table of float16
    query_scalar_big: tuple[int, int] | None = None  # (layers, scalar) of the one size whose scalar is not head_dim
    add_bos: bool = False  # whether a text begins with a token for it where the folder does not say
    family: str = ""  # entry of families.FAMILIES: what no table says of its settings
    names: Mapping[str, str] = field(default_factory=dict)  # a block's tensors whose names the gguf package lacks


GEMMAS: dict[str, Any] = {
    "norm_offset": True,
    "untied_head": False,
    "own_rounding": 0.1,  # 0.01 was seen on random models, 0.05 on a tuned gemma 3 of 270 M parameters
}

GATED_DELTA: dict[str, Any] = {
    "family": "gated_delta",
    "names": {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"},
}
SSM_SETTINGS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
}
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
LFM2_SETTINGS = {
    key: name
    for key, name in COMMON_SETTINGS.items()
    if key not in ("feed_forward_length", "attention.head_count_kv", "attention.key_length")
} | {"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(gguf="llama", model_class="LlamaForCausalLM", interleaved_rope=True),
    "mistral": Architecture(gguf="llama", model_class="MistralForCausalLM", interleaved_rope=True),
    "smollm3": Architecture(
        gguf="smollm3",
        model_class="SmolLM3ForCausalLM",
        interleaved_rope=True,
        constants={"no_rope_layer_interval": 4},
    ),
    "qwen2": Architecture(gguf="qwen2", model_class="Qwen2ForCausalLM"),
    "qwen3": Architecture(gguf="qwen3", model_class="Qwen3ForCausalLM"),
    "qwen3_moe": Architecture(
        gguf="qwen3moe",
        model_class="Qwen3MoeForCausalLM",
        settings=COMMON_SETTINGS | EXPERTS,
        constants={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "gemma": Architecture(gguf="gemma", model_class="GemmaForCausalLM", **GEMMAS),
    "gemma2": Architecture(
        gguf="gemma2",
        model_class="Gemma2ForCausalLM",
        settings=COMMON_SETTINGS
        | SLIDING
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        **GEMMAS,
        query_scalar_big=(46, 144),
    ),
    "gemma3_text": Architecture(
        gguf="gemma3",
        model_class="Gemma3ForCausalLM",
        settings=COMMON_SETTINGS | SLIDING | {"rope.freq_base_swa": "rope_local_base_freq"},
        constants={"sliding_window_pattern": 6},
        **GEMMAS,
        query_scalar_big=(62, 168),
    ),
    "phi3": Architecture(
        gguf="phi3",
        model_class="Phi3ForCausalLM",
        settings={k: v for k, v in COMMON_SETTINGS.items() if v != "head_dim"} | SLIDING,
    ),
    "qwen3_5": Architecture(
        gguf="qwen35",
        model_class="Qwen3_5ForCausalLM",
        settings=COMMON_SETTINGS | SSM_SETTINGS,
        **GATED_DELTA,
    ),
    "qwen3_5_moe": Architecture(
        gguf="qwen35moe",
        model_class="Qwen3_5MoeForCausalLM",
        settings=COMMON_SETTINGS
        | SSM_SETTINGS
        | EXPERTS
        | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        constants={"decoder_sparse_step": 1, "norm_topk_prob": True},
        **GATED_DELTA,
    ),
    "gemma4_text": Architecture(
        gguf="gemma4",
        model_class="Gemma4ForCausalLM",
        settings={
            key: name
            for key, name in COMMON_SETTINGS.items()
            if name not in ("head_dim", "rope_theta", "intermediate_size", "num_key_value_heads")
        }
        | SLIDING
        | {
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "expert_count": "num_experts",
            "expert_used_count": "top_k_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        untied_head=False,
        own_rounding=0.1,
        add_bos=True,
        family="gemma4",
        names={
            "layer_scalar": "layer_output_scale.weight",
            "router.scale": "ffn_gate_inp.scale",
            "router.per_expert_scale": "ffn_down_exps.scale",
            "experts.switch_glu.gate_proj.weight": "ffn_gate_exps.weight",
            "experts.switch_glu.up_proj.weight": "ffn_up_exps.weight",
            "experts.switch_glu.down_proj.weight": "ffn_down_exps.weight",
        },
    ),
    "gpt_oss": Architecture(
        gguf="gpt-oss",
        model_class="GptOssForCausalLM",
        settings=COMMON_SETTINGS
        | SLIDING
        | {
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
        family="gpt_oss",
        names={"self_attn.sinks": "attn_sinks.weight"},
    ),
    "lfm2": Architecture(
        gguf="lfm2", model_class="Lfm2ForCausalLM", settings=LFM2_SETTINGS, untied_head=False, family="lfm2"
    ),
    "lfm2_moe": Architecture(
        gguf="lfm2moe",
        model_class="Lfm2MoeForCausalLM",
        settings=LFM2_SETTINGS
        | EXPERTS
        | {"feed_forward_length": "intermediate_size", "leading_dense_block_count": "num_dense_layers"},
        constants={"norm_topk_prob": True, "conv_bias": False},
        untied_head=False,
        family="lfm2",
        names={"feed_forward.expert_bias": "exp_probs_b.bias"},
    ),
}


def model_type_of(gguf_architecture: str) -> str | None:
    """The config.json `model_type` for a file's `general.architecture`; None when no entry reads it."""
    return next((name for name, a in ARCHITECTURES.items() if a.gguf == gguf_architecture), None)


def to_gguf_name(architecture: Architecture, name: str) -> str | None:
    """`model.layers.3.self_attn.q_proj.weight` as `blk.3.attn_q.weight`; None for what a file has no place for."""
    layer = LAYER.search(name)
    if layer and (own := architecture.names.get(name[layer.end() :])):
        return f"blk.{layer[1]}.{own}"
    stem, _, kind = name.rpartition(".")
    # the package's map is made for so many layers; mlx-lm has one tensor for all experts, and a name for it of its own
    names = name_map(_package_names(architecture.gguf), 1)
    found = names.get_name(LAYER.sub("layers.0.", stem).replace(".switch_mlp.", ".experts."))
    if found is None:
        return None
    return f"{found.replace('blk.0.', f'blk.{layer[1]}.') if layer else found}.{kind}"


def _package_names(gguf_architecture: str) -> Any:
    """The gguf package's own word for a file's `general.architecture`."""
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_architecture)


def llama3_factors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """What each of `[head_dim / 2]` rotary frequencies is divided by in Llama 3's scaling (the tensor `rope_freqs`).

    Wavelengths beyond original/low are stretched by `factor`, those below original/high stay, the rest are blended.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
