"""A data set is read whole or refused whole, and no prompt stands on both sides of a split."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_dpo.config import DataConfig
from mlx_dpo.data import load as loading
from mlx_dpo.data.load import hold_out, load_prompts, load_records, load_splits, load_to_judge, prompt_key
from mlx_dpo.data.records import Demonstration, PreferencePair, Ranking, Record, Unpaired, kind_of
from mlx_dpo.errors import DataError, UsageError
from support.rows import RANKED, ROWS

TIED = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}

Write = Callable[..., Path]


def refusal(source: Path | str, kind: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load_records(source, kind)
    return str(caught.value)


def prompts(records: list[Record]) -> set[str]:
    return set(map(prompt_key, records))


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("hh_train", 584, "pair"),
        ("hh_train.messages", 584, "pair"),
        ("hh_heldout", 177, "pair"),
        ("hh_heldout.messages", 177, "pair"),
        ("sentiment_pairs", 606, "pair"),
        ("helpful_pairs", 471, "pair"),
        ("format_sharegpt_dpo", 50, "pair"),
        ("odd", 74, "pair"),
        ("rankings", 263, "ranking"),
        ("format_kto_messages", 33, "unpaired"),
        ("prompts_sentiment", 285, "demonstration"),
        ("reviews_sft", 362, "demonstration"),
        ("reviews_labelled", 1051, "demonstration"),
        ("summaries", 70, "demonstration"),
    ],
)
def test_every_file_of_real_data_loads_whole(shared_data: Path, name: str, count: int, kind: str) -> None:
    records = load_records(shared_data / f"{name}.jsonl")
    assert len(records) == count
    assert {kind_of(record) for record in records} == {kind}


@pytest.mark.parametrize("name", ["hh_train", "sentiment_pairs", "helpful_pairs", "odd", "reviews_sft"])
def test_no_prompt_of_real_data_stands_on_both_sides(shared_data: Path, name: str) -> None:
    splits = load_splits(shared_data / f"{name}.jsonl", valid_fraction=0.2)
    whole = load_records(shared_data / f"{name}.jsonl")
    assert not prompts(splits.train) & prompts(splits.valid)
    assert len(splits.train) + len(splits.valid) == len(whole)
    assert len(prompts(splits.valid)) == round(0.2 * len(prompts(whole)))


def test_rankings_give_their_best_over_their_worst_and_ties_are_reported(shared_data: Path) -> None:
    said: list[Any] = []
    pairs = load_records(shared_data / "rankings.jsonl", "pair", on_event=said.append)
    lines = (shared_data / "rankings.jsonl").read_text(encoding="utf-8").split("\n")
    rows = {row["id"]: row for row in map(json.loads, filter(None, lines))}
    for pair in pairs:
        rank = dict(zip(rows[pair.id]["responses"], rows[pair.id]["ranks"], strict=True))
        assert isinstance(pair, PreferencePair)
        assert rank[pair.chosen[0]["content"]] == min(rank.values())  # type: ignore[index]
        assert rank[pair.rejected[0]["content"]] == max(rank.values())  # type: ignore[index]
    tied = [row for row in rows.values() if len(set(row["ranks"])) == 1]
    assert len(pairs) == len(rows) - len(tied)
    assert [event.text.endswith(f"{len(tied)} of 263 rows give no pair row (all answers tie)") for event in said] == [
        True
    ]


def test_rows_without_an_id_are_called_by_their_line(write: Write) -> None:
    assert [record.id for record in load_records(write([{"id": "first", **ROWS[0]}, ROWS[1]]))] == ["first", "2"]


# What is wrong is said at once.


def test_all_bad_lines_are_named_up_to_ten_and_then_counted(write: Write) -> None:
    rows = [{"prompt": "p", "chosen": "c"} if n % 2 else ROWS[0] for n in range(30)]
    path = write(rows)
    lines = refusal(path).splitlines()
    assert lines[0] == f"{path}: 15 of 30 rows cannot be used"
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"line {n}" for n in range(2, 22, 2)]
    assert lines[11] == "  and 5 more"
    assert all('"rejected" is missing' in line for line in lines[1:11])


def test_every_kind_of_bad_line_says_what_and_where(write: Write) -> None:
    good = json.dumps(ROWS[0]).encode()
    path = write(b"\n".join([good, b'{"prompt": "p", }', b"[1]", b"null", b'{"prompt": "caf\xe9"}', good, b'"text"']))
    message = refusal(path)
    for words in (
        "5 of 7 rows cannot be used",
        "line 2: broken JSON: ",
        "(column 17)",
        "line 3: not an object but a list",
        "line 4: not an object but null",
        "line 5: not UTF-8: byte 16 is 0xe9",
        "line 7: not an object but a string",
    ):
        assert words in message


def test_bad_rows_of_all_files_of_a_folder_are_in_one_error(write: Write) -> None:
    write([ROWS[0], {}], "set/train.jsonl")
    folder = write([{"prompt": "p"}], "set/valid.jsonl").parent
    with pytest.raises(DataError) as caught:
        load_splits(folder)
    assert "train.jsonl: 1 of 2 rows" in caught.value.message
    assert "valid.jsonl: 1 of 1 rows" in caught.value.message
    assert "A row is an object of one of these shapes" in caught.value.remedy


# Kinds.


def test_a_file_of_mixed_kinds_says_which_line_is_what(write: Write) -> None:
    path = write([*ROWS[:4], RANKED, {"text": "t"}])
    message = refusal(path)
    assert f"{path} mixes kinds of rows: 4 pair rows (line 1, line 2, line 3, …), 1 ranking row (line 5)" in message
    assert "1 demonstration row (line 6)" in message


def test_a_kind_that_is_asked_for_joins_what_can_be_converted(write: Write) -> None:
    path = write([ROWS[0], RANKED])
    as_pairs, as_rankings = load_records(path, "pair"), load_records(path, "ranking")
    assert [record.completions for record in as_pairs] == [("good 0", "bad 0"), ("b", "a")]
    assert all(isinstance(record, Ranking) and record.ranks == (1, 2) for record in as_rankings)
    judged = load_records(write(ROWS[:1], "pairs.jsonl"), "unpaired")
    assert [(record.completion, record.label) for record in judged if isinstance(record, Unpaired)] == [
        ("good 0", True),
        ("bad 0", False),
    ]
    shown = load_records(path, "demonstration")
    assert [record.completion for record in shown if isinstance(record, Demonstration)] == ["good 0", "b"]


def test_a_kind_that_the_data_cannot_give_is_refused_with_the_lines(write: Write) -> None:
    message = refusal(write([ROWS[0], {"text": "t"}]), "pair")
    assert "pair rows are needed, but there are 1 demonstration row (line 2)" in message
    with pytest.raises(UsageError, match='no kind of records "pairs"'):
        load_records(write(ROWS), "pairs")


def test_rankings_that_all_tie_give_no_pairs_and_say_so(write: Write) -> None:
    said: list[Any] = []
    assert len(load_records(write([TIED, RANKED, TIED]), "pair", on_event=said.append)) == 1
    assert "2 of 3 rows give no pair row (all answers tie)" in said[0].text
    assert "none of its 1 rows gives a pair row (all answers tie)" in refusal(write([TIED]), "pair")
    bad = {"prompt": "p", "completion": "c", "label": False}
    assert "the answer is judged bad" in refusal(write([bad]), "demonstration")


def test_prompts_can_be_had_of_rows_without_answers(write: Write) -> None:
    path = write([{"prompt": "p", "id": "x"}, ROWS[0], {"messages": [{"role": "user", "content": "hi"}]}])
    assert [(prompt.id, prompt.prompt) for prompt in load_prompts(path)] == [
        ("x", "p"),
        ("2", "question 0"),
        ("3", ({"role": "user", "content": "hi"},)),
    ]
    with pytest.raises(DataError, match='line 1: "prompt" is missing'):
        load_prompts(write([{"text": "t"}]))


# Splits.


def test_validation_rows_are_held_out_by_prompt(write: Write) -> None:
    rows = [{**row, "chosen": f"{row['chosen']} {n}"} for row in ROWS for n in range(3)]
    train, valid, test = load_splits(write(rows), valid_fraction=0.25)
    assert (len(train), len(valid), test) == (45, 15, [])
    assert not prompts(train) & prompts(valid)


def test_the_split_depends_on_the_seed_and_not_on_the_order(write: Write) -> None:
    valid = prompts(load_splits(write(ROWS), valid_fraction=0.3, seed=1).valid)
    assert valid == prompts(load_splits(write(ROWS[::-1]), valid_fraction=0.3, seed=1).valid)
    assert valid != prompts(load_splits(write(ROWS), valid_fraction=0.3, seed=2).valid)


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(1, 0.1, 0), (2, 0.1, 1), (3, 0.1, 1), (5, 0.9, 4), (20, 0.0, 0), (20, 0.1, 2)]
)
def test_a_handful_of_prompts_leaves_something_on_both_sides(
    write: Write, count: int, fraction: float, held: int
) -> None:
    train, valid, _ = load_splits(write(ROWS[:count]), valid_fraction=fraction)
    assert (len(train), len(valid)) == (count - held, held)


def test_equal_prompts_are_equal_in_whatever_shape_and_spacing() -> None:
    user = {"role": "user", "content": "hi"}
    one = PreferencePair(id="1", prompt=(user,), chosen="c", rejected="r")
    same = PreferencePair(id="2", prompt=({"content": "hi\n", "role": "user", "name": "me"},), chosen="c", rejected="r")
    other = PreferencePair(id="3", prompt=(user, user), chosen="c", rejected="r")
    assert prompt_key(one) == prompt_key(same) != prompt_key(other)


def test_texts_without_a_prompt_are_split_by_their_text() -> None:
    texts: list[Record] = [Demonstration(id=str(n), prompt="", completion=f"text {n % 5}") for n in range(10)]
    train, valid = hold_out(texts, 0.2, 0)
    assert (len(train), len(valid)) == (8, 2)
    assert len({record.completions for record in valid}) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 10])
def test_a_share_of_prompts_lies_below_one(write: Write, fraction: float) -> None:
    with pytest.raises(UsageError, match="valid_fraction"):
        load_splits(write(ROWS), valid_fraction=fraction)


# One split to judge a model by.


def to_judge(source: Path | str, *kinds: str, split: str = "auto", valid_fraction: float = 0.25) -> list[Record]:
    return load_to_judge(DataConfig(path=str(source), valid_fraction=valid_fraction), kinds, split)


@pytest.mark.parametrize("split", ["auto", "train", "valid"])
@pytest.mark.parametrize("kinds", [("pair",), ("pair", "ranking"), ("ranking", "demonstration"), ("demonstration",)])
def test_a_source_is_read_once_whatever_is_asked_of_it(
    write: Write, monkeypatch: pytest.MonkeyPatch, split: str, kinds: tuple[str, ...]
) -> None:
    path = write(ROWS)
    readings = []
    read_splits = loading.read_splits
    monkeypatch.setattr(loading, "read_splits", lambda source: readings.append(source) or read_splits(source))
    by_name = to_judge(path, *kinds, split=split)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    assert to_judge("-", *kinds, split=split) == by_name
    assert readings == [str(path), "-"]
    assert {kind_of(record) for record in by_name} == {"pair" if "pair" in kinds else kinds[0]}


def test_rows_are_judged_as_what_they_are_if_they_may_be_and_else_as_the_first_kind(write: Write) -> None:
    ranked = [RANKED, {**RANKED, "prompt": "another"}]
    assert {kind_of(record) for record in to_judge(write(ranked), "pair", "ranking")} == {"ranking"}
    assert {kind_of(record) for record in to_judge(write(ranked), "pair")} == {"pair"}
    assert {kind_of(record) for record in to_judge(write(ranked), "demonstration", "unpaired")} == {"demonstration"}
    mixed = write([ROWS[0], RANKED])
    assert len(to_judge(mixed, "pair", "pair")) == 2  # one kind is asked for, so what can be converted is
    with pytest.raises(DataError, match=r"mixes kinds of rows: 1 pair row \(line 1\), 1 ranking row \(line 2\)"):
        to_judge(mixed, "pair", "ranking")


def test_a_source_is_judged_by_its_test_split_before_its_validation_split_before_all_of_it(write: Write) -> None:
    document = {"train": ROWS[:10], "valid": ROWS[10:14], "test": ROWS[14:]}
    for there, expected in (("train valid test", 6), ("train valid", 4), ("train", 10)):
        path = write(json.dumps({name: document[name] for name in there.split()}).encode(), "data.json")
        assert len(to_judge(path, "pair")) == expected
    with pytest.raises(DataError, match=r"has no test split \(there: train\)"):
        to_judge(path, "pair", split="test")


def test_validation_rows_of_a_file_are_those_that_training_holds_out(write: Write) -> None:
    path = write(ROWS)
    assert to_judge(path, "pair", split="valid") == load_splits(path, valid_fraction=0.25).valid
    for rows, fraction in ((ROWS[:1], 0.5), (ROWS, 0.0)):
        with pytest.raises(DataError, match="has no validation rows"):
            to_judge(write(rows), "pair", split="valid", valid_fraction=fraction)
