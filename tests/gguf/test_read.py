"""A GGUF file becomes a folder that mlx-lm loads and that holds the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.errors import ModelError, UsageError
from support.gguf_models import (
    CASES,
    DENSE,
    gpt_oss_in_four_bit_floats,
    make_adapter,
    make_folder,
    mlx_log_probs,
)
from support.tiny_models import tiny_model_folder

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

import gguf

from mlx_dpo.gguf.read import import_gguf
from mlx_dpo.gguf.write import export_adapter_gguf, export_model_gguf

NEWER = ("qwen3_5", "qwen3_5_moe", "gemma4", "gemma4_moe", "gpt_oss", "lfm2", "lfm2_moe")
SAME_FROM_THE_FILE = [case for case in CASES if case not in ("llama_yarn", "llama3_rope")]


@pytest.mark.parametrize("case", SAME_FROM_THE_FILE)
def test_a_folder_written_and_read_back_computes_the_same(case: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", case)
    export_model_gguf(base, None, tmp_path / "model.gguf", "f32")
    report = import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert report.kept_quantized == 0
    np.testing.assert_allclose(mlx_log_probs(tmp_path / "back", None), mlx_log_probs(base, None), atol=1e-4)


@pytest.mark.parametrize("case", ["llama_tied", "llama", "qwen3_moe", "gemma3", *NEWER])
def test_four_bit_weights_go_out_and_come_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", case, quantize_bits=4)
    _round_scales_to_half(base)
    report = export_model_gguf(base, None, tmp_path / "model.gguf", "q4_1")
    assert report.not_exact == ()
    again = import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert again.kept_quantized == report.tensors["Q4_1"]
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (base, tmp_path / "back"))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    for name in (name for name in before if name.endswith(".scales") and name in after):
        module = name.removesuffix("scales")
        for part in ("weight", "scales", "biases"):
            assert mx.array_equal(before[module + part].astype(after[module + part].dtype), after[module + part])
    np.testing.assert_allclose(mlx_log_probs(tmp_path / "back", None), mlx_log_probs(base, None), atol=1e-4)


def test_four_bit_floats_go_out_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = gpt_oss_in_four_bit_floats(tmp_path / "base")
    export_model_gguf(base, None, tmp_path / "model.gguf", "q4_1")
    report = import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert report.kept_quantized == 12
    np.testing.assert_allclose(mlx_log_probs(tmp_path / "back", None), mlx_log_probs(base, None), atol=1e-4)


@pytest.mark.parametrize("case", ["qwen3_5_moe", "gemma4_moe"])
def test_weights_kept_in_four_bits_are_those_written_in_float32(case: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", case, quantize_bits=4)
    _round_scales_to_half(base)
    for outtype in ("q4_1", "f32"):
        export_model_gguf(base, None, tmp_path / f"{outtype}.gguf", outtype)
    kept, plain = (
        {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / file).tensors}
        for file in ("q4_1.gguf", "f32.gguf")
    )
    for name, values in plain.items():
        np.testing.assert_allclose(kept[name], values, atol=1e-6, err_msg=name)


def test_what_the_makers_of_files_add_or_join_is_read(tmp_path: Path) -> None:
    """A block that guesses further tokens is left out, and experts' two matrices in one are taken apart."""
    base = make_folder(tmp_path / "base", "qwen3_5_moe")
    export_model_gguf(base, None, tmp_path / "model.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "joined.gguf", "qwen35moe")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value = field.contents()
            value = value + 1 if field.name == "qwen35moe.block_count" else value
            kind = field.types[0]
            writer.add_key_value(field.name, value, kind, field.types[-1] if len(field.types) > 1 else None)
    writer.add_uint32("qwen35moe.nextn_predict_layers", 1)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name in [name for name in tensors if "ffn_gate_exps" in name]:
        joined = [tensors.pop(name), tensors.pop(name.replace("gate", "up"))]
        tensors[name.replace("gate", "gate_up")] = np.concatenate(joined, axis=1)
    tensors["blk.4.nextn.enorm.weight"] = np.zeros(64, np.float32)
    for name, data in tensors.items():
        writer.add_tensor(name, np.array(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    import_gguf(tmp_path / "joined.gguf", tmp_path / "back")
    np.testing.assert_allclose(mlx_log_probs(tmp_path / "back", None), mlx_log_probs(base, None), atol=1e-4)


def _round_scales_to_half(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    rounded = {
        name: value.astype(mx.float16).astype(mx.float32) if name.endswith((".scales", ".biases")) else value
        for name, value in weights.items()
    }
    mx.eval(rounded)
    mx.save_safetensors(str(folder / "model.safetensors"), rounded)


def test_scales_that_have_no_half_are_written_as_f16_and_named(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama_tied", quantize_bits=4)
    report = export_model_gguf(base, None, tmp_path / "model.gguf", "q4_1")
    assert len(report.not_exact) == report.tensors["F16"]
    assert "model.layers.0.self_attn.q_proj.weight" in report.not_exact


def test_adapted_matrices_of_a_four_bit_base_become_16_bit(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "llama_tied", quantize_bits=4)
    _round_scales_to_half(base)
    adapter = make_adapter(tmp_path / "adapter", base, DENSE[:2])
    report = export_model_gguf(base, adapter, tmp_path / "model.gguf", "q4_1")
    assert report.adapted == report.tensors["F16"] == 8  # q and k of four layers


def test_a_base_that_is_not_quantized_has_no_bits_to_keep(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not quantized"):
        export_model_gguf(tiny_llama, None, tmp_path / "model.gguf", "q4_1")


@pytest.mark.parametrize(("dtype", "found"), [("float32", mx.float32), ("bfloat16", mx.bfloat16)])
def test_a_quantized_file_can_be_dequantized_as_it_is_read(dtype: Any, found: mx.Dtype, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama")
    export_model_gguf(base, None, tmp_path / "model.gguf", "q8_0")
    import_gguf(tmp_path / "model.gguf", tmp_path / "kept")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=dtype)
    weights = mx.load(str(tmp_path / "back" / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {value.dtype for value in weights.values()} == {found}
    if dtype == "float32":
        expected = mlx_log_probs(tmp_path / "kept", None)
        np.testing.assert_allclose(mlx_log_probs(tmp_path / "back", None), expected, atol=1e-3)


def test_weights_are_sharded_when_they_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama")
    export_model_gguf(base, None, tmp_path / "model.gguf", "f16")
    monkeypatch.setattr("mlx_dpo.gguf.read.SHARD_BYTES", 100_000)
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    shards = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert mlx_log_probs(tmp_path / "back", None).shape[0] > 0


def test_what_cannot_be_read_is_refused_and_leaves_no_folder(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ModelError, match="no GGUF file"):
        import_gguf(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(ModelError, match="no file"):
        import_gguf(tmp_path / "missing.gguf", tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba'"):
        import_gguf(tmp_path / "mamba.gguf", tmp_path / "out")
    adapter = make_adapter(tmp_path / "adapter", tiny_llama, DENSE[:1])
    export_adapter_gguf(tiny_llama, adapter, tmp_path / "adapter.gguf")
    with pytest.raises(ModelError, match="adapter of architecture 'llama'"):
        import_gguf(tmp_path / "adapter.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        import_gguf(tmp_path / "adapter.gguf", tmp_path / "there")


def test_an_interrupted_import_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    export_model_gguf(tiny_llama, None, tmp_path / "model.gguf", "f16")
    with pytest.raises(KeyboardInterrupt):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
