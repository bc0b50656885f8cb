"""K-quants are made by llama.cpp's own quantizer, or its exact command is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_dpo.errors import MlxDpoError, UsageError
from mlx_dpo.gguf.llamacpp import quantize_gguf


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.gguf", "llama-quantize", "out.gguf"]
