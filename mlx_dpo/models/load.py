"""Loads any model that mlx-lm reads, by folder or Hub name, in the form in which it will compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.config import ModelConfig
from mlx_dpo.errors import ModelError, UsageError, device_error
from mlx_dpo.models.merge import full_weight, is_packed, plain_layer
from mlx_dpo.models.trees import flat

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

FILES = ["*.json", "*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
"""What is fetched of a Hub repository."""


@dataclass
class LoadedModel:
    """A model in memory with all that belongs to it."""

    model: nn.Module
    tokenizer: Any  # the Hugging Face tokenizer
    wrapper: Any  # mlx-lm's wrapper of it, which generation wants
    config: dict[str, Any]  # config.json
    path: Path  # the folder it came from
    name: str  # as the user wrote it
    form: str  # how it is held: source quantization and compute dtype, part of the reference cache's key


def model_folder(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model, fetched from the Hub when `path` is a repository's name.

    Without `weights` they are not fetched; the folder has them where they were fetched before.

    Raises:
        ModelError: no such folder, or the Hub does not have it or does not answer.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        remedy = "convert it with `mlx-dpo import` first" if folder.suffix == ".gguf" else "name the folder"
        raise ModelError(f"--model {path} is a file, a model is a folder", remedy)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(f"no model folder {path}", "check the path, or give a Hub name such as owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = [pattern for pattern in FILES if pattern != "*.safetensors"]
    try:
        if not weights:
            with suppress(LocalEntryNotFoundError):
                return Path(snapshot_download(path, revision=revision, allow_patterns=FILES, local_files_only=True))
        return Path(snapshot_download(path, revision=revision, allow_patterns=FILES if weights else small))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no folder {path}, and the Hub did not give a model of that name: {first}",
            "check the spelling and the network; a gated model needs `hf auth login`",
        ) from error


def load(config: ModelConfig, *, lazy: bool = False, weights: bool = True) -> LoadedModel:
    """Loads model and tokenizer, without an adapter, frozen and in evaluation mode.

    With `lazy` no weight is read before it is needed; `read_weights` reads them. Without `weights` there need not be
    any: the model then has the form that config.json says, and its arrays are good for nothing but their shapes.

    Quantized weights keep their bits on a GPU, and there a float32 norm or scale among 16 bits becomes 16-bit. On a
    CPU, where MLX's quantized and half-precision products are some twenty times slower than float32,
    `compute_dtype: auto` dequantizes them once to float32: the same function.

    Raises:
        ModelError: the folder lacks weights, configuration or tokenizer, or mlx-lm cannot read its kind.
        UsageError: quantization on load is asked for a model that is quantized already.
    """
    from mlx_lm.utils import load_tokenizer

    if not config.path:
        raise UsageError("no model given", "name a folder or a Hub model with --model")
    folder = model_folder(config.path, config.revision, weights=weights)
    model, settings, form = read_stored(folder, config, weights=weights)
    form += "+" + _set_compute_dtype(model, config)
    with _readable(folder):
        wrapper = load_tokenizer(folder, {"trust_remote_code": config.trust_remote_code})
    model.freeze()
    model.eval()
    loaded = LoadedModel(model, wrapper._tokenizer, wrapper, settings, folder, config.path, form)
    if not lazy:
        read_weights(loaded)
    return loaded


def read_stored(folder: Path, config: ModelConfig, *, weights: bool = True) -> tuple[nn.Module, dict[str, Any], str]:
    """A model with its weights as they are stored (or quantized, where `config` asks for it), its configuration, and
    a name for how its weights are quantized. No weight is read yet.

    Raises:
        ModelError, UsageError: as `load`.
    """
    from mlx_lm.utils import load_model

    _check_folder(folder, weights=weights)
    with _readable(folder):
        model, settings = load_model(folder, lazy=True, strict=weights, trust_remote_code=config.trust_remote_code)
    if not has_weights(folder):
        _give_form(model, settings)
    return model, settings, _quantize_on_load(model, settings, config)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # mlx-lm, transformers and model code raise of every kind: all mean an unreadable folder
        said = shorten(str(error) or type(error).__name__, 300, placeholder=" …")
        hint = (
            "--trust-remote-code runs code of the model's author"
            if "trust_remote_code" in str(error)
            else "mlx-lm must support the model; `mlx_lm.generate --model …` shows whether it does"
        )
        raise ModelError(f"cannot load the model in {folder}: {said}", hint) from error


def read_weights(loaded: LoadedModel) -> None:
    """Reads the weights of a model that was loaded lazily.

    Layer by layer: what is read and then converted, quantized or unpacked, is not all in memory at once.

    Raises:
        ModelError: a file cannot be read.
    """
    try:
        for _, layer in loaded.model.named_modules():
            mx.eval([value for value in layer.values() if isinstance(value, mx.array)])
    except RuntimeError as error:
        if (found := device_error(error)) is not None:
            raise found from error
        raise ModelError(f"the weights in {loaded.path} cannot be read: {error}", "fetch the model again") from error
    mx.clear_cache()  # of what was read and then converted


def unload_blocks(loaded: LoadedModel, config: ModelConfig, count: int) -> None:
    """Gives back the memory of the lowest `count` blocks; should one be needed again, MLX reads it again.

    Raises:
        ModelError: the model's folder is not what it was.
    """
    fresh, _, _ = read_stored(loaded.path, config)
    _set_compute_dtype(fresh, config)
    for block, unread in zip(loaded.model.layers[:count], fresh.layers, strict=False):
        block.update(unread.parameters())
    mx.clear_cache()  # else MLX would keep it for arrays to come


def loaded_size(model: nn.Module) -> int:
    """Bytes that a model's weights take once it is loaded in the form for this device, from those as they are stored.

    On a CPU packed and 16-bit weights become float32, as `load` has it.
    """
    if mx.default_device() == mx.gpu:
        return sum(value.nbytes for value in flat(model.parameters()).values())
    size = 0
    for _, layer in model.named_modules():
        arrays = [value for value in layer.values() if isinstance(value, mx.array)]
        size += 4 * (full_weight(layer).size if is_packed(layer) else sum(value.size for value in arrays))
    return size


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer holds packed weights."""
    return any(is_packed(module) for _, module in model.named_modules())


