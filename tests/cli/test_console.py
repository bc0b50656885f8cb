"""What is said to people stands on standard error, as it was written, and results on standard output."""

from __future__ import annotations

from importlib import import_module

import pytest

from mlx_dpo.errors import RunError
from support.command_line import call


def test_an_error_of_the_users_is_a_message_and_an_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("the disk is [full]", "remove something")

    monkeypatch.setattr(import_module("mlx_dpo.training.loop"), "train", fail)
    result = call("train", "--model", "m", "--data", "d", code=1)
    assert result.stdout == ""
    assert result.stderr.splitlines() == ["error: the disk is [full]", "remove something"]
