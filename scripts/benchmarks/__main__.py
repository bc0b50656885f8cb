"""The command line of the measurements: `./scripts/bench --help`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import contenders, figure, page
from benchmarks.contenders import OURS, PEERS, Contender
from benchmarks.lengths import lengths
from benchmarks.machine import describe
from benchmarks.ratios import ratios
from benchmarks.rounds import ROOT, measure, run_worker
from benchmarks.workloads import Workload, batches, workloads
from mlx_dpo.errors import MlxDpoError
from mlx_dpo.logprobs.scorer import OPTIMIZATIONS
from mlx_dpo.planning.machine import this_machine

SHARED = ROOT.parent / "shared" / "data"
SHIPPED = ROOT / "mlx_dpo" / "demo" / "data"
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[list[str], int]] = {"top16": (["q_proj", "v_proj"], 16), "all": (EVERY_LINEAR, 10**6)}
"""Modules and number of top blocks by name."""

GROWTH = {"prompt": (64, 128, 256, 512, 1024, 2048, 4096), "answer": (32, 64, 128, 256, 512, 1024)}
BESIDE = {"prompt": 128, "answer": 64}
"""Lengths of a growth's points, and the length that the other side has meanwhile."""

VOCABULARY, LONG_ANSWER = 262_144, 512

Settings = argparse.Namespace


def main() -> None:
    """Measures what was asked for; each part adds to one file of results."""
    settings = _arguments()
    try:
        if settings.install_peers:
            contenders.install(settings.peers, settings.install_peers)
            return
        results = _read(settings.out)
        results["machine"] = describe()
        for part in settings.parts:
            PARTS[part](settings, results)
            _keep(settings, results)
    except MlxDpoError as error:
        sys.exit(f"{error.message}\n{error.remedy}")


def measure_steps(settings: Settings, results: dict[str, Any]) -> None:
    """Steps of every contender on every workload with either adapter."""
    who = contenders.chosen(settings.ours, OURS, "--ours") | contenders.chosen(settings.peers, PEERS, "--peers")
    for name, workload, adapter in _cases(settings):
        spec = _spec(settings, workload, adapter)
        _say(f"{name}")
        taking_part = {
            label: contender
            for label, contender in who.items()
            if spec["top_layers"] < spec["blocks"] or contender.options.get("speed") != {"activation_cache": False}
        }  # with adapters on all blocks there are no frozen blocks to leave out
        found = measure(
            taking_part,
            spec,
            _python(settings),
            rounds=settings.rounds,
            logs=settings.out / "logs" / name.replace("/", "-"),
            say=_say,
        )
        limit = run_worker("limit", spec | {"options": {}}, sys.executable, settings.out / "logs" / "limit.log")
        section = {
            "lengths": [lengths(pair) for batch in spec["batches"] for pair in batch],
            "contenders": found,
            "ratios": ratios(found, settings.steps),
            "limit": limit.get("limit"),
            "flops_per_second": limit.get("flops_per_second"),
        }
        kept = {key: value for key, value in spec.items() if key != "batches"}
        kept |= {"rounds": settings.rounds, "steps": settings.steps}
        results.setdefault("steps", {})[name] = section
        results.setdefault("settings", {})[name] = kept
        _keep(settings, results)
        _say(page.steps_section(name, section, kept) + "\n")


def measure_profile(settings: Settings, results: dict[str, Any]) -> None:
    """Where the time of mlx_dpo's step goes, on every workload with either adapter."""
    for name, workload, adapter in _cases(settings):
        spec = _spec(settings, workload, adapter) | {"options": {}}
        logs = settings.out / "logs" / name.replace("/", "-")
        found = run_worker("profile", spec, sys.executable, logs / "profile.log")
        limit = run_worker("limit", spec, sys.executable, logs / "limit.log")
        if failed := found.get("error") or limit.get("error"):
            sys.exit(failed)
        found["limit"] = statistics.median(sum(step.values()) for step in limit["limit"]["later"])
        results.setdefault("profile", {})[name] = found
        _say(page.profile_section(name, found) + "\n")


