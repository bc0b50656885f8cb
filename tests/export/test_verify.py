"""The check of an export tells what was trained from the base, and from noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.errors import ModelError
from mlx_dpo.export.verify import Trained, compare_logps, first_rows, verify_folder, verify_gguf
from mlx_dpo.gguf.llamacpp import runtime_installed
from mlx_dpo.gguf.write import export_model_gguf
from mlx_dpo.models.load import load
from mlx_dpo.reference.store import RefLogps
from support.adapters import PAIRS, write_adapter, write_pairs

ROW = TokenizedRow("1", [5], ([6, 7], [8]), (0, 0), (1.0, 2.0))


def logps(*values: float) -> RefLogps:
    """Of the one row's answers, two tokens and one."""
    return [[np.array(values[:2], np.float32), np.array(values[2:], np.float32)]]


def test_differences_are_of_tokens_and_accuracies_of_pairs() -> None:
    # the adapter adds 1 and 0 to the chosen answer's tokens and 0 to the rejected one's; the export adds 1, -2, 0
    found = compare_logps("x", [ROW], logps(-3, -3, -3), logps(-2, -3, -3), logps(-2, -5, -3), None)
    assert (found.rows, found.tokens) == (1, 3)
    assert found.largest == 2
    assert found.error == pytest.approx((4 / 3) ** 0.5)
    assert found.effect == pytest.approx((1 / 3) ** 0.5)
    assert found.off == pytest.approx((5 / 3) ** 0.5)
    assert found.trained_accuracy == 1  # +1 for the chosen answer, 0 for the other
    assert found.accuracy == 0  # -1 for the chosen answer
    assert not found.holds


def test_the_base_in_the_trained_models_place_is_found_out() -> None:
    base, trained = logps(-3, -3, -3), logps(-2.9999, -3, -3)
    silent = compare_logps("x", [ROW], base, trained, base, 1e-3)
    assert silent.largest < 1e-3
    assert not silent.holds  # within the tolerance, and yet it does nothing
    assert compare_logps("x", [ROW], base, trained, trained, 1e-3).holds


def test_an_adapter_that_changes_nothing_needs_no_telling_apart() -> None:
    base = logps(-3, -3, -3)
    assert compare_logps("x", [ROW], base, base, base, 1e-3).holds


def test_rounding_is_judged_by_what_the_adapter_makes() -> None:
    base, trained = logps(-3, -3, -3), logps(-2, -2, -2)
    assert compare_logps("x", [ROW], base, trained, logps(-2.4, -1.6, -2.4), None).holds
    assert not compare_logps("x", [ROW], base, trained, logps(-2.6, -1.4, -2.6), None).holds


def test_another_adapter_is_no_export_of_this_one(tiny_llama: Path, tmp_path: Path) -> None:
    mine = write_adapter(tiny_llama, tmp_path / "mine")
    other = write_adapter(tiny_llama, tmp_path / "other", size=0.06)
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl", PAIRS[:2])))
    trained = Trained(ModelConfig(path=str(tiny_llama), adapter=str(mine)), data)
    assert verify_folder(trained, tiny_llama, adapter=mine, exact=True).holds
    with pytest.raises(ModelError, match="the export is not what was trained"):
        verify_folder(trained, tiny_llama, adapter=other, exact=True)
    with pytest.raises(ModelError, match="the export is not what was trained"):
        verify_folder(trained, tiny_llama, exact=True)


def test_without_data_the_packages_own_rows_are_taken(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    trained = Trained(ModelConfig(path=str(tiny_llama), adapter=str(adapter)), rows=2)
    assert verify_folder(trained, tiny_llama, adapter=adapter, exact=True).rows == 2
    assert len(first_rows(replace(trained, rows=3), load(trained.model).tokenizer)) == 3


def test_llama_cpp_computes_what_was_trained(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if not runtime_installed():
        pytest.skip("llama.cpp (xllamacpp) is not installed")
    adapter = write_adapter(tiny_llama, tmp_path / "adapter")
    export_model_gguf(tiny_llama, adapter, tmp_path / "fused.gguf", "f32")
    data = DataConfig(path=str(write_pairs(tmp_path / "pairs.jsonl", PAIRS[:2])))
    trained = Trained(ModelConfig(path=str(tiny_llama), adapter=str(adapter)), data, rows=4)
    report = verify_gguf(trained, tmp_path / "fused.gguf", "f32")
    assert report.largest < 1e-3
    with pytest.raises(Exception, match=r"llama\.cpp differs from MLX"):
        other = write_adapter(tiny_llama, tmp_path / "other", size=0.1)
        changed = replace(trained, model=replace(trained.model, adapter=str(other)))
        verify_gguf(changed, tmp_path / "fused.gguf", "f32")
