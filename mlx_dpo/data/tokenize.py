"""Records to token ids: chat template, the boundary between prompt and completion, truncation.

What is scored is decided here: every id in `TokenizedRow.completions` counts, none of the prompt does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from mlx_dpo.config import DataConfig
from mlx_dpo.data import template
from mlx_dpo.data.reasoning import Finding, examine_answers, remedies, sentences
from mlx_dpo.data.records import Context, Ranking, Record, Text, Unpaired, first_few
from mlx_dpo.data.template import shared_prefix, unwrap
from mlx_dpo.errors import DataError

Given = TypeVar("Given")


class TokenizedRow(NamedTuple):
    """One prompt and its K answers as token ids.

    Answer k is read as `prompt[starts[k]:] + completions[k]` and its loss counts `completions[k]` alone. `starts` is 0
    everywhere unless truncation kept the end. `ranks` are 1 and 2 for a pair, the given ranks for a ranking, 1 for a
    single answer; `label` is +1 or -1 for an unpaired row and 0 otherwise.
    """

    id: str
    prompt: list[int]
    completions: tuple[list[int], ...]
    starts: tuple[int, ...]
    ranks: tuple[float, ...]
    label: int = 0

    def context(self, answer: int) -> list[int]:
        """The prompt tokens that answer `answer` sees."""
        return self.prompt[self.starts[answer] :]

    @property
    def shares_prompt(self) -> bool:
        """Whether all answers continue the same, non-empty prompt."""
        return bool(self.prompt) and not any(self.starts)


@dataclass
class EncodeReport:
    """What tokenizing did to the rows: counted, so that nothing is cut in silence."""

    rows: int = 0
    kept: int = 0
    dropped: list[str] = field(default_factory=list)  # ids of rows without a completion token left
    cut_rows: int = 0
    cut_tokens: int = 0
    lost_eos: int = 0  # answers whose end of sequence was cut away
    boundary_merges: int = 0  # rows whose prompt was shortened, since its end tokenizes differently before an answer
    boundary_example: str = ""
    untemplated: int = 0  # rows of strings, which the arguments given to the chat template do not reach
    prompt_tokens: int = 0
    completion_tokens: int = 0
    longest: int = 0
    findings: list[Finding] = field(default_factory=list)  # what the chat template did to answers
    remedies: Mapping[str, str] = field(default_factory=dict)  # what to do about each kind of finding

    def count(self, whole: TokenizedRow, row: TokenizedRow, eos: int | None) -> None:
        """Adds a row that is kept as `row` and was `whole` before truncation."""
        self.kept += 1
        lengths = [len(row.context(k)) + len(ids) for k, ids in enumerate(row.completions)]
        lost = sum(len(whole.prompt) + len(ids) for ids in whole.completions) - sum(lengths)
        self.cut_rows += lost > 0
        self.cut_tokens += lost
        if lost:
            pairs = zip(whole.completions, row.completions, strict=True)
            self.lost_eos += sum(eos in before and eos not in after for before, after in pairs)
        self.prompt_tokens += len(row.prompt)
        self.completion_tokens += sum(map(len, row.completions))
        self.longest = max(self.longest, *lengths)

    def warnings(self, max_length: int | None) -> list[str]:
        """Sentences for the log on what was cut, dropped or left unread; empty when every row went in whole."""
        said = []
        if self.dropped:
            limit = f" within max_length {max_length}" if max_length is not None else ""
            said.append(
                f"{len(self.dropped)} of {self.rows} rows dropped: no completion token is left{limit} "
                f"({first_few(self.dropped, 5)})"
            )
        if self.cut_rows:
            said.append(
                f"{self.cut_rows} of {self.kept} rows cut to max_length {max_length}: {self.cut_tokens} tokens lost, "
                f"{self.lost_eos} answers lost their end-of-sequence token"
            )
        if self.boundary_merges:
            said.append(
                f"in {self.boundary_merges} of {self.rows} rows the prompt's end tokenizes otherwise before an answer; "
                f"it counts as part of the answer (first: {self.boundary_example!r})"
            )
        if self.untemplated:
            said.append(
                f"{self.untemplated} of {self.rows} rows are plain strings, which go through no chat template: "
                "chat_template_kwargs (or --thinking) do nothing to them"
            )
        return said

    def template_warnings(self, names: int) -> list[str]:
        """A sentence for each kind of thing that the chat template did to answers, with the first `names` rows."""
        return sentences(self.findings, self.remedies, self.rows, names=names)


def template_warning(*reports: EncodeReport) -> list[str]:
    """One sentence on all that the chat template did to the answers of these rows; empty where it did nothing."""
    findings = [finding for report in reports for finding in report.findings]
    remedies = next((report.remedies for report in reports if report.findings), {})
    told = sentences(findings, remedies, sum(report.rows for report in reports), names=3)
    return ["; ".join(told) + " (mlx-dpo check names more rows)"] if told else []


def encode_text(tokenizer: Any, text: Text, *, generation_prompt: bool = False, **arguments: Any) -> list[int]:
    """Token ids of a string, or of messages through the chat template, which gets the `arguments`."""
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    ids = tokenizer.apply_chat_template(
        template.template_messages(text),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=generation_prompt,
        **arguments,
    )
    return list(ids["input_ids"])


def encode_prompt(tokenizer: Any, record: Context, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a record's prompt, ready for an answer to be generated after it."""
    tokenizer = unwrap(tokenizer)
    if isinstance(record.prompt, str):
        return encode_text(tokenizer, record.prompt)
    arguments = template.arguments(tokenizer, chat_template_kwargs, record)
    return encode_text(tokenizer, record.prompt, generation_prompt=True, **arguments)


