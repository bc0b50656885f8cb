"""Base and adapter fused into one plain mlx-lm folder; how much of the tuning rounding takes is measured and said."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_dpo.config import DataConfig, Dtype, ModelConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.export.forms import (
    Form,
    LayerRoundingError,
    choose_forms,
    dtype_name,
    packing,
    rounding_errors,
    total_rounding_error,
)
from mlx_dpo.export.verify import Trained, Verified, verify_folder, verify_layers
from mlx_dpo.files import written_whole
from mlx_dpo.models import lora
from mlx_dpo.models.load import loaded_size, model_folder, read_stored
from mlx_dpo.models.merge import adapted_layers, base_of, full_weight, is_packed, merged_weight, plain_layer
from mlx_dpo.planning.machine import in_gb, this_machine
from mlx_dpo.run.card import card_along

WARN_ABOVE = 2.0
"""How large rounding's error may be beside the adapter's own change before a warning says so.

The error spreads over directions that no input takes, the change does not. Measured on SmolLM2-135M, tuned for 68
steps: errors of 1.7 (8 bits), 4.1 (6 bits) and 26 (4 bits) moved log-probs by 5, 18 and 37 % of what the adapter does.
"""

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "*.tiktoken",
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""What goes along from the base's folder as it is."""


@dataclass(frozen=True)
class FuseReport:
    """What was written, and what rounding took; `error` and `kept` as in `LayerRoundingError`, of all layers.

    `verified` is the check of what was written; where the memory is too small for it, `compared` adapted layers were
    held against base + adapter one by one.
    """

    output: Path
    form: str
    adapted_form: str
    layers: tuple[LayerRoundingError, ...]
    error: float
    kept: float
    size: int  # bytes of weights
    verified: Verified | None
    compared: int = 0


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
    package's own demo rows without it) before it gets its name; where it does not fit this machine, its adapted layers
    are compared one by one, and a warning says so first.

    Raises:
        UsageError: `output` holds something, or the settings do not go together.
        ModelError: model or adapter cannot be used, or the written folder is not the model that was trained.
    """
    check_output(output)
    tuned, config, folder, _ = load_stored(model, adapter)
    plain, adapted = choose_forms(tuned, dtype, quantize_bits, quantize_group_size, quantize_mode, keep_adapted_bits)
    count = len(adapted_layers(tuned))
    layers: list[LayerRoundingError] = []
    for layer in rounding_errors(tuned, adapted):
        layers.append(layer)
        on_event(Progressed("measuring what rounding takes", len(layers), count, "layers"))
    one = base_of(adapted_layers(tuned)[0][1])
    error, kept = total_rounding_error(layers)
    report = FuseReport(output, str(plain.of(one)), str(adapted.of(one)), tuple(layers), error, kept, 0, None)
    if error > WARN_ABOVE:
        on_event(Warned(_advice(report, packed=adapted.bits is not None)))
    forms = {name: adapted.of(base_of(module)) for name, module in adapted_layers(tuned)}
    before = loaded_size(tuned)
    # from here on the adapter is gone from `tuned`; measuring came first
    settings = _put_into_form(tuned, config, plain, adapted)
    machine, needed = this_machine(), max(before, loaded_size(tuned))
    too_large = verify and not machine.fits(needed, 0)
    if too_large:
        on_event(
            Warned(
                f"to run the fused model beside base + adapter takes {in_gb(needed)}, and {machine.name} has "
                f"{in_gb(machine.usable)} for it: its adapted layers are compared one by one instead, and it is not run"
            )
        )
    with written_whole(output, folder=True) as beside:
        on_event(Progressed("writing weights", 0, 1, ""))
        write_folder(tuned, settings, folder, beside)
        card_along(adapter, beside, fused=True, on_event=on_event)
        on_event(Progressed("writing weights", 1, 1, ""))
        verified, compared = None, 0
        # inside the `with`: a folder that is not the trained model never gets its name
        trained = Trained(replace(model, adapter=str(adapter)), data, rows, on_event)
        if too_large:
            compared = verify_layers(trained, beside, forms)
        elif verify:
            verified = verify_folder(trained, beside, exact=all(layer.form == "float32" for layer in layers))
            if not verified.holds:
                on_event(Warned(_shortfall(verified)))
        size = sum(file.stat().st_size for file in beside.glob("*.safetensors"))
    return replace(report, size=size, verified=verified, compared=compared)


def check_output(output: Path) -> None:
    """Raises UsageError when `output` is a file or a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output {output} exists already", "name another folder, or remove it first")


def load_stored(model: ModelConfig, adapter: str | Path) -> tuple[nn.Module, dict[str, Any], Path, lora.Adapter]:
    """The model with its adapter on, its weights in the form in which they are stored and still on disk; its
    configuration; its folder; the adapter's settings.

    Raises:
        ModelError: model or adapter cannot be used.
    """
    folder = model_folder(model.path, model.revision)
    base, config, _ = read_stored(folder, model)
    settings = lora.load(base, adapter)
    base.eval()
    return base, config, folder, settings


