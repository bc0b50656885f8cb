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
from support.gguf_models import as_hugging_face_stores_it, gpt_oss_in_four_bit_floats, make_folder
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


def test_a_text_model_inside_one_that_mlx_lm_does_not_know(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "klingon_vl", "text_config": config}))
    with pytest.raises(ModelError, match="no model of type 'klingon_vl'"):
        open_base(base)


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


def test_how_each_matrix_is_quantized_in_a_folder_of_two_ways(tmp_path: Path) -> None:
    base = gpt_oss_in_four_bit_floats(tmp_path / "base")
    experts = "model.layers.0.mlp.experts.up_proj.weight"
    assert open_base(base).quantization(experts) == (32, 4, "mxfp4")
    assert open_base(base).quantization("model.layers.0.self_attn.q_proj.weight") is None
    weights = mx.load(str(base / "model.safetensors"))
    assert isinstance(weights, dict)
    name = "model.layers.0.self_attn.q_proj"
    parts = zip(("weight", "scales", "biases"), mx.quantize(weights[f"{name}.weight"], 64, 8), strict=True)
    weights |= {f"{name}.{part}": array for part, array in parts}
    mx.eval(weights)
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    settings = json.loads((base / "config.json").read_text())
    settings["quantization"] = {"group_size": 32, "bits": 4, "mode": "mxfp4", name: {"group_size": 64, "bits": 8}}
    (base / "config.json").write_text(json.dumps(settings))
    assert open_base(base).quantization(f"{name}.weight") == (64, 8, "affine")
    assert open_base(base).quantization(experts) == (32, 4, "mxfp4")
