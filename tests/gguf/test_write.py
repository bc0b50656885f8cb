"""What llama.cpp cannot take is refused with the reason and another way, and nothing is left half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from support.gguf_models import DENSE, make_adapter
from support.tiny_models import tiny_model_folder

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.errors import MlxDpoError, ModelError, UsageError
from mlx_dpo.gguf.kquants import quantize_gguf
from mlx_dpo.gguf.write import export_adapter_gguf, export_model_gguf


def change_adapter(folder: Path, weights: dict[str, mx.array], **settings: Any) -> None:
    file = folder / "adapters.safetensors"
    old = mx.load(str(file))
    assert isinstance(old, dict)
    mx.eval(old)
    mx.save_safetensors(str(file), old | weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", tiny_llama, DENSE)


@pytest.mark.parametrize(("kind", "program"), [("dora", "mlx-dpo fuse"), ("full", "mlx_lm.fuse")])
def test_an_adapter_that_is_not_plain_lora(
    kind: str, program: str, adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    change_adapter(adapter, {}, fine_tune_type=kind)
    with pytest.raises(ModelError, match=f"{kind}.*\n.*{program}"):
        export_adapter_gguf(tiny_llama, adapter, tmp_path / "adapter.gguf")


def test_every_reason_is_named_at_once(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    one = mx.zeros((1,))
    change_adapter(
        adapter,
        {
            "model.layers.0.self_attn.q_proj.m": one,
            "model.embed_tokens.lora_a": one,
            "model.embed_tokens.lora_b": one,
            "model.layers.9.self_attn.q_proj.lora_a": one,
        },
    )
    with pytest.raises(ModelError) as error:
        export_adapter_gguf(tiny_llama, adapter, tmp_path / "adapter.gguf")
    for reason in ("DoRA", "embedding", "model.layers.9.self_attn.q_proj"):
        assert reason in error.value.message


def test_an_adapter_on_the_head_of_a_tied_model(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama_tied")
    adapter = make_adapter(tmp_path / "adapter", base, DENSE)
    change_adapter(adapter, {"lm_head.lora_a": mx.zeros((64, 4)), "lm_head.lora_b": mx.zeros((4, 320))})
    with pytest.raises(ModelError, match="head is its embedding"):
        export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf")


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


def test_a_file_that_exists_is_not_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        export_model_gguf(tiny_llama, None, tmp_path / "model.gguf", "f16")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    with pytest.raises(UsageError, match="no folder"):
        export_model_gguf(tiny_llama, None, tmp_path / "nowhere" / "model.gguf", "f16")


def test_an_interrupted_export_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model_gguf(tiny_llama, None, tmp_path / "model.gguf", "f16", progress=stop)
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*"))


def test_progress_counts_every_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = export_model_gguf(tiny_llama, None, tmp_path / "model.gguf", "f16", progress=lambda *now: seen.append(now))
    total = sum(report.tensors.values())
    assert seen == [(i + 1, total) for i in range(total)]
    assert report.bytes == report.path.stat().st_size


def test_k_quants_without_llama_cpp_name_the_exact_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MlxDpoError, match=r"llama-quantize .*in\.gguf .*out\.gguf Q4_K_M"):
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_k_m")
    with pytest.raises(UsageError, match="q4_k_m"):
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", "q9")


def test_k_quants_run_llama_cpps_quantizer_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] || { echo "no such kind" >&2; exit 3; }\n/bin/cp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "in.gguf").write_text("weights")
    assert quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_k_m").read_text() == "weights"
    with pytest.raises(MlxDpoError, match="no such kind"):
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "other.gguf", "q6_k")
    assert not (tmp_path / "other.gguf").exists()
