"""How a record is read: which of its tokens are prompt, which are scored, which were cut."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from mlx_dpo.config import DataConfig, ModelConfig
from mlx_dpo.data.records import Record, Unpaired
from mlx_dpo.data.tokenize import encode_record, truncate, unwrap
from mlx_dpo.errors import ModelError
from mlx_dpo.models.load import model_folder


class Piece(NamedTuple):
    """A run of tokens of one answer. `role` says what becomes of them: read as prompt, scored, or cut away."""

    role: Literal["prompt", "scored", "cut"]
    tokens: int
    text: str


class Preview(NamedTuple):
    """A record as the model reads it: for each of its answers, by name, the pieces in order."""

    id: str
    answers: dict[str, list[Piece]]
    dropped: bool  # truncation leaves an answer without a scored token, so the row is left out


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a model, with its chat template; the weights are left where they are.

    Raises:
        ModelError: there is no such model, or its tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    folder = model_folder(config.path, config.revision)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers and the model's own code raise of every kind
        raise ModelError(f"the tokenizer in {folder} cannot be read: {error}", "fetch the model again") from error


def preview(record: Record, tokenizer: Any, config: DataConfig) -> Preview:
    """What `encode_records` makes of one record, for people to look at.

    Raises:
        DataError: the chat template refuses the messages.
    """
    whole, _ = encode_record(record, tokenizer)
    row = truncate(whole, config.max_length, config.truncation_mode)
    decode = unwrap(tokenizer).decode
    answers = {}
    for k, ids in enumerate(whole.completions):
        start = row.starts[k] if row else len(whole.prompt)
        kept = row.completions[k] if row else []
        front = len(ids) - len(kept) if row and config.truncation_mode == "keep_end" else 0
        runs: list[tuple[Literal["prompt", "scored", "cut"], list[int]]] = [
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
    names = ("chosen", "rejected") if type(record).__name__ == "PreferencePair" else ()
    return names[answer] if answer < len(names) else f"answer {answer + 1}"
