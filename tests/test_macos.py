"""On macOS the driver, MLX and the machine's sleep are told what a run needs, and elsewhere nothing changes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest

from mlx_dpo import macos
from mlx_dpo.macos import kept_awake, set_environment, told
from support.command_line import ROOT


def test_what_the_user_has_not_set_is_set() -> None:
    mac: dict[str, str] = {}
    set_environment(mac, "darwin")
    assert mac == {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1", "MLX_ENABLE_TF32": "0"}
    own = {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "0", "MLX_ENABLE_TF32": "1"}
    set_environment(chosen := dict(own), "darwin")
    assert chosen == own


def test_elsewhere_only_float32_is_kept_whole() -> None:
    linux: dict[str, str] = {}
    set_environment(linux, "linux")
    assert linux == {"MLX_ENABLE_TF32": "0"}


def test_it_is_set_before_mlx_is_loaded() -> None:
    """By the program's entry itself: MLX reads it once, the driver when the process first uses the GPU."""
    code = (
        "import os, sys\n"
        "import mlx_dpo.cli.app as program\n"
        "program.app = lambda: print(os.environ['MLX_ENABLE_TF32'], 'mlx.core' in sys.modules)\n"
        "program.main()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert done.stdout == "0 False\n"


class Caffeinate:
    started: ClassVar[list[list[str]]] = []
    ended = 0

    def __init__(self, command: list[str]) -> None:
        Caffeinate.started.append(command)

    def __enter__(self) -> Caffeinate:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def terminate(self) -> None:
        Caffeinate.ended += 1


@pytest.fixture
def caffeinate(monkeypatch: pytest.MonkeyPatch) -> Any:
    Caffeinate.started, Caffeinate.ended = [], 0
    monkeypatch.setattr(macos.subprocess, "Popen", Caffeinate)
    return Caffeinate


def test_a_mac_is_kept_awake_as_long_as_it_trains(caffeinate: Any) -> None:
    """With this process's id, so that it ends with it even where it is killed."""
    with pytest.raises(ZeroDivisionError), kept_awake(True, "darwin"):
        assert caffeinate.started == [["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]]
        assert caffeinate.ended == 0
        raise ZeroDivisionError
    assert caffeinate.ended == 1


@pytest.mark.parametrize(("wanted", "platform"), [(False, "darwin"), (True, "linux")])
def test_not_where_it_is_not_wanted_or_not_macos(wanted: bool, platform: str, caffeinate: Any) -> None:
    with kept_awake(wanted, platform):
        pass
    assert caffeinate.started == []


def test_what_was_told_is_said_in_a_few_words_and_only_what_is_so() -> None:
    environ: dict[str, str] = {}
    set_environment(environ, "darwin")
    assert told(True, environ, "darwin") == "display may wait for the GPU, TF32 off, kept awake (caffeinate)"
    assert told(False, {"MLX_ENABLE_TF32": "0"}, "darwin") == "TF32 off"
    assert told(True, environ, "linux") == ""
