"""Run folders: never two trainings in one, never half a file, never somebody's work overwritten."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dpo.errors import RunError
from mlx_dpo.run.folder import RunFolder, open_run

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from mlx_dpo.run.folder import open_run
with open_run(Path(sys.argv[1]), resume=False):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_holds_something_is_refused_and_both_ways_out_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(RunError, match=r"--output .* exists and holds notes\.txt\n.*--resume.*--output"),
        open_run(tmp_path, resume=False),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"), open_run(tmp_path / "run", resume=False):
        pass


def test_an_empty_folder_and_a_missing_one_may_be_trained_into(tmp_path: Path) -> None:
    for path in (tmp_path / "empty", tmp_path / "deep" / "missing"):
        if path.name == "empty":
            path.mkdir()
        with open_run(path, resume=False) as run:
            run.append_metrics({"step": 1})
        assert [file.name for file in path.iterdir()] == ["metrics.jsonl"]


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to resume"), open_run(tmp_path / "run", resume=True):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_that_comes_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run", resume=False):
        _ = 1 / 0
    assert not (tmp_path / "run").exists()


def test_a_second_training_into_the_same_folder_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="another process is training"), open_run(folder, resume=False):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    with open_run(folder, resume=False) as run:
        assert run.path == folder


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    (tmp_path / ".config.yaml.77.part").write_text("half")
    half = run.checkpoint(50).with_name(".step-0000050.77.part")
    half.mkdir(parents=True)
    (half / "adapters.safetensors").write_text("half")
    with open_run(tmp_path, resume=True):
        assert not list(tmp_path.rglob("*.part"))


def test_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1000, 50, 100):
        run.checkpoint(step).mkdir(parents=True)
    assert run.checkpoints() == [run.checkpoint(50), run.checkpoint(100), run.checkpoint(1000)]


def test_a_resumed_run_drops_the_metrics_that_it_will_write_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 0.5})
    with run.metrics.open("a") as stream:
        stream.write('{"step": 4, "lo')  # a kill cut this line short
    run.append_samples({"step": step, "tuned": "a line\u2028break in an answer"} for step in (2, 3))
    run.keep_metrics_until(2)
    assert [json.loads(line)["step"] for line in run.samples.read_text().split("\n") if line] == [2]
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]
