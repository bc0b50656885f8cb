"""What is prompt and what is scored with the templates of model families, thinking on and off, and who reads what."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_dpo.config import DataConfig
from mlx_dpo.data.preview import preview
from mlx_dpo.data.records import Demonstration, Message, PreferencePair
from mlx_dpo.data.template import (
    arguments,
    check_arguments,
    keeps_reasoning,
    names_read,
    render,
    switch,
    template_messages,
)
from mlx_dpo.data.texts import REASONING_KEYS
from mlx_dpo.data.tokenize import encode_prompt, encode_record, encode_records
from mlx_dpo.errors import UsageError
from support.templates import BESIDE, FAMILIES, real, stand_in, tokenizer_of


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def answer(content: str, reasoning: str | None = None) -> Message:
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def pair(*prompt: Message, chosen: Message, rejected: Message, **more: Any) -> PreferencePair:
    return PreferencePair(id="7", prompt=prompt, chosen=(chosen,), rejected=(rejected,), **more)


YES, NO = answer("Yes, it is."), answer("No way.")
REASONED = answer("Yes, it is.", "Look at it.\n\nSo it is.")
PAIRS = {
    "plain": pair(user("Is it so?"), chosen=YES, rejected=NO),
    "system": pair(system("Be brief."), user("Is it so?"), chosen=YES, rejected=NO),
    "multi-turn": pair(user("Hi"), answer("Hello."), user("Is it so?"), chosen=YES, rejected=NO),
    "reasoned": pair(user("Is it so?"), chosen=REASONED, rejected=answer("No way.", "I doubt it.")),
}
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}

CHATML = "<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "Look at it.\n\nSo it is."
LLAMA = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
PLAIN = {
    # family: what stands between question and answer when thinking is off, on, not spoken of; what ends the answer
    "qwen3": (CHATML + EMPTY, CHATML + EMPTY, CHATML + EMPTY, "<|im_end|>\n"),
    "qwen3_5_nothink": (CHATML + EMPTY, CHATML + EMPTY, CHATML + EMPTY, "<|im_end|>\n"),
    "qwen3_6": (CHATML + EMPTY, CHATML + EMPTY, CHATML + EMPTY, "<|im_end|>\n"),
    "qwen3_8": (CHATML + EMPTY, CHATML + EMPTY, CHATML + EMPTY, "<|im_end|>\n"),
    "smollm3": (CHATML + "<think>\n\n</think>\n", CHATML, CHATML, "<|im_end|>\n"),
    "gemma4": (
        "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        "<turn|>\n<|turn>model\n",
        "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        "<turn|>\n",
    ),
    "gptoss": (*["<|end|><|start|>assistant<|channel|>final<|message|>"] * 3, "<|return|>"),
    "deepseek_r1_distill": (*["<｜Assistant｜>"] * 3, "<｜end▁of▁sentence｜>"),
    "gemma3": (*["<end_of_turn>\n<start_of_turn>model\n"] * 3, "<end_of_turn>\n"),
    "llama3_1": (*[LLAMA] * 3, "<|eot_id|>"),
    "llama3_2": (*[LLAMA] * 3, "<|eot_id|>"),
    "mistral_v0_3": (*["[/INST]"] * 3, "</s>"),
    "mistral_small": (*["[/INST]"] * 3, "</s>"),
    "phi4": (*["<|im_end|><|im_start|>assistant<|im_sep|>"] * 3, "<|im_end|>"),
}
WITH_REASONING = {
    # family: of an answer with reasoning, what stands before it with thinking on, and what is scored
    "qwen3": (CHATML, f"<think>\n{THOUGHT}\n</think>\n\nYes, it is.<|im_end|>\n"),
    "qwen3_5_nothink": (CHATML + "<think>\n", f"{THOUGHT}\n</think>\n\nYes, it is.<|im_end|>\n"),
    "qwen3_6": (CHATML + "<think>\n", f"{THOUGHT}\n</think>\n\nYes, it is.<|im_end|>\n"),
    "qwen3_8": (CHATML + "<think>\n", f"{THOUGHT}\n</think>\n\nYes, it is.<|im_end|>\n"),
    "gptoss": (
        "<|end|><|start|>assistant",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes, it is.<|return|>",
    ),
}


@pytest.mark.parametrize("row", ["plain", "system", "multi-turn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_plain_answer_only_its_own_text_is_scored(family: str, row: str, template_of: Any) -> None:
    tokenizer = tokenizer_of(family, template_of(family))
    space = " " if family == "mistral_v0_3" else ""  # its template's, which merges with the answer's first word
    off, on, unsaid, end = PLAIN[family]
    for given, before in ((OFF, off), (ON, on), (None, unsaid)):
        encoded = encode_record(PAIRS[row], tokenizer, given)
        prompt = tokenizer.decode(encoded.row.prompt)
        assert prompt.partition("Is it so?")[2] == before
        scored = [tokenizer.decode(ids) for ids in encoded.row.completions]
        assert scored == [f"{space}Yes, it is.{end}", f"{space}No way.{end}"]
        assert encoded.taken_off == []


@pytest.mark.parametrize("family", WITH_REASONING)
def test_reasoning_is_scored_from_where_the_model_begins_to_write(family: str, template_of: Any) -> None:
    """A think block's opening is prompt only where the generation prompt has it."""
    tokenizer = tokenizer_of(family, template_of(family))
    row, taken_off, found = encode_record(PAIRS["reasoned"], tokenizer, ON)
    before, scored = WITH_REASONING[family]
    assert tokenizer.decode(row.prompt).partition("Is it so?")[2] == before
    assert tokenizer.decode(row.completions[0]) == scored
    assert row.prompt == encode_prompt(tokenizer, PAIRS["reasoned"], ON)
    assert (taken_off, found) == ([], [])


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_which_nothing_is_told_is_a_runtimes(family: str, row: str, template_of: Any) -> None:
    tokenizer = tokenizer_of(family, template_of(family))
    for given in (None, ON, OFF):
        encoded = encode_record(PAIRS[row], tokenizer, given)
        if not encoded.found:
            assert encoded.row.prompt == encode_prompt(tokenizer, PAIRS[row], given)


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_preview_shows_what_training_reads(family: str, row: str, template_of: Any) -> None:
    tokenizer = tokenizer_of(family, template_of(family))
    for given in (None, ON, OFF):
        encoded = encode_record(PAIRS[row], tokenizer, given).row
        shown = preview(PAIRS[row], tokenizer, DataConfig(max_length=None, chat_template_kwargs=given))
        for k, pieces in enumerate(shown.answers.values()):
            assert [(piece.role, piece.text) for piece in pieces] == [
                ("prompt", tokenizer.decode(encoded.prompt)),
                ("scored", tokenizer.decode(encoded.completions[k])),
            ]