def measure_growth(settings: Settings, results: dict[str, Any]) -> None:
    """Time and memory of one pair over the lengths of its prompt and of its answers, optimized and plain."""
    points: list[dict[str, Any]] = []
    for sweep, sizes in GROWTH.items():
        for size in sizes:
            for who, speed in {"mlx_dpo": {}, "plain": OPTIMIZATIONS}.items():
                point = BESIDE | {sweep: size, "sweep": sweep, "who": who}
                options = {"prompt": point["prompt"], "answer": point["answer"], "speed": speed}
                shorter = [p for p in points if (p["sweep"], p["who"]) == (sweep, who) and "error" not in p][-1:]
                found = too_large(shorter, size) or _synthetic(settings, options, f"growth-{sweep}-{size}-{who}")
                points.append(point | found)
                _say(f"  {point | found}")
    results["growth"] = points
    _say(page.growth_section(points) + "\n")


def too_large(shorter: list[dict[str, Any]], size: int) -> dict[str, str]:
    """Why a length is not run after a `shorter` one: what is not weights grows by its square at most."""
    if not shorter:
        return {}
    before = shorter[0]
    most = (before["peak_mlx_mb"] - before["model_mb"]) * (size / before[before["sweep"]]) ** 2 + before["model_mb"]
    return {"error": f"not run: it may take {most / 1024:.0f} GB"} if most * 2**20 > this_machine().usable else {}


def measure_vocabulary(settings: Settings, results: dict[str, Any]) -> None:
    """Peak memory of a tiny model with a large vocabulary, with and without the head in chunks."""
    options = {"prompt": BESIDE["prompt"], "answer": LONG_ANSWER, "vocabulary": VOCABULARY}
    runs = {
        who: _synthetic(settings, options | {"speed": speed}, f"vocabulary-{who.replace(' ', '-')}")
        for who, speed in {
            "mlx_dpo": {},
            "without chunked_logits": {"chunked_logits": False},
            "plain": OPTIMIZATIONS,
        }.items()
    }
    results["vocabulary"] = {"vocabulary": VOCABULARY, "answer": LONG_ANSWER, "runs": runs}
    _say(page.vocabulary_section(results["vocabulary"]) + "\n")


def write_page(settings: Settings, results: dict[str, Any]) -> None:
    """Puts what was measured, now and before, into the page, and the figure beside it."""
    page.write_page(settings.page, results)
    if "growth" in results:
        figure.draw(results["growth"], settings.page.with_name(page.FIGURE))


PARTS: dict[str, Callable[[Settings, dict[str, Any]], None]] = {
    "steps": measure_steps,
    "profile": measure_profile,
    "growth": measure_growth,
    "vocabulary": measure_vocabulary,
    "page": write_page,
}


def _synthetic(settings: Settings, options: dict[str, Any], label: str) -> dict[str, Any]:
    """Seconds of a step on one pair of stated lengths, and of its frozen blocks, and the memory they take."""
    keys, top = ADAPTERS["top16"]
    spec = _fixed(settings) | {"keys": keys, "top_layers": top, "batch": 1, "max_length": None, "options": options}
    found = run_worker("synthetic", spec, sys.executable, settings.out / "logs" / f"{label}.log")
    if "error" in found:
        return found
    step = min(taken["wall"] for taken in found["steps"][1:])
    counted = len(found["steps"]) - 1  # the first did not count
    frozen_blocks = found["stages"].get("frozen_blocks", {"wall": 0.0})["wall"] / counted
    return {"step": step, "frozen_blocks": frozen_blocks} | {
        name: found[name] for name in ("peak_mlx_mb", "peak_rss_mb", "model_mb")
    }


def _cases(settings: Settings) -> list[tuple[str, Workload, str]]:
    there = workloads(settings.data)
    return [
        (f"{name}/{adapter}", workload, adapter)
        for name, workload in there.items()
        if name in settings.workloads
        for adapter in settings.adapters
    ]


