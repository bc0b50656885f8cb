"""A fused model or an adapter as a GGUF file: what is written, from which adapters, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.errors import MlxDpoError, UsageError
from mlx_dpo.events import Progressed, Warned
from mlx_dpo.export.gguf import export_gguf, export_gguf_adapter
from mlx_dpo.export.peft import export_peft
from mlx_dpo.gguf.llamacpp import runtime_installed
from support.adapters import PAIRS, write_adapter, write_pairs


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_adapter(tiny_llama, tmp_path / "adapter")


def test_a_peft_adapter_gives_the_same_files_as_the_one_it_was_made_of(
    tiny_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(tiny_llama))
    export_peft(model, adapter, tmp_path / "peft", verify=False)
    for name, source in (("ours", adapter), ("peft", tmp_path / "peft")):
        export_gguf(model, source, tmp_path / f"{name}.gguf", verify=False)
        export_gguf_adapter(model, source, tmp_path / f"{name}-adapter.gguf", verify=False)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "peft.gguf").read_bytes()
    assert (tmp_path / "ours-adapter.gguf").stat().st_size == (tmp_path / "peft-adapter.gguf").stat().st_size


@pytest.mark.skipif(not runtime_installed(), reason="real llama.cpp is not installed: pip install xllamacpp")
def test_an_adapters_file_is_checked_on_top_of_its_base(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl", PAIRS[:2])))
    events: list[Any] = []
    report = export_gguf_adapter(
        ModelConfig(path=str(tiny_llama)), adapter, tmp_path / "adapter.gguf", data=data, rows=2, on_event=events.append
    )
    assert report.verified is not None
    assert report.verified.largest < 1e-3
    assert report.verified.control is not None
    assert "checking in llama.cpp" in {event.name for event in events if isinstance(event, Progressed)}


def test_without_llama_cpp_the_file_is_written_and_the_missing_check_said(
    tiny_llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_dpo.export.gguf.runtime_installed", lambda: False)
    events: list[Any] = []
    file = tmp_path / "adapter.gguf"
    assert (
        export_gguf_adapter(ModelConfig(path=str(tiny_llama)), adapter, file, on_event=events.append).verified is None
    )
    assert file.is_file()
    assert any(isinstance(event, Warned) and "not checked in llama.cpp" in event.text for event in events)


def test_a_form_that_there_is_not_is_refused_before_anything_is_written(
    tiny_llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(path=str(tiny_llama))
    with pytest.raises(UsageError, match="q3_x is no form"):
        export_gguf(model, adapter, tmp_path / "tuned.gguf", outtype="q3_x")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MlxDpoError, match="llama-quantize"):
        export_gguf(model, adapter, tmp_path / "tuned.gguf", outtype="q4_k_m", verify=False)
    assert not list(tmp_path.glob("*.gguf"))
