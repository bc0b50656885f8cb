"""What stands beside the answers arrives: prompt, system message, history, tools, template arguments, id."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_dpo.data.formats import parse_row
from mlx_dpo.data.records import PreferencePair
from support.rows import ASK, MORE, SYSTEM, THREE, TWO


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "Be brief.", "question": "What is 1 + 1?"}, (SYSTEM, ASK)),
        ({"system": "Be brief.", "prompt": "What is 1 + 1?"}, (SYSTEM, ASK)),
        ({"system_prompt": "Be brief.", "prompt": [ASK]}, (SYSTEM, ASK)),
        ({"system": "Not this one.", "prompt": [SYSTEM, ASK]}, (SYSTEM, ASK)),
        ({"instruction": "Add.", "input": "1 and 1"}, ({"role": "user", "content": "Add.\n\n1 and 1"},)),
        ({"question": "And 1 + 2?", "history": [["What is 1 + 1?", "Two."]]}, (ASK, TWO, MORE)),
        ({"prompt": []}, ()),
        (
            {"prompt": [ASK, {"role": "assistant", "content": "It is"}]},
            (ASK, {"role": "assistant", "content": "It is"}),
        ),
    ],
)
def test_what_belongs_to_the_prompt_stands_in_it(row: dict[str, Any], prompt: Any) -> None:
    answers = {"chosen": [TWO], "rejected": [THREE]}
    assert parse_row({**row, **answers}, "1") == PreferencePair(id="1", prompt=prompt, chosen=(TWO,), rejected=(THREE,))


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]', ['{"name": "add"}'], {"name": "add"}])
def test_tools_arrive_however_they_are_stored(tools: Any) -> None:
    row = {"prompt": [ASK], "chosen": [TWO], "rejected": [THREE], "tools": tools}
    assert parse_row(row, "1").tools == ({"name": "add"},)


def test_template_arguments_arrive_and_nulls_and_empty_tools_do_not() -> None:
    row = {"prompt": [ASK], "chosen": [TWO], "rejected": [THREE], "tools": []}
    record = parse_row({**row, "chat_template_kwargs": {"enable_thinking": False, "other": None}}, "1")
    assert (record.tools, record.chat_template_kwargs) == (None, {"enable_thinking": False})
    assert parse_row({**row, "chat_template_kwargs": '{"enable_thinking": false}'}, "1") == record


@pytest.mark.parametrize(("given", "kept"), [("a", "a"), (7, "7"), (None, "1"), ("", "1"), ([], "1")])
def test_rows_keep_their_id_or_get_their_number(given: Any, kept: str) -> None:
    assert parse_row({"id": given, "text": "t"}, "1").id == kept
