"""GGUF files from an MLX model folder and an adapter folder, one tensor in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import mlx.core as mx
import numpy as np

from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.files import written_whole
from mlx_dpo.gguf import OnTensor
from mlx_dpo.gguf.architectures import to_gguf_name
from mlx_dpo.gguf.base import Base, LoraFolder, open_base, read_lora
from mlx_dpo.gguf.blocks import GROUP, exact_kind, pack_blocks, unpack_affine
from mlx_dpo.gguf.config_write import write_config
from mlx_dpo.gguf.layout import column_order, ggml_shape, groups_stay_whole, moved, row_order, to_ggml_form
from mlx_dpo.gguf.tokenizer_write import general_name, write_tokenizer

AdapterType = Literal["f32", "f16"]
ModelType = Literal["f16", "f32", "bf16", "q8_0", "q4_1"]
FILE_TYPES = {"f32": 0, "f16": 1, "q4_1": 3, "q8_0": 7, "bf16": 32}  # general.file_type
FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "shortconv.conv")
"""Matrices that are float32 in every file that llama.cpp's own converter writes, and it expects so, as with vectors."""

STORED = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What a GGUF file holds."""

    path: Path
    bytes: int
    tensors: dict[str, int]  # how many of each ggml type
    adapted: int  # matrices that the adapter changed, or that the adapter file holds
    not_exact: tuple[str, ...] = ()  # with q4_1: quantized matrices that ggml has no exact kind for, written as F16
    notes: tuple[str, ...] = ()  # what is not in the file, or is known to be otherwise in llama.cpp


@dataclass(frozen=True)
class Planned:
    """One tensor to be written: `make` computes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: str  # name of the ggml type
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """How much room it takes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return int(np.prod(self.shape)) // block * size


def export_adapter_gguf(
    base_folder: str | Path,
    adapter_folder: str | Path,
    out: str | Path,
    dtype: AdapterType = "f32",
) -> ExportReport:
    """Write an mlx-lm adapter as a GGUF file for `llama.cpp --lora`, beside a GGUF file of the same base.

    Raises ModelError for an adapter that llama.cpp cannot take or a base that is not in the table, with the other way;
    UsageError when `out` exists.
    """
    base = open_base(base_folder)
    adapter = read_lora(adapter_folder, base)
    kind = dtype.upper()
    planned = []
    for module in adapter.modules:
        name = f"{module}.weight"
        a, b = adapter.matrices(module)
        if (scale := _scale_of_experts(base, module)) is not None:
            b = b * scale[:, None, None]
        # ggml computes B (A x) as it stands: B has the base's rows, and A its columns
        rows, columns = _orders(base, name, base.shapes[name][-1])
        for half, matrix in (("a", moved(a, None, columns)), ("b", moved(b, rows))):
            theirs = f"{to_gguf_name(base.architecture, name)}.lora_{half}"
            planned.append(Planned(theirs, matrix.shape, kind, partial(_encode, matrix, kind)))
    with _writer(Path(out), base.architecture.gguf) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.scale * adapter.rank)
        writer.add_name(f"{base.folder.name} adapter")
        _write(writer, planned)
    return _report(Path(out), planned, adapter)


def export_model_gguf(
    base_folder: str | Path,
    adapter_folder: str | Path | None,
    out: str | Path,
    outtype: ModelType = "f16",
    progress: OnTensor | None = None,
) -> ExportReport:
    """Write a model, with an adapter fused into it in float32, as a GGUF file.

    `q4_1` keeps the base's own bits wherever ggml has a kind that holds them exactly (4-bit affine as Q4_1, 5-bit as
    Q5_1, 8-bit as Q8_0 where it fits, MXFP4 and 16-bit as they are); adapted matrices become F16, since requantizing
    them would round the tuning away. In the other types every matrix gets that type; vectors and routers stay F32.
    Raises ModelError for what llama.cpp would compute otherwise, with the other way; UsageError when `out` exists or
    when q4_1 is asked of a base that is not quantized.
    """
    base = open_base(base_folder)
    adapter = read_lora(adapter_folder, base) if adapter_folder is not None else None
    settings, rope_tensors = write_config(base)
    if outtype == "q4_1" and not any(name.endswith(".scales") for name in base.stored):
        raise UsageError(f"{base.folder} is not quantized: there are no 4-bit weights to keep.", "Use q8_0 or f16.")
    planned = [Planned(name, values.shape, "F32", partial(np.copy, values)) for name, values in rope_tensors.items()]
    not_exact = []
    for name in (name for name in base.shapes if name in base.stored):
        adapted = adapter is not None and name.removesuffix(".weight") in adapter.modules
        gguf_name = str(to_gguf_name(base.architecture, name))
        kind, repack = _kind(base, name, gguf_name, outtype, adapted)
        if outtype == "q4_1" and kind == "F16" and base.quantization(name) and not adapted:
            not_exact.append(name)
        added = adapter if adapted else None
        make = partial(_repacked, base, name, kind) if repack else partial(_dense, base, name, kind, added)
        planned.append(Planned(gguf_name, ggml_shape(name, base.shapes[name]), kind, make))
    with _writer(Path(out), base.architecture.gguf) as writer:
        writer.add_type("model")
        writer.add_name(general_name(base.folder, base.folder.name))
        writer.add_file_type(FILE_TYPES[outtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in settings.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                add[type(value)](key, value)
        tokens = base.shapes["model.embed_tokens.weight"][0]
        notes = _left_out(base) + write_tokenizer(base.folder, tokens, writer, base.architecture.add_bos)
        _write(writer, planned, progress)
    return _report(Path(out), planned, adapter, not_exact=tuple(not_exact), notes=tuple(notes))


def _left_out(base: Base) -> list[str]:
    """What the file does not hold or say, in sentences."""
    senses = [word for key, word in (("vision_config", "images"), ("audio_config", "sound")) if base.config.get(key)]
    notes = [f"the file holds the text model alone: it cannot read {' or '.join(senses)}"] * bool(senses)
    if base.model_type == "phi3" and (base.setting("rope_scaling") or {}).get("type") in ("longrope", "su"):
        original = base.setting("original_max_position_embeddings")
        notes.append(
            f"llama.cpp takes longrope's factors for short texts in a context of up to {original} tokens, mlx-lm never "
            f"does: with --ctx-size {original + 1} or more both compute the same"
        )
    return notes


def _kind(base: Base, name: str, gguf_name: str, outtype: ModelType, adapted: bool) -> tuple[str, bool]:
    """The ggml type of a tensor, and whether it is the base's own bits repacked."""
    shape = ggml_shape(name, base.shapes[name])
    part = gguf_name.split(".", 2)[-1] if gguf_name.startswith("blk.") else gguf_name
    if len(shape) == 1 or not part.endswith(".weight") or part.removesuffix(".weight") in FLOAT32:
        return "F32", False
    if outtype != "q4_1":
        kind = outtype.upper()
        return ("F16" if kind == "Q8_0" and shape[-1] % GROUP else kind), False
    how = base.quantization(name)
    if adapted:
        return "F16", False
    if how is None:
        return STORED.get(base.stored[name][1], "F16"), False
    if not groups_stay_whole(base.setting, name, how.group_size):
        return "F16", False
    exact = exact_kind(*how, *_scales(base, name, how.mode))
    return exact or "F16", exact is not None


