"""`mlx-dpo score`: a line a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command_line import call


def test_score_gives_a_line_a_row_whose_margin_is_what_it_is_made_of(run: Path, tiny_llama: Path) -> None:
    asked = ("score", "--model", tiny_llama, "--adapter", run, "--data", run.parent / "pairs.jsonl", "--beta", "0.5")
    rows = [json.loads(line) for line in call(*asked, "--json").stdout.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["chosen_reward"] == pytest.approx(0.5 * (row["chosen_logps"] - row["ref_chosen_logps"]), abs=1e-5)
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)
    table = call(*asked, "--quiet").stdout.splitlines()
    assert table[0].split("\t") == list(rows[0])
    assert len(table) == 7


def test_rows_that_are_piped_in_are_scored(run: Path, tiny_llama: Path) -> None:
    rows = (run.parent / "pairs.jsonl").read_text()
    assert len(call("score", "--model", tiny_llama, "--data", "-", "--json", piped=rows).stdout.splitlines()) == 6