@pytest.mark.parametrize("row", ["plain", "multi-turn", "reasoned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stand_in_writes_what_the_real_template_writes(family: str, row: str) -> None:
    """From the first question on: what families say of themselves in a system turn is not repeated here."""
    template = real(family)
    if template is None:
        pytest.skip(f"no real template of {family}: neither in {BESIDE} nor in an installed TRL")
    for given in (OFF, ON, {}):
        for answered in ((), PAIRS[row].chosen, PAIRS[row].rejected):
            texts = [
                render(
                    tokenizer_of(family, text), (*PAIRS[row].prompt, *answered), generation_prompt=not answered, **given
                )
                for text in (template, stand_in(family))
            ]
            first = str(PAIRS[row].prompt[0]["content"])
            assert texts[0].partition(first)[2] == texts[1].partition(first)[2]
            assert first in texts[0]


# arguments


def test_a_run_has_one_setting_and_a_rows_own_wins() -> None:
    tokenizer = tokenizer_of("qwen3_6")
    off = encode_record(PAIRS["plain"], tokenizer, OFF)
    assert encode_record(pair(user("Is it so?"), chosen=YES, rejected=NO, chat_template_kwargs=OFF), tokenizer) == off
    own = pair(user("Is it so?"), chosen=YES, rejected=NO, chat_template_kwargs=ON)
    assert encode_record(own, tokenizer, OFF).found[0].kind == "unthought"
    rows, _ = encode_records([PAIRS["plain"]], tokenizer, DataConfig(chat_template_kwargs=OFF))
    assert rows == [off.row]


def test_null_says_nothing() -> None:
    assert arguments(tokenizer_of("qwen3"), {"enable_thinking": None}) == {}
    check_arguments(tokenizer_of("phi4"), {"enable_thinking": None})


@pytest.mark.parametrize(
    ("family", "reads", "key", "keeps"),
    [
        ("qwen3", {"enable_thinking"}, "enable_thinking", True),
        ("qwen3_8", {"enable_thinking", "preserve_thinking", "reasoning_effort"}, "enable_thinking", True),
        ("smollm3", {"enable_thinking"}, "enable_thinking", False),
        ("gemma4", {"enable_thinking"}, "enable_thinking", False),
        ("gptoss", {"reasoning_effort"}, None, True),
        ("llama3_2", {"date_string"}, None, False),
        ("phi4", set(), None, False),
    ],
)
def test_what_a_template_reads_is_found_in_it(
    family: str, reads: set[str], key: str | None, keeps: bool, template_of: Any
) -> None:
    template = template_of(family)
    asked = {"enable_thinking", "preserve_thinking", "reasoning_effort", "date_string"}
    assert names_read(template) & asked == reads
    assert switch(template) == key
    assert keeps_reasoning(tokenizer_of(family, template)) == keeps


def test_thinking_goes_under_the_name_that_the_template_reads() -> None:
    """DeepSeek-V3.1, Granite and Kimi call it `thinking`; of two words for it the later counts."""
    tokenizer = tokenizer_of("qwen3", "{{ 'thinks' if thinking else 'answers' }}")
    assert render(tokenizer, [user("?")], **arguments(tokenizer, ON)) == "thinks"
    assert render(tokenizer, [user("?")], **arguments(tokenizer, {"thinking": True, **OFF})) == "answers"
    check_arguments(tokenizer, ON)


def test_what_no_template_reads_is_refused_and_what_it_reads_is_named() -> None:
    with pytest.raises(UsageError, match=r"thinking cannot be switched .* reads no enable_thinking") as refused:
        encode_records([PAIRS["plain"]], tokenizer_of("gptoss"), DataConfig(chat_template_kwargs=OFF))
    assert "reasoning_effort" in refused.value.remedy
    with pytest.raises(UsageError, match="reads no enable_thinking"):
        check_arguments(tokenizer_of("llama3_2"), ON)
    with pytest.raises(UsageError, match="reads no effort") as refused:
        check_arguments(tokenizer_of("qwen3"), {"effort": "high", "enable_thinking": True})
    assert "enable_thinking" in refused.value.remedy
    check_arguments(tokenizer_of("gptoss"), {"reasoning_effort": "low"})
    bare = tokenizer_of("phi4")
    bare.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        check_arguments(bare, ON)


# reasoning in messages


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("family", ["qwen3", "gptoss"])
def test_reasoning_reaches_the_template_under_whatever_key(family: str, key: str, template_of: Any) -> None:
    tokenizer = tokenizer_of(family, template_of(family))
    said = {"role": "assistant", "content": "Yes.", key: "Look at it."}
    assert set(template_messages([said])[0]) == {"role", "content", *REASONING_KEYS}
    shown = encode_record(Demonstration(id="1", prompt=(user("Is it so?"),), completion=(said,)), tokenizer)
    assert "Look at it." in tokenizer.decode(shown.row.completions[0])
    assert shown.found == []