def has_weights(folder: Path) -> bool:
    """Whether a model's folder holds its weights."""
    return any(folder.glob("model*.safetensors"))


def _check_folder(folder: Path, *, weights: bool) -> None:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if weights and not has_weights(folder):
        missing.append("weights (model*.safetensors)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise ModelError(
            f"the model folder {folder} lacks {', '.join(missing)}",
            "give a folder as mlx-lm or Hugging Face writes it; a folder with adapters.safetensors goes to --adapter",
        )


def _give_form(model: nn.Module, settings: dict[str, Any]) -> None:
    """Gives a model without weights the bits and the dtype that its configuration says; bfloat16 if it says nothing."""
    packed = settings.get("quantization") or {}
    if "bits" in packed:
        group = packed["group_size"]
        nn.quantize(
            model,
            group,
            packed["bits"],
            mode=packed.get("mode", "affine"),
            class_predicate=lambda _, layer: hasattr(layer, "to_quantized") and layer.weight.shape[-1] % group == 0,
        )
    names = (settings.get(key) for key in ("dtype", "torch_dtype"))
    model.set_dtype(next((DTYPES[name] for name in names if name in DTYPES), mx.bfloat16))


def _quantize_on_load(model: nn.Module, settings: dict[str, Any], config: ModelConfig) -> str:
    from mlx_lm.utils import quantize_model

    if config.quantize_bits is None:
        return str(settings.get("quantization", "full"))
    if is_quantized(model):
        raise UsageError(f"--quantize-bits: {config.path} is quantized already", "leave the flag out")
    asked = f"--quantize-bits {config.quantize_bits} --quantize-group-size {config.quantize_group_size}"
    try:
        with redirect_stdout(StringIO()):  # mlx-lm says there how many bits a weight takes
            quantize_model(model, settings, config.quantize_group_size, config.quantize_bits)
    except ValueError as error:
        raise UsageError(f"{asked}: {error}", "MLX takes 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128") from error
    if not is_quantized(model):
        raise UsageError(
            f"{asked}: no layer is a multiple of {config.quantize_group_size} wide", "take smaller groups: 32 or 64"
        )
    return f"q{config.quantize_bits}g{config.quantize_group_size}"


def _set_compute_dtype(model: nn.Module, config: ModelConfig) -> str:
    wanted = config.compute_dtype
    if wanted == "auto":
        if mx.default_device() == mx.gpu:
            return _as_stored(model)
        wanted = "float32"
    if mx.default_device() == mx.cpu:
        # not mlx-lm's dequantize_model: it rounds to the scales' type, and leaves out nvfp4 experts' scale of their own
        packed = [(name, layer) for name, layer in model.named_modules() if is_packed(layer)]
        model.update_modules(tree_unflatten([(name, plain_layer(layer, full_weight(layer))) for name, layer in packed]))
    model.set_dtype(DTYPES[wanted])
    return wanted


def _as_stored(model: nn.Module) -> str:
    """Leaves a model as it is stored, but for float32 among 16 bits, and says which it is.

    One float32 norm or embedding has all that follows it computed in float32: GGUF files keep norms, and some folders
    scales, in float32 beside 16-bit matrices. Such floats become 16-bit like the others, except what the architecture
    wants in float32. Gemma's activations are too large for float16.
    """
    floats = {
        name: value for name, value in flat(model.parameters()).items() if mx.issubdtype(value.dtype, mx.floating)
    }
    ((most, _),) = Counter(value.dtype for value in floats.values() if value.ndim > 1).most_common(1)
    wide = [name for name, value in floats.items() if value.dtype == mx.float32]
    if most == mx.float32 or not any(name.endswith(("norm.weight", "scales")) for name in wide):
        return "stored"
    half = mx.bfloat16 if str(getattr(model, "model_type", "")).startswith("gemma") else most
    wanted = getattr(model, "cast_predicate", lambda name: True)
    cast = [(name, value.astype(half)) for name, value in floats.items() if wanted(name)]
    model.update(tree_unflatten(cast))
    return f"stored, {str(half).removeprefix('mlx.core.')}"
