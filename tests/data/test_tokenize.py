"""Text becomes the tokens that TRL makes of it, and nothing is cut, dropped or merged without being counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlx_dpo.config import DataConfig
from mlx_dpo.data.formats import parse_row
from mlx_dpo.data.records import Demonstration, PreferencePair, Ranking, Unpaired
from mlx_dpo.data.tokenize import TokenizedRow, encode_prompt, encode_record, encode_records, truncate, unwrap
from mlx_dpo.errors import DataError

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def with_template(folder: Path, template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def text(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> PreferencePair:
    return PreferencePair(id="7", prompt=text(prompt), chosen=text(chosen), rejected=text(rejected), **more)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# what TRL makes of the same rows


@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_every_row_has_trls_tokens(form: str, golden: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "models/llama")
    expected = json.loads((golden / "golden.json").read_text())["cases"][f"llama/{form}"]["pairs"]
    rows = [json.loads(line) for line in (golden / f"data/{form}.jsonl").read_text().splitlines()]
    records = [pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    found, report = encode_records(records, tokenizer, DataConfig(max_length=None))
    assert len(found) == len(expected) == 24
    for row, trl in zip(found, expected, strict=True):
        assert row.prompt == trl["prompt_ids"]
        assert row.completions == (trl["chosen_ids"], trl["rejected_ids"])
    assert (report.rows, report.kept, report.cut_rows, report.dropped) == (24, 24, 0, [])


@pytest.mark.parametrize(
    "case",
    [
        "standard_implicit_prompt",
        "standard_boundary_merge",
        "conv_last_is_assistant_prompt",
        "conv_chat_template_kwargs",
        "implicit_identical",
        "max_length_drop",
        "bos_standard",
    ],
)
def test_odd_rows_have_trls_tokens_too(case: str, golden: Path) -> None:
    """TRL drops rows beforehand and cuts the others in its collator; here both are done at once."""
    trl = json.loads((golden / "token_edge_cases.json").read_text())["cases"][case]
    tokenizer = AutoTokenizer.from_pretrained(golden / trl["tokenizer"])
    limit = trl["config"].get("max_length")
    records = [parse_row(row, str(i)) for i, row in enumerate(trl["rows"])]
    found, report = encode_records(records, tokenizer, DataConfig(max_length=limit))
    assert len(found) == len(trl["result"]) == report.rows - len(report.dropped)
    for row, whole in zip(found, trl["result"], strict=True):
        assert row.prompt == whole["prompt_ids"]
        for ids, name in zip(row.completions, ("chosen_ids", "rejected_ids"), strict=True):
            assert row.prompt + ids == (whole["prompt_ids"] + whole[name])[:limit]


# the boundary between prompt and answer


def test_strings_end_in_one_end_of_sequence_token(tokenizer: Any) -> None:
    row, *_ = encode_record(pair("the question", " the answer", " many words<|im_end|>"), tokenizer)
    assert [ids.count(EOS) for ids in row.completions] == [1, 1]
    assert [ids[-1] for ids in row.completions] == [EOS, EOS]
    assert tokenizer.decode(row.prompt) == "the question"
    assert tokenizer.decode(row.completions[0]) == " the answer<|im_end|>"


def test_a_token_that_merges_over_the_boundary_belongs_to_every_answer(tokenizer: Any) -> None:
    """Where "the ans" + "wer" is tokenized otherwise than "the ans" alone, the prompt ends before the difference."""
    rows, report = encode_records(
        [pair("the ans", "wer", "x"), pair("the question", " is", " says")], tokenizer, DataConfig()
    )
    whole = tokenizer("the answer<|im_end|>")["input_ids"]
    assert rows[0].prompt + rows[0].completions[0] == whole
    assert tokenizer.decode(rows[0].prompt + rows[0].completions[1]) == "the ansx<|im_end|>"
    assert len(rows[0].prompt) < len(tokenizer("the ans")["input_ids"])
    assert report.boundary_merges == 1
    assert "1 of 2 rows" in report.warnings(1024)[0]
    assert repr(report.boundary_example) in report.warnings(1024)[0]


def test_an_empty_prompt_leaves_the_whole_text_as_answer(tokenizer: Any) -> None:
    row, *_ = encode_record(pair("", "the answer", "words"), tokenizer)
    assert row.prompt == []
    assert row.completions[0] == tokenizer("the answer<|im_end|>")["input_ids"]
    assert not row.shares_prompt


def test_messages_are_scored_up_to_what_the_template_prints_after_the_answer(tokenizer: Any) -> None:
    record = pair([user("Hello there")], [assistant("short")], [assistant("many more words")])
    row, merged, _ = encode_record(record, tokenizer)
    assert tokenizer.decode(row.prompt) == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in row.completions] == ["short<|im_end|>\n", "many more words<|im_end|>\n"]
    assert row.prompt == encode_prompt(tokenizer, record)
    assert merged == []


def test_what_a_template_adds_to_the_generation_prompt_alone_is_cut_and_reported(tiny_llama: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}"
    )
    tokenizer = with_template(tiny_llama, template)
    rows, report = encode_records(
        [pair([user("Hello")], [assistant("short")], [assistant("clear")])], tokenizer, DataConfig()
    )
    assert tokenizer.decode(rows[0].prompt + rows[0].completions[0]) == "user:Hello<|im_end|>assistant:short<|im_end|>"
    assert report.boundary_merges == 0, "no token of the answer is one of the prompt's"
    assert [(finding.kind, finding.row) for finding in report.findings] == [("unthought", "7")]
    assert "'<think>' at generation" in report.template_warnings(3)[0]


def test_tools_and_template_arguments_reach_the_template(tiny_llama: Path) -> None:
    template = (
        "{% for tool in tools or [] %}{{ '[' + tool['name'] + ']' }}{% endfor %}"
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}{{ '(' + style + ')' if style else '' }}"
    )
    tokenizer = with_template(tiny_llama, template)
    record = pair([user("Hello")], [assistant("a")], [assistant("b")])
    plain, *_ = encode_record(record, tokenizer)
    assert tokenizer.decode(plain.prompt) == "Hello<|im_end|>"
    record = pair(
        [user("Hello")],
        [assistant("a")],
        [assistant("b")],
        tools=({"name": "search"}, {"name": "clock"}),
        chat_template_kwargs={"style": "short"},
    )
    row, *_ = encode_record(record, tokenizer)
    assert tokenizer.decode(row.prompt + row.completions[0]) == "[search][clock]Hello<|im_end|>a<|im_end|>(short)"


def test_mlx_lms_wrapper_changes_no_token(tiny_llama: Path, tokenizer: Any) -> None:
    """The wrapper hands `enable_thinking` to the template; here, as in TRL, only what the data says is handed over."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    template = (
        "{{ 'thinking is ' ~ enable_thinking if enable_thinking is defined else 'silent' }}" + tokenizer.chat_template
    )
    inner = with_template(tiny_llama, template)
    wrapper = TokenizerWrapper(inner)
    assert unwrap(wrapper) is inner
    assert unwrap(inner) is inner
    record = pair([user("Hello")], [assistant("a")], [assistant("b")])
    assert encode_record(record, wrapper) == encode_record(record, inner)
    assert inner.decode(encode_record(record, wrapper)[0].prompt).startswith("silent")


