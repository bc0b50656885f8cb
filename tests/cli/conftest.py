"""A training that is only recorded, and one that was done: what the tests of several verbs begin with."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_dpo.config import RunConfig
from support.command_line import ROOT, pairs


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, bool]]:
    """What `train` was called with, instead of training."""
    calls = []

    def train(config: RunConfig, *, resume: bool, on_event: object) -> SimpleNamespace:
        calls.append((config, resume))
        return SimpleNamespace(
            output=Path(config.train.output), steps=3, total_steps=3, interrupted=False, evaluations=[], best_step=3,
            stopped_early=False,
        )  # fmt: skip

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", train)
    return calls


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run folder that `train` made, with what it said."""
    folder = tmp_path_factory.mktemp("way")
    data = pairs(folder / "pairs.jsonl")
    environment = os.environ | {"MLX_DPO_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "mlx_dpo", "train", "--model", tiny_llama, "--data", data]
    command += ["--output", folder / "run", "--num-layers", "-1", "--batch-size", "2", "--learning-rate", "1e-2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'run'}\n"
    assert "step 1 of 3: loss 0.6931" in done.stderr
    assert "held out, after step 3: " in done.stderr
    return folder / "run"
