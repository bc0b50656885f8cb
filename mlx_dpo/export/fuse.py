"""Base and adapter fused into one plain mlx-lm folder, with what rounding takes from the tuning measured and said."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_dpo import lora
from mlx_dpo.config import DataConfig, Dtype, ModelConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.events import OnEvent, Phase, Warned, ignore
from mlx_dpo.export.merge import base_of, full_weight, is_packed, merged_weight
from mlx_dpo.export.verify import Verified, verify_folder
from mlx_dpo.model import DTYPES, load, resolve
from mlx_dpo.run import written_whole

MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
"""MLX's ways to quantize, with the group size and bits that each defaults to."""

WARN_ABOVE = 0.5
"""Share of the adapter's change that rounding may replace by noise before a warning says so."""

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "*.jinja",
    "*.tiktoken",
)
CARRIED += (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""What goes along from the base's folder as it is."""


class Form(NamedTuple):
    """How a layer's weight is written: its `dtype`, None for the base's own; packed where `bits` is given."""

    dtype: mx.Dtype | None = None
    bits: int | None = None
    group_size: int = 64
    mode: str = "affine"

    def __str__(self) -> str:
        dtype = "as stored" if self.dtype is None else str(self.dtype).removeprefix("mlx.core.")
        return dtype if self.bits is None else f"{self.bits}-bit {self.mode} in groups of {self.group_size}"

    def of(self, layer: Any) -> Form:
        """The form that `layer` can have: with a dtype, and not packed where its rows do not divide into groups."""
        dtype = self.dtype or (layer.scales if is_packed(layer) else layer.weight).dtype
        packable = self.bits is not None and hasattr(layer, "to_quantized") or is_packed(layer)
        width = layer.scales.shape[-1] * layer.group_size if is_packed(layer) else layer.weight.shape[-1]
        return self._replace(dtype=dtype, bits=self.bits if packable and width % self.group_size == 0 else None)

    def holds(self, layer: Any) -> bool:
        """Whether `layer` is packed in this very form already."""
        return is_packed(layer) and (layer.bits, layer.group_size, layer.mode) == (
            self.bits,
            self.group_size,
            self.mode,
        )


@dataclass(frozen=True)
class LayerLoss:
    """What became of one layer's change Δ = W' - W when W' was rounded to `form`; norms are Frobenius norms.

    `error` = ‖(Q(W') - Q(W)) - Δ‖ / ‖Δ‖: 0 when the change arrives whole, about 1 when it is rounded away, more when it
    drowns in rounding noise. `kept` = ⟨Q(W') - Q(W), Δ⟩ / ‖Δ‖²: how much of the change itself arrives, 1 for all of it.
    Q(W) is the base rounded alike, or as it is stored where it is stored in that form.
    """

    name: str
    form: str
    weight: float  # ‖W‖
    delta: float  # ‖Δ‖
    error: float
    kept: float


@dataclass(frozen=True)
class FuseReport:
    """What was written, and what rounding took. `error` and `kept` are the layers' together (see `LayerLoss`)."""

    output: Path
    form: str
    adapted_form: str
    layers: tuple[LayerLoss, ...]
    error: float
    kept: float
    verified: Verified | None
    size: int  # bytes of weights


def fuse(
    model: ModelConfig,
    adapter: str | Path,
    output: Path,
    *,
    dtype: Dtype = "auto",
    quantize_bits: int | None = None,
    quantize_group_size: int | None = None,
    quantize_mode: str | None = None,
    keep_adapted_bits: int | None = None,
    verify: bool = True,
    data: DataConfig | None = None,
    rows: int = 32,
    on_event: OnEvent = ignore,
) -> FuseReport:
    """Writes base + adapter to `output` as a plain mlx-lm folder, and gives what that took from the tuning.

    The sum is made in float32 from the weights as they are stored, and rounded once. `dtype` auto keeps the base's own;
    a quantized base becomes 16-bit. With `quantize_bits` (or `quantize_mode`) the result is quantized, but layers that
    the base holds in that very form stay untouched; `keep_adapted_bits` 8 or 16 writes the adapted layers finer than
    the rest. With `verify`, the written folder is loaded and compared with base + adapter on `rows` rows of `data` (the
    package's own demo rows without it), before it gets its name.

    Raises:
        UsageError: `output` holds something, or the settings do not go together.
        ModelError: model or adapter cannot be used, or the written folder is not the model that was trained.
    """
    check_output(output)
    tuned, config, folder = load_stored(model, adapter)
    plain, adapted = _forms(tuned, dtype, quantize_bits, quantize_group_size, quantize_mode, keep_adapted_bits)
    layers = tuple(_measure(tuned, adapted, on_event))
    one = base_of(next(module for _, module in tuned.named_modules() if "lora_a" in module))
    report = FuseReport(output, str(plain.of(one)), str(adapted.of(one)), layers, *_together(layers), None, 0)
    if report.error > WARN_ABOVE:
        on_event(Warned(_advice(report, adapted.bits is not None)))
    settings = _settle(tuned, config, plain, adapted)
    with written_whole(output) as beside:
        beside.mkdir(exist_ok=True)
        write_folder(tuned, settings, folder, beside)
        on_event(Phase("writing", 1, 1, "folder"))
        size = sum(file.stat().st_size for file in beside.glob("*.safetensors"))
        verified = None
        if verify:
            trained = replace(model, adapter=str(adapter))
            exact = all(layer.form == "float32" for layer in layers)
            verified = verify_folder(trained, beside, exact=exact, data=data, rows=rows, on_event=on_event)
    return replace(report, verified=verified, size=size)


def check_output(output: Path) -> None:
    """Raises UsageError when `output` is a file or a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output {output} exists already", "name another folder, or remove it first")


def load_stored(model: ModelConfig, adapter: str | Path) -> tuple[nn.Module, dict[str, Any], Path]:
    """The model with its adapter on, weights in the form in which they are stored and still on disk; config and folder.

    Raises:
        ModelError: model or adapter cannot be used.
    """
    from mlx_lm.utils import load_model

    folder = resolve(model.path, model.revision)
    try:
        base, config = load_model(folder, lazy=True, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # of any kind, from mlx-lm or the model's own code
        load(model)  # says what is wrong
        raise ModelError(f"cannot load the model in {folder}: {error}") from error
    lora.load(base, adapter)
    base.eval()
    return base, config, folder


def write_folder(model: nn.Module, config: dict[str, Any], source: Path, target: Path) -> None:
    """Weights in shards with their index, config, and what `source` has of tokenizer, template and generation settings."""
    from mlx_lm.utils import save_config, save_model

    save_model(target, model)
    has_vision = "vision_tower" in getattr(model, "model", {})
    save_config(config, target / "config.json", keep_vision_config=has_vision)
    for pattern in CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, target)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def _forms(
    model: nn.Module, dtype: Dtype, bits: int | None, group_size: int | None, mode: str | None, adapted_bits: int | None
) -> tuple[Form, Form]:
    """The forms of untouched and of adapted layers; refuses what MLX does not have."""
    pack = bits is not None or mode is not None
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
    default_group, default_bits = MODES[mode or "affine"]
    packed = Form(full.dtype, bits or default_bits, group_size or default_group, mode or "affine")
    fine = Form(full.dtype, 8, packed.group_size if packed.mode == "affine" else 64)
    try:
        mx.eval([mx.quantize(mx.zeros((1, 512)), f.group_size, f.bits, mode=f.mode) for f in (packed, fine)])
    except ValueError as error:
        raise UsageError(
            f"MLX cannot quantize to {packed}: {error}",
            "affine takes 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128; the other modes have one form each",
        ) from error
    return packed, {None: packed, 8: fine, 16: full}[adapted_bits]


def _natural_dtype(model: nn.Module, pack: bool) -> mx.Dtype | None:
    """None, the base's own, unless that is float32 and base or result are quantized: then float16, the finer 16 bits."""
    layers = [base_of(module) if "lora_a" in module else module for _, module in model.named_modules()]
    packed = {layer.scales.dtype for layer in layers if is_packed(layer)} & set(DTYPES.values())
    full = {layer.weight.dtype for layer in layers if isinstance(layer, (nn.Linear, nn.Embedding))}
    if not packed and not pack:
        return None
    stored = packed or full
    return next((dtype for dtype in (mx.bfloat16, mx.float16) if dtype in stored), mx.float16)


def _measure(model: nn.Module, adapted: Form, on_event: OnEvent) -> Iterator[LayerLoss]:
    """Each adapted layer's loss, one layer in memory at a time."""
    modules = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    for done, (name, module) in enumerate(modules):
        on_event(Phase("measuring what rounding takes", done, len(modules), "layers"))
        base, form = base_of(module), adapted.of(base_of(module))
        before, after = full_weight(base), merged_weight(module)
        delta = after - before
        arrived = _rounded(after, form) - (before if form.holds(base) else _rounded(before, form))
        sizes = [_norm(before), _norm(delta), _norm(arrived - delta), (arrived * delta).sum()]
        mx.eval(sizes)
        weight, norm, lost, along = (size.item() for size in sizes)
        error, kept = (lost / norm, along / norm**2) if norm else (0.0, 1.0)
        yield LayerLoss(name, str(form), weight, norm, error, kept)
    on_event(Phase("measuring what rounding takes", len(modules), len(modules), "layers"))


def _norm(values: mx.array) -> mx.array:
    return mx.sqrt((values * values).sum())


def _together(layers: tuple[LayerLoss, ...]) -> tuple[float, float]:
    """`error` and `kept` of all layers as if they were one."""
    total = sum(layer.delta**2 for layer in layers)
    if not total:
        return 0.0, 1.0
    error = (sum((layer.error * layer.delta) ** 2 for layer in layers) / total) ** 0.5
    return error, sum(layer.kept * layer.delta**2 for layer in layers) / total


def _rounded(weight: mx.array, form: Form) -> mx.array:
    """`weight` as it can be read back, in float32."""
    cast = weight.astype(form.dtype)
    if form.bits is None:
        return cast.astype(mx.float32)
    packed, scales, *biases = mx.quantize(cast, form.group_size, form.bits, mode=form.mode)
    if biases:
        scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
    bias = biases[0] if biases else None
    return mx.dequantize(packed, scales, bias, form.group_size, form.bits, form.mode, dtype=mx.float32)


def _advice(report: FuseReport, packed: bool) -> str:
    said = (
        f"rounding to {report.adapted_form} replaces much of what was learnt: the error is {report.error:.2f} times the "
        f"adapter's own change, of which {100 * report.kept:.0f} % arrives"
    )
    way = (
        "keep the adapted layers finer (--keep-adapted-bits 16), or take more bits"
        if packed
        else "take --dtype float32"
    )
    return f"{said}; {way}"


def _settle(model: nn.Module, config: dict[str, Any], plain: Form, adapted: Form) -> dict[str, Any]:
    """Puts every layer into its final form, lazily, and gives the configuration that says so."""
    fused = {name: module for name, module in model.named_modules() if "lora_a" in module}
    was_packed = any(is_packed(module) for _, module in model.named_modules())
    model.update_modules(tree_unflatten([(name, _merged(module)) for name, module in fused.items()]))
    opened = [
        (name, _opened(module, full_weight(module)))
        for name, module in model.named_modules()
        if is_packed(module) and not plain.holds(module)
    ]
    # a layer that a quantized base holds in full stays full
    allowed = {name for name, _ in opened} | set(fused) if was_packed else None
    model.update_modules(tree_unflatten(opened))
    if plain.dtype is not None:
        _cast(model, plain.dtype)
    if plain.bits is not None:
        _pack(model, fused, plain, adapted, allowed)
    return _settings(model, config, plain)


def _merged(module: nn.Module) -> nn.Module:
    base = base_of(module)
    weight = merged_weight(module)
    return _opened(base, weight if is_packed(base) else weight.astype(base.weight.dtype))


def _opened(layer: Any, weight: mx.array) -> nn.Module:
    """An unpacked layer of `layer`'s kind with `weight`, and its bias."""
    from mlx_lm.models.switch_layers import SwitchLinear

    if weight.ndim == 3:
        plain: Any = SwitchLinear(1, 1, 1, bias=False)
    elif isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)):
        plain = nn.Embedding(1, 1)
    else:
        plain = nn.Linear(1, 1, bias=False)
    plain.weight = weight
    if "bias" in layer:
        plain.bias = layer.bias
    return plain


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Floats to `dtype`, but for what the architecture wants in float32 and for scales of layers that stay packed."""
    wanted = getattr(model, "cast_predicate", lambda name: True)
    packed = tuple(f"{name}." for name, module in model.named_modules() if is_packed(module))

    def cast(name: str, value: mx.array) -> mx.array:
        keep = not mx.issubdtype(value.dtype, mx.floating) or not wanted(name) or name.startswith(packed)
        return value if keep else value.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))


def _pack(model: nn.Module, fused: dict[str, nn.Module], plain: Form, adapted: Form, allowed: set[str] | None) -> None:
    """Quantizes layers in place: the adapted ones to `adapted`, the others as mlx-lm would."""
    model_wants = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or (allowed is not None and path not in allowed):
            return False
        form = (adapted if path in fused else plain).of(module)
        if form.bits is None:
            return False
        if path not in fused and allowed is None and not isinstance(wish := model_wants(path, module), bool):
            return wish
        return {"bits": form.bits, "group_size": form.group_size, "mode": form.mode}

    nn.quantize(model, plain.group_size, plain.bits, mode=plain.mode, class_predicate=choose)


def _settings(model: nn.Module, config: dict[str, Any], plain: Form) -> dict[str, Any]:
    """config.json of the model as it is now: its quantization, layer by layer where it differs, and its dtype."""
    settings = {name: value for name, value in config.items() if name not in ("quantization", "quantization_config")}
    if "text_config" in settings:
        settings["text_config"] = {k: v for k, v in settings["text_config"].items() if k != "quantization_config"}
    for section in (settings, settings.get("text_config", {})):
        for key in {"dtype", "torch_dtype"} & section.keys():
            if plain.dtype is not None:
                section[key] = str(plain.dtype).removeprefix("mlx.core.")
    if plain.bits is not None:
        usual = {"group_size": plain.group_size, "bits": plain.bits, "mode": plain.mode}
        other = {
            name: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            for name, module in model.named_modules()
            if is_packed(module) and not plain.holds(module)
        }
        settings["quantization"] = usual | other
    return settings
