"""Fused folders compute what base and adapter computed, and what rounding takes is measured and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.events import Progressed, Warned
from mlx_dpo.export import fuse as fuse_module
from mlx_dpo.export.fuse import WARN_ABOVE, fuse
from mlx_dpo.models.merge import base_of, full_weight
from mlx_dpo.planning.machine import Machine
from support.adapters import PAIRS, write_adapter, write_pairs
from support.tiny_models import tiny_model_folder

EXPERTS = ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj", "self_attn.q_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"keys": ["model.embed_tokens", "self_attn.q_proj"]},  # reaches the head, too
    "qwen2": {"keys": ["self_attn.q_proj", "self_attn.v_proj"]},  # which have biases
    "gemma2": {},
    "qwen3_moe": {"keys": EXPERTS},
    "qwen3_5": {"keys": ["mlp.down_proj"]},  # lies inside language_model
    "phi3": {"keys": ["self_attn.qkv_proj", "mlp.gate_up_proj"]},
}


def mlx_lm_logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    """What mlx-lm itself computes in float32, for some tokens."""
    from mlx_lm.utils import load

    loaded, _ = load(str(model), adapter_path=str(adapter) if adapter else None)
    loaded.set_dtype(mx.float32)
    return np.array(loaded(mx.array([[1, 40, 77, 200, 9, 2, 30]])).astype(mx.float32))


def folder_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def weights(folder: Path) -> dict[str, mx.array]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in mx.load(str(file)).items()}


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "llama-4bit", "llama", quantize_bits=4)


@pytest.fixture(scope="module")
def four_bit_adapter(four_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(four_bit, tmp_path_factory.mktemp("adapters") / "random")


# Whole folders.


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fused_folder_computes_what_base_and_adapter_compute(arch: str, kind: str, tmp_path: Path) -> None:
    settings = KINDS[arch]
    if kind == "dora" and arch == "qwen3_moe":
        pytest.skip("mlx-lm has no DoRA of experts")
    base = tiny_model_folder(tmp_path / "base", arch)
    adapter = write_adapter(base, tmp_path / "adapter", kind=kind, **settings)
    report = fuse(ModelConfig(path=str(base)), adapter, tmp_path / "fused", data=rows(tmp_path))
    expected, found = mlx_lm_logits(base, adapter), mlx_lm_logits(tmp_path / "fused")
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(mlx_lm_logits(base) - expected).max() > 0.05
    assert report.form == "float32"
    assert report.verified is not None
    assert report.verified.holds
    assert report.verified.effect > 100 * report.verified.error


def rows(folder: Path) -> DataConfig:
    return DataConfig(path=str(write_pairs(folder / "pairs.jsonl", PAIRS[:3])))


def test_a_quantized_base_becomes_16_bit_without_quantization(
    four_bit: Path, four_bit_adapter: Path, tmp_path: Path
) -> None:
    report = fuse(ModelConfig(path=str(four_bit)), four_bit_adapter, tmp_path / "fused", data=rows(tmp_path))
    assert report.form == "float16"
    assert not {"quantization", "quantization_config"} & folder_config(tmp_path / "fused").keys()
    assert {value.dtype for value in weights(tmp_path / "fused").values()} == {mx.float16}
    assert report.error < 0.1
    assert report.verified is not None
    assert report.verified.error < 0.1 * report.verified.effect


def test_in_float32_a_quantized_base_loses_nothing(four_bit: Path, four_bit_adapter: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(four_bit))
    report = fuse(model, four_bit_adapter, tmp_path / "fused", dtype="float32", data=rows(tmp_path))
    assert report.verified is not None
    assert report.verified.largest < 1e-3 == report.verified.tolerance
    # mlx-lm's own float32 product of packed weights is another order of the same sum
    np.testing.assert_allclose(mlx_lm_logits(tmp_path / "fused"), mlx_lm_logits(four_bit, four_bit_adapter), atol=1e-3)


def test_back_into_four_bits_the_rounding_error_is_measured_and_said(four_bit: Path, tmp_path: Path) -> None:
    said: list[str] = []
    adapter = write_adapter(four_bit, tmp_path / "adapter", size=0.025)
    report = fuse(
        ModelConfig(path=str(four_bit)), adapter, tmp_path / "fused", quantize_bits=4, data=rows(tmp_path),
        on_event=lambda event: said.append(event.text) if isinstance(event, Warned) else None,
    )  # fmt: skip
    assert report.form == "4-bit affine in groups of 32"
    assert folder_config(tmp_path / "fused")["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert report.error > WARN_ABOVE
    assert len(report.layers) == 4
    assert any("takes much of what was learnt" in text for text in said)
    assert report.verified is not None
    assert report.verified.error > 0.1 * report.verified.effect


@pytest.mark.parametrize(("bits", "most"), [(8, 0.2), (16, 0.01)])
def test_adapted_layers_kept_finer_keep_the_tuning_and_the_rest_its_bits(
    bits: int, most: float, four_bit: Path, four_bit_adapter: Path, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(four_bit))
    report = fuse(model, four_bit_adapter, tmp_path / "fused", keep_adapted_bits=bits, data=rows(tmp_path))
    assert report.form == "4-bit affine in groups of 32"
    assert report.error < most
    before, after = weights(four_bit), weights(tmp_path / "fused")
    adapted = {layer.name for layer in report.layers}
    for name, value in after.items():
        if name.rsplit(".", 1)[0] not in adapted:
            assert mx.array_equal(value, before[name]), name
    overrides = {name for name in folder_config(tmp_path / "fused")["quantization"] if "." in name}
    assert overrides == (adapted if bits == 8 else set())
    assert {f"{name}.scales" in after for name in adapted} == {bits == 8}
    expected = mlx_lm_logits(four_bit, four_bit_adapter)
    away = np.abs(mlx_lm_logits(four_bit) - expected).max()
    assert np.abs(mlx_lm_logits(tmp_path / "fused") - expected).max() < 0.3 * away


def test_a_base_of_several_bits_keeps_each_layers_own(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    base = tiny_model_folder(tmp_path / "base", "llama")
    finer = {"bits": 8, "group_size": 64}
    model, config = load_model(base)
    model, config = quantize_model(
        model, config, 32, 4, quant_predicate=lambda name, _: finer if "embed" in name or "v_proj" in name else True
    )
    save_model(base, model)
    save_config(config, base / "config.json")
    adapter = write_adapter(base, tmp_path / "adapter", keys=["self_attn.v_proj", "self_attn.q_proj"])
    for bits, settings in ((16, {"keep_adapted_bits": 16}), (None, {"quantize_bits": 4})):
        folder = tmp_path / str(bits)
        report = fuse(ModelConfig(path=str(base)), adapter, folder, verify=False, **settings)
        before, after = weights(base), weights(folder)
        adapted = {layer.name for layer in report.layers}
        for name, value in before.items():
            if name.rsplit(".", 1)[0] not in adapted:
                assert mx.array_equal(value, after[name]), name
        forms = {layer.name.rsplit(".", 1)[-1]: layer.form for layer in report.layers}
        assert forms["v_proj"] == ("8-bit affine in groups of 64" if bits is None else "float16")
        expected = mlx_lm_logits(base, adapter)
        off = np.abs(mlx_lm_logits(folder) - expected).max()
        if bits == 16:
            assert off < 0.1 * np.abs(mlx_lm_logits(base) - expected).max()


def test_a_full_precision_base_is_quantized_as_mlx_lm_would(tiny_llama: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model

    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    fuse(ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "plain", dtype="float16", verify=False)
    model, config = load_model(tmp_path / "plain", lazy=True)
    _, expected = quantize_model(model, config, 32, 6)
    fuse(
        ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "fused",
        quantize_bits=6, quantize_group_size=32, verify=False,
    )  # fmt: skip
    assert folder_config(tmp_path / "fused")["quantization"] == expected["quantization"]
    np.testing.assert_allclose(
        mlx_lm_logits(tmp_path / "fused"),
        np.array(quantized_logits(model)),
        atol=0.05,  # float16 before they were packed, or float32 until then
    )


def quantized_logits(model: nn.Module) -> mx.array:
    model.set_dtype(mx.float32)
    return model(mx.array([[1, 40, 77, 200, 9, 2, 30]])).astype(mx.float32)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_mode_of_mlx_is_written_and_read_back(mode: str, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    model = ModelConfig(path=str(tiny_llama))
    report = fuse(model, adapter, tmp_path / "fused", quantize_mode=mode, data=rows(tmp_path))
    assert folder_config(tmp_path / "fused")["quantization"]["mode"] == mode
    assert report.verified is not None


def test_an_adapter_trained_on_a_base_quantized_while_loading_meets_that_base(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    model = ModelConfig(path=str(tiny_llama), quantize_bits=4, quantize_group_size=32)
    report = fuse(model, adapter, tmp_path / "fused", dtype="float32", data=rows(tmp_path))
    assert report.verified is not None
    assert report.verified.largest < 1e-3


def test_tokenizer_template_generation_settings_and_card_go_along(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "generation_config.json").write_text('{"temperature": 0.3}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "LICENSE").write_text("free")
    adapter = write_adapter(base, tmp_path / "adapter")
    (adapter / "config.yaml").write_text("train:\n  seed: 7\n")
    fuse(ModelConfig(path=str(base)), adapter, tmp_path / "fused", verify=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "fused" / name).read_bytes() == (base / name).read_bytes()
    assert "| seed | 7 |" in (tmp_path / "fused" / "README.md").read_text()
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(tmp_path / "fused").keys() == weights(base).keys()
    assert not list(tmp_path.glob(".fused*"))


@pytest.mark.parametrize(("bits", "form"), [(None, "float32"), (4, "4-bit affine in groups of 32")])
def test_where_the_check_does_not_fit_each_adapted_layer_is_compared_as_it_was_written(
    bits: int | None, form: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    size = 4 * sum(value.size for value in weights(tiny_llama).values())
    monkeypatch.setattr(fuse_module, "this_machine", lambda: Machine(2**40, size - 1, "a small machine"))
    said: list[Any] = []
    how: dict[str, Any] = {"quantize_bits": bits, "quantize_group_size": 32 if bits else None, "rows": 2}
    model = ModelConfig(path=str(tiny_llama))
    report = fuse(model, adapter, tmp_path / "fused", on_event=said.append, **how)
    warned = next(i for i, event in enumerate(said) if isinstance(event, Warned) and "one by one" in event.text)
    assert "a small machine" in said[warned].text
    assert warned < next(i for i, event in enumerate(said) if isinstance(event, Progressed) and "writing" in event.name)
    assert (report.verified, report.compared, report.form) == (None, len(report.layers), form)

    # and the comparison finds a layer that is not base + adapter
    monkeypatch.setattr(fuse_module, "merged_weight", lambda module: full_weight(base_of(module)))
    with pytest.raises(ModelError, match="is not what was trained: model"):
        fuse(model, adapter, tmp_path / "wrong", on_event=said.append, **how)
    assert not (tmp_path / "wrong").exists()


def test_nothing_is_left_of_what_fails(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    with pytest.raises(Exception, match="no file or folder"):
        fuse(ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "fused", data=DataConfig(path="nowhere.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_holds_something_is_not_written_to(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "mine").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        fuse(ModelConfig(path=str(tiny_llama)), tmp_path / "adapter", tmp_path / "fused")


def test_what_does_not_go_together_is_refused_with_all_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    model = ModelConfig(path=str(tiny_llama))
    with pytest.raises(UsageError, match=r"--quantize-group-size.*go with --quantize-bits; --keep-adapted-bits 5"):
        fuse(model, adapter, tmp_path / "fused", quantize_group_size=32, keep_adapted_bits=5)
    with pytest.raises(UsageError, match="MLX knows affine, mxfp4"):
        fuse(model, adapter, tmp_path / "fused", quantize_mode="int4")
    with pytest.raises(UsageError, match="cannot quantize to 7-bit"):
        fuse(model, adapter, tmp_path / "fused", quantize_bits=7)
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        fuse(model, tmp_path, tmp_path / "fused")