def _spec(settings: Settings, workload: Workload, adapter: str) -> dict[str, Any]:
    """What a worker is told."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    blocks = _blocks(Path(settings.model))
    keys, top = ADAPTERS[adapter]
    return _fixed(settings) | {
        "batches": batches(workload, settings.data, tokenizer, settings.steps),
        "batch": workload.batch,
        "max_length": workload.max_length,
        "keys": keys,
        "top_layers": min(top, blocks),
        "blocks": blocks,
    }


def _fixed(settings: Settings) -> dict[str, Any]:
    same = {"rank": 8, "scale": 2.0, "beta": 0.1, "learning_rate": 1e-5, "seed": 0}
    return same | {"model": settings.model, "warmup": settings.warmup, "checkpoint": settings.checkpoint}


def _blocks(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return int((config.get("text_config") or config)["num_hidden_layers"])


def _python(settings: Settings) -> Callable[[Contender], str]:
    """The interpreter that a contender runs in: this one for mlx_dpo, and for all where no other is named."""
    other = settings.peers_python or sys.executable
    return lambda contender: sys.executable if contender.ours else str(other)


def _read(out: Path) -> dict[str, Any]:
    file = out / "results.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _keep(settings: Settings, results: dict[str, Any]) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "results.json").write_text(json.dumps(results))


def _say(text: str) -> None:
    print(text, flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _arguments() -> Settings:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  scripts/bench --install-peers build/peers\n"
        "  scripts/bench steps profile --peers-python build/peers/bin/python\n"
        "  scripts/bench steps --workloads short --adapters top16 --steps 3 --warmup 1 --rounds 1 --peers ''\n"
        "  scripts/bench growth vocabulary page",
    )
    add = parser.add_argument
    add("parts", nargs="*", help=f"some of {', '.join(PARTS)}; by default steps. page writes all that is known")
    add("--model", help="model folder; by default the demo's, in float32")
    add("--data", type=Path, default=SHARED if SHARED.is_dir() else SHIPPED, help="folder of the rows")
    add("--workloads", type=_names, default=["short", "medium", "prompt-heavy"], help="some of them, by comma")
    add("--adapters", type=_names, default=list(ADAPTERS), help=f"some of {', '.join(ADAPTERS)}")
    add("--ours", type=_names, default=list(OURS), help=f"some of: {', '.join(OURS)}")
    add("--peers", type=_names, default=list(contenders.DEFAULT_PEERS), help=f"some of: {', '.join(PEERS)}")
    add("--peers-python", type=Path, help="interpreter of the environment that has them; by default this one")
    add("--install-peers", type=Path, metavar="FOLDER", help="only make that environment there")
    add("--steps", type=int, default=8, help="batches a pass (default 8)")
    add("--warmup", type=int, default=2, help="first steps of a pass that do not count (default 2)")
    add("--rounds", type=int, default=2, help="passes of each contender, in turns (default 2)")
    add("--checkpoint", action="store_true", help="with gradient checkpointing")
    add("--out", type=Path, default=ROOT / "build" / "bench", help="folder for results and logs")
    add("--page", type=Path, default=ROOT / "BENCHMARKS.md", help="page that the part `page` writes into")
    settings = parser.parse_args()
    settings.parts = settings.parts or ["steps"]
    if unknown := set(settings.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    if unknown := set(settings.adapters) - set(ADAPTERS):
        parser.error(f"--adapters: no {', '.join(unknown)}")
    if settings.warmup >= settings.steps:
        parser.error("--warmup must leave a step to count")
    if settings.model is None and not settings.install_peers:
        from mlx_dpo.demo.model import fetch_demo_model

        settings.model = str(fetch_demo_model("float32", progress=_say))
    elif settings.model:
        settings.model = str(Path(settings.model).expanduser().resolve())
    return settings


if __name__ == "__main__":
    main()
