"""Runs contenders, each in its own process, in alternating rounds, and sums up what they saw."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def run_worker(worker: str, spec: Mapping[str, Any], python: str, log: Path, *, mlx: bool = True) -> Result:
    """Runs one worker to its end; what it wrote, or `error` with the end of what it said.

    It finds an empty reference store, unless `spec` has a `folder` of earlier workers: then theirs.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(spec.get("folder", temporary))
        (folder / "spec.json").write_text(json.dumps({"folder": str(folder)} | dict(spec)))
        out = folder / f"{worker}.json"
        out.unlink(missing_ok=True)  # of an earlier worker in the same folder
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "scripts", ROOT))),
            "MLX_DPO_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not mlx:
            environment.pop("LD_PRELOAD", None)  # PyTorch brings a BLAS of its own
        command = [python, "-m", f"benchmarks.workers.{worker}", str(folder / "spec.json"), str(out)]
        with log.open("w") as said:
            code = subprocess.run(
                command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT, check=False
            ).returncode
        if not out.exists():
            tail = log.read_text(errors="replace").strip().splitlines()[-3:]
            return {"error": f"exit status {code}: " + " / ".join(tail)}
        found: Result = json.loads(out.read_text())
        return found


def run_contender(contender: Contender, spec: Mapping[str, Any], python: str, log: Path) -> Result:
    """One pass of a contender over the spec's batches.

    mlx_dpo takes two processes: in the first the reference pass is timed, the second finds it stored, as every run but
    the first does.
    """
    spec = dict(spec) | {"options": contender.options}
    if not contender.ours:
        return run_worker(contender.worker, spec, python, log, mlx=contender.mlx)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        spec["folder"] = folder
        first = spec | {"options": contender.options | {"part": "reference"}}
        reference = run_worker(contender.worker, first, python, log.with_suffix(".reference.log"))
        if "error" in reference:
            return reference
        found = run_worker(contender.worker, spec, python, log)
    if "error" not in found:
        found["stages"] |= reference["stages"]
        for name in ("peak_mlx_mb", "peak_rss_mb"):
            found[name] = max(found[name], reference[name])
    return found


def measure(
    contenders: Mapping[str, Contender],
    spec: Mapping[str, Any],
    pythons: Callable[[Contender], str],
    *,
    rounds: int,
    logs: Path,
    say: Callable[[str], None],
) -> dict[str, Result]:
    """Every contender `rounds` times, one after the other and then all again, summed up."""
    passes: dict[str, list[Result]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, contender in contenders.items():
            began = time.perf_counter()
            log = logs / f"{name.replace(' ', '-')}.{turn}.log"
            found = run_contender(contender, spec, pythons(contender), log)
            passes[name].append(found)
            seconds = f"{time.perf_counter() - began:.0f} s"
            say(f"  round {turn + 1}, {name}: {found.get('error', seconds)}")
    return {name: summary(found, spec["warmup"]) for name, found in passes.items()}


def summary(passes: Sequence[Result], warmup: int) -> Result:
    """The medians over all passes: seconds of a `step`, of what comes before (`frozen_blocks`, `reference`), memory.

    The first `warmup` steps of each pass are dropped. Of passes that all failed the error of one is given.
    """
    good = [found for found in passes if "error" not in found]
    if not good:
        return {"error": passes[0]["error"]}
    steps = [step for found in good for step in found["steps"][warmup:]]
    rows: Result = {"step": _medians(steps)}
    for stage in ("frozen_blocks", "reference"):
        if taken := [found["stages"][stage] for found in good if stage in found["stages"]]:
            rows[stage] = _medians(taken)
    for name in ("peak_mlx_mb", "peak_rss_mb"):
        seen = [found[name] for found in good if found[name] is not None]
        rows[name] = statistics.median(seen) if seen else None
    rows["first_loss"] = good[0]["steps"][0].get("loss")
    rows["warnings"] = good[0].get("warnings", [])
    rows["passes"] = good
    return rows


def _medians(taken: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: statistics.median(seconds[kind] for seconds in taken) for kind in ("wall", "cpu")}
