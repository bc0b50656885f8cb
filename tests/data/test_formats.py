"""Whatever shape a row has, the record says what the row said: prompt, answers, which is preferred."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mlx_dpo.data.formats import FORMATS, accepted_shapes, parse_prompt, parse_row
from mlx_dpo.data.records import Demonstration, PreferencePair, Ranking, Record, Unpaired
from mlx_dpo.errors import DataError
from support.rows import ASK, MORE, SYSTEM, THREE, TWO, json_lines

RIGHT = PreferencePair(id="1", prompt=(ASK,), chosen=(TWO,), rejected=(THREE,))


def refusal(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        parse_row(row, "1")
    return caught.value.message


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [TWO], "rejected": [THREE]},
        {"prompt": [ASK], "chosen": TWO, "rejected": THREE},
        {"prompt": ASK, "chosen": "Two.", "rejected": "Three."},
        {"prompt": [[ASK]], "chosen": [[TWO]], "rejected": [["Three."]]},
        {"prompt": "What is 1 + 1?", "chosen": [TWO], "rejected": [THREE]},
        {"chosen": [ASK, TWO], "rejected": [ASK, THREE]},
        {"prompt": "What is 1 + 1?", "chosen": [ASK, TWO], "rejected": [ASK, THREE]},
        {"prompt": [ASK], "chosen": [ASK, TWO], "rejected": [ASK, THREE]},
        {"prompt": None, "chosen": [ASK, TWO], "rejected": [ASK, THREE]},
        {"prompt": [ASK], "chosen": [ASK, TWO], "rejected": "Three."},
        {"prompt": "What is 1 + 1?", "messages": [ASK, TWO], "chosen": [ASK, TWO], "rejected": [ASK, THREE]},
        {"question": "What is 1 + 1?", "chosen": "Two.", "rejected": "Three."},
        {"system": "", "question": "What is 1 + 1?", "chosen": "Two.", "rejected": "Three."},
        {"system": None, "prompt": "What is 1 + 1?", "chosen": "Two.", "rejected": "Three."},
        {"instruction": "What is 1 + 1?", "input": "", "chosen": "Two.", "rejected": "Three."},
        {"messages": [ASK], "chosen": "Two.", "rejected": "Three."},
        {"prompt": "\n\nHuman: What is 1 + 1?\n\nAssistant:", "chosen": " Two.", "rejected": " Three."},
        {
            "chosen": "\n\nHuman: What is 1 + 1?\n\nAssistant: Two.",
            "rejected": "\n\nHuman: What is 1 + 1?\n\nAssistant: Three.",
        },
        {
            "conversations": [{"from": "human", "value": "What is 1 + 1?"}],
            "chosen": {"from": "gpt", "value": "Two."},
            "rejected": {"from": "gpt", "value": "Three."},
        },
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]}
            ],
            "chosen": [{**TWO, "name": None, "tool_calls": None}],
            "rejected": {"text": "Three."},
        },
    ],
)
def test_one_preference_in_many_shapes_is_one_record(row: dict[str, Any]) -> None:
    assert parse_row(row, "1") == RIGHT


def test_strings_stay_strings_so_that_a_base_model_can_be_trained() -> None:
    row = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3", "source": "nobody", "score_chosen": 9.0}
    assert parse_row(row, "1") == PreferencePair(id="1", prompt="1 + 1 =", chosen=" 2", rejected=" 3")


def test_a_system_message_inside_whole_conversations_belongs_to_the_prompt() -> None:
    row = {"prompt": "What is 1 + 1?", "chosen": [SYSTEM, ASK, TWO], "rejected": [SYSTEM, ASK, THREE]}
    for prompt in ("What is 1 + 1?", [ASK], [SYSTEM, ASK], [SYSTEM]):
        assert parse_row({**row, "prompt": prompt}, "1").prompt == (SYSTEM, ASK)


def test_messages_before_whole_conversations_are_their_opening() -> None:
    row = {"prompt": [SYSTEM], "chosen": [ASK, TWO], "rejected": [ASK, THREE]}
    assert parse_row(row, "1").prompt == (SYSTEM, ASK)
    assert '"chosen" is a whole conversation' in refusal({**row, "prompt": [MORE]})


def test_conversations_are_parted_at_the_first_message_that_differs() -> None:
    row = {"chosen": [ASK, TWO, MORE, THREE], "rejected": [ASK, THREE]}
    assert parse_row(row, "1") == PreferencePair(id="1", prompt=(ASK,), chosen=(TWO, MORE, THREE), rejected=(THREE,))


def test_of_identical_conversations_the_last_message_is_the_answer() -> None:
    both = [ASK, TWO, MORE, THREE]
    expected = PreferencePair(id="1", prompt=(ASK, TWO, MORE), chosen=(THREE,), rejected=(THREE,))
    assert parse_row({"chosen": both, "rejected": both}, "1") == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # the space goes to the answers
        ("It is four.", "It is five.", "It is f"),
        ("Yes", "Yes", "Ye"),
        ("Yes", "Yes, indeed", "Ye"),
        ("a", "b", ""),
        ("ends in a space ", "begins otherwise", ""),
        ("", "b", ""),
    ],
)
def test_strings_without_a_prompt_share_their_beginning(chosen: str, rejected: str, prompt: str) -> None:
    record = parse_row({"chosen": chosen, "rejected": rejected}, "1")
    cut = len(prompt)
    assert record == PreferencePair(id="1", prompt=prompt, chosen=chosen[cut:], rejected=rejected[cut:])


def test_implicit_prompts_are_parted_where_trl_parts_them(golden: Path) -> None:
    cases = json.loads((golden / "token_edge_cases.json").read_text())["cases"]
    tokenizer = Tokenizer.from_file(str(golden / "models/llama/tokenizer.json"))
    case = cases["standard_implicit_prompt"]
    record, theirs = parse_row(case["rows"][1], "1"), case["result"][1]  # here no token merges over the boundary
    texts = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (record.prompt, *record.completions), strict=True))
    assert {name: tokenizer.decode(theirs[name]) for name in texts} == texts

    case = cases["implicit_identical"]
    record, theirs = parse_row(case["rows"][0], "1"), case["result"][0]
    for name, (message,) in {"prompt_ids": record.prompt, "chosen_ids": record.completions[0]}.items():
        assert message["content"] in tokenizer.decode(theirs[name])
    assert record.completions[0][0]["content"] not in tokenizer.decode(theirs["prompt_ids"])


def test_rows_with_a_prompt_are_taken_as_they_are(golden: Path) -> None:
    for row in json_lines(golden / "data/standard.jsonl") + json_lines(golden / "data/conversational.jsonl"):
        record = parse_row(row, "1")
        given = tuple(
            text if isinstance(text, str) else tuple(text) for text in map(row.get, ("prompt", "chosen", "rejected"))
        )
        assert (record.prompt, *record.completions) == given


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "responses": ["c", "a", "b"], "ranks": [3, 1, 2]},
        {"prompt": "p", "responses": ["c", "a", "b"], "ranks": [3, 1, 2], "scores": [1.0, 3.0, 2.0]},
        {"prompt": "p", "responses": ["c", "a", "b"], "scores": [-1, 9.5, "4"]},
        {"prompt": "p", "generations": ["c", "a", "b"], "ratings": [1, 5, 3]},
        {"prompt": "p", "responses": ["c", "a", "b"], "errors": [0.9, 0.0, 0.3]},
        {"prompt": "p", "completions": [{"text": "c", "rank": 3}, {"text": "a", "rank": 1}, {"text": "b", "rank": 2}]},
        {
            "prompt": "p",
            "completions": [
                {"response": "c", "overall_score": 2.0},
                {"response": "a", "overall_score": 8.5},
                {"response": "b", "overall_score": 7.0},
            ],
        },
    ],
)
def test_rankings_stand_best_first_whatever_judges_them(row: dict[str, Any]) -> None:
    assert parse_row(row, "1") == Ranking(id="1", prompt="p", responses=("a", "b", "c"), ranks=(1, 2, 3))


def test_equal_scores_share_a_rank() -> None:
    record = parse_row({"prompt": [ASK], "responses": ["a", "b", "c"], "passed": [False, True, True]}, "1")
    assert [answer[0]["content"] for answer in record.completions] == ["b", "c", "a"]
    assert isinstance(record, Ranking)
    assert record.ranks == (1, 1, 3)


class Scalar:
    """A number of numpy's or pandas' kind."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("label", "meaning"),
    [
        *((good, True) for good in (True, 1, 1.0, "true", "True", "1", "yes", Scalar(1.0))),
        *((bad, False) for bad in (False, 0, 0.0, "false", "0", -1, "no", Scalar(False))),
    ],
)
def test_labels_are_read_as_people_write_them(label: Any, meaning: bool) -> None:
    row = {"prompt": "p", "completion": "c", "label": label}
    assert parse_row(row, "1") == Unpaired(id="1", prompt="p", completion="c", label=meaning)


