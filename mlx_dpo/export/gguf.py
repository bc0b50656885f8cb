"""GGUF files of what was trained: a fused model, or the adapter alone, each checked in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast, get_args

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.data.load import load_records
from mlx_dpo.data.tokenize import encode_records
from mlx_dpo.errors import UsageError
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.export.ollama import in_mlx_form, write_fused_gguf
from mlx_dpo.export.verify import demo_rows
from mlx_dpo.gguf.base import open_base
from mlx_dpo.gguf.kquants import K_QUANTS, quantize_gguf
from mlx_dpo.gguf.llamacpp import runtime_installed
from mlx_dpo.gguf.verify import TOLERANCES, VerifyReport, float32_log_probs, verify_gguf
from mlx_dpo.gguf.write import AdapterType, ModelType, export_adapter_gguf, export_model_gguf
from mlx_dpo.models.load import model_folder


@dataclass(frozen=True)
class GGUFReport:
    """The file that was written, and the check of it; None where llama.cpp is not installed or was not wanted."""

    path: Path
    verified: VerifyReport | None


def export_gguf(
    model: ModelConfig,
    adapter: str | Path,
    file: Path,
    *,
    outtype: str = "f16",
    verify: bool = True,
    data: DataConfig | None = None,
    rows: int = 4,
    on_event: OnEvent = ignore,
) -> GGUFReport:
    """Writes base + adapter as one GGUF file. `outtype` is f16, f32, bf16, q8_0, q4_1, or a K-quant.

    A K-quant is made by llama.cpp's own quantizer from a 16-bit file; that file is what the check is made of, since
    llama.cpp's arithmetic on quantized weights differs from MLX's by more than an adapter does.

    Raises:
        ModelError: the model or adapter cannot be a GGUF file, or what was written is not what was trained.
        UsageError: `outtype` is no form of a GGUF file, or the file exists.
        MlxDpoError: a K-quant, and no quantizer; the message has the command.
    """
    if outtype not in K_QUANTS:
        if outtype not in get_args(ModelType):
            known = ", ".join((*get_args(ModelType), *K_QUANTS))
            raise UsageError(f"--outtype {outtype} is no form of a GGUF file", f"one of {known}")
        found = write_fused_gguf(
            model, adapter, file,
            outtype=cast(ModelType, outtype), verify=verify, data=data, rows=rows, on_event=on_event,
        )  # fmt: skip
        return GGUFReport(file, found)
    with TemporaryDirectory() as made:
        half = Path(made) / "f16.gguf"
        found = write_fused_gguf(
            model, adapter, half, outtype="f16", verify=verify, data=data, rows=rows, on_event=on_event
        )
        quantize_gguf(half, file, outtype)
    return GGUFReport(file, found)


def export_gguf_adapter(
    model: ModelConfig,
    adapter: str | Path,
    file: Path,
    *,
    dtype: AdapterType = "f32",
    verify: bool = True,
    data: DataConfig | None = None,
    rows: int = 4,
    on_event: OnEvent = ignore,
) -> GGUFReport:
    """Writes the adapter alone, for `llama-cli --lora`. The check writes the base as float32 beside it for a while.

    Raises:
        ModelError: GGUF or llama.cpp cannot hold this adapter, or what was written is not it.
    """
    base = model_folder(model.path, model.revision)
    with in_mlx_form(model, adapter) as folder, TemporaryDirectory() as made:
        export_adapter_gguf(base, folder, file, dtype)
        if not verify or not runtime_installed():
            if verify:
                on_event(Warned("not checked in llama.cpp: pip install 'mlx-dpo[verify]'"))
            return GGUFReport(file, None)
        plain = Path(made) / "base.gguf"
        export_model_gguf(
            base, None, plain, "f32",
            lambda done, total: on_event(Progressed("writing the base for the check", done, total, "tensors")),
        )  # fmt: skip
        on, off = float32_log_probs(base, folder)
        found = verify_gguf(
            plain, sequences(model, data, rows), on, adapter_gguf=file, adapter_off=off,
            tolerance=TOLERANCES[dtype] + open_base(base).architecture.own_rounding,
        )  # fmt: skip
    return GGUFReport(file, found)


def sequences(model: ModelConfig, data: DataConfig | None, rows: int) -> Sequence[list[int]]:
    """Prompt and first answer of the first rows of `data`, or of the demo's, as token ids."""
    from mlx_lm.utils import load_tokenizer

    data = data or demo_rows()
    tokenizer = load_tokenizer(model_folder(model.path, model.revision))
    tokenized, _ = encode_records(load_records(data.path)[:rows], tokenizer, data)
    return [row.context(0) + row.completions[0] for row in tokenized]
