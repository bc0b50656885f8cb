"""config.json is read back from a file's settings and rotary factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.gguf.read import import_gguf
from mlx_dpo.gguf.write import export_model_gguf
from support.tiny_models import tiny_model_folder


def test_llama_3s_scaling_is_read_from_its_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = tiny_model_folder(tmp_path / "base", "llama", rope_scaling=scaling, rope_theta=500000.0)
    export_model_gguf(base, None, tmp_path / "model.gguf", "f32")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    found = json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"]
    assert {key: found[key] for key in scaling} == scaling