def test_the_last_message_of_a_judged_conversation_is_what_is_judged() -> None:
    messages = [ASK, TWO, MORE, THREE]
    expected = Unpaired(id="1", prompt=(ASK, TWO, MORE), completion=(THREE,), label=True)
    assert parse_row({"messages": messages, "label": True}, "1") == expected
    sharegpt = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in messages]
    assert parse_row({"conversations": sharegpt, "kto_tag": True}, "1") == expected


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "p", "completion": "c"}, Demonstration(id="1", prompt="p", completion="c")),
        (
            {"prompt": "p", "completion": [TWO]},
            Demonstration(id="1", prompt=({**ASK, "content": "p"},), completion=(TWO,)),
        ),
        (
            {"instruction": "What is 1 + 1?", "input": "", "output": "Two."},
            Demonstration(id="1", prompt=(ASK,), completion=(TWO,)),
        ),
        ({"messages": [SYSTEM, ASK, TWO]}, Demonstration(id="1", prompt=(SYSTEM, ASK), completion=(TWO,))),
        (
            {"messages": [ASK, TWO], "system": "Be brief."},
            Demonstration(id="1", prompt=(SYSTEM, ASK), completion=(TWO,)),
        ),
        ({"prompt": "p", "references": ["c"]}, Demonstration(id="1", prompt="p", completion="c")),
        ({"prompt": "p", "continuation": "c", "label": "pos"}, Demonstration(id="1", prompt="p", completion="c")),
        ({"text": "t", "label": "pos"}, Demonstration(id="1", prompt="", completion="t")),
    ],
)
def test_rows_with_one_answer_are_demonstrations(row: dict[str, Any], record: Record) -> None:
    assert parse_row(row, "1") == record


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "chosen": "c"}, '"rejected" is missing'),
        ({"prompt": "p", "chosen": "c", "rejected": None}, '"rejected" is null'),
        ({"prompt": "p", "rejected": "c"}, '"chosen" is missing'),
        ({"prompt": "p", "chosen": "c", "rejected": float("nan")}, '"rejected" is null'),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, '"prompt" is null'),
        ({"prompt": None, "completion": "c"}, '"prompt" is null'),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, '"prompt" is int 3'),
        ({"prompt": "p", "chosen": True, "rejected": "r"}, '"chosen" is bool true'),
        (
            {"prompt": "p", "chosen": ["a", "b"], "rejected": "r"},
            "\"chosen\" is a list that begins with the string 'a'",
        ),
        ({"prompt": "p", "chosen": [], "rejected": [TWO]}, '"chosen" is an empty list'),
        ({"prompt": [ASK], "chosen": {"score": 1}, "rejected": "r"}, '"chosen" is an object with the keys score'),
        ({"prompt": [{"role": "user"}], "chosen": "c", "rejected": "r"}, '"prompt[0].content" is null'),
        ({"prompt": [{"content": "x"}], "chosen": "c", "rejected": "r"}, '"prompt[0].role" is null'),
        (
            {"prompt": [ASK], "chosen": [{"role": "assistant", "content": 5}], "rejected": "r"},
            '"chosen[0].content" is int 5',
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "c", "rejected": "r"}, "no text"),
        ({"chosen": [ASK, TWO], "rejected": [MORE, TWO]}, "share no prompt"),
        ({"prompt": [ASK], "chosen": [MORE, TWO], "rejected": "r"}, '"chosen" opens with a message of the role "user"'),
        ({"prompt": "p", "chosen": "\ud83d", "rejected": "r"}, "half a character at position 0"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tools": "[{"}, '"tools" is a string that is not JSON'),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tools": [1]}, '"tools" is a list that begins with int 1'),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "chat_template_kwargs": [1]},
            '"chat_template_kwargs" is a list',
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "system": 1, "question": "q"}, '"system" is int 1'),
        ({"question": "p", "chosen": "c", "rejected": "r", "history": ["a"]}, '"history" is a list'),
        ({"prompt": "p", "responses": ["a", "b"]}, 'neither "ranks" nor "scores"'),
        ({"prompt": "p", "responses": ["a"], "ranks": [1]}, "2 or more"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, '2 answers and "ranks" 1 values'),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]}, '"ranks[1]": None is not a finite number'),
        ({"prompt": "p", "responses": ["a", 1], "ranks": [1, 2]}, '"responses[1]" is int 1'),
        ({"responses": ["a", "b"], "ranks": [1, 2]}, '"prompt" is missing'),
        ({"prompt": "p", "completion": "c", "label": "pos"}, "\"label\" is the string 'pos'"),
        ({"prompt": "p", "completion": "c", "label": None}, '"label" is null'),
        ({"messages": [ASK]}, 'ends with a message of the role "user"'),
        ({"messages": []}, '"messages" is an empty list'),
        ({"prompt": "p", "references": ["a", "b"]}, '"references" is a list'),
        ({"text": 1}, '"text" is int 1'),
        ({"text": "p", "responses": {"a": "one", "b": "two"}}, '"responses" is an object'),
        ({"text": None}, '"text" is null'),
        ({"prompt": "p"}, "a prompt but no answer"),
        ({"a": 1, "b": 2}, "no known shape (keys: a, b)"),
        ({}, "no known shape (keys: none)"),
    ],
)
def test_a_row_that_cannot_be_used_says_which_key_and_what_was_found(row: dict[str, Any], words: str) -> None:
    assert words in refusal(row)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": [ASK], "responses": ["a", "b"]}, (ASK,)),
        ({"question": "What is 1 + 1?"}, (ASK,)),
        ({"messages": [ASK, TWO, MORE]}, (ASK, TWO, MORE)),
        ({"messages": [ASK, TWO]}, (ASK,)),
        ({"prompt": [ASK, TWO]}, (ASK, TWO)),  # an answer to go on with
        ({"chosen": [ASK, TWO], "rejected": [ASK, THREE]}, (ASK,)),
    ],
)
def test_a_prompt_can_be_had_without_an_answer(row: dict[str, Any], prompt: Any) -> None:
    assert parse_prompt({**row, "id": "x", "tools": [{"name": "add"}]}, "1").prompt == prompt


def test_a_row_without_a_prompt_says_so() -> None:
    with pytest.raises(DataError, match='"prompt" is missing'):
        parse_prompt({"text": "t"}, "1")


def test_every_shape_is_named_in_the_remedy_and_recognised_by_its_name() -> None:
    assert all(shape.written in accepted_shapes() for shape in FORMATS.values())
    assert parse_row({"prompt": "p", "chosen": "c", "rejected": "r"}, "1").shape == "pair"
    assert parse_row({"chosen": [ASK, TWO], "rejected": [ASK, THREE]}, "1").shape == "conversations"