def write_folder(model: nn.Module, config: dict[str, Any], source: Path, target: Path) -> None:
    """Weights in shards with their index, configuration, and `source`'s tokenizer, template and generation settings."""
    from mlx_lm.utils import save_config, save_model

    save_model(target, model, donate_model=True)  # so that a shard is gone from memory once it is written
    has_vision = "vision_tower" in getattr(model, "model", {})
    save_config(config, target / "config.json", keep_vision_config=has_vision)
    for file in {file for pattern in CARRIED for file in source.glob(pattern)}:
        if file.is_file():
            shutil.copy(file, target)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def _advice(report: FuseReport, *, packed: bool) -> str:
    said = (
        f"rounding to {report.adapted_form} takes much of what was learnt: its error is {report.error:.2f} times the "
        f"adapter's own change, of which {100 * report.kept:.0f} % arrives"
    )
    finer = "keep the adapted layers finer (--keep-adapted-bits 16), or take more bits"
    return f"{said}; {finer if packed else 'take --dtype float32'}"


def _shortfall(found: Verified) -> str:
    ranked = ""
    if found.accuracy is not None and found.trained_accuracy is not None:
        ranked = f", and ranks {100 * found.accuracy:.0f} % of pairs right where the trained model ranks "
        ranked += f"{100 * found.trained_accuracy:.0f} %"
    return (
        f"the fused model's log-probs are {found.error:.3g} nats a token off the trained model's, where the adapter "
        f"itself makes {found.effect:.3g}{ranked}"
    )


def _put_into_form(model: nn.Module, config: dict[str, Any], plain: Form, adapted: Form) -> dict[str, Any]:
    """Puts every layer into its final form, lazily, and gives the configuration that says so.

    The order matters: the forms are read off the adapted layers while these are there, and everything is opened and
    cast before anything is packed, since a packed layer's scales get the dtype of the weight it is packed from.
    """
    forms = {name: adapted.of(base_of(module)) for name, module in adapted_layers(model)}
    was_packed = any(is_packed(module) for _, module in model.named_modules())
    merged = [(name, _opened(base_of(module), merged_weight(module), plain)) for name, module in adapted_layers(model)]
    model.update_modules(tree_unflatten(merged))
    packed = [(name, module) for name, module in model.named_modules() if is_packed(module)]
    opened = [(name, _opened(module, full_weight(module), plain)) for name, module in packed if not plain.holds(module)]
    model.update_modules(tree_unflatten(opened))
    if plain.dtype is not None and len(opened) == len(packed):  # else the base stays what it was
        _cast(model, plain.dtype)
    if plain.bits is not None:
        # what a quantized base holds in full stays full
        allowed = forms.keys() | {name for name, _ in opened} if was_packed else None
        _pack(model, plain, forms, allowed)
    return _settings(model, config, plain)


def _opened(layer: Any, weight: mx.array, form: Form) -> nn.Module:
    """An unpacked layer of `layer`'s kind with `weight` in the form's dtype."""
    return plain_layer(layer, weight.astype(form.of(layer).dtype or weight.dtype))


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Floats to `dtype`, but for what the architecture wants in float32."""
    wanted = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, value: mx.array) -> mx.array:
        keep = not mx.issubdtype(value.dtype, mx.floating) or not wanted(name)
        return value if keep else value.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))


def _pack(model: nn.Module, plain: Form, forms: Mapping[str, Form], allowed: Collection[str] | None) -> None:
    """Quantizes layers in place: each in its form of `forms`, the others as mlx-lm would, of `allowed` ones alone."""
    wish = getattr(model, "quant_predicate", None) or (lambda name, layer: True)

    def choose(name: str, layer: Any) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized") or (allowed is not None and name not in allowed):
            return False
        form = forms[name] if name in forms else plain.of(layer)
        if form.bits is None:
            return False
        if name in forms or allowed is not None:
            return form.settings()
        found = wish(name, layer)
        return form.settings() if found is True else found

    nn.quantize(model, class_predicate=choose)


def _settings(model: nn.Module, config: dict[str, Any], plain: Form) -> dict[str, Any]:
    """config.json of the model as it is now: its dtype, and its quantization, by layer where it differs."""
    settings = {name: value for name, value in config.items() if not name.startswith("quantization")}
    if "text_config" in settings:
        settings["text_config"] = {
            name: value for name, value in settings["text_config"].items() if not name.startswith("quantization")
        }
    for section in (settings, settings.get("text_config", {})):
        for key in {"dtype", "torch_dtype"} & section.keys():
            section[key] = section[key] if plain.dtype is None else dtype_name(plain.dtype)
    if plain.bits is not None:
        other = {
            name: Form(None, *packing(module)).settings()
            for name, module in model.named_modules()
            if is_packed(module) and packing(module) != (plain.bits, plain.group_size, plain.mode)
        }
        settings["quantization"] = plain.settings() | other
    return settings
