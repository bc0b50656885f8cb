"""The check of a GGUF file in llama.cpp itself: its log-probs against MLX's, and against MLX's with the adapter off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from mlx_dpo.config import ModelConfig
from mlx_dpo.errors import MlxDpoError
from mlx_dpo.gguf.llamacpp import next_log_probs, open_llama_cpp
from mlx_dpo.models import load as model
from mlx_dpo.models import lora

LogProbs = Callable[[list[int]], np.ndarray]
"""log p of every next token at each position of a row, `[tokens, vocab]` float32."""

TOLERANCES = {"f32": 1e-3, "f16": 0.25, "bf16": 2.0, "q8_0": 2.0, "q4_1": 4.0}
"""By the type of the weights, in nats. Quantized weights make llama.cpp quantize what they are multiplied with too."""

LIKELY = 200
"""How many of the likeliest tokens are compared at each position."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """How far llama.cpp's log-probs are from MLX's, in nats."""

    positions: int
    largest: float  # the largest difference of one log-prob
    mean: float  # the mean absolute difference
    control: float | None  # the mean absolute difference from MLX with the adapter off; None without an adapter
    tolerance: float


def compare_in_llama_cpp(
    model_gguf: str | Path,
    rows: Sequence[list[int]],
    log_probs: LogProbs,
    *,
    adapter_gguf: str | Path | None = None,
    adapter_off: LogProbs | None = None,
    tolerance: float = TOLERANCES["f32"],
    positions: int = 8,
) -> VerifyReport:
    """Compare a model file, with an adapter file on top where one is given, with what it was made from.

    `log_probs` computes the same in MLX, `adapter_off` without the adapter: the check must tell the two apart, so that
    an adapter that does nothing cannot pass. `positions` a row are compared, spread over those that predict one of its
    tokens. Raises MlxDpoError, with the numbers, when a log-prob differs by more than `tolerance`, or when llama.cpp is
    not clearly nearer to the model with the adapter than to the one without.
    """
    longest = max(len(row) for row in rows)
    llama = open_llama_cpp(model_gguf, adapter_gguf, context=max(longest + 8, _long_context(model_gguf)))
    differences, controls = [], []
    for row in rows:
        on, off = log_probs(row), adapter_off(row) if adapter_off else None
        last = max(len(row) - 2, 0)  # behind the end of a text nothing follows, and rounding there is tenfold
        for i in sorted({round(i) for i in np.linspace(0, last, min(positions, last + 1))}):
            found = next_log_probs(llama, row[: i + 1], LIKELY)
            likely = np.isfinite(found)
            differences.append(np.abs(found - on[i])[likely])
            if off is not None:
                controls.append(np.abs(found - off[i])[likely])
    report = VerifyReport(
        positions=len(differences),
        largest=float(max(difference.max() for difference in differences)),
        mean=float(np.concatenate(differences).mean()),
        control=float(np.concatenate(controls).mean()) if controls else None,
        tolerance=tolerance,
    )
    said = f"{model_gguf}: llama.cpp differs from MLX by up to {report.largest:.2g} nats, {report.mean:.2g} in the mean"
    if not report.largest <= tolerance:
        raise MlxDpoError(f"{said}; {tolerance:g} is allowed.", "Do not use the file, and report this as a bug.")
    if report.control is not None and not report.mean < 0.9 * report.control:
        raise MlxDpoError(
            f"{said}, and from MLX with the adapter off by {report.control:.2g}: the adapter cannot be seen.",
            "Either it has hardly been trained, or rounding is as large as what it does: export as f16 or f32.",
        )
    return report


def _long_context(model_gguf: str | Path) -> int:
    """From how large a context llama.cpp takes longrope's factors for long texts, as mlx-lm does for all; else 0."""
    fields = {name.split(".", 1)[-1]: field for name, field in gguf.GGUFReader(model_gguf).fields.items()}
    if "rope.scaling.type" not in fields or fields["rope.scaling.type"].contents() != "longrope":
        return 0
    return int(fields["rope.scaling.original_context_length"].contents()) + 1


def float32_log_probs(base: str | Path, adapter: str | Path | None = None) -> tuple[LogProbs, LogProbs | None]:
    """MLX's log-probs for `compare_in_llama_cpp`, with the adapter and with it off, by a model loaded in float32."""
    loaded = model.load(ModelConfig(path=str(base), compute_dtype="float32")).model
    loaded.set_dtype(mx.float32)
    if adapter is not None:
        lora.load(loaded, adapter)

    def on(row: list[int]) -> np.ndarray:
        logits = loaded(mx.array([row]))[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def off(row: list[int]) -> np.ndarray:
        with lora.switched_off(loaded):
            return on(row)

    return on, off if adapter is not None else None
