"""An adapter as a PEFT folder: what PEFT would compute from it, and that reading it back gives the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.events import Warned
from mlx_dpo.export.peft import export_peft, import_peft
from mlx_dpo.models import lora
from mlx_dpo.models.merge import adapted_layers, base_of, full_weight, merged_weight
from support.adapters import PAIRS, write_adapter, write_pairs
from support.tiny_models import tiny_model_folder


def exported(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    return json.loads((folder / "adapter_config.json").read_text()), {k: np.array(v) for k, v in tensors.items()}


def merged(model: Path, adapter: Path) -> dict[str, np.ndarray]:
    from mlx_lm.utils import load_model

    loaded = load_model(model)[0]
    lora.load(loaded, adapter)
    return {name: np.array(merged_weight(module)) for name, module in adapted_layers(loaded)}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl", PAIRS[:2])))


def test_alpha_over_rank_times_b_a_is_what_the_adapter_adds(tiny_llama: Path, data: DataConfig, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    adapter = write_adapter(tiny_llama, tmp_path / "adapter", rank=4, scale=2.5)
    report = export_peft(ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "peft", data=data)
    settings, tensors = exported(tmp_path / "peft")
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 10)
    loaded = load_model(tiny_llama)[0]
    lora.load(loaded, adapter)
    for name, module in adapted_layers(loaded):
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        assert a.shape[0] == b.shape[1] == 4
        expected = np.array(merged_weight(module) - full_weight(base_of(module)))
        np.testing.assert_allclose(settings["lora_alpha"] / settings["r"] * b @ a, expected, rtol=1e-4, atol=1e-5)
    assert report.modules == 4
    assert report.verified[0].largest < 1e-5


def test_modules_are_named_by_their_place_in_a_block_and_the_blocks_by_number(
    tiny_llama: Path, data: DataConfig, tmp_path: Path
) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter", num_layers=2)
    export_peft(ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "peft", base_model="some/model", data=data)
    settings, _ = exported(tmp_path / "peft")
    assert settings["target_modules"] == ["mlp.down_proj", "self_attn.q_proj"]
    assert settings["layers_to_transform"] == [2, 3]
    assert settings["base_model_name_or_path"] == "some/model"


def test_beside_a_head_every_module_is_named_whole(tiny_llama: Path, data: DataConfig, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter", num_layers=1, keys=["lm_head", "self_attn.q_proj"])
    export_peft(ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "peft", data=data)
    settings, _ = exported(tmp_path / "peft")
    assert sorted(settings["target_modules"]) == ["lm_head", "model.layers.3.self_attn.q_proj"]
    assert settings["layers_to_transform"] is None


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "gemma2", "qwen3_5"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_there_and_back_the_weights_are_the_same(arch: str, kind: str, data: DataConfig, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", arch)
    adapter = write_adapter(base, tmp_path / "adapter", kind=kind, keys=["mlp.down_proj"])
    report = export_peft(ModelConfig(path=str(base)), adapter, tmp_path / "peft", data=data)
    before, after = merged(base, adapter), merged(base, tmp_path / "peft")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, rtol=1e-5, atol=1e-6)
    assert exported(tmp_path / "peft")[0]["use_dora"] == (kind == "dora")
    assert report.verified[0].holds
    assert report.verified[0].effect > 0.01


def test_of_a_mixture_the_dense_modules_go_to_peft(data: DataConfig, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "qwen2_moe")
    keys = ["self_attn.q_proj", "mlp.shared_expert.down_proj"]
    adapter = write_adapter(base, tmp_path / "adapter", keys=keys)
    report = export_peft(ModelConfig(path=str(base)), adapter, tmp_path / "peft", data=data)
    assert report.modules == 4
    assert exported(tmp_path / "peft")[0]["target_modules"] == sorted(keys)


def test_inside_a_multimodal_model_names_are_those_of_transformers(data: DataConfig, tmp_path: Path) -> None:
    for architecture, name in (
        ("Qwen3_5ForCausalLM", "base_model.model.model.layers.3.mlp.down_proj.lora_A.weight"),
        (
            "Qwen3_5ForConditionalGeneration",
            "base_model.model.model.language_model.layers.3.mlp.down_proj.lora_A.weight",
        ),
    ):
        base = tiny_model_folder(tmp_path / architecture, "qwen3_5", architectures=[architecture])
        adapter = write_adapter(base, tmp_path / f"{architecture}-adapter", num_layers=1, keys=["mlp.down_proj"])
        export_peft(ModelConfig(path=str(base)), adapter, tmp_path / f"{architecture}-peft", data=data)
        assert name in exported(tmp_path / f"{architecture}-peft")[1]


def test_of_a_quantized_base_the_original_must_be_named(data: DataConfig, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama", quantize_bits=4)
    adapter = write_adapter(base, tmp_path / "adapter")
    said: list[str] = []

    def hear(event: object) -> None:
        said.extend([event.text] if isinstance(event, Warned) else [])

    export_peft(ModelConfig(path=str(base)), adapter, tmp_path / "a", data=data, on_event=hear)
    assert "transformers cannot read" in said[0]
    said.clear()
    export_peft(ModelConfig(path=str(base)), adapter, tmp_path / "b", base_model="own/er", data=data, on_event=hear)
    assert not said


@pytest.mark.parametrize(
    ("arch", "keys", "said"),
    [
        ("qwen3_moe", ["mlp.switch_mlp.gate_proj"], r"switch_mlp.gate_proj \(experts\)"),
        ("qwen3_moe", ["mlp.gate"], r"mlp.gate \(router\)"),
        ("llama_tied", ["model.embed_tokens"], r"embed_tokens \(LoRAEmbedding\)"),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_name(arch: str, keys: list[str], said: str, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", arch)
    adapter = write_adapter(base, tmp_path / "adapter", keys=keys)
    with pytest.raises(ModelError, match=said) as refusal:
        export_peft(ModelConfig(path=str(base)), adapter, tmp_path / "peft")
    assert "mlx-dpo fuse" in refusal.value.remedy and "--keys" in refusal.value.remedy
    assert not (tmp_path / "peft").exists()


def test_a_folder_that_holds_something_is_not_written_to(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        export_peft(ModelConfig(path=str(tiny_llama)), tmp_path / "adapter", tmp_path)


def test_a_peft_folder_becomes_an_adapter_that_mlx_lm_loads(tiny_llama: Path, data: DataConfig, tmp_path: Path) -> None:
    from mlx_lm.utils import load as load_in_mlx_lm

    adapter = write_adapter(tiny_llama, tmp_path / "adapter", rank=4, scale=2.5)
    export_peft(ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "peft", data=data, verify=False)
    settings = import_peft(ModelConfig(path=str(tiny_llama)), tmp_path / "peft", tmp_path / "back")
    assert (settings.rank, settings.scale) == (4, 2.5)
    tokens = mx.array([[5, 9, 40, 41, 7]])
    found, expected = (
        load_in_mlx_lm(str(tiny_llama), adapter_path=str(folder))[0](tokens) for folder in (tmp_path / "back", adapter)
    )
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)
    with pytest.raises(UsageError):
        import_peft(ModelConfig(path=str(tiny_llama)), tmp_path / "peft", tmp_path / "back")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["peft"], "for which model"),
        (["peft", "--model", "m", "--dtype", "float16"], "--dtype float16 is for GGUF files"),
        (["fil.gguf"], "there is no fil.gguf"),
        (["file.gguf", "--model", "m"], "--model is for the folder of a PEFT adapter"),
    ],
)
def test_what_an_import_cannot_mean_is_said(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_dpo.cli.app import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "peft").mkdir()
    (tmp_path / "file.gguf").touch()
    monkeypatch.setattr("sys.argv", ["mlx-dpo", "import", *arguments, "--output", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (1 if "there is no" in said else 2)
    assert said in " ".join(capsys.readouterr().err.split())