class Encoded(NamedTuple):
    """A record as token ids, before truncation.

    `taken_off` are the prompt's last tokens, where the same text is other tokens before an answer; `found` is what the
    chat template did to the answers.
    """

    row: TokenizedRow
    taken_off: list[int]
    found: list[Finding]


def encode_record(record: Record, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> Encoded:
    """One record as token ids, and what the boundary rule and the chat template did to it.

    The prompt is the longest prefix that the tokenized prompt shares with every tokenized prompt + answer, so a token
    that merges over the boundary belongs to the answer (TRL 1.16's rule). An empty think block is prompt besides,
    whether the template writes it at the generation prompt or before an answer without reasoning: no answer says it.
    Strings get the end-of-sequence token appended unless they end in it; for messages the template decides.
    Raises DataError where the template refuses the messages, or the model has none.
    """
    tokenizer = unwrap(tokenizer)
    if any(isinstance(answer, str) != isinstance(record.prompt, str) for answer in record.completions):
        raise DataError(f"row {record.id}: prompt and answer must both be strings or both be messages")
    # Prompt and whole are encoded apart and compared, never prompt and answer joined as ids: a tokenizer may merge over
    # the boundary, and a template may write a turn that waits for its answer otherwise than one that has it.
    if isinstance(record.prompt, str):
        prompt_ids, wholes = encode_prompt(tokenizer, record), _encode_strings(tokenizer, record)
        merges, found = True, []
    else:
        arguments = template.arguments(tokenizer, chat_template_kwargs, record)
        rendered = _guard(record, tokenizer, lambda: template.render_record(record, tokenizer, **arguments))
        prompt_ids, wholes = _guard(record, tokenizer, lambda: _encode_rendered(tokenizer, record, rendered, arguments))
        merges = rendered.prompt is not None or rendered.shared == len(rendered.generation)
        found = examine_answers(record, rendered, tokenizer)
    shared = shared_prefix(prompt_ids, *wholes)
    completions = tuple(whole[shared:] for whole in wholes)
    ranks = record.ranks if isinstance(record, Ranking) else tuple(float(k + 1) for k in range(len(completions)))
    label = (1 if record.label else -1) if isinstance(record, Unpaired) else 0
    row = TokenizedRow(record.id, prompt_ids[:shared], completions, (0,) * len(completions), ranks, label)
    return Encoded(row, prompt_ids[shared:] if merges else [], found)


def truncate(row: TokenizedRow, max_length: int | None, mode: str) -> TokenizedRow | None:
    """The row cut to `max_length` tokens an answer; None where an answer would have no scored token left.

    `keep_start` cuts the ends of answers, `keep_end` the beginning of the prompt, as much as each answer needs.
    """
    if max_length is None or len(row.prompt) + max(map(len, row.completions)) <= max_length:
        cut = row
    elif mode == "keep_start":
        room = max_length - len(row.prompt)
        if room <= 0:
            return None
        cut = row._replace(completions=tuple(ids[:room] for ids in row.completions))
    else:
        starts = tuple(min(max(len(row.prompt) + len(ids) - max_length, 0), len(row.prompt)) for ids in row.completions)
        cut = row._replace(starts=starts, completions=tuple(ids[-max_length:] for ids in row.completions))
    # Without a prompt token before it the first token has nothing to be predicted from, so it is not scored.
    scored = [len(ids) - (not cut.context(k)) for k, ids in enumerate(cut.completions)]
    return cut if min(scored) > 0 else None


def encode_records(
    records: Iterable[Record], tokenizer: Any, config: DataConfig
) -> tuple[list[TokenizedRow], EncodeReport]:
    """All records as token ids, cut to `config.max_length`, and the count of what was cut or dropped.

    Raises DataError where no row has a completion token left.
    """
    rows: list[TokenizedRow] = []
    report = EncodeReport()
    hf = unwrap(tokenizer)
    given = config.chat_template_kwargs
    template.check_arguments(tokenizer, given)
    for record in records:
        whole, taken_off, found = encode_record(record, tokenizer, given)
        report.rows += 1
        report.findings += found
        report.untemplated += bool(given) and isinstance(record.prompt, str)
        if taken_off:
            report.boundary_merges += 1
            report.boundary_example = report.boundary_example or hf.decode(taken_off)
        row = truncate(whole, config.max_length, config.truncation_mode)
        if row is None:
            report.dropped.append(whole.id)
            continue
        report.count(whole, row, hf.eos_token_id)
        rows.append(row)
    if report.findings:
        report.remedies = remedies(hf, **template.arguments(hf, given))
    if not rows:
        limit = f" left within max_length {config.max_length}" if config.max_length is not None else ""
        raise DataError(
            f"none of {report.rows} rows has a completion token{limit}",
            "raise --max-length, or shorten the prompts" if limit else "",
        )
    return rows, report


def _encode_strings(tokenizer: Any, record: Record) -> list[list[int]]:
    eos = tokenizer.eos_token or ""
    ended = [answer if str(answer).endswith(eos) else f"{answer}{eos}" for answer in record.completions]
    return [encode_text(tokenizer, f"{record.prompt}{answer}") for answer in ended]


def _encode_rendered(
    tokenizer: Any, record: Record, rendered: template.Rendered, arguments: Mapping[str, Any]
) -> tuple[list[int], list[list[int]]]:
    """The prompt as token ids, and prompt + answer for each answer.

    A tokenizer that encodes messages in a way of its own (Mistral's, Kimi's) is left to it, without a think block.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        wholes = [encode_text(tokenizer, (*record.prompt, *answer), **arguments) for answer in record.completions]
        return encode_text(tokenizer, record.prompt, generation_prompt=True, **arguments), wholes

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = rendered.generation if rendered.prompt is None else rendered.prompt
    return encode(prompt), [encode(text) for text in rendered.read()]


def _guard(record: Record, tokenizer: Any, encode: Callable[[], Given]) -> Given:
    """Template errors come from the data or the model's template: say which row, instead of a traceback."""
    from jinja2.exceptions import TemplateError

    try:
        return encode()
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        if not isinstance(record.prompt, str) and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the data holds messages, but the model's tokenizer has no chat template",
                "use an instruction-tuned model, or give prompt, chosen and rejected as plain strings",
            ) from error
        raise DataError(
            f"row {record.id}: the model's chat template refuses its messages: {error}",
            "most templates want user and assistant in turns, and some no system message",
        ) from error
