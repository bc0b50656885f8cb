"""What the figures come down to: mlx_dpo beside the best of the others, in ratios of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.contenders import PEERS

Result = dict[str, Any]


def ratios(results: Mapping[str, Result], steps: int) -> dict[str, dict[str, float]]:
    """Ratios of mlx_dpo with all optimizations to the best MLX trainer of preferences, to mlx-lm's SFT step and to TRL.

    Each is named for what is compared and holds `wall` and `cpu`, or `memory`; below 1 is better. What was not
    measured is left out. The frozen blocks are computed before the first step, over the rows of `steps` steps: by the
    clock no step has it, and a run of one epoch pays a share of it for each.
    """
    ours = results.get("mlx_dpo", {"error": "not measured"})
    if "error" in ours:
        return {}
    good = {name: found for name, found in results.items() if name in PEERS and "error" not in found}
    rivals = {name: found for name, found in good.items() if PEERS[name].mlx and PEERS[name].prefers}
    compared: dict[str, dict[str, float]] = {}
    frozen_blocks = ours.get("frozen_blocks", {"wall": 0.0, "cpu": 0.0})
    taken = {
        "a step by the clock": ours["step"],
        "a step with its share of the frozen blocks": {
            kind: seconds + frozen_blocks[kind] / steps for kind, seconds in ours["step"].items()
        },
    }
    others = {"best MLX peer": rivals} | {
        name: {peer: good[peer]}
        for peer, name in {"mlx-lm-sft": "mlx-lm's SFT step", "trl": "TRL"}.items()
        if peer in good
    }
    for what, seconds in taken.items():
        for name, there in others.items():
            compared[f"{what} / {name}"] = _times(seconds, there, "step")
    if "reference" in ours:
        before = {kind: seconds + frozen_blocks[kind] for kind, seconds in ours["reference"].items()}
        first = {name: found for name, found in rivals.items() if "reference" in found}
        compared["frozen blocks and reference pass / best MLX peer's reference pass"] = _times(
            before, first, "reference"
        )
    for kind in ("peak_mlx_mb", "peak_rss_mb"):
        if rivals:
            best = min(found[kind] for found in rivals.values())
            compared[f"{kind} / best MLX peer"] = {"memory": ours[kind] / best}
    return {name: ratio for name, ratio in compared.items() if ratio}


def _times(ours: Mapping[str, float], others: Mapping[str, Result], what: str) -> dict[str, float]:
    """Ratios of wall and of CPU seconds, each to the lowest of the others."""
    if not others:
        return {}
    return {kind: seconds / min(found[what][kind] for found in others.values()) for kind, seconds in ours.items()}
