"""The preference set that the demo trains on: enough rows, honest hold-out, and a preference that is style alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

FOLDER = files("mlx_dpo") / "demo" / "data"
PARTS = ("train", "test")
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
PADDED_OPENING = re.compile(
    r"(great|good|excellent|interesting) question|what an? \w+ question|certainly|sure\b|of course|absolutely"
    r"|as an ai|i('m| am| would|'d| hope| understand)\b.*(happy|glad|sorry|delighted|understand|help)"
    r"|(happy|glad) to|thank(s| you) for (your question|asking|reaching)|let('s| us| me) |it is (important|worth)"
    r"|when it comes to|here is (a|the|your)",
    re.IGNORECASE,
)


def rows(part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def text(row: dict[str, Any], key: str) -> str:
    return row[key][0]["content"]


def words(answer: str) -> int:
    return len(answer.split())


def normalised(string: str) -> str:
    return " ".join(re.findall(r"\w+", string.lower()))


TRAIN, TEST = rows("train"), rows("test")
ALL = TRAIN + TEST


def test_there_are_180_pairs_and_48_of_them_are_held_out() -> None:
    assert len(ALL) >= 180
    assert len(TEST) >= 48


def test_every_kind_of_question_is_trained_on_and_held_out() -> None:
    assert {row["kind"] for row in TRAIN} == {row["kind"] for row in TEST}
    assert min(Counter(row["kind"] for row in TRAIN).values()) >= 5
    assert min(Counter(row["kind"] for row in TEST).values()) >= 2


def test_the_readme_states_the_counts_and_the_kinds() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for count in (f"{len(ALL)} preference pairs", f"`train.jsonl`: {len(TRAIN)} ", f"`test.jsonl`: {len(TEST)} "):
        assert count in readme
    assert all(row["kind"] in readme for row in ALL)


@pytest.mark.parametrize("part", PARTS)
def test_files_are_utf8_with_unix_line_ends_and_no_blank_line(part: str) -> None:
    content = (FOLDER / f"{part}.jsonl").read_bytes()
    assert b"\r" not in content
    assert content.endswith(b"}\n")
    assert b"\n\n" not in content


@pytest.mark.parametrize("row", ALL, ids=lambda row: row["id"])
def test_a_row_is_one_question_and_two_answers_of_the_stated_lengths(row: dict[str, Any]) -> None:
    assert set(row) == {"id", "kind", *ROLES}
    assert re.fullmatch(r"concise-\d{3}", row["id"])
    for key, role in ROLES.items():
        assert [set(message) for message in row[key]] == [{"role", "content"}]
        assert row[key][0]["role"] == role
        assert text(row, key) == text(row, key).strip()
    assert 3 <= words(text(row, "chosen")) <= 30
    assert 30 <= words(text(row, "rejected")) <= 65


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
def test_nothing_is_said_twice(key: str) -> None:
    assert [said for said, times in Counter(normalised(text(row, key)) for row in ALL).items() if times > 1] == []


def test_ids_are_unique_and_no_answer_is_both_chosen_and_rejected() -> None:
    assert len({row["id"] for row in ALL}) == len(ALL)
    assert {normalised(text(row, "chosen")) for row in ALL}.isdisjoint(normalised(text(row, "rejected")) for row in ALL)


def test_no_held_out_prompt_says_almost_what_a_trained_one_says() -> None:
    """Two prompts are near when they share more than two thirds of all their distinct words."""
    near = []
    for held_out in TEST:
        for trained in TRAIN:
            a, b = (set(normalised(text(row, "prompt")).split()) for row in (held_out, trained))
            if len(a & b) / len(a | b) > 2 / 3:
                near.append((held_out["id"], trained["id"]))
    assert near == []


@pytest.mark.parametrize("part", PARTS)
def test_chosen_answers_are_shorter_on_average_but_length_is_not_the_only_cue(part: str) -> None:
    lengths = [(words(text(row, "chosen")), words(text(row, "rejected"))) for row in rows(part)]
    chosen, rejected = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
    assert chosen < rejected / 2
    near = sum(c >= 0.6 * r for c, r in lengths)
    assert near >= 0.1 * len(lengths)


def test_no_chosen_answer_opens_with_padding() -> None:
    assert [row["id"] for row in ALL if PADDED_OPENING.match(text(row, "chosen"))] == []
