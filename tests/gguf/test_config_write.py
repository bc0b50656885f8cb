"""A model that llama.cpp would compute otherwise is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.write import export_model_gguf
from support.tiny_models import tiny_model_folder


@pytest.mark.parametrize(
    ("arch", "config", "reason"),
    [
        ("mixtral", {}, "'mixtral'.*\n.*convert_hf_to_gguf.py"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_traditional": True}, "rotates neighbours"),
        ("llama_sliding", {}, "sliding window"),
        ("smollm3", {}, "every fourth"),
        ("qwen3_moe", {"norm_topk_prob": False}, "not normalised"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar is 20, not 16"),
        ("gemma3", {}, "output head of its own"),
        ("gemma3", {}, "sliding_window_pattern is 2, not 6"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise(
    arch: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = tiny_model_folder(tmp_path / "base", arch, **config)
    with pytest.raises(ModelError, match=reason):
        export_model_gguf(base, None, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*"))
