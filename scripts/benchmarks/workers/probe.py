"""What every worker measures alike: seconds of each step and stage, peak memory, and the file they are written to."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Probe:
    """Wall and CPU seconds of this process (all its threads), step by step and stage by stage."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.stages: dict[str, dict[str, float]] = {}
        self._since = (time.perf_counter(), time.process_time())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what happens inside to the stage `name`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        known = self.stages.setdefault(name, {"wall": 0.0, "cpu": 0.0})
        known["wall"] += time.perf_counter() - wall
        known["cpu"] += time.process_time() - cpu

    def start(self) -> None:
        """The first step begins."""
        self._since = (time.perf_counter(), time.process_time())

    def step(self, **values: Any) -> None:
        """A step ended; `values` are what it reported. What this call costs belongs to no step."""
        wall, cpu = self._since
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        self.steps.append(taken | {name: float(value) for name, value in values.items()})
        self.start()


def read_spec() -> dict[str, Any]:
    """The spec that this worker was started with: the file named by the first argument."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return spec


def write_result(probe: Probe, *, peak_bytes: float | None = None, **more: Any) -> None:
    """Writes what was seen to the file named by the second argument. `peak_bytes` is MLX's own count."""
    found = {"steps": probe.steps, "stages": probe.stages, "peak_rss_mb": peak_rss_mb()} | more
    found["peak_mlx_mb"] = None if peak_bytes is None else peak_bytes / 2**20
    Path(sys.argv[2]).write_text(json.dumps(found))


def peak_rss_mb() -> float:
    """The most memory that this process has held, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def module_names(spec: dict[str, Any]) -> list[str]:
    """The adapted modules of a block as mlx-lm names them: `self_attn.q_proj`, `mlp.up_proj`."""
    return [
        ("self_attn." if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp.") + name for name in spec["keys"]
    ]
