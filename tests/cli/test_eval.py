"""`mlx-dpo eval`: the summary for people and for programs, of files and of what is piped in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command_line import call


def test_eval_says_how_many_pairs_are_ranked_right(run: Path, tiny_llama: Path) -> None:
    asked = ("eval", "--model", tiny_llama, "--adapter", run, "--data", run.parent / "pairs.jsonl")
    found = json.loads(call(*asked, "--json").stdout)
    assert found["rows"] == 6
    assert found["accuracy_low"] <= found["rewards/accuracies"] <= found["accuracy_high"]
    assert "rewards/accuracies" in call(*asked).stdout


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        ({"prompt": "p{}", "completion": " c{}", "label": True}, "sft"),
        ({"prompt": "p{}", "completion": " c{}", "label": True}, "kto"),
        ({"prompt": "p{}", "responses": [" a", " b"], "ranks": [1, 2]}, "sigmoid"),
        ({"prompt": "p{}", "chosen": " c{}", "rejected": " r{}"}, "sft"),
    ],
)
def test_rows_that_are_piped_in_are_judged_like_those_of_a_file(
    tiny_llama: Path, tmp_path: Path, row: dict[str, object], loss: str
) -> None:
    rows = "\n".join(json.dumps(row).replace("{}", str(n)) for n in range(6))
    (tmp_path / "rows.jsonl").write_text(rows)
    for split in ("auto", "valid"):
        asked = ("eval", "--model", tiny_llama, "--loss", loss, "--split", split, "--json", "--data")
        piped = json.loads(call(*asked, "-", piped=rows).stdout)
        assert piped["rows"] == (6 if split == "auto" else 1)
        named = json.loads(call(*asked, tmp_path / "rows.jsonl").stdout)
        assert piped == named | {"data": "-"}
