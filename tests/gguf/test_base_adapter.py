"""What llama.cpp's adapters cannot be is refused, all of it at once and with another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.write import export_adapter_gguf
from support.gguf_models import DENSE, make_adapter
from support.tiny_models import tiny_model_folder


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
    for reason in (
        "DoRA",
        "it adapts model.embed_tokens, which llama.cpp uses without adapters",
        "model.layers.9.self_attn.q_proj",
    ):
        assert reason in error.value.message


@pytest.mark.parametrize(
    ("case", "module"),
    [
        ("gemma4", "language_model.model.per_layer_model_projection"),
        ("gemma4", "language_model.model.embed_tokens_per_layer"),
        ("lfm2", "model.layers.0.conv.conv"),
    ],
)
def test_an_adapter_on_what_llama_cpp_computes_without_adapters(case: str, module: str, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", case)
    adapter = make_adapter(tmp_path / "adapter", base, ("self_attn.q_proj",))
    one = mx.zeros((1,))
    change_adapter(adapter, {f"{module}.lora_a": one, f"{module}.lora_b": one})
    with pytest.raises(ModelError, match=f"{module.removeprefix('language_model.')}, which llama.cpp uses without"):
        export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf")


def test_an_adapter_on_the_head_of_a_tied_model(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "llama_tied")
    adapter = make_adapter(tmp_path / "adapter", base, DENSE)
    change_adapter(adapter, {"lm_head.lora_a": mx.zeros((64, 4)), "lm_head.lora_b": mx.zeros((4, 320))})
    with pytest.raises(ModelError, match="head is its embedding"):
        export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf")
