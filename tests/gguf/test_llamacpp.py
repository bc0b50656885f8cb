"""llama.cpp computes from our GGUF files what MLX computes from the folders: models and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_dpo
from support.gguf_models import (
    ATTENTION,
    CASES,
    DENSE,
    EXACT,
    IDS,
    gpt_oss_in_four_bit_floats,
    make_adapter,
    make_folder,
    mlx_log_probs,
)

pytest.importorskip("gguf", reason="GGUF files need the gguf package")
pytest.importorskip("xllamacpp", reason="real llama.cpp is not installed: pip install xllamacpp")

import gguf

from mlx_dpo.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.data.load import load_splits
from mlx_dpo.data.tokenize import encode_records
from mlx_dpo.gguf.llamacpp import next_log_probs, open_llama_cpp
from mlx_dpo.gguf.write import export_adapter_gguf, export_model_gguf
from mlx_dpo.models.load import load
from mlx_dpo.training.loop import train

DEMO_ROWS = Path(mlx_dpo.__file__).parent / "demo" / "data" / "train.jsonl"
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


def test_gpt_oss_in_its_own_four_bit_floats(tmp_path: Path) -> None:
    base = gpt_oss_in_four_bit_floats(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, ATTENTION)
    export_model_gguf(base, None, tmp_path / "plain.gguf", "f32")
    export_adapter_gguf(base, adapter, tmp_path / "adapter.gguf")
    found = llama_cpp_log_probs(tmp_path / "plain.gguf", tmp_path / "adapter.gguf")
    assert difference(found, mlx_log_probs(base, adapter)) < EXACT
    report = export_model_gguf(base, None, tmp_path / "kept.gguf", "q4_1")
    assert report.tensors["MXFP4"] == 12  # three matrices of experts in four layers
    # llama.cpp rounds what four-bit weights are multiplied with to eight bits
    assert difference(llama_cpp_log_probs(tmp_path / "kept.gguf"), mlx_log_probs(base, None)) < 1.0
    plain, kept = (
        {t.name: t for t in gguf.GGUFReader(tmp_path / f"{file}.gguf").tensors} for file in ("plain", "kept")
    )
    for name, tensor in kept.items():
        np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), plain[name].data)


@pytest.mark.real_model
def test_the_real_model_tuned_agrees_over_its_whole_vocabulary(
    demo_model: Path, tmp_path: Path, record_property: Any
) -> None:
    """A short run on the demo's rows, then 64 positions of four of them: the adapter's file, and the fused model's."""
    model, data = ModelConfig(path=str(demo_model)), DataConfig(path=str(DEMO_ROWS), valid_fraction=0.0)
    adapter = tmp_path / "adapter"
    lora, optim = LoraConfig(num_layers=8), OptimConfig(learning_rate=2e-3, warmup_ratio=0.0)
    steps = TrainConfig(output=str(adapter), batch_size=2, iters=4, steps_per_eval=None)
    train(RunConfig(model=model, data=data, lora=lora, optim=optim, train=steps))
    export_model_gguf(demo_model, None, tmp_path / "base.gguf", "f32")
    export_adapter_gguf(demo_model, adapter, tmp_path / "adapter.gguf")
    export_model_gguf(demo_model, adapter, tmp_path / "fused.gguf", "f32")

    records = load_splits(data.path, valid_fraction=0.0, seed=0, kind="pair").train[:4]
    rows = encode_records(records, load(model).tokenizer, data)[0]
    texts = [(row.prompt + row.completions[0])[:48] for row in rows]
    with_adapter = open_llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    fused = open_llama_cpp(tmp_path / "fused.gguf")
    largest = {"adapter": 0.0, "fused": 0.0, "adapter off": 0.0}
    positions = 0
    for ids in texts:
        on, off = mlx_log_probs(demo_model, adapter, ids), mlx_log_probs(demo_model, None, ids)
        for place in range(len(ids) - 16, len(ids)):
            by_adapter, by_fused = (next_log_probs(llama, ids[: place + 1]) for llama in (with_adapter, fused))
            assert np.isfinite(by_adapter).all() and np.isfinite(by_fused).all()
            found = {"adapter": by_adapter - on[place], "fused": by_fused - on[place]}
            found["adapter off"] = by_adapter - off[place]
            largest = {name: max(largest[name], float(np.abs(found[name]).max())) for name in largest}
            positions += 1
    record_property("agreement", largest)
    print(f"{positions} positions:", {name: f"{value:.1e}" for name, value in largest.items()})
    assert positions == 64
    assert max(largest["adapter"], largest["fused"]) < 1e-3
    assert largest["adapter off"] > 0.3
