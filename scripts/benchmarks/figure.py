"""The growth of time and memory with a pair's lengths, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_dpo.errors import MlxDpoError

LINES = {"mlx_dpo": "-o", "plain": "-s"}


def draw(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Seconds a step and peak memory in one file, by the prompt's length and by the answers', as far as measured.

    Raises:
        MlxDpoError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MlxDpoError("the figure needs matplotlib", "pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps = [length for length in ("prompt", "answer") if any(point["sweep"] == length for point in points)]
    size_of_figure = (5 * len(sweeps), 7)
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=size_of_figure, layout="constrained", squeeze=False)
    for column, length in enumerate(sweeps):
        swept = [p for p in points if p["sweep"] == length and "error" not in p]
        for who, style in LINES.items():
            line = [p for p in swept if p["who"] == who]
            size = [p[length] for p in line]
            axes[0, column].plot(size, [p["step"] for p in line], style, label=who)
            axes[1, column].plot(size, [p["peak_mlx_mb"] for p in line], style, label=who)
            if who == "mlx_dpo":
                first = [p["step"] + p["frozen_blocks"] for p in line]
                axes[0, column].plot(size, first, "--o", label="mlx_dpo with the frozen blocks' pass")
        axes[0, column].set_ylabel("seconds a step of one pair")
        axes[1, column].set_ylabel("peak memory, MB")
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log", xlabel=f"tokens of the {length}")
            axis.grid(alpha=0.3, which="both")
            axis.legend()
    figure.savefig(file)
    pyplot.close(figure)
