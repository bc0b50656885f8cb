"""Who is measured: mlx_dpo with all its speed optimizations, without each, and without any; and other trainers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_dpo.errors import UsageError
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A program of `workers/` with its options, and what it needs."""

    worker: str
    options: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    prefers: bool = True  # it trains on preferences; mlx-lm's supervised step only stands beside them
    mlx: bool = True
    packages: tuple[str, ...] = ()  # what pip installs for it
    packages_alone: tuple[str, ...] = ()  # and without their dependencies


def _ours(**speed: bool) -> Contender:
    return Contender(worker="ours", ours=True, options={"speed": speed})


OURS: dict[str, Contender] = {
    "mlx_dpo": _ours(),
    **{f"mlx_dpo without {optimization}": _ours(**{optimization: off}) for optimization, off in OPTIMIZATIONS.items()},
    "mlx_dpo plain": _ours(**OPTIMIZATIONS),
}

PEERS: dict[str, Contender] = {
    "mlx-lm-sft": Contender(worker="mlx_lm_sft", prefers=False),
    "mlx-lm-lora": Contender(worker="mlx_lm_lora", packages=("mlx-lm==0.32.2", "mlx-lm-lora==5.10.2")),
    "soup": Contender(worker="soup", packages=("datasets",), packages_alone=("soup-cli==0.77.0",)),
    "mlx-tune": Contender(
        worker="mlx_tune",
        packages=("datasets", "Pillow", "requests"),
        packages_alone=("mlx-tune==0.6.0", "mlx-embeddings==0.1.0", "mlx-vlm==0.7.10"),
    ),
    "trl": Contender(worker="trl", mlx=False, packages=("torch", "trl==1.16.0", "peft==0.21.2", "datasets")),
}
"""Other trainers by name. Their dependencies disagree with each other's, hence the packages installed alone."""

DEFAULT_PEERS = ("mlx-lm-sft", "mlx-lm-lora", "soup")


def chosen(names: Sequence[str], table: dict[str, Contender], option: str) -> dict[str, Contender]:
    """The contenders of those names. Raises UsageError that lists what there is."""
    if unknown := [name for name in names if name not in table]:
        raise UsageError(f"{option}: no {', '.join(unknown)}", f"there are {', '.join(table)}")
    return {name: table[name] for name in names}


def install(names: Sequence[str], folder: Path) -> None:
    """Makes a virtual environment in `folder` with the peers of those names. Raises CalledProcessError."""
    peers = chosen(names, PEERS, "--peers")
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    backend = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
    packages = {backend} | {package for peer in peers.values() for package in peer.packages}
    subprocess.run([*pip, *sorted(packages)], check=True)
    if alone := sorted({package for peer in peers.values() for package in peer.packages_alone}):
        subprocess.run([*pip, "--no-deps", *alone], check=True)
