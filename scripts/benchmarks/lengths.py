"""The lengths of a pair, in tokens: all that a count needs to know of it."""

from __future__ import annotations

from typing import Any

Lengths = tuple[int, int, int]
"""Tokens of the prompt, of the chosen and of the rejected answer."""


def lengths(pair: dict[str, Any]) -> Lengths:
    """The lengths of a pair whose tokens are known."""
    return len(pair["prompt_ids"]), len(pair["chosen_ids"]), len(pair["rejected_ids"])
