"""What a chat template removes from answers, doubles or makes equal is named, with its rows and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_dpo.config import DataConfig
from mlx_dpo.data.reasoning import KINDS, remedies
from mlx_dpo.data.records import Message, PreferencePair, Unpaired
from mlx_dpo.data.tokenize import EncodeReport, encode_record, encode_records, template_warning
from support.templates import tokenizer_of

OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


def answer(content: str, reasoning: str | None = None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more} | ({"reasoning_content": reasoning} if reasoning else {})


def row(chosen: Message, rejected: Message, id: str = "7") -> PreferencePair:
    return PreferencePair(
        id=id, prompt=({"role": "user", "content": "Is it so?"},), chosen=(chosen,), rejected=(rejected,)
    )


PLAIN = row(answer("Yes."), answer("No."))
REASONED = row(answer("Yes.", "It is."), answer("No.", "It is not."))
IN_TEXT = row(answer("<think>\nIt is.\n</think>\n\nYes."), answer("<think>\nIt is not.\n</think>\n\nNo."))
CLOSED = row(answer("It is.\n</think>\n\nYes."), answer("It is not.\n</think>\n\nNo."))
ONLY_REASONING = row(answer("<think>\nIt is.\n</think>\n\nYes."), answer("<think>\nIt is not.\n</think>\n\nYes."))
TWICE = row(answer("<think>\nb\n</think>\n\nYes.", "a"), answer("<think>\nb\n</think>\n\nNo.", "a"))
TWO_IN_TEXT = row(answer("<think>a</think><think>bb</think>Yes."), answer("<think>a</think><think>bb</think>No."))
MIXED = row(answer("Yes.", "It is."), answer("No."))
CHANNEL = row(answer("<|channel>thought\nIt is.<channel|>Yes."), answer("<|channel>thought\nIt is not.<channel|>No."))

NAMED = [
    # family, arguments, row, what is found, the text that is shown
    ("qwen3", OFF, PLAIN, [], ""),
    ("qwen3", None, PLAIN, ["unthought"], "'<think>\\n\\n</think>\\n\\n' before the answer, '' at generation"),
    ("qwen3", None, REASONED, [], ""),
    ("qwen3", None, IN_TEXT, [], ""),
    ("qwen3", None, CLOSED, [], ""),
    ("qwen3", OFF, REASONED, ["against"], ""),
    ("qwen3", None, MIXED, ["mixed"], ""),
    ("qwen3", None, TWICE, ["second"], "'<think>\\nb\\n</think>\\n\\nYes.'"),
    ("qwen3", None, TWO_IN_TEXT, ["block"], "'bb'"),
    ("qwen3_5_nothink", None, PLAIN, [], ""),
    (
        "qwen3_6",
        None,
        PLAIN,
        ["unthought"],
        "'<think>\\n\\n</think>\\n\\n' before the answer, '<think>\\n' at generation",
    ),
    ("qwen3_6", None, TWICE, ["second"], "'<think>\\nb\\n</think>\\n\\nYes.'"),
    ("qwen3_8", None, REASONED, [], ""),
    ("qwen3_8", None, IN_TEXT, ["second"], "'<think>\\nIt is.\\n</think>\\n\\nYes.'"),
    ("qwen3_8", OFF, IN_TEXT, ["second"], "'<think>\\nIt is.\\n</think>\\n\\nYes.'"),
    ("smollm3", OFF, IN_TEXT, ["second"], "'<think>\\nIt is.\\n</think>\\n\\nYes.'"),
    ("smollm3", ON, IN_TEXT, [], ""),
    ("smollm3", None, PLAIN, ["unthought"], "no think block before the answer"),
    ("smollm3", OFF, PLAIN, [], ""),
    ("smollm3", ON, REASONED, ["reasoning"], "'It is.'"),
    ("deepseek_r1_distill", None, PLAIN, ["unthought"], "'' before the answer, '<think>\\n' at generation"),
    ("deepseek_r1_distill", None, IN_TEXT, ["block"], "'It is.'"),
    ("deepseek_r1_distill", None, CLOSED, ["block"], "'It is.'"),
    ("deepseek_r1_distill", None, ONLY_REASONING, ["equal", "block"], "'It is.'"),
    ("deepseek_r1_distill", None, REASONED, ["reasoning"], "'It is.'"),
    ("gptoss", None, PLAIN, ["unthought"], "'<|channel|>final<|message|>' before the answer, '' at generation"),
    ("gptoss", None, REASONED, [], ""),
    ("gptoss", None, IN_TEXT, ["foreign"], "'<think>\\nIt is.\\n</think>\\n\\nYes.'"),
    ("gemma4", None, PLAIN, [], ""),
    ("gemma4", ON, PLAIN, ["unthought"], "no think block before the answer"),
    ("gemma4", ON, CHANNEL, ["block"], "'thought\\nIt is.'"),
    ("gemma4", None, IN_TEXT, ["foreign"], "'<think>\\nIt is.\\n</think>\\n\\nYes.'"),
    ("llama3_2", None, PLAIN, [], ""),
    ("llama3_2", None, IN_TEXT, [], ""),
    ("llama3_2", None, REASONED, ["reasoning"], "'It is.'"),
    ("phi4", None, PLAIN, [], ""),
]


@pytest.mark.parametrize(("family", "given", "record", "kinds", "text"), NAMED)
def test_what_becomes_of_answers_is_found(
    family: str, given: dict[str, Any] | None, record: PreferencePair, kinds: list[str], text: str, template_of: Any
) -> None:
    found = encode_record(record, tokenizer_of(family, template_of(family)), given).found
    assert [finding.kind for finding in found] == kinds
    assert not kinds or any(finding.text == text for finding in found)
    assert {finding.row for finding in found} <= {"7"}


def test_every_kind_of_finding_is_tested_and_has_a_remedy() -> None:
    tested = {kind for _, _, _, kinds, _ in NAMED for kind in kinds}
    assert tested | {"text", "unlike"} == set(KINDS) == set(remedies(tokenizer_of("qwen3")))


def test_an_empty_block_is_context_of_unpaired_rows_and_demonstrations_too() -> None:
    """KTO, SFT, ORPO and CPO teach what is scored: nobody is to learn to write an empty think block."""
    tokenizer = tokenizer_of("qwen3")
    single = Unpaired(id="1", prompt=PLAIN.prompt, completion=(answer("Yes."),), label=True)
    assert tokenizer.decode(encode_record(single, tokenizer).row.completions[0]) == "Yes.<|im_end|>\n"


def test_text_that_a_template_drops_without_being_reasoning_is_named() -> None:
    tokenizer = tokenizer_of("phi4", "{% for m in messages %}{{ m['content'].split('#')[0] }}<|im_end|>{% endfor %}")
    found = encode_record(row(answer("Yes. # a note"), answer("No. # a note")), tokenizer).found
    assert [(finding.kind, finding.text) for finding in found] == [("text", "'Yes. # a note'")]


def test_another_generation_prompt_than_that_of_an_answered_turn_is_named() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:Well, {% endif %}"
    )
    found = encode_record(PLAIN, tokenizer_of("phi4", template)).found
    assert [finding.kind for finding in found] == ["unlike"]
    assert "'Well, ' at generation" in found[0].text


def test_a_run_is_told_of_all_of_it_in_one_sentence_and_check_of_each() -> None:
    tokenizer = tokenizer_of("deepseek_r1_distill")
    records = [row(PLAIN.chosen[0], PLAIN.rejected[0], "a")]
    records += [row(IN_TEXT.chosen[0], IN_TEXT.rejected[0], str(n)) for n in range(5)]
    records.append(row(ONLY_REASONING.chosen[0], ONLY_REASONING.rejected[0], "same"))
    _, report = encode_records(records, tokenizer, DataConfig())
    assert report.warnings(1024) == []
    (said,) = template_warning(report)
    assert "1 of 7 rows have answers that the chat template makes equal" in said
    assert "6 of 7 rows lose reasoning that stands in an answer's text" in said and "('It is.')" in said
    assert "(rows 0, 1, 2, …)" in said
    each = report.template_warnings(10)
    assert len(each) == 3
    assert "(rows 0, 1, 2, 3, 4, same)" in each[1]
    assert each[0].endswith("see what was removed, and make the difference one that stays")


def test_training_and_held_out_rows_are_told_of_together() -> None:
    tokenizer = tokenizer_of("qwen3")
    reports = [encode_records([PLAIN], tokenizer, DataConfig())[1] for _ in range(2)]
    (said,) = template_warning(*reports)
    assert said.startswith("2 of 2 rows are answered without reasoning")
    assert template_warning(EncodeReport(), EncodeReport()) == []


@pytest.mark.parametrize(
    ("family", "kind", "remedy"),
    [
        ("qwen3", "unthought", "--thinking off"),
        ("gptoss", "unthought", "no switch for it: give the answers their reasoning"),
        ("deepseek_r1_distill", "unthought", "no switch for it: write prompt and answers as plain strings"),
        ("qwen3_8", "second", "reasoning_content"),
        ("smollm3", "second", "plain strings"),
        ("deepseek_r1_distill", "block", "plain strings"),
        ("gptoss", "foreign", "reasoning_content"),
    ],
)
def test_a_remedy_is_one_that_the_template_knows(family: str, kind: str, remedy: str) -> None:
    assert remedy in remedies(tokenizer_of(family))[kind]
