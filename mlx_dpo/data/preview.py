"""How a record is read: which of its tokens are prompt, which are scored, which were cut."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from mlx_dpo.config import DataConfig
from mlx_dpo.data.records import PreferencePair, Record, Unpaired
from mlx_dpo.data.tokenize import encode_record, truncate, unwrap

Role = Literal["prompt", "scored", "cut"]


class Piece(NamedTuple):
    """A run of tokens of one answer. `role` says what becomes of them: read as prompt, scored, or cut away."""

    role: Role
    tokens: int
    text: str


class Preview(NamedTuple):
    """A record as the model reads it: for each of its answers, by name, the pieces in order."""

    id: str
    answers: dict[str, list[Piece]]
    dropped: bool  # truncation leaves an answer without a scored token, so the row is left out


def preview(record: Record, tokenizer: Any, config: DataConfig) -> Preview:
    """What `encode_records` makes of one record, for people to look at; it raises what that does."""
    whole = encode_record(record, tokenizer, config.chat_template_kwargs).row
    row = truncate(whole, config.max_length, config.truncation_mode)
    decode = unwrap(tokenizer).decode
    answers = {}
    for k, ids in enumerate(whole.completions):
        start = row.starts[k] if row else len(whole.prompt)
        kept = row.completions[k] if row else []
        # keep_end cuts an answer that alone is too long at its front, keep_start every answer at its end
        front = len(ids) - len(kept) if row and config.truncation_mode == "keep_end" else 0
        runs: list[tuple[Role, list[int]]] = [
            ("cut", whole.prompt[:start]),
            ("prompt", whole.prompt[start:]),
            ("cut", ids[:front]),
            ("scored", kept),
            ("cut", ids[front + len(kept) :]),
        ]
        answers[_name(record, k)] = [Piece(role, len(run), decode(run)) for role, run in runs if run]
    return Preview(whole.id, answers, row is None)


def _name(record: Record, answer: int) -> str:
    if isinstance(record, Unpaired):
        return "good" if record.label else "bad"
    return ("chosen", "rejected")[answer] if isinstance(record, PreferencePair) else f"answer {answer + 1}"
