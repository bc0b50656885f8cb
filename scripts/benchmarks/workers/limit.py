"""The counted limit: the operations of an ideal step at the rate at which this machine multiplies matrices."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx

from benchmarks.lengths import lengths
from benchmarks.limit import matrices, step_flops
from benchmarks.workers.probe import Probe, read_spec, write_result
from mlx_dpo.config import ModelConfig
from mlx_dpo.models.load import load

TRIES = 5


def rate(rows: int, inner: int, columns: int, dtype: mx.Dtype) -> float:
    """The best of some products `[rows, inner] @ [inner, columns]`, in operations a second."""
    a, b = (mx.random.normal(shape).astype(dtype) for shape in ((rows, inner), (inner, columns)))
    mx.eval(a, b, a @ b)
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best


def run(spec: dict[str, Any]) -> None:
    """Counts and measures, and writes the least seconds of each step."""
    loaded = load(ModelConfig(path=spec["model"]))
    m = matrices(loaded.model, loaded.config, spec["keys"], spec["top_layers"])
    dtype = loaded.model.layers[0].input_layernorm.weight.dtype
    wide = max(m.block // m.hidden // 4, m.hidden)
    shapes = [(1024, 1024, 1024), (512, m.hidden, wide), (512, wide, m.hidden), (128, m.hidden, m.vocabulary)]
    rates = {" × ".join(map(str, shape)): rate(*shape, dtype) for shape in shapes}
    best = max(rates.values())
    counted = {}
    for name, known in {"first": False, "later": True}.items():
        parts = [
            step_flops([lengths(pair) for pair in batch], m, spec["rank"], activations_known=known)
            for batch in spec["batches"]
        ]
        counted[name] = [{part: flops / best for part, flops in step.items()} for step in parts]
    write_result(Probe(), flops_per_second=rates, limit=counted)


if __name__ == "__main__":
    run(read_spec())
