"""Settings that hold for some layers go into a file as llama.cpp wants them; test_read.py reads whole models back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.families import FAMILIES, NOT_ROTATED, proportional_factors
from mlx_dpo.gguf.write import export_model_gguf
from support.gguf_models import make_folder
from support.tiny_models import MORE_TINY_MODELS, TINY_MODELS


def test_a_quarter_of_the_frequencies_turn() -> None:
    assert proportional_factors(16, 0.25).tolist() == pytest.approx([1.0] * 2 + [NOT_ROTATED] * 6)


def test_pairs_turn_in_turn_by_time_row_and_column() -> None:
    half = {"head_dim": 256, "partial_rotary_factor": 0.25, "linear_value_head_dim": 128, "linear_num_value_heads": 32}
    found = FAMILIES["gated_delta"].write(half.get)
    assert found["rope.dimension_sections"] == [11, 11, 10, 0]  # Qwen3.5's own, which its config.json may leave out
    assert found["ssm.inner_size"] == 4096


def test_lfm2s_hidden_layer_is_as_wide_as_mlx_lm_makes_it() -> None:
    settings = TINY_MODELS["lfm2"] | {"full_attn_idxs": [1], "num_hidden_layers": 2}
    settings |= {"block_ff_dim": 200, "block_auto_adjust_ff_dim": True}
    found = FAMILIES["lfm2"].write(settings.get)
    assert found == {"attention.head_count_kv": [0, 2], "feed_forward_length": 160}  # 133, in 32s


@pytest.mark.parametrize(
    ("case", "config", "reason"),
    [
        ("qwen3_5", {"linear_value_head_dim": 16}, "heads of two sizes"),
        ("qwen3_5", {"attention_bias": True}, "attention has biases"),
        ("qwen3_5_moe", {"norm_topk_prob": False}, "not normalised"),
        ("gemma4", {"num_kv_shared_layers": 2}, "last layers with keys of their own"),
        ("gemma4", {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "not 'proportional'"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "in turn"),
        ("lfm2", {"conv_bias": True}, "convolutions have biases"),
        ("lfm2_moe", {"norm_topk_prob": False}, "not normalised"),
        ("lfm2_moe", {"routed_scaling_factor": 2.0}, "multiplied by 2.0"),
    ],
)
def test_what_llama_cpp_takes_for_granted(case: str, config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tiny = (TINY_MODELS | MORE_TINY_MODELS)[case]
    if "text_config" in tiny:
        config = {"text_config": tiny["text_config"] | config}
    base = make_folder(tmp_path / "base", case, **config)
    with pytest.raises(ModelError, match=reason):
        export_model_gguf(base, None, tmp_path / "model.gguf", "f16")
