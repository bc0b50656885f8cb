"""Tiny random models with a tokenizer, made on the spot, so that tests download nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

PAD, IM_START, IM_END = 0, 1, 2
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MERGES_FROM = (
    "the answer that they prefer is short and clear and says what the question asks for; "
    "the other answer says the same with many more words than the question needs. "
    "user assistant system Hello there, how are you today? I am fine, thank you."
)

_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}
_ATTENTION = _COMMON | {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
_SLIDING = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GATED = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "tie_word_embeddings": True,
}

TINY_MODELS: dict[str, dict[str, Any]] = {
    # name: what config.json says beside the vocabulary and the token ids
    "llama": _ATTENTION | {"model_type": "llama", "tie_word_embeddings": False},
    "llama_tied": _ATTENTION | {"model_type": "llama", "tie_word_embeddings": True},
    "llama_sliding": _ATTENTION | {"model_type": "llama", "layer_types": _SLIDING, "sliding_window": 8},
    "smollm3": _ATTENTION | {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "qwen2": _COMMON | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _ATTENTION | {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma": _ATTENTION | {"model_type": "gemma"},
    "gemma2": _ATTENTION | {"model_type": "gemma2", "query_pre_attn_scalar": 16},
    "gemma3": _ATTENTION
    | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "phi3": _COMMON | {"model_type": "phi3"},
    "mixtral": _COMMON | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _COMMON
    | _EXPERTS
    | {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": _ATTENTION
    | _EXPERTS
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "lfm2": _COMMON
    | {
        "model_type": "lfm2",
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
    "qwen3_5": {"model_type": "qwen3_5", "text_config": _ATTENTION | _GATED | {"model_type": "qwen3_5"}},
    "mamba2": {
        "model_type": "mamba2",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_heads": 8,
        "head_dim": 16,
        "intermediate_size": 128,
        "state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": "auto",
    },
}

MORE_TINY_MODELS: dict[str, dict[str, Any]] = {
    # for tests of files; those that go through every model of the table above leave these out
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "text_config": _ATTENTION
        | _GATED
        | {
            "model_type": "qwen3_5_moe_text",
            "linear_num_value_heads": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "tie_word_embeddings": False,
        },
    },
    "gemma4": {
        "model_type": "gemma4",
        "text_config": _ATTENTION
        | {
            "model_type": "gemma4_text",
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "global_head_dim": 32,
            "num_kv_shared_layers": 3,
            "hidden_size_per_layer_input": 16,
        },
    },
    "gpt_oss": _ATTENTION
    | {
        "model_type": "gpt_oss",
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "lfm2_moe": _COMMON
    | {
        "model_type": "lfm2_moe",
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "full_attn_idxs": [1, 3],
    },
}


def tiny_model_folder(
    folder: Path, arch: str = "llama", *, quantize_bits: int | None = None, seed: int = 0, **config: Any
) -> Path:
    """Write a random model of four layers that mlx-lm loads, with a ChatML byte-level BPE tokenizer; give its folder.

    `arch` is a key of the tables above; keywords overwrite what its config.json says (`num_hidden_layers=2`). Weights
    are float32, far enough from 0 that log-probs differ clearly between tokens; with `quantize_bits` they are
    MLX-quantized in groups of 32. The same arguments write the same bytes. Token ids: 0 pad, 1 <|im_start|>, 2
    <|im_end|> = EOS.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import quantize_model, save_config

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    settings = (
        {"bos_token_id": None, "eos_token_id": IM_END, "pad_token_id": PAD, "vocab_size": vocabulary}
        | (TINY_MODELS | MORE_TINY_MODELS)[arch]
        | config
    )
    if "text_config" in settings:
        size = {"vocab_size": settings["vocab_size"]}
        if settings["text_config"].get("hidden_size_per_layer_input"):
            size["vocab_size_per_layer_input"] = settings["vocab_size"]
        settings["text_config"] = settings["text_config"] | size
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    mx.random.seed(seed)  # a gated-delta layer draws its decay rates
    model = module.Model(module.ModelArgs.from_dict(settings))
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))
    model.update(
        tree_map(
            lambda weight: (
                mx.random.normal(weight.shape, scale=0.2, key=next(keys))
                if weight.ndim > 1
                else weight + mx.random.normal(weight.shape, scale=0.1, key=next(keys))
            ),
            model.parameters(),
        )
    )
    if quantize_bits is not None:
        model, settings = quantize_model(model, settings, group_size=32, bits=quantize_bits)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    save_config(settings, config_path=folder / "config.json")
    return folder


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json of a byte-level BPE with a ChatML template; give its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator([MERGES_FROM], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": SPECIAL_TOKENS[IM_END],
                "pad_token": SPECIAL_TOKENS[PAD],
                "clean_up_tokenization_spaces": False,
                "model_max_length": 2048,
                "chat_template": CHATML,
            },
            indent=2,
        ),
        encoding="utf-8",
    )
    return tokenizer.get_vocab_size()
