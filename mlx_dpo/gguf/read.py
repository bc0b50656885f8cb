"""An MLX model folder from a GGUF file: settings, tokenizer and weights, quantized blocks kept bit for bit."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import mlx.core as mx
import numpy as np

from mlx_dpo.errors import ModelError
from mlx_dpo.files import written_whole
from mlx_dpo.gguf import OnTensor
from mlx_dpo.gguf.architectures import ARCHITECTURES, model_type_of, to_gguf_name
from mlx_dpo.gguf.base import text_model
from mlx_dpo.gguf.blocks import BITS, GROUP, pack_affine, unpack_blocks, unpack_mxfp4
from mlx_dpo.gguf.config_read import read_config
from mlx_dpo.gguf.layout import column_order, groups_stay_whole, moved, row_order, to_mlx_form
from mlx_dpo.gguf.tokenizer_read import eos_token_ids, read_tokenizer
from mlx_dpo.models.load import DTYPES

ImportDtype = Literal["keep", "float32", "float16", "bfloat16"]
SHARD_BYTES = 4 << 30
SETTING_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What came out of a GGUF file."""

    folder: Path
    model_type: str
    name: str  # general.name of the file
    tensors: dict[str, int]  # how many tensors of each ggml type the file had
    kept_quantized: int  # how many of them are quantized in the folder, with the same bits
    parameters: int


class Target(NamedTuple):
    """The model that a file's tensors go into: mlx-lm's, without weights."""

    config: dict[str, Any]
    prefix: str  # what its parameters' names begin with beside the text model's
    names: Mapping[str | None, str]  # of the text model's parameters, by names in the file
    shapes: Mapping[str, tuple[int, ...]]


class Tensor(NamedTuple):
    """One tensor of a file, as the gguf package gives it."""

    name: str
    tensor_type: gguf.GGMLQuantizationType
    data: np.ndarray


def import_gguf(
    gguf_path: str | Path,
    output_folder: str | Path,
    *,
    dtype: ImportDtype = "keep",
    progress: OnTensor | None = None,
) -> ImportReport:
    """Turn a GGUF file into a folder that mlx-lm loads.

    `keep` leaves Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 tensors as they are (MLX quantization in groups of 32, the same
    numbers), F32, F16 and BF16 too; other quantized tensors are dequantized to float16. The other choices dequantize
    everything. The folder appears whole or not at all. Raises ModelError for a file that cannot be read, an
    architecture or a tokenizer that is not in the tables, and an output folder that exists; MlxDpoError when the
    `gguf` package is missing.
    """
    path, folder = Path(gguf_path), Path(output_folder)
    if folder.exists():
        raise ModelError(f"{folder} exists already.", "Name a folder that does not exist yet.")
    # all that can be refused is refused before the first weight is read: settings and tokenizer take a moment
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if field.types}
    model_type = model_type_of(fields["general.architecture"])
    if fields.get("general.type", "model") != "model" or model_type is None:
        kinds = ", ".join(sorted({a.gguf for a in ARCHITECTURES.values()}))
        what = f"{fields.get('general.type', 'model')} of architecture {fields['general.architecture']!r}"
        raise ModelError(
            f"{path} holds a {what}; a model of one of these can be read: {kinds}.",
            "Give the original model's folder or Hub name instead of the GGUF file.",
        )
    config = read_config(model_type, fields, {t.name: t for t in reader.tensors})
    tensors = list(_tensors(reader.tensors, config["num_hidden_layers"], fields))
    _, _, prefix, shapes = text_model(config)
    names = {to_gguf_name(ARCHITECTURES[model_type], name): name for name in shapes}
    unknown = [t.name for t in tensors if t.name not in names and t.name not in SETTING_TENSORS]
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} tensors have no place in a {model_type} model: {', '.join(unknown[:8])}.",
            "The file may be of a newer variant; give the original model's folder or Hub name instead.",
        )
    tokenizer, tokenizer_config = read_tokenizer(fields)
    eos = eos_token_ids(fields)
    config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    if "tokenizer.ggml.bos_token_id" in fields:
        config["bos_token_id"] = int(fields["tokenizer.ggml.bos_token_id"])
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}

    with written_whole(folder, folder=True) as beside:
        modules = _write_weights(tensors, Target(config, prefix, names, shapes), dtype, beside, progress)
        if modules:
            counted = Counter(tuple(how.items()) for how in modules.values())
            usual = dict(counted.most_common(1)[0][0])
            config["quantization"] = usual | {name: how for name, how in modules.items() if how != usual}
            config["quantization_config"] = config["quantization"]
        contents = {
            "config.json": config,
            "generation_config.json": generation,
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": tokenizer_config,
        }
        for name, content in contents.items():
            (beside / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return ImportReport(
        folder=folder,
        model_type=model_type,
        name=fields.get("general.name", path.stem),
        tensors=dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        kept_quantized=len(modules),
        parameters=sum(math.prod(shapes[names[t.name]]) for t in tensors if t.name in names),
    )


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"There is no file {path}.", "Give the path of a .gguf file.")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(f"{path} is no GGUF file that can be read: {error}.", "Download it again.") from error


