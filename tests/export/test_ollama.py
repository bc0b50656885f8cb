"""A folder from which Ollama makes a model: what is written, and that it is the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_dpo.config import ModelConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.export.ollama import export_ollama, sampling
from support.adapters import write_adapter


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("models") / "tiny"))
    settings = {"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapters") / "random")


def test_ollama_gets_a_file_a_template_a_stop_for_each_end_and_the_sampling(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    report = export_ollama(ModelConfig(path=str(base)), adapter, tmp_path / "My model", outtype="f32")
    assert report.gguf == tmp_path / "My model" / "my-model.gguf"
    assert report.gguf.read_bytes()[:4] == b"GGUF"
    lines = (tmp_path / "My model" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./my-model.gguf"
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
    ]
    assert report.has_template
    assert report.commands == (
        f"ollama create my-model -f '{tmp_path / 'My model' / 'Modelfile'}'",
        "ollama run my-model",
    )
    with pytest.raises(UsageError, match="exists already"):
        export_ollama(ModelConfig(path=str(base)), adapter, tmp_path / "My model")


def test_greedy_models_stay_greedy(tmp_path: Path) -> None:
    assert sampling(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    assert sampling(tmp_path) == {"temperature": 0}
