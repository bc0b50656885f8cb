"""HH dialogues and ShareGPT's turns become messages, and no text gets lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_dpo.data.formats import parse_row
from mlx_dpo.data.records import PreferencePair
from mlx_dpo.errors import DataError
from support.rows import ASK, json_lines


@pytest.mark.parametrize("name", ["hh_train", "hh_heldout"])
def test_hh_dialogues_are_the_messages_that_the_data_names(shared_data: Path, name: str) -> None:
    dialogues, messages = json_lines(shared_data / f"{name}.jsonl"), json_lines(shared_data / f"{name}.messages.jsonl")
    assert len(dialogues) == len(messages)
    for dialogue, row in zip(dialogues, messages, strict=True):
        record = parse_row({**dialogue, "id": row["id"]}, "1")
        assert record == parse_row(row, "1")
        assert [list(text) for text in (record.prompt, *record.completions)] == [
            row["prompt"],
            row["chosen"],
            row["rejected"],
        ]


def test_a_role_marker_inside_a_turn_is_text() -> None:
    opening = "\n\nHuman: What is 1 + 1?\n\nAssistant: "
    record = parse_row({"chosen": f"{opening}Human: hm", "rejected": f"{opening}No. Human: why?"}, "1")
    assert [text[0]["content"] for text in record.completions] == ["Human: hm", "No. Human: why?"]
    assert record.prompt == (ASK,)


def test_two_turns_of_one_role_become_one_so_that_roles_alternate() -> None:
    opening = "\n\nHuman: What is 1 + 1?\n\nAssistant:"
    record = parse_row({"chosen": f"{opening} Here:\n\nAssistant:  Two.", "rejected": f"{opening} "}, "1")
    assert record.completions == (
        ({"role": "assistant", "content": "Here:\n\nTwo."},),
        ({"role": "assistant", "content": ""},),
    )


def test_every_odd_row_is_a_pair_of_single_answers_and_loses_no_text(shared_data: Path) -> None:
    for row in json_lines(shared_data / "odd.jsonl"):
        record = parse_row(row, "1")
        assert isinstance(record, PreferencePair)
        assert [[m["role"] for m in answer] for answer in record.completions] == [["assistant"]] * 2, row["tag"]
        if row["format"] == "messages":
            assert record.completions == (tuple(row["chosen"]), tuple(row["rejected"]))
            assert record.tools == (tuple(row["tools"]) if "tools" in row else None)
        else:
            for key, answer in zip(("chosen", "rejected"), record.completions, strict=True):
                said = "".join(m["content"] for m in (*record.prompt, *answer))
                unmarked = row[key].replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
                assert "".join(said.split()) == "".join(unmarked.split()), row["tag"]


def test_a_sharegpt_tool_call_is_a_message_with_tool_calls() -> None:
    conversations = [
        {"from": "human", "value": "What is 1 + 1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    record = parse_row({"conversations": conversations, "chosen": "Two.", "rejected": "Three."}, "1")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
    assert record.prompt[1:] == (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    )


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_messages_reasoning_stays_beside_what_it_says(key: str, empty: str | None) -> None:
    said = {"role": "assistant", "content": "Two.", key: "1 and 1 …"}
    record = parse_row({"prompt": [ASK], "chosen": [said], "rejected": [{**said, key: empty}]}, "1")
    assert record.completions == ((said,), ({"role": "assistant", "content": "Two."},))
    with pytest.raises(DataError, match=f'"chosen.*{key}" is'):
        parse_row({"prompt": [ASK], "chosen": [{**said, key: 7}], "rejected": [said]}, "1")
