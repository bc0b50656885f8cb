"""GGUF files of what was trained: a fused model, or the adapter alone, each checked in llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast, get_args

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.export.verify import Trained, verify_gguf
from mlx_dpo.gguf import OnTensor
from mlx_dpo.gguf.llamacpp import K_QUANTS, quantize_gguf, runtime_installed
from mlx_dpo.gguf.verify import VerifyReport
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
    known = (*get_args(ModelType), *K_QUANTS)
    if outtype not in known:
        raise UsageError(f"--outtype {outtype} is no form of a GGUF file", f"one of {', '.join(known)}")
    with TemporaryDirectory() as made:
        whole = Path(made) / "f16.gguf" if outtype in K_QUANTS else file
        plain = cast(ModelType, "f16" if outtype in K_QUANTS else outtype)
        trained = Trained(replace(model, adapter=str(adapter)), data, rows, on_event)
        found = write_fused_gguf(trained, whole, plain, verify=verify)
        if outtype in K_QUANTS:
            quantize_gguf(whole, file, outtype)
    return GGUFReport(file, found)


def write_fused_gguf(trained: Trained, file: Path, outtype: ModelType, *, verify: bool) -> VerifyReport | None:
    """Writes what was trained as one GGUF file and, where it can, checks it in llama.cpp; raises as `export_gguf`."""
    base = model_folder(trained.model.path, trained.model.revision)
    report = export_model_gguf(base, trained.model.adapter, file, outtype, _shown(trained.on_event, "writing GGUF"))
    for note in report.notes:
        trained.on_event(Warned(note))
    return verify_gguf(trained, file, outtype) if verify and runtime_installed() else None


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
    export_adapter_gguf(base, adapter, file, dtype)
    if not verify or not runtime_installed():
        if verify:
            on_event(Warned("not checked in llama.cpp: pip install 'mlx-dpo[verify]'"))
        return GGUFReport(file, None)
    with TemporaryDirectory() as made:
        plain = Path(made) / "base.gguf"
        export_model_gguf(base, None, plain, "f32", _shown(on_event, "writing the base for the check"))
        trained = Trained(replace(model, adapter=str(adapter)), data, rows, on_event)
        found = verify_gguf(trained, plain, dtype, adapter_file=file)
    return GGUFReport(file, found)


def _shown(on_event: OnEvent, stage: str) -> OnTensor:
    return lambda done, total: on_event(Progressed(stage, done, total, "tensors"))
