"""The program as a whole: its help, its version, and how it ends when something stops a verb."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_dpo.cli.app import VERBS, app
from support.command_line import ROOT, call, pairs


def test_without_arguments_there_is_help_that_opens_with_examples() -> None:
    shown = CliRunner().invoke(app, []).output
    assert 0 < shown.index("Examples") < shown.index("mlx-dpo demo") < shown.index("Commands")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    shown = call(verb, "--help").stdout
    assert "Examples" in shown
    assert f"mlx-dpo {verb}" in shown


def test_the_version_can_be_asked_for() -> None:
    assert call("--version").stdout == "mlx-dpo 0.1.0\n"


def test_a_mistyped_verb_or_flag_is_refused_with_a_suggestion() -> None:
    assert "'train'" in call("trian", code=2).stderr
    assert "--learning-rate" in call("train", "--lerning-rate", "1", code=2).stderr


def test_an_error_of_the_programs_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        call("train", "--model", "m", "--data", "d")


@pytest.mark.parametrize(
    ("said", "meaning", "remedy"),
    [
        (
            "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
            "(00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
            "kept the display waiting",
            "let the display sleep",
        ),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
            "not enough memory",
            "mlx-dpo plan",
        ),
        ("[malloc] Unable to allocate 123 bytes.", "not enough memory", "--auto"),
        ("[metal::malloc] Resource limit (499000) exceeded.", "more arrays at once", "prefill_step_size=0"),
        (
            "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8",
            "one array is larger",
            "--batch-size",
        ),
        (
            "[METAL] Command buffer execution failed: Discarded (victim of GPU error/recovery) "
            "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
            "the GPU failed",
            "run it again",
        ),
    ],
)
def test_a_gpu_that_gives_up_is_no_traceback_and_the_way_out_is_said(
    said: str, meaning: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(import_module("mlx_dpo.evaluation.evaluate"), "evaluate", fail)
    shown = " ".join(call("eval", "--model", "m", "--data", "d", code=1).stderr.split())
    assert shown.startswith("error: ")
    assert meaning in shown and said in shown and remedy in shown


def test_ctrl_c_ends_with_130_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", interrupt)
    assert call("train", "--model", "m", "--data", "d", code=130).stderr == "interrupted\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    data = pairs(tmp_path / "pairs.jsonl")
    command = [sys.executable, "-m", "mlx_dpo", "check", "--data", str(data)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(writing)
    assert "Traceback" not in done.stderr
