"""An adapter or a fused model on the Hugging Face Hub: private unless asked otherwise, and only what belongs there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.events import OnEvent, Progressed, ignore

ADAPTER = ("adapters.safetensors", "adapter_model.safetensors", "adapter_config.json", "README.md")
"""What goes of an adapter's folder: not its settings, metrics and checkpoints, which name the user's own files."""

MODEL = (
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py",
    "*.gguf", "Modelfile", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What goes of a model's folder."""


@dataclass(frozen=True)
class PushReport:
    """What went, or with a dry run would go: files with their sizes in bytes. `url` is None after a dry run."""

    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]
    url: str | None


def push(
    folder: Path, repo: str, *, private: bool = True, dry_run: bool = False, on_event: OnEvent = ignore
) -> PushReport:
    """Uploads an adapter's or a model's folder to `repo` (owner/name), with the login of `hf auth login`.

    An interrupted upload is resumed by the same call. Files of an earlier upload that `folder` lacks stay there.

    Raises:
        UsageError: `repo` is no repository's name.
        ModelError: the folder holds neither, or the Hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"{repo!r} is no name of a repository", "it is owner/name")
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not any(folder.glob("model*.safetensors")) and not any(folder.glob("*.gguf")):
        raise ModelError(f"{folder} holds neither adapter nor model", "give a run folder, or what fuse or export wrote")
    patterns = ADAPTER if is_adapter else MODEL
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    listed = tuple(sorted((file.name, file.stat().st_size) for file in files))
    if dry_run:
        return PushReport(repo, private, listed, None)

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    on_event(Progressed("uploading", 0, 1, ""))
    try:
        url = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[name for name, _ in listed], commit_message="Upload"
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the Hub did not take {folder} as {repo}: {said}",
            "log in with `hf auth login`, with a token that may write; the same command goes on where it stopped",
        ) from error
    on_event(Progressed("uploading", 1, 1, ""))
    return PushReport(repo, private, listed, str(url))
