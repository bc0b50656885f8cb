"""K-quants: made by llama.cpp's own quantizer, which alone knows how, from a 16-bit GGUF file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from mlx_dpo.errors import MlxDpoError, UsageError
from mlx_dpo.files import written_whole

QUANTIZER = "llama-quantize"
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")


def quantize_gguf(source: str | Path, out: str | Path, kind: str) -> Path:
    """Quantize the GGUF file `source` to one of `K_QUANTS`, as the file `out`.

    It runs `llama-quantize` where that is installed. Raises MlxDpoError with the exact command where it is not, and
    with what the program said where it fails; UsageError for another kind or a file that exists.
    """
    source, out = Path(source), Path(out)
    if kind not in K_QUANTS:
        raise UsageError(f"{kind!r} is no K-quant.", f"Choose one of {', '.join(K_QUANTS)}.")
    if out.exists():
        raise UsageError(f"{out} exists already.", "Name a file that does not exist yet, or remove it first.")
    program = shutil.which(QUANTIZER)
    if program is None:
        raise MlxDpoError(
            f"K-quants are made by llama.cpp's quantizer, and {QUANTIZER} is not installed.",
            f"Install llama.cpp (brew install llama.cpp), then run: {QUANTIZER} {source} {out} {kind.upper()}",
        )
    with written_whole(out) as beside:
        command = [program, str(source), str(beside), kind.upper()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not beside.is_file():
            last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            raise MlxDpoError(f"{QUANTIZER} {source} {out} {kind.upper()} failed ({done.returncode}):\n{last}")
    return out
