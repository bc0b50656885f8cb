"""llama.cpp computes from our GGUF files what MLX computes from the folders: models and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gguf_models import CASES, DENSE, IDS, make_adapter, make_folder, mlx_log_probs

pytest.importorskip("gguf", reason="GGUF files need the gguf package")
pytest.importorskip("xllamacpp", reason="real llama.cpp is not installed: pip install xllamacpp")

from mlx_dpo.errors import MlxDpoError
from mlx_dpo.gguf.llamacpp import next_log_probs, open_llama_cpp
from mlx_dpo.gguf.verify import float32_log_probs, verify_gguf
from mlx_dpo.gguf.write import export_adapter_gguf, export_model_gguf

POSITIONS = (0, 5, 11, 19)


def llama_cpp_log_probs(model: Path, adapter: Path | None = None, context: int = 1024) -> np.ndarray:
    """The same by llama.cpp at `POSITIONS`."""
    llama = open_llama_cpp(model, adapter, context=context)
    return np.stack([next_log_probs(llama, IDS[: i + 1]) for i in POSITIONS])


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.abs(found - expected[list(POSITIONS)]).max())


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_agrees_with_mlx_on_base_adapter_and_fused_model(
    case: str, tmp_path: Path, record_property: Any
) -> None:
    _, _, keys, tolerance = CASES[case]
    base = make_folder(tmp_path / "base", case)
    adapter = make_adapter(tmp_path / "adapter", base, keys)
    export_model_gguf(base, None, tmp_path / "base.gguf", "f32")
    export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf", "f32")
    export_model_gguf(base, adapter, tmp_path / "fused.gguf", "f32")

    off, on = mlx_log_probs(base, None), mlx_log_probs(base, adapter)
    with_adapter = llama_cpp_log_probs(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    measured = {
        "base": difference(llama_cpp_log_probs(tmp_path / "base.gguf"), off),
        "adapter": difference(with_adapter, on),
        "fused": difference(llama_cpp_log_probs(tmp_path / "fused.gguf"), on),
    }
    control = difference(with_adapter, off)
    record_property("agreement", measured | {"adapter off": control})
    print(case, {name: f"{value:.1e}" for name, value in measured.items()}, f"off {control:.2f}")
    assert max(measured.values()) < tolerance, measured
    assert control > 0.5  # with the adapter off it is another function: the check can fail


def test_log_probs_sum_to_one(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "llama")
    export_model_gguf(base, None, tmp_path / "base.gguf", "f32")
    found = llama_cpp_log_probs(tmp_path / "base.gguf")
    assert np.exp(found).sum(axis=-1) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 0.05), ("bf16", 0.5), ("q8_0", 1.0)])
def test_smaller_types_cost_what_their_rounding_costs(outtype: Any, tolerance: float, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, DENSE)
    export_model_gguf(base, adapter, tmp_path / "fused.gguf", outtype)
    found = llama_cpp_log_probs(tmp_path / "fused.gguf")
    assert difference(found, mlx_log_probs(base, adapter)) < tolerance
    assert difference(found, mlx_log_probs(base, None)) > 3


def test_an_adapter_in_16_bits_is_nearly_the_same(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, DENSE)
    export_model_gguf(base, None, tmp_path / "base.gguf", "f32")
    export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf", "f16")
    found = llama_cpp_log_probs(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert difference(found, mlx_log_probs(base, adapter)) < 0.02


def test_the_check_passes_what_is_right_and_fails_loudly_otherwise(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, DENSE)
    export_model_gguf(base, None, tmp_path / "base.gguf", "f32")
    export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf")
    on, off = float32_log_probs(base, adapter)
    rows = [IDS, IDS[:7]]
    report = verify_gguf(
        tmp_path / "base.gguf", rows, on, adapter_gguf=tmp_path / "adapter.gguf", adapter_off=off, positions=3
    )
    assert report.positions == 6
    assert report.largest < 1e-4
    assert report.control is not None
    assert report.control > 0.5
    with pytest.raises(MlxDpoError, match="is allowed"):  # the base alone is not the tuned model
        verify_gguf(tmp_path / "base.gguf", rows, on, adapter_off=off, positions=3)
    with pytest.raises(MlxDpoError, match="cannot be seen"):  # whatever is allowed, it must be nearer to the tuned one
        verify_gguf(tmp_path / "base.gguf", rows, on, adapter_off=off, positions=3, tolerance=1e9)


@pytest.mark.real_model
def test_the_real_model_agrees_over_its_whole_vocabulary(demo_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", demo_model, DENSE, rank=8, deviation=0.02)
    export_model_gguf(demo_model, None, tmp_path / "base.gguf", "f32")
    export_adapter_gguf(demo_model, adapter, tmp_path / "adapter.gguf")
    export_model_gguf(demo_model, adapter, tmp_path / "fused.gguf", "f32")
    on, off = mlx_log_probs(demo_model, adapter), mlx_log_probs(demo_model, None)
    with_adapter = llama_cpp_log_probs(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert difference(with_adapter, on) < 1e-3
    assert difference(llama_cpp_log_probs(tmp_path / "fused.gguf"), on) < 1e-3
    assert difference(with_adapter, off) > 0.3