# other kinds of rows


def test_every_kind_of_record_is_one_prompt_with_its_answers(tokenizer: Any) -> None:
    ranking = Ranking(id="r", prompt="Hello", responses=(" a", " b", " c"), ranks=(1.0, 2.0, 2.0))
    good = Unpaired(id="g", prompt="Hello", completion=" a", label=True)
    bad = Unpaired(id="b", prompt="Hello", completion=" a", label=False)
    shown = Demonstration(id="d", prompt="Hello", completion=" a")
    rows, _ = encode_records([ranking, good, bad, shown], tokenizer, DataConfig())
    assert [(row.id, len(row.completions), row.ranks, row.label) for row in rows] == [
        ("r", 3, (1.0, 2.0, 2.0), 0),
        ("g", 1, (1.0,), 1),
        ("b", 1, (1.0,), -1),
        ("d", 1, (1.0,), 0),
    ]
    assert len({tuple(row.prompt) for row in rows}) == 1
    assert rows[0].completions[0] == rows[1].completions[0]


# truncation

ROW = TokenizedRow("row", [10, 11, 12, 13, 14], ([20, 21, 22, EOS], [30, EOS]), (0, 0), (1.0, 2.0))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 9, 100])
def test_a_row_that_fits_stays_whole(mode: str, max_length: int | None) -> None:
    assert truncate(ROW, max_length, mode) == ROW


def test_keep_start_cuts_the_ends_of_answers() -> None:
    assert truncate(ROW, 7, "keep_start") == ROW._replace(completions=([20, 21], [30, EOS]))
    assert truncate(ROW, 6, "keep_start") == ROW._replace(completions=([20], [30]))


def test_keep_start_drops_a_row_whose_prompt_fills_the_length() -> None:
    assert truncate(ROW, 5, "keep_start") is None
    assert truncate(ROW, 4, "keep_start") is None


