"""Adapters: attach, switch off, save, load (mlx-lm and PEFT folders)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.config import LoraConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.files import written_whole
from mlx_dpo.models.merge import adapted_layers, base_of
from mlx_dpo.models.peft import read_peft
from mlx_dpo.models.trees import flat, read_json, read_weights

LEAVES = ("lora_a", "lora_b", "m")
"""Names of adapter parameters in mlx-lm's layers (m: DoRA's magnitudes)."""

ROUTERS = ("gate", "router")
"""What mlx-lm's models call the linear layer, or the module around it, that chooses a token's experts."""


@dataclass(frozen=True)
class Adapter:
    """What `adapter_config.json` says of an adapter, in mlx-lm's terms: y = W x + scale · B A x."""

    rank: int
    scale: float
    dropout: float
    num_layers: int
    keys: tuple[str, ...]
    fine_tune_type: str = "lora"

    def to_json(self, base: str) -> dict[str, Any]:
        """The content of `adapter_config.json`, as `mlx_lm.generate --adapter-path` wants it."""
        parameters = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": list(self.keys)}
        return {
            "fine_tune_type": self.fine_tune_type,
            "model": base,
            "num_layers": self.num_layers,
            "lora_parameters": parameters,
        }


def attach(model: nn.Module, config: LoraConfig, *, seed: int) -> Adapter:
    """Puts a fresh adapter on `model`: A random from `seed`, B zero, so the function stays the same.

    Without keys all linear modules of a block are adapted, but for what `mixture_modules` finds. For one token the
    experts are a few of many: their adapters would be most of the parameters (138 M of rank 8 in the top 16 blocks of
    Qwen3-30B-A3B) and learn each from a few rows, and an adapted router sends tokens elsewhere.

    Raises:
        UsageError: a key names no linear module of a block, no block is to be adapted, or DoRA of experts is asked for.
    """
    total = len(model.layers)
    if config.num_layers < 1 and config.num_layers != -1:
        raise UsageError(f"--num-layers {config.num_layers} adapts nothing", "-1 means all blocks")
    count = total if config.num_layers == -1 else min(config.num_layers, total)
    keys = _resolve_keys(model.layers[-count:], config.keys)
    scale = config.scale if config.alpha is None else config.alpha / config.rank
    experts = [key for key, module in _linear_modules(model.layers[-count:]).items() if module.weight.ndim == 3]
    if config.fine_tune_type == "dora" and (found := [key for key in keys if key in experts]):
        raise UsageError(
            f"--fine-tune-type dora: no DoRA of experts ({', '.join(found)}), mlx-lm has none that would load it",
            "leave them out of --keys, or take --fine-tune-type lora",
        )
    adapter = Adapter(config.rank, scale, config.dropout, count, keys, config.fine_tune_type)
    mx.random.seed(seed)  # right before A is drawn, so that nothing that loading drew decides the adapter
    _attach(model, adapter)
    return adapter


def mixture_modules(layers: Iterable[nn.Module]) -> dict[str, str]:
    """The linear modules of a mixture of experts by their name in a block, each "experts" or "router".

    A shared expert, and the gate of one, is read by every token: a dense module like others, and not among them.
    """
    names = _linear_modules(layers)
    found = {name: "experts" for name, module in names.items() if _holds_experts(name, module)}
    routers = [name for name in names if set(name.split(".")) & set(ROUTERS) and name not in found]
    return found | dict.fromkeys(routers if found else [], "router")


def load(model: nn.Module, folder: str | Path, *, dropout: float = 0.0) -> Adapter:
    """Puts the adapter of an mlx-lm or PEFT folder on `model`.

    Raises:
        ModelError: the folder holds no adapter, or one that does not fit this model; all misfits are named.
    """
    folder = Path(folder).expanduser()
    adapter, weights = read(folder, {name for name, _ in model.named_modules()}, len(model.layers))
    if adapter.num_layers > len(model.layers):
        raise ModelError(
            f"the adapter in {folder} is for {adapter.num_layers} blocks, the model has {len(model.layers)}",
            "load it on the model it was trained on",
        )
    _check_dora(model, adapter, folder)
    try:
        _attach(model, Adapter(**{**vars(adapter), "dropout": dropout}))
    except (ValueError, KeyError) as error:
        raise ModelError(f"the adapter in {folder} does not fit this model: {error}") from error
    given = {name.rsplit(".", 1)[0] for name in weights}
    # a layer that the file leaves alone, though others of its name are adapted, must not get a random A to train
    _take_off(model, [(path, layer) for path, layer in adapted_layers(model) if path not in given])
    _assign(model, weights, folder)
    model.freeze()
    model.unfreeze(keys=list(LEAVES), strict=False)
    return adapter


def read(folder: Path, modules: Collection[str], blocks: int) -> tuple[Adapter, dict[str, mx.array]]:
    """An adapter's settings and arrays, in mlx-lm's form, from an mlx-lm or PEFT folder; no model need be loaded.

    A PEFT folder needs to be told the names of the model's `modules` and how many `blocks` it has.

    Raises:
        ModelError: the folder holds no adapter, or none that is LoRA or DoRA.
    """
    settings = read_json(folder / "adapter_config.json", "name the folder of an mlx-lm or PEFT adapter")
    if "peft_type" in settings:
        settings, weights = read_peft(folder, settings, modules, blocks)
    else:
        weights = read_weights(folder / "adapters.safetensors", "name the folder of a whole adapter")
    return _to_adapter(folder, settings, weights), weights