def _tensors(found: list[Any], layers: int, fields: Mapping[str, Any]) -> Iterator[Tensor]:
    """A file's tensors, without blocks that only guess further tokens, and experts' joined matrices in two."""
    guesses = fields.get(f"{fields['general.architecture']}.nextn_predict_layers", 0)
    for tensor in found:
        if guesses and tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= layers:
            continue
        if tensor.name.endswith("ffn_gate_up_exps.weight"):
            for part, half in zip(("gate", "up"), np.split(tensor.data, 2, axis=-2), strict=True):
                yield Tensor(tensor.name.replace("gate_up", part), tensor.tensor_type, half)
        else:
            yield Tensor(tensor.name, tensor.tensor_type, tensor.data)


def _write_weights(
    tensors: list[Tensor],
    target: Target,
    dtype: ImportDtype,
    folder: Path,
    progress: OnTensor | None,
) -> dict[str, dict[str, Any]]:
    """Write model*.safetensors and its index; returns how each quantized module is quantized."""
    shards: list[list[str]] = []
    shard: dict[str, mx.array] = {}
    modules: dict[str, dict[str, Any]] = {}
    total = 0

    # how many shards there will be is known only at the end, so they get their names then
    for done, tensor in enumerate(tensors):
        name = target.names.get(tensor.name)
        if name is not None:
            for key, array in _convert(tensor, name, target, dtype):
                shard[target.prefix + key] = array
                total += array.nbytes
                if key.endswith(".scales"):
                    kind = tensor.tensor_type.name
                    how = {"bits": BITS[kind], "mode": "affine"} if kind in BITS else {"bits": 4, "mode": "mxfp4"}
                    modules[target.prefix + key.removesuffix(".scales")] = {"group_size": GROUP, **how}
        if shard and (done + 1 == len(tensors) or sum(array.nbytes for array in shard.values()) >= SHARD_BYTES):
            mx.save_safetensors(str(folder / f"part-{len(shards)}.safetensors"), shard, metadata={"format": "mlx"})
            shards.append(sorted(shard))
            shard = {}
        if progress:
            progress(done + 1, len(tensors))
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return modules


def _convert(tensor: Tensor, name: str, target: Target, dtype: ImportDtype) -> Iterator[tuple[str, mx.array]]:
    """The arrays of one tensor: itself, or weight, scales and biases."""
    architecture, setting = ARCHITECTURES[target.config["model_type"]], target.config.get
    kind = tensor.tensor_type.name
    raw = np.asarray(tensor.data)
    order = row_order(architecture, setting, name, raw.shape[0])
    if order is not None:
        raw = raw[np.argsort(order)]

    def columns(values: np.ndarray) -> np.ndarray:
        there = column_order(setting, name, values.shape[-1])
        return values if there is None else moved(values, None, np.argsort(there))

    keep = dtype == "keep" and groups_stay_whole(setting, name, GROUP)
    module = name.removesuffix("weight")
    if keep and kind == "MXFP4":
        codes, exponents = unpack_mxfp4(raw)
        yield name, mx.array(pack_affine(columns(codes), 4))
        yield module + "scales", mx.array(columns(exponents))
        return
    if keep and kind in BITS:
        try:
            q, scale, bias = unpack_blocks(raw, kind)
        except OverflowError:
            pass  # a scale so large that its bias has no float16: dequantized below
        else:
            # A looked-up embedding has the type of its scales: float16 would round there what matrix products do not.
            looked_up = tensor.name in ("token_embd.weight", "per_layer_token_embd.weight")
            wide = mx.float32 if looked_up else mx.float16
            yield name, mx.array(pack_affine(columns(q), BITS[kind]))
            yield module + "scales", mx.array(columns(scale)).astype(wide)
            yield module + "biases", mx.array(columns(bias)).astype(wide)
            return
    if kind == "BF16" and dtype == "keep":
        plain = columns(np.ascontiguousarray(raw).view(np.uint16)).reshape(target.shapes[name])
        array = mx.array(np.ascontiguousarray(plain)).view(mx.bfloat16)
    else:
        values = columns(gguf.quants.dequantize(np.ascontiguousarray(raw), tensor.tensor_type))
        if kind == "F32":  # as are all that have another form
            values = to_mlx_form(architecture, name, values, target.shapes[name])
        kept = mx.float32 if kind == "F32" else mx.float16
        array = mx.array(values).astype(kept if dtype == "keep" else DTYPES[dtype])
    mx.eval(array)
    yield name, array