def _scales(base: Base, name: str, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each group; a micro-scaling one has an exponent, and no bias."""
    module = name.removesuffix(".weight")
    if mode != "affine":
        exponents = np.array(base.weights.take(f"{module}.scales"))
        return exponents, exponents
    scales, biases = (base.weights.take(f"{module}.{part}").astype(mx.float32) for part in ("scales", "biases"))
    return np.array(scales), np.array(biases)


def _scale_of_experts(base: Base, module: str) -> np.ndarray | None:
    """What llama.cpp multiplies the experts' outputs by, but not what an adapter adds to them: float32 `[experts]`.

    Gemma 4 has such a scale; None for modules without one.
    """
    name = module.replace("experts.switch_glu.down_proj", "router.per_expert_scale")
    return base.dense(name) if name != module and name in base.stored else None


def _dense(base: Base, name: str, kind: str, adapter: LoraFolder | None) -> np.ndarray:
    values = base.dense(name)
    if adapter is not None:  # before rows move: the adapter's B has its rows where the base has them
        values = values + adapter.delta(name.removesuffix(".weight"))
    rows, columns = _orders(base, name, values.shape[-1])
    return _encode(to_ggml_form(base.architecture, name, moved(values, rows, columns)), kind)


def _repacked(base: Base, name: str, kind: str) -> np.ndarray:
    how = base.quantization(name)
    assert how is not None
    q = unpack_affine(np.array(base.weights.take(name)), how.bits)
    scale, bias = (moved(part, *_orders(base, name, part.shape[-1])) for part in _scales(base, name, how.mode))
    return pack_blocks(moved(q, *_orders(base, name, q.shape[-1])), scale, bias, kind)


def _orders(base: Base, name: str, columns: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    rows = row_order(base.architecture, base.setting, name, base.shapes[name][0])
    return rows, column_order(base.setting, name, columns)


def _encode(values: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])


@contextmanager
def _writer(out: Path, architecture: str) -> Iterator[Any]:
    if out.exists():
        raise UsageError(f"{out} exists already.", "Name a file that does not exist yet, or remove it first.")
    if not out.parent.is_dir():
        raise UsageError(f"There is no folder {out.parent}.", "Make it first.")
    with written_whole(out) as beside:
        writer = gguf.GGUFWriter(beside, architecture)
        try:
            yield writer
        finally:
            writer.close()


def _write(writer: Any, planned: list[Planned], on_tensor: OnTensor | None = None) -> None:
    """Write settings and tensors. All sizes stand at the head of the file, so the tensors can be made one at a time."""
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(planned):
        values = tensor.make()
        if values.nbytes != tensor.nbytes:
            raise ModelError(f"{tensor.name} has {values.nbytes} bytes, which is not its shape {tensor.shape}.")
        writer.write_tensor_data(values)
        if on_tensor:
            on_tensor(done + 1, len(planned))


def _report(out: Path, planned: list[Planned], adapter: LoraFolder | None, **more: tuple[str, ...]) -> ExportReport:
    kinds = Counter(tensor.kind for tensor in planned)
    adapted = len(adapter.modules) if adapter else 0
    return ExportReport(path=out, bytes=out.stat().st_size, tensors=dict(kinds), adapted=adapted, **more)
