"""The check by llama.cpp passes what is right and fails loudly otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

from mlx_dpo.errors import MlxDpoError
from mlx_dpo.gguf.verify import compare_in_llama_cpp, float32_log_probs
from mlx_dpo.gguf.write import export_adapter_gguf, export_model_gguf
from support.gguf_models import DENSE, IDS, make_adapter, make_folder

pytest.importorskip("xllamacpp", reason="real llama.cpp is not installed: pip install xllamacpp")


def test_the_check_passes_what_is_right_and_fails_loudly_otherwise(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, DENSE)
    export_model_gguf(base, None, tmp_path / "base.gguf", "f32")
    export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf")
    on, off = float32_log_probs(base, adapter)
    rows = [IDS, IDS[:7]]
    report = compare_in_llama_cpp(
        tmp_path / "base.gguf", rows, on, adapter_gguf=tmp_path / "adapter.gguf", adapter_off=off, positions=3
    )
    assert report.positions == 6
    assert report.largest < 1e-4
    assert report.control is not None
    assert report.control > 0.5
    with pytest.raises(MlxDpoError, match="is allowed"):  # the base alone is not the tuned model
        compare_in_llama_cpp(tmp_path / "base.gguf", rows, on, adapter_off=off, positions=3)
    with pytest.raises(MlxDpoError, match="cannot be seen"):  # whatever is allowed, it must be nearer to the tuned one
        compare_in_llama_cpp(tmp_path / "base.gguf", rows, on, adapter_off=off, positions=3, tolerance=1e9)


def test_longropes_factors_for_long_texts_are_compared_with_mlx_lms(tmp_path: Path) -> None:
    # a context as short as the rows would have llama.cpp take the factors for short texts
    base = make_folder(tmp_path / "base", "phi3_longrope", original_max_position_embeddings=512)
    report = export_model_gguf(base, None, tmp_path / "base.gguf", "f32")
    assert "--ctx-size 513" in report.notes[0]
    on, _ = float32_log_probs(base)
    assert compare_in_llama_cpp(tmp_path / "base.gguf", [IDS], on, positions=3).largest < 1e-4
