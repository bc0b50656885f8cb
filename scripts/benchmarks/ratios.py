"""What the figures come down to: mlx_dpo beside the best of the others, in ratios of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.contenders import PEERS

Result = dict[str, Any]


def ratios(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """Ratios of mlx_dpo with all levers to the best MLX trainer of preferences, to mlx-lm's SFT step and to TRL.

    Each is named for what is compared and holds `wall` and `cpu`, or `memory`; below 1 is better. What was not
    measured is left out.
    """
    ours = results.get("mlx_dpo", {"error": "not measured"})
    if "error" in ours:
        return {}
    good = {name: found for name, found in results.items() if name in PEERS and "error" not in found}
    rivals = {name: found for name, found in good.items() if PEERS[name].mlx and PEERS[name].prefers}
    compared: dict[str, dict[str, float]] = {}
    for epoch in ("first", "later"):
        if epoch not in ours:
            continue
        compared[f"step, {epoch} epoch / best MLX peer"] = _times(ours[epoch], rivals, lambda found: found["first"])
        for name, peer in {"mlx-lm-sft": "mlx-lm's SFT step", "trl": "TRL"}.items():
            there = {name: good[name]} if name in good else {}
            compared[f"step, {epoch} epoch / {peer}"] = _times(ours[epoch], there, lambda found: found["first"])
    if "reference" in ours:
        with_pass = {name: found for name, found in rivals.items() if "reference" in found}
        compared["reference pass / best MLX peer"] = _times(
            ours["reference"], with_pass, lambda found: found["reference"]
        )
    for kind in ("peak_mlx_mb", "peak_rss_mb"):
        if rivals:
            best = min(found[kind] for found in rivals.values())
            compared[f"{kind} / best MLX peer"] = {"memory": ours[kind] / best}
    return {name: ratio for name, ratio in compared.items() if ratio}


def _times(
    ours: Mapping[str, float], others: Mapping[str, Result], seconds: Callable[[Result], Mapping[str, float]]
) -> dict[str, float]:
    """Ratios of wall and of CPU seconds, each to the lowest of the others."""
    if not others:
        return {}
    return {kind: ours[kind] / min(seconds(found)[kind] for found in others.values()) for kind in ("wall", "cpu")}
