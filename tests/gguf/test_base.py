"""A model folder is read tensor by tensor, and what is missing or in another format is named."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

import gguf
import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.base import open_base
from mlx_dpo.gguf.write import export_model_gguf
from support.gguf_models import as_hugging_face_stores_it, make_folder
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


@pytest.mark.parametrize("case", ["qwen3_5", "qwen3_5_moe", "gemma4", "gemma4_moe"])
def test_a_folder_as_hugging_face_stores_it_gives_the_same_file(case: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", case)
    export_model_gguf(base, None, tmp_path / "ours.gguf", "f32")
    as_hugging_face_stores_it(base)
    export_model_gguf(base, None, tmp_path / "theirs.gguf", "f32")
    ours, theirs = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / f"{whose}.gguf").tensors}
        for whose in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, data in ours.items():
        np.testing.assert_allclose(theirs[name], data, atol=1e-6, err_msg=name)


def test_a_tensor_can_be_taken_again(tmp_path: Path) -> None:
    weights = open_base(tiny_model_folder(tmp_path / "base", "llama")).weights
    first, again = (weights.take("model.norm.weight") for _ in range(2))
    assert mx.array_equal(first, again)


def test_experts_of_which_one_is_missing(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "qwen3_moe")
    weights = mx.load(str(base / "model.safetensors"))
    assert isinstance(weights, dict)
    gates = weights.pop("model.layers.0.mlp.switch_mlp.up_proj.weight")
    weights |= {f"model.layers.0.mlp.experts.{i}.up_proj.weight": gates[i] for i in range(3)}
    mx.eval(weights)
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"does not find .*experts\.3\.up_proj"):
        open_base(base)
