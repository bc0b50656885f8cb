"""A model folder is read tensor by tensor, and what is missing or in another format is named."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.write import export_model_gguf
from support.tiny_models import tiny_model_folder


def test_a_folder_whose_tensors_are_not_those_of_its_config(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama")
    weights = mx.load(str(base / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.layers.0.strange.weight"] = weights.pop("model.norm.weight")
    mx.eval(weights)
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"lacks model\.norm\.weight and has model\.layers\.0\.strange\.weight"):
        export_model_gguf(base, None, tmp_path / "model.gguf", "f16")


def test_a_model_quantized_in_another_format(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'awq'"):
        export_model_gguf(base, None, tmp_path / "model.gguf", "f16")
