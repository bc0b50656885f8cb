"""The figures as Markdown: tables for the terminal, and their place in a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.machine import in_words

BEGIN, END = "<!-- figures: written by ./scripts/bench -->", "<!-- end of figures -->"
FIGURE = "benchmarks-growth.svg"
Result = dict[str, Any]


def write_page(page: Path, results: Mapping[str, Any]) -> None:
    """Puts the tables of all that was measured between the marks of the page."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{figures(results)}\n{END}{after}")


def figures(results: Mapping[str, Any]) -> str:
    """All tables of a file of results."""
    sections = [f"Measured on: {in_words(results['machine'])}."]
    settings = results.get("settings", {})
    sections += [steps_section(name, found, settings[name]) for name, found in results.get("steps", {}).items()]
    if "profile" in results:
        sections += [profile_section(name, found) for name, found in results["profile"].items()]
    if "vocabulary" in results:
        sections.append(vocabulary_section(results["vocabulary"]))
    if "growth" in results:
        sections.append(growth_section(results["growth"]))
    return "\n\n".join(sections)


def steps_section(name: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A workload: seconds of a step, memory, reference; then the ratios, and how far it is to the counted limit."""
    prompt, *answers = (fmean(column) for column in zip(*found["lengths"], strict=True))
    head = (
        f"### {name}\n\n{settings['steps']} steps of {settings['batch']} pairs × {settings['rounds']} rounds, medians "
        f"without the first {settings['warmup']} of each; on average {prompt:.0f} prompt tokens, "
        f"{fmean(answers):.0f} an answer. Adapter: rank {settings['rank']} on {', '.join(settings['keys'])} of the top "
        f"{settings['top_layers']} of {settings['blocks']} blocks."
    )
    columns = [
        "",
        "s a step",
        "CPU s",
        "peak MB, MLX",
        "peak MB, process",
        "frozen blocks, s a pair",
        "reference, s a pair",
    ]
    columns.append("first loss")
    rows = len(found["lengths"])
    lines = [_step_row(who, result, rows) for who, result in found["contenders"].items()]
    limit = found.get("limit")
    if limit:
        seconds = {epoch: median(sum(step.values()) for step in limit[epoch]) for epoch in limit}
        lines.append(["counted limit", _s(seconds["first"]), *[""] * 6])
        lines.append(["counted limit, activations known", _s(seconds["later"]), *[""] * 6])
    kinds = ["wall", "cpu", "memory"]
    compared = [
        [what, *(_s(ratio[kind]) if kind in ratio else "" for kind in kinds)] for what, ratio in found["ratios"].items()
    ]
    tables = [head, table(columns, lines)]
    if compared:
        tables.append(table(["mlx_dpo / …", "wall", "CPU", "memory"], compared))
    return "\n\n".join(tables)


def profile_section(name: str, found: Mapping[str, Any]) -> str:
    """Where a step's time goes."""
    whole, limit = found["whole"], found["limit"]
    rows = [[part, _s(seconds), f"{seconds / whole:.0%}"] for part, seconds in found["parts"].items()]
    rows.append(["the whole step", _s(whole), "100%"])
    rows.append(["its counted limit", _s(limit), f"{limit / whole:.0%}"])
    counted = ", ".join(f"{count} {name}" for name, count in list(found["operations"].items())[:12])
    return "\n\n".join(
        [
            f"### Where a step's time goes: {name}, activations known",
            table(["part", "s", "share"], rows),
            f"Describing the graph in Python takes {_s(found['described'])} s of these. Operations: {counted}.",
        ]
    )


def vocabulary_section(found: Mapping[str, Any]) -> str:
    """Peak memory under a large vocabulary."""
    rows = [
        [who, result["error"], ""] if "error" in result else [who, f"{result['peak_mlx_mb']:.0f}", _s(result["step"])]
        for who, result in found["runs"].items()
    ]
    head = f"### {found['vocabulary']:,} tokens of vocabulary, two answers of {found['answer']} tokens"
    return f"{head}\n\n" + table(["", "peak MB, MLX", "s a step"], rows)


def growth_section(points: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory of a pair by length."""
    columns = ["prompt", "answer", "", "a step, s", "its frozen blocks, once, s", "peak MB, MLX"]
    rows = [
        [
            str(point["prompt"]),
            str(point["answer"]),
            point["who"],
            *(
                [point["error"], "", ""]
                if "error" in point
                else [_s(point["step"]), _s(point["frozen_blocks"]), f"{point['peak_mlx_mb']:.0f}"]
            ),
        ]
        for point in points
    ]
    picture = f"![Seconds and memory of a step by the lengths of a pair]({FIGURE})"
    return "\n\n".join(["### Growth: one pair by its lengths", picture, table(columns, rows)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _step_row(who: str, result: Result, rows: int) -> list[str]:
    if "error" in result:
        return [who, f"failed: {result['error'][:120]}", *[""] * 6]
    before = [result.get(stage) for stage in ("frozen_blocks", "reference")]
    seconds = [result["step"]["wall"], result["step"]["cpu"]]
    memory = [result["peak_mlx_mb"], result["peak_rss_mb"]]
    loss = result["first_loss"]
    return [
        who,
        *map(_s, seconds),
        *("" if mb is None else f"{mb:.0f}" for mb in memory),
        *(_s(stage["wall"] / rows) if stage else "" for stage in before),
        "" if loss is None else f"{loss:.4f}",
    ]


def _s(seconds: float | None) -> str:
    """Three significant digits."""
    if seconds is None:
        return ""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}"
