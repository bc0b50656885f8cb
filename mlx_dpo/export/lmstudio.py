"""A fused GGUF file where LM Studio looks for models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.events import OnEvent, ignore
from mlx_dpo.export.fuse import check_output
from mlx_dpo.export.gguf import GGUFReport, write_fused_gguf
from mlx_dpo.export.verify import Trained
from mlx_dpo.files import written_whole
from mlx_dpo.gguf.write import ModelType

MODELS = "~/.lmstudio/models"
"""LM Studio's folder of models, unless the user chose another one there."""


def export_lmstudio(
    model: ModelConfig,
    adapter: str | Path,
    name: str,
    *,
    publisher: str = "local",
    models: str | Path = MODELS,
    outtype: ModelType = "f16",
    verify: bool = True,
    data: DataConfig | None = None,
    rows: int = 4,
    on_event: OnEvent = ignore,
) -> GGUFReport:
    """Writes `models/publisher/name/name-OUTTYPE.gguf`, base and adapter fused: LM Studio takes no adapters.

    It shows the model as publisher/name.

    Raises:
        UsageError: there is a model of that name, or a name holds a slash.
        ModelError: the model or adapter cannot be a GGUF file, or what was written is not what was trained.
    """
    for word in (publisher, name):
        if not word or "/" in word or word.startswith("."):
            raise UsageError(f"{word!r} is no name for a publisher or a model", "leave slashes out")
    folder = Path(models).expanduser() / publisher / name
    check_output(folder)
    with written_whole(folder, folder=True) as beside:
        file = f"{name}-{outtype.upper()}.gguf"
        trained = Trained(replace(model, adapter=str(adapter)), data, rows, on_event)
        verified = write_fused_gguf(trained, beside / file, outtype, verify=verify)
    return GGUFReport(folder / file, verified)
