"""The doctor names what a person would want to know before training, and stays silent where all is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dpo.data.doctor import Report, examine, length
from mlx_dpo.data.formats import parse_row
from mlx_dpo.data.load import load_records
from mlx_dpo.data.records import Record


def pair(id: str, prompt: Any, chosen: Any, rejected: Any) -> Record:
    return parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, id)


SOUND = [pair("1", "p", "long one", "short"), pair("2", "q", "brief", "much longer"), pair("3", "r", "abc", "xyz")]


def named(report: Report) -> dict[str, Any]:
    """The suspicions that name rows."""
    suspicions = ("duplicates", "contradictions", "identical", "nearly_identical", "empty", "parted_early")
    suspicions += ("repeats_prompt", "control_tokens", "shared_prompts")
    return {name: getattr(report, name) for name in suspicions if getattr(report, name)}


def test_sound_data_is_counted_and_nothing_is_said() -> None:
    report = examine(SOUND)
    assert (report.rows, report.prompts, report.kinds, report.shapes) == (3, 3, {"pair": 3}, {"pair": 3})
    assert report.mean_prompt == 1
    assert report.mean_first == pytest.approx((8 + 5 + 3) / 3)
    assert report.mean_last == pytest.approx((5 + 11 + 3) / 3)
    assert named(report) == {}
    assert report.warnings() == []


def test_length_bias_counts_the_pairs_that_differ_in_length() -> None:
    assert examine(SOUND).longer_chosen == 0.5  # one longer, one shorter, one equal
    biased = examine([SOUND[0], SOUND[2]])
    assert biased.longer_chosen == 1
    assert biased.warnings() == [
        "the chosen answer is the longer one in 100% of the pairs: length alone may be learned"
    ]
    assert "shorter one in 100%" in examine([SOUND[1]]).warnings()[0]
    assert examine([SOUND[2]]).longer_chosen is None


@pytest.mark.parametrize(
    ("row", "suspicion"),
    [
        (("x", "p", "long one", "short"), {"duplicates": ("x",)}),
        (("x", " p\n", "short", "long one"), {"contradictions": (("1", "x"),)}),
        (("x", "new", "same", "same"), {"identical": ("x",)}),
        (("x", "new", "a b", "a  b\n"), {"nearly_identical": ("x",)}),
        (("x", "new", "a", " \n"), {"empty": ("x",)}),
        (("x", "new", "newer", "newest"), {"repeats_prompt": ("x",)}),
        (("x", "new", "a<|im_end|>", "b"), {"control_tokens": ("x",)}),
        (("x", "<s>[INST] new [/INST]", "a", "b"), {"control_tokens": ("x",)}),
        (
            ("x", "new", [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "c"),
            {"parted_early": ("x",)},
        ),
    ],
)
def test_a_suspicious_row_is_named_and_put_in_words(row: tuple[Any, ...], suspicion: dict[str, Any]) -> None:
    report = examine([*SOUND, pair(*row)])
    assert named(report) == suspicion
    assert any("1 of 4" in said and "(x)" in said for said in report.warnings())


def test_an_answer_that_is_a_tool_call_is_not_empty() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    report = examine([pair("x", "p", [call], "no")])
    assert report.empty == ()
    assert length((call,)) > 0


def test_one_prompt_in_training_and_validation_is_named_whatever_the_answers() -> None:
    assert examine(SOUND, [pair("v", "q", "a", "b")]).shared_prompts == ("2",)


def test_a_prompt_asked_twice_with_other_answers_is_no_duplicate() -> None:
    report = examine([*SOUND, pair("4", "p", "another", "answer")])
    assert (report.prompts, report.duplicates) == (3, ())


def test_judged_answers_to_one_prompt_with_other_labels_are_no_duplicates() -> None:
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False, True)]
    report = examine([parse_row(row, str(number)) for number, row in enumerate(rows)])
    assert report.duplicates == ("2",)


def test_no_rows_are_no_error() -> None:
    report = examine([])
    assert (report.rows, report.mean_first, report.longer_chosen) == (0, 0, None)


def test_the_flaws_of_the_odd_rows_are_found(shared_data: Path) -> None:
    records = load_records(shared_data / "odd.jsonl")
    tags = dict(zip([r.id for r in records], _tags(shared_data / "odd.jsonl"), strict=True))
    report = examine(records)
    assert {tags[id] for id in report.identical} == {"identical"}
    assert {tags[id] for id in report.duplicates} == {"duplicate_row"}
    assert {"hh_empty_chosen", "empty_completion", "whitespace_only_rejected"} == {tags[id] for id in report.empty}
    assert {"differ_only_in_trailing_space", "differ_only_in_trailing_newlines"} <= {
        tags[id] for id in report.nearly_identical
    }
    assert {tags[id] for id in report.control_tokens} == {"special_token_strings", "chatml_tokens_in_text"}


def _tags(path: Path) -> list[str]:
    return [json.loads(line)["tag"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_the_length_bias_that_the_data_is_known_for(shared_data: Path) -> None:
    assert examine(load_records(shared_data / "helpful_pairs.jsonl")).longer_chosen == pytest.approx(0.65, abs=0.005)


def test_answers_that_differ_in_their_reasoning_are_different_answers() -> None:
    def reasoned(id: str, text: str) -> Record:
        said = {"role": "assistant", "content": "Two."}
        ask = [{"role": "user", "content": "1 + 1?"}]
        return pair(id, ask, [{**said, "reasoning_content": text}], [{**said, "reasoning_content": "Hm."}])

    report = examine([reasoned("1", "Easy."), reasoned("2", "Count.")])
    assert named(report) == {}
    assert report.mean_first == len("Easy.Two.") / 2 + len("Count.Two.") / 2
