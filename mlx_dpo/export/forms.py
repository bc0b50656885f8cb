"""The forms in which weights are written (dtype, bits), and how much of the tuning each would round away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config import Dtype
from mlx_dpo.errors import UsageError
from mlx_dpo.models.load import DTYPES
from mlx_dpo.models.merge import adapted_layers, base_of, full_weight, is_packed, merged_weight

MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
"""MLX's ways to quantize, with the group size and bits that each defaults to."""


class Form(NamedTuple):
    """How a layer's weight is written: its `dtype`, None for the base's own; packed where `bits` is given.

    `own`: layers that the base packs keep its packing, which may differ from layer to layer.
    """

    dtype: mx.Dtype | None = None
    bits: int | None = None
    group_size: int = 64
    mode: str = "affine"
    own: bool = False

    def __str__(self) -> str:
        dtype = "as stored" if self.dtype is None else dtype_name(self.dtype)
        return dtype if self.bits is None else f"{self.bits}-bit {self.mode} in groups of {self.group_size}"

    def of(self, layer: Any) -> Form:
        """The form that `layer` can have: not packed where its rows do not divide into groups."""
        packed = is_packed(layer)
        dtype = self.dtype or (layer.scales if packed else layer.weight).dtype
        if self.own and packed:
            return Form(dtype, *packing(layer))
        width = layer.scales.shape[-1] * layer.group_size if packed else layer.weight.shape[-1]
        packable = (packed or hasattr(layer, "to_quantized")) and width % self.group_size == 0
        return self._replace(dtype=dtype, bits=self.bits if packable else None)

    def holds(self, layer: Any) -> bool:
        """Whether `layer` is packed in this very form already."""
        return is_packed(layer) and (self.own or packing(layer) == (self.bits, self.group_size, self.mode))

    def settings(self) -> dict[str, Any]:
        """The packing as config.json and `to_quantized` want it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def dtype_name(dtype: mx.Dtype) -> str:
    """`bfloat16` and the like, as config.json has it."""
    return str(dtype).removeprefix("mlx.core.")


def packing(layer: Any) -> tuple[int, int, str]:
    """Bits, group size and mode of a packed layer."""
    return layer.bits, layer.group_size, layer.mode


def choose_forms(
    model: nn.Module, dtype: Dtype, bits: int | None, group_size: int | None, mode: str | None, adapted_bits: int | None
) -> tuple[Form, Form]:
    """The forms of untouched and of adapted layers, for a model with its adapter on and its weights as stored.

    Where bits are asked for, what is not said is the base's own if it is quantized, so its untouched layers can stay.

    Raises:
        UsageError: MLX has no such form, or the settings do not go together; all of it in one error.
    """
    own = Counter(packing(layer) for layer in _base_layers(model) if is_packed(layer)).most_common(1)
    pack = bits is not None or mode is not None or (adapted_bits is not None and bool(own))
    wrong = []
    if mode is not None and mode not in MODES:
        wrong.append(f"--quantize-mode {mode}: MLX knows {', '.join(MODES)}")
    if not pack and (group_size is not None or adapted_bits is not None):
        wrong.append("--quantize-group-size and --keep-adapted-bits go with --quantize-bits")
    if adapted_bits not in (None, 8, 16):
        wrong.append(f"--keep-adapted-bits {adapted_bits}: adapted layers are kept in 8 or 16 bits")
    if wrong:
        raise UsageError("; ".join(wrong))
    full = Form(DTYPES[dtype] if dtype != "auto" else _natural_dtype(model, pack))
    if not pack:
        return full, full
    own_bits, own_group, own_mode = own[0][0] if own else (None, None, "affine")
    chosen = mode or own_mode
    usual_group, usual_bits = MODES[chosen]
    if chosen == own_mode:
        usual_group, usual_bits = own_group or usual_group, own_bits or usual_bits
    packed = Form(full.dtype, bits or usual_bits, group_size or usual_group, chosen)
    packed = packed._replace(own=(packed.bits, packed.group_size, packed.mode) == (own_bits, own_group, own_mode))
    # a micro-scaling mode fixes bits and groups, so what is kept in 8 bits beside it is affine
    fine = Form(full.dtype, 8, packed.group_size if chosen == "affine" else 64)
    try:  # MLX itself is asked: which bits go with which groups differs by its version
        mx.eval([mx.quantize(mx.zeros((1, 512)), form.group_size, form.bits, form.mode) for form in (packed, fine)])
    except ValueError as error:
        raise UsageError(
            f"MLX cannot quantize to {packed}: {error}",
            "affine takes 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128; the other modes have one form each",
        ) from error
    return packed, {None: packed, 8: fine, 16: full}[adapted_bits]


def _base_layers(model: nn.Module) -> list[Any]:
    wrapped = [base_of(module) for _, module in adapted_layers(model)]
    return wrapped + [module for _, module in model.named_modules() if "weight" in module]


def _natural_dtype(model: nn.Module, pack: bool) -> mx.Dtype | None:
    """None, the base's own, unless that is float32 and base or result are packed: then float16, the finer 16 bits."""
    layers = _base_layers(model)
    packed = {layer.scales.dtype for layer in layers if is_packed(layer)} & set(DTYPES.values())
    if not packed and not pack:
        return None
    stored = packed or {layer.weight.dtype for layer in layers if hasattr(layer, "to_quantized")}
    return next((dtype for dtype in (mx.bfloat16, mx.float16) if dtype in stored), mx.float16)


