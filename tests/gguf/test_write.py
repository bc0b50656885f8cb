"""GGUF files are written whole or not at all, tensor by tensor, and never over another file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.errors import UsageError
from mlx_dpo.gguf.write import export_model_gguf
from support.tiny_models import tiny_model_folder


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


def test_what_a_file_does_not_hold_is_said(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "qwen3_5")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"vision_config": {"depth": 2}}))
    report = export_model_gguf(base, None, tmp_path / "model.gguf", "f16")
    assert report.notes == ("the file holds the text model alone: it cannot read images",)
