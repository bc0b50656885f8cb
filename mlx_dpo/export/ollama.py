"""A folder from which Ollama makes a model: the fused GGUF file and the Modelfile."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.events import OnEvent, Warned, ignore
from mlx_dpo.export.fuse import check_output
from mlx_dpo.export.gguf import write_fused_gguf
from mlx_dpo.export.ollama_template import go_template, learn_shape
from mlx_dpo.export.verify import Trained
from mlx_dpo.files import written_whole
from mlx_dpo.gguf.verify import VerifyReport
from mlx_dpo.gguf.write import ModelType
from mlx_dpo.models.load import model_folder
from mlx_dpo.sampling.generate import end_tokens

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Of generation_config.json, what Ollama has under which name."""


@dataclass(frozen=True)
class OllamaReport:
    """What was written. `commands` make the model known to Ollama and talk to it; `has_template` says whether the
    Modelfile holds the model's chat template."""

    gguf: Path
    commands: tuple[str, ...]
    has_template: bool
    verified: VerifyReport | None


def export_ollama(
    model: ModelConfig,
    adapter: str | Path,
    output: Path,
    *,
    name: str | None = None,
    outtype: ModelType = "f16",
    verify: bool = True,
    data: DataConfig | None = None,
    rows: int = 4,
    on_event: OnEvent = ignore,
) -> OllamaReport:
    """Writes `output/NAME.gguf`, base and adapter fused, and `output/Modelfile` with a stop for each end token, the
    chat template, and what generation_config.json says of sampling.

    `name` is what the model will be called; the folder's name without it. With `verify`, and llama.cpp installed
    (`xllamacpp`), the file's log-probs are compared with what was trained.

    Raises:
        UsageError: `output` holds something.
        ModelError: the model or adapter cannot be a GGUF file, or what was written is not what was trained.
    """
    check_output(output)
    called = re.sub(r"[^a-z0-9._-]+", "-", (name or output.name).lower()).strip("-._") or "tuned"
    gguf = output / f"{called.replace('/', '-')}.gguf"
    with written_whole(output, folder=True) as beside:
        trained = Trained(replace(model, adapter=str(adapter)), data, rows, on_event)
        verified = write_fused_gguf(trained, beside / gguf.name, outtype, verify=verify)
        given = data.chat_template_kwargs if data else None
        text, has_template = modelfile(model_folder(model.path, model.revision), gguf.name, given)
        (beside / "Modelfile").write_text(text)
    if not has_template:
        on_event(Warned("the chat template is not made of constant texts: Ollama will use its own reading of it"))
    commands = (f"ollama create {called} -f {quote(str(output / 'Modelfile'))}", f"ollama run {called}")
    return OllamaReport(gguf, commands, has_template, verified)


def modelfile(folder: Path, gguf: str, chat_template_kwargs: Mapping[str, Any] | None = None) -> tuple[str, bool]:
    """The text of a Modelfile for the model in `folder` as file `gguf`, and whether it holds the chat template, as it
    is with these arguments."""
    from mlx_lm.utils import load_config, load_tokenizer

    tokenizer = load_tokenizer(folder)._tokenizer
    lines = [f"FROM ./{gguf}"]
    shape = learn_shape(tokenizer, chat_template_kwargs)
    if shape is not None:
        lines.append(f'TEMPLATE """{go_template(shape)}"""')
    ends = end_tokens(tokenizer, load_config(folder))
    lines += [f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(sorted(ends))]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling(folder).items()]
    return "\n".join(lines) + "\n", shape is not None


def sampling(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of sampling, under Ollama's names; greedy where it says so."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    if settings.get("do_sample") is False:
        return {"temperature": 0}
    return {ours: settings[theirs] for theirs, ours in PARAMETERS.items() if settings.get(theirs) is not None}
