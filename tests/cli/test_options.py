"""What a verb cannot do without is asked for by name."""

from __future__ import annotations

from support.command_line import call


def test_what_is_missing_is_named() -> None:
    assert "--model and --data must be given" in call("train", code=2).stderr
    assert "--adapter must be given" in call("fuse", "--model", "m", "--output", "o", code=2).stderr
