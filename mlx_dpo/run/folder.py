"""What lies where in a run folder, and the lock on it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlx_dpo.errors import RunError
from mlx_dpo.files import PART, remove, written_whole

LOCK = ".lock"


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the resolved settings, enough to run again
        # one JSON object a report or evaluation: the one source for pictures, trackers and pages
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"  # a line for each prompt that was answered at an evaluation

    def checkpoint(self, step: int) -> Path:
        """The folder of the whole training state after `step` optimizer steps."""
        return self.path / "checkpoints" / f"step-{step:07d}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that there are, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-[0-9]*"))

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def append_samples(self, samples: Iterable[dict[str, Any]]) -> None:
        """Adds lines to `samples.jsonl`."""
        with self.samples.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))

    def keep_metrics_until(self, step: int) -> None:
        """Drops the lines after `step`, samples too, which a resumed run will write again."""
        for file in (self.metrics, self.samples):
            if not file.exists():
                continue
            # by \n alone: an answer may hold other characters that Python takes for line ends
            lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line and _step(line) <= step]
            with written_whole(file) as beside:
                beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@contextmanager
def open_run(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """The run folder, made when missing and locked while the `with` lasts; a killed process leaves no lock.

    Raises:
        RunError: the folder holds something and `resume` is not asked for, or another process trains into it.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"--output {path} is a file", "name a folder")
    held = [entry.name for entry in path.iterdir() if entry.name != LOCK] if path.is_dir() else []
    if held and not resume:
        raise RunError(
            f"--output {path} exists and holds {', '.join(sorted(held)[:4])}{' …' if len(held) > 4 else ''}",
            "go on with it by --resume, or name another folder by --output",
        )
    if resume and not held:
        raise RunError(f"nothing to resume in {path}", "leave --resume out to start a new run")
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    # locked before anything is cleared away: what looks left over may be what another process is writing
    with (path / LOCK).open("a") as lock:
        if not _take(lock, path / LOCK):
            raise RunError(f"another process is training into {path}", "wait for it, or name another --output")
        for left in [*path.glob(f".*{PART}"), *(path / "checkpoints").glob(f".*{PART}")]:
            remove(left)  # what a killed process was writing
        try:
            yield RunFolder(path)
        finally:
            (path / LOCK).unlink(missing_ok=True)
            for folder in made:  # where nothing came of it: leave nothing behind
                if not any(folder.iterdir()):
                    folder.rmdir()


def _take(lock: IO[str], name: Path) -> bool:
    """Whether the lock was free and is ours now; not so if its last holder removed the file after we opened it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), name.stat())
    except OSError:
        return False


def _step(line: str) -> int:
    """The step that a line of metrics speaks of; a line cut short by a kill speaks of none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60
