"""LM Studio finds a fused file where it looks for models."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.config import ModelConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.export.lmstudio import export_lmstudio
from support.adapters import write_adapter


def test_lm_studio_finds_publisher_model_file(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    report = export_lmstudio(ModelConfig(path=str(tiny_llama)), adapter, "tuned", models=tmp_path, outtype="f32")
    assert report.path == tmp_path / "local" / "tuned" / "tuned-F32.gguf"
    assert report.path.is_file()
    with pytest.raises(UsageError, match="no name for a publisher or a model"):
        export_lmstudio(ModelConfig(path=str(tiny_llama)), adapter, "a/b", models=tmp_path)