def test_keep_end_cuts_the_beginning_of_the_prompt_by_what_each_answer_needs() -> None:
    cut = truncate(ROW, 7, "keep_end")
    assert cut is not None
    assert [cut.context(k) + cut.completions[k] for k in (0, 1)] == [
        [12, 13, 14, 20, 21, 22, EOS],
        [10, 11, 12, 13, 14, 30, EOS],
    ]
    assert not cut.shares_prompt


def test_keep_end_cuts_into_an_answer_that_is_longer_than_all() -> None:
    cut = truncate(ROW, 3, "keep_end")
    assert cut is not None
    assert [cut.context(k) + cut.completions[k] for k in (0, 1)] == [[21, 22, EOS], [14, 30, EOS]]
    assert truncate(ROW, 1, "keep_end") is None, "one token alone has nothing to be predicted from"


def test_what_was_cut_and_dropped_is_counted_and_said(tokenizer: Any) -> None:
    """Prompts of 1, 1 and 3 tokens; answers of 1 + EOS, 4 + EOS and 1 + EOS; room for 3."""
    records = [
        PreferencePair(id="whole", prompt="a", chosen=" answer", rejected=" question"),
        PreferencePair(id="cut", prompt="a", chosen=" answer the question answer", rejected=" question"),
        PreferencePair(id="lost", prompt="a answer answer", chosen=" answer", rejected=" question"),
    ]
    whole = [encode_record(record, tokenizer)[0] for record in records]
    assert [len(row.prompt) for row in whole] == [1, 1, 3]
    assert [[len(ids) for ids in row.completions] for row in whole] == [[2, 2], [5, 2], [2, 2]]
    rows, report = encode_records(records, tokenizer, DataConfig(max_length=3))
    assert [row.id for row in rows] == ["whole", "cut"]
    assert (report.rows, report.kept, report.dropped) == (3, 2, ["lost"])
    assert (report.cut_rows, report.cut_tokens, report.lost_eos) == (1, 3, 1)
    assert (report.prompt_tokens, report.completion_tokens, report.longest) == (2, 8, 3)
    said = " ".join(report.warnings(3))
    assert "1 of 3 rows dropped" in said
    assert "lost" in said
    assert "1 of 2 rows cut to max_length 3: 3 tokens lost, 1 answers lost their end-of-sequence token" in said


def test_rows_that_go_in_whole_are_not_talked_about(tokenizer: Any) -> None:
    _, report = encode_records([pair("the", " answer", " question")], tokenizer, DataConfig())
    assert report.warnings(1024) == []


def test_arguments_of_the_template_that_reach_no_string_are_said_so(golden: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "models/llama")
    rows = [pair("the", " answer", " question"), pair([user("Hello")], [assistant("a")], [assistant("b")])]
    _, report = encode_records(rows, tokenizer, DataConfig(chat_template_kwargs={"enable_thinking": False}))
    assert "1 of 2 rows are plain strings, which go through no chat template" in report.warnings(1024)[0]


def test_an_answer_without_any_token_drops_its_row_with_no_word_of_a_limit(tokenizer: Any) -> None:
    rows = [pair([user("Hello")], [assistant("a")], [assistant("b")]), pair([user("Hello")], [], [])]
    kept, report = encode_records(rows, tokenizer, DataConfig(max_length=None))
    assert len(kept) == 1
    assert "1 of 2 rows dropped" in report.warnings(None)[0]
    assert "None" not in report.warnings(None)[0]


def test_no_row_left_is_an_error_that_says_what_to_do(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"none of 1 rows .* max_length 2") as caught:
        encode_records([pair("the other answer", " a", " b")], tokenizer, DataConfig(max_length=2))
    assert "--max-length" in caught.value.remedy


# what a row or a template can do wrong


def test_messages_without_a_chat_template_say_what_is_missing(tiny_llama: Path) -> None:
    with pytest.raises(DataError, match="no chat template") as caught:
        encode_record(pair([user("Hello")], [assistant("a")], [assistant("b")]), with_template(tiny_llama, None))
    assert "plain strings" in caught.value.remedy


def test_a_template_that_refuses_names_the_row_and_its_own_words(tiny_llama: Path) -> None:
    tokenizer = with_template(tiny_llama, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"row 7: .*roles must alternate"):
        encode_record(pair([user("Hello")], [assistant("a")], [assistant("b")]), tokenizer)


@pytest.mark.parametrize(
    ("prompt", "chosen"), [("Hello", [assistant("a")]), ([user("Hello")], "a")], ids=["string first", "messages first"]
)
def test_strings_and_messages_do_not_mix_in_a_row(prompt: Any, chosen: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 7: prompt and answer must both be"):
        encode_record(pair(prompt, chosen, "b"), tokenizer)
