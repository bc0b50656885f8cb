"""`./scripts/mac-check`: measures this machine section by section within the minutes given, and writes it down.

JSON and page are written anew after each section, so that whatever ends it early leaves what was found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from maccheck.page import page, said


def main() -> None:
    """Runs the sections that were asked for; or, called by itself, one of them."""
    asked = _parser().parse_args()
    if asked.section:
        from maccheck.sections import SECTIONS, Job

        found = SECTIONS[asked.section](Job(asked.model[0], asked.dtype[0], asked.display_minutes))
        asked.result.write_text(json.dumps(found))
        return
    models, dtypes, names, once = _defaults(asked)
    asked.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * asked.minutes
    results: list[dict[str, Any]] = []
    jobs = [(name, models[0], dtypes[0]) for name in names if name in once]
    jobs += [(name, model, dtype) for model in models for dtype in dtypes for name in names if name not in once]
    for name, model, dtype in jobs:
        print(f"{name}, {model}, {dtype} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        found = _in_own_process(name, model, dtype, ends, asked.display_minutes)
        known_as = Path(model).name if Path(model).is_dir() else model  # a path tells of its owner
        results.append(
            {"section": name, "model": known_as, "dtype": dtype, "seconds": time.monotonic() - began} | found
        )
        (asked.output / "mac-check.json").write_text(json.dumps(results, indent=1) + "\n")
        (asked.output / "mac-check.html").write_text(page(results))
    print("\n".join(said(results)))
    print(f"Written to {asked.output}: mac-check.json, mac-check.html. Please send both.")


def _in_own_process(name: str, model: str, dtype: str, ends: float, display_minutes: float) -> dict[str, Any]:
    left = ends - time.monotonic() + (60 * display_minutes if name == "display" else 0)
    if left < 5:
        return {"error": "not reached in the minutes given (--minutes)"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "maccheck", "--section", name, "--model", model, "--dtype", dtype]
        command += ["--result", str(result), "--display-minutes", str(display_minutes)]
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            return {"error": "stopped: it took longer than the minutes that were left (--minutes)"}
        if done.returncode or not result.is_file():
            return {"error": f"exit status {done.returncode}: " + "\n".join(done.stderr.strip().splitlines()[-6:])}
        return {"found": json.loads(result.read_text())}


def _defaults(asked: argparse.Namespace) -> tuple[list[str], list[str], list[str], tuple[str, ...]]:
    from maccheck.sections import ONCE, SECTIONS, mx
    from mlx_dpo.demo.model import fetch_demo_model

    on_cpu = mx.default_device() == mx.cpu  # whose 16-bit products are some twenty times slower
    models = asked.model or [str(fetch_demo_model("float32" if on_cpu else "4bit"))]
    dtypes = asked.dtype or (["float32"] if on_cpu else ["bfloat16", "float16"])
    names = asked.only or [name for name in SECTIONS if name != "display" or asked.display_minutes]
    return models, dtypes, names, ONCE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./scripts/mac-check", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="folder or Hub name, may be repeated; the demo's small one")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float16", "float32"], help="may be repeated")
    parser.add_argument("--minutes", type=float, default=15, help="for all of it but --display-minutes (15)")
    parser.add_argument("--display-minutes", type=float, default=0, help="of steps with the display on; 20 tell much")
    parser.add_argument("--only", action="append", help="a section, may be repeated: machine, hybrid, exactness, …")
    parser.add_argument("--output", type=Path, default=Path("mac-check"), help="folder for JSON and page (mac-check)")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