def save(model: nn.Module, adapter: Adapter, folder: Path, *, base: str) -> None:
    """Writes `adapters.safetensors` and `adapter_config.json` into `folder` in mlx-lm's form, each whole or not."""
    with written_whole(folder / "adapters.safetensors") as beside, beside.open("wb") as stream:
        mx.save_safetensors(stream, parameters(model), metadata={"format": "mlx"})
    with written_whole(folder / "adapter_config.json") as beside:
        beside.write_text(json.dumps(adapter.to_json(base), indent=2) + "\n")


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays by name."""
    return {name: value for name, value in flat(model.parameters()).items() if name.rsplit(".", 1)[-1] in LEAVES}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base model inside the `with`: every adapted layer is replaced by what it wraps, then put back."""
    adapted = adapted_layers(model)
    _take_off(model, adapted)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))


def _attach(model: nn.Module, adapter: Adapter) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_dpo.models.adapted_layers import use_own_layers

    model.freeze()
    settings = adapter.to_json(base="")["lora_parameters"]
    linear_to_lora_layers(model, adapter.num_layers, settings, use_dora=adapter.fine_tune_type == "dora")
    use_own_layers(model)
    model.eval()  # a new layer starts in training mode


def _take_off(model: nn.Module, adapted: list[tuple[str, nn.Module]]) -> None:
    """Replaces adapted layers by what they wrap."""
    model.update_modules(tree_unflatten([(name, base_of(module)) for name, module in adapted]))


def _resolve_keys(layers: list[nn.Module], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Module names relative to a block; a short name such as q_proj stands for every module that ends in it."""
    names = _linear_modules(layers)
    if wanted is None:
        mixture = mixture_modules(layers)
        return tuple(name for name in names if name not in mixture)
    found = {key: [name for name in names if name == key or name.endswith("." + key)] for key in wanted}
    unknown = [key for key, matches in found.items() if not matches]
    if unknown:
        raise UsageError(
            f"--keys: no linear module {', '.join(unknown)} in the adapted blocks", f"there are: {', '.join(names)}"
        )
    return tuple(dict.fromkeys(name for matches in found.values() for name in matches))


def _linear_modules(layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """What can be adapted in these blocks, adapted already or not, by its name in a block."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    found: dict[str, nn.Module] = {}
    for layer in layers:
        modules = dict(layer.named_modules())
        adapted = {name for name, module in modules.items() if "lora_a" in module}
        bases = {name: base_of(module) if name in adapted else module for name, module in modules.items()}
        found |= {
            name: module
            for name, module in bases.items()
            if isinstance(module, kinds) and name.rpartition(".")[0] not in adapted
        }
    return found


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether a linear module is all experts' at once or, in a list of them (dbrx), one expert's."""
    return module.weight.ndim == 3 or bool(re.search(r"(^|\.)experts\.\d+\.", name))


def _check_dora(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    if adapter.fine_tune_type != "dora":
        return
    experts = [key for key, module in _linear_modules(model.layers).items() if module.weight.ndim == 3]
    packed = (name for name, module in model.named_modules() if isinstance(module, nn.QuantizedEmbedding))
    wrong = [f"{key} (experts)" for key in adapter.keys if key in experts]
    wrong += [f"{name} (a quantized embedding)" for name in packed if name in adapter.keys]
    if wrong:
        raise ModelError(
            f"the adapter in {folder} is DoRA on {', '.join(wrong)}, which it cannot be here",
            "fuse it where it was trained, and start from the fused model",
        )


def _to_adapter(folder: Path, settings: dict[str, Any], weights: dict[str, mx.array]) -> Adapter:
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ModelError(
            f"the adapter in {folder} is a {kind!r} fine-tune, not LoRA or DoRA",
            "fuse it with mlx_lm.fuse and start from the fused model",
        )
    try:
        given = settings["lora_parameters"]
        modules = (name.rsplit(".", 1)[0] for name in weights)  # model.layers.3.self_attn.q_proj → self_attn.q_proj
        keys = given.get("keys") or dict.fromkeys(re.sub(r"^.*?\.layers\.\d+\.", "", name) for name in modules)
        rank, scale, dropout = int(given["rank"]), float(given["scale"]), float(given.get("dropout", 0))
        return Adapter(rank, scale, dropout, int(settings["num_layers"]), tuple(keys), kind)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} lacks what mlx-lm writes there: {error!r}") from error


def _assign(model: nn.Module, weights: dict[str, mx.array], folder: Path) -> None:
    ours = parameters(model)
    wrong = [f"{name}: the model has no such adapter parameter" for name in weights if name not in ours]
    wrong += [f"{name}: missing" for name in ours if name not in weights]
    wrong += [
        f"{name}: shape {tuple(value.shape)}, the model wants {tuple(ours[name].shape)}"
        for name, value in weights.items()
        if name in ours and value.shape != ours[name].shape
    ]
    if wrong or not weights:
        more = f"\n  … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        listed = "\n  ".join(wrong[:5]) if wrong else "it holds no adapter parameter"
        raise ModelError(
            f"the adapter in {folder} is for another model:\n  {listed}{more}",
            "load it on the model it was trained on (adapter_config.json names it)",
        )
    # float32 whatever the file holds: an update of 1e-5 vanishes in half precision
    # and only now that all of it fits: a refused adapter leaves B zero, so the model computes what it did
    model.load_weights([(name, value.astype(mx.float32)) for name, value in weights.items()], strict=False)