@dataclass(frozen=True)
class LayerRoundingError:
    """How far rounding W' to `form` moves one layer's change Δ = W' - W; norms are Frobenius norms.

    `error` = ‖(Q(W') - Q(W)) - Δ‖ / ‖Δ‖: 0 when the change arrives whole, about 1 when it is rounded away, more when it
    drowns in rounding noise. `kept` = ⟨Q(W') - Q(W), Δ⟩ / ‖Δ‖²: how much of the change itself arrives, 1 for all of it.
    Q(W) is the base rounded alike; W itself where it is stored in that form.
    """

    name: str
    form: str
    delta: float  # ‖Δ‖
    error: float
    kept: float


def rounding_errors(model: nn.Module, adapted: Form) -> Iterator[LayerRoundingError]:
    """The rounding error of each adapted layer in the form `adapted`, with one layer in memory at a time."""
    for name, module in adapted_layers(model):
        base = base_of(module)
        form = adapted.of(base)
        before, after = full_weight(base), merged_weight(module)
        delta = after - before
        arrived = rounded(after, form) - (before if form.holds(base) else rounded(before, form))
        sums = [(delta * delta).sum(), ((arrived - delta) ** 2).sum(), (arrived * delta).sum()]
        mx.eval(sums)  # here, so that the next layer's weights come only when this one's are gone
        change, off, along = (float(value) for value in sums)
        error, kept = ((off / change) ** 0.5, along / change) if change else (0.0, 1.0)
        yield LayerRoundingError(name, str(form), change**0.5, error, kept)


def total_rounding_error(layers: Sequence[LayerRoundingError]) -> tuple[float, float]:
    """`error` and `kept` of all layers as if they were one: each weighs as much as its change is large."""
    change = sum(layer.delta**2 for layer in layers)
    if not change:
        return 0.0, 1.0
    error = (sum((layer.error * layer.delta) ** 2 for layer in layers) / change) ** 0.5
    return float(error), sum(layer.kept * layer.delta**2 for layer in layers) / change


def rounded(weight: mx.array, form: Form) -> mx.array:
    """`weight` as it is read back once written in `form` (with a dtype), in float32."""
    cast = weight.astype(form.dtype or weight.dtype)
    if form.bits is None:
        return cast.astype(mx.float32)
    packed, scales, *biases = mx.quantize(cast, form.group_size, form.bits, form.mode)
    if biases:
        scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
    bias = biases[0] if biases else None
    return mx.dequantize(packed, scales, bias, form.group_size, form.bits, form.mode, dtype=mx.float32)
