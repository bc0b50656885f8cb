"""The machine that the figures belong to, in words."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system, what MLX computes on, versions, and how busy the machine is."""
    import mlx.core as mx

    device = mx.device_info()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": f"{mx.default_device()}, {device.get('device_name') or device.get('architecture')}",
        "blas": os.path.basename(os.environ.get("LD_PRELOAD", "").split(":")[0]) or "MLX's own",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "load": os.getloadavg()[0],
    }


def in_words(machine: dict[str, Any]) -> str:
    """One sentence of it."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['system']}; "
        f"MLX on {machine['device']}, BLAS: {machine['blas']}; {versions}, Python {machine['python']}"
    )


def _processor() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
