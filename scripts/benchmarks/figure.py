"""The growth of time and memory with a pair's lengths, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LINES = {"mlx_dpo": "-o", "plain": "-s"}


def draw(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Four pictures in one file: seconds a step and peak memory, by the prompt's length and by the answers'."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for column, length in enumerate(("prompt", "answer")):
        swept = [p for p in points if p["sweep"] == length and "error" not in p]
        for who, style in LINES.items():
            line = [p for p in swept if p["who"] == who]
            size = [p[length] for p in line]
            axes[0, column].plot(size, [p["step"] for p in line], style, label=who)
            axes[1, column].plot(size, [p["peak_mlx_mb"] for p in line], style, label=who)
            if who == "mlx_dpo":
                first = [p["step"] + p["trunk"] for p in line]
                axes[0, column].plot(size, first, "--o", label="mlx_dpo with the trunk pass")
        axes[0, column].set_ylabel("seconds a step of one pair")
        axes[1, column].set_ylabel("peak memory, MB")
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log", xlabel=f"tokens of the {length}")
            axis.grid(alpha=0.3, which="both")
            axis.legend()
    figure.savefig(file)
    pyplot.close(figure)
