"""Rows to records of one kind, split by prompt: every row used, or every bad row named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlx_dpo.config import DataConfig
from mlx_dpo.data.formats import accepted_shapes, parse_prompt, parse_row
from mlx_dpo.data.records import KINDS, Context, Record, first_few, kind_of
from mlx_dpo.data.signals import CONVERSIONS
from mlx_dpo.data.sources import SPLITS, Row, json_type, one_split, read_splits
from mlx_dpo.errors import DataError, UsageError
from mlx_dpo.events import OnEvent, Warned, ignore

NAMED_ERRORS = 10  # bad rows of a file that are named one by one; the rest are counted


class Splits(NamedTuple):
    """The records of a data set by what they are for; `valid` and `test` may be empty."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]


Parsed = TypeVar("Parsed", bound=Context)


def load_records(
    source: str | Path, kind: str | None = None, *, split: str = "train", on_event: OnEvent = ignore
) -> list[Record]:
    """The records of a file, of one split of a folder or of a Hub data set, or of standard input (`-`).

    `kind` (a name in `records.KINDS`) asks for records of one kind; where the data is of another, it is converted as
    `signals.CONVERSIONS` says. Without it all rows must be of one kind, whichever.

    Raises:
        DataError: the source cannot be read, or rows of it cannot be used; all of them in one error.
    """
    rows = one_split(source, read_splits(source), split)
    return _of_kind(_parsed(rows, parse_row), [kind] if kind else list(KINDS), on_event)


def load_to_judge(data: DataConfig, kinds: Sequence[str], split: str, on_event: OnEvent = ignore) -> list[Record]:
    """The records of one split to judge a model by, all of one of the `kinds`; others are converted to the first.

    `split` auto is the test split, else the validation split, else all there is. Validation records of a source that
    has none are those that `load_splits` holds out with the same `valid_fraction` and seed.

    The source is read once, split, kind and all: standard input is empty on a second reading.

    Raises:
        DataError: the source cannot be read, has no such split, or rows of it cannot be used.
    """
    source = data.path
    rows = read_splits(source)
    if split == "auto":
        split = next(name for name in ("test", "valid", "train") if name in rows)
    held_out = split == "valid" and "valid" not in rows
    parsed = _parsed(one_split(source, rows, "train" if held_out else split), parse_row)
    records = _of_kind(parsed, kinds, on_event)
    if held_out:
        _, records = hold_out(records, data.valid_fraction, data.split_seed)
        if not records:
            raise DataError(
                f"{source} has no validation rows: none of its {len(parsed)} rows is held out",
                "Give it two or more different prompts and a valid_fraction above 0, or judge by another split.",
            )
    return records


def load_prompts(source: str | Path, *, split: str = "train") -> list[Context]:
    """The prompts alone, for sampling: of any data that `load_records` takes, or of rows that have no answer.

    Raises:
        DataError: the source cannot be read, or rows of it hold no prompt.
    """
    return [prompt for _, prompt in _parsed(one_split(source, read_splits(source), split), parse_prompt)]


def load_splits(
    source: str | Path,
    *,
    valid_fraction: float = 0.1,
    seed: int = 0,
    kind: str | None = None,
    on_event: OnEvent = ignore,
) -> Splits:
    """Training, validation and test records of a folder, a file or a Hub data set.

    Where the source has no validation split, `valid_fraction` of the prompts are held out of the training rows.

    Raises:
        DataError: the source cannot be read, or rows of it cannot be used; all of them in one error.
        UsageError: `valid_fraction` is not in [0, 1).
    """
    if not 0 <= valid_fraction < 1:
        raise UsageError(f"valid_fraction is {valid_fraction}", "It is a share of the prompts: 0 or more, below 1.")
    rows = read_splits(source)
    one_split(source, rows, "train")
    # All splits are parsed in one go, so that one error names the bad rows of every file, and then dealt out again.
    kinds = [kind] if kind else list(KINDS)
    parsed = iter(_parsed([row for there in rows.values() for row in there], parse_row))
    records = {name: _of_kind(list(islice(parsed, len(there))), kinds, on_event) for name, there in rows.items()}
    train, valid, test = (records.get(name, []) for name in SPLITS)
    if "valid" not in rows:
        train, valid = hold_out(train, valid_fraction, seed)
    return Splits(train, valid, test)


def hold_out(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Records split by prompt, in their order: those to train on, and a share of the prompts to validate with.

    Equal prompts stay on one side. Which prompts are held out depends on their texts and the seed alone, so the order
    of the rows does not matter. Of two or more prompts at least one is held out, unless `fraction` is 0, and at least
    one stays.
    """
    keys = [prompt_key(record) for record in records]
    # Prompts in the order of their hashes: no random state, so eval finds again what training held out.
    order = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    count = min(max(round(fraction * len(order)), 1), len(order) - 1) if fraction and order else 0
    held = set(order[:count])
    train = [record for record, key in zip(records, keys, strict=True) if key not in held]
    return train, [record for record, key in zip(records, keys, strict=True) if key in held]


def prompt_key(record: Record) -> str:
    """What makes two records' prompts the same: role and content of every message, whitespace around it aside.

    A record without a prompt (plain text to imitate) is known by its answer.
    """
    text = record.prompt or record.completions[0]
    if isinstance(text, str):
        return text.strip()
    return json.dumps([[m["role"], m["content"].strip(), m.get("tool_calls")] for m in text], sort_keys=True)


# Rows to records.


def _parsed(rows: Sequence[Row], parse: Callable[[Mapping[str, Any], str], Parsed]) -> list[tuple[Row, Parsed]]:
    """Every row parsed, or one error that names the bad ones."""
    parsed, errors = [], []
    for row in rows:
        if row.error or not isinstance(row.value, Mapping):
            errors.append(row if row.error else row._replace(error=f"not an object but {json_type(row.value)}"))
            continue
        try:
            parsed.append((row, parse(row.value, str(row.number))))
        except DataError as error:
            errors.append(row._replace(error=error.message))
    if errors:
        raise _bad_rows(errors, rows)
    return parsed


def _of_kind(parsed: Sequence[tuple[Row, Record]], kinds: Sequence[str], on_event: OnEvent) -> list[Record]:
    """The records of a split, all of one of the `kinds`; where the split is of another, converted to the first.

    Several kinds to choose from leave the choice to the rows, which must then agree; a single one is an order, under
    which rows of several kinds are brought together.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f'there is no kind of records "{unknown[0]}"', f"One of {', '.join(KINDS)}.")
    file = parsed[0][0].file
    there: dict[str, list[Row]] = {}
    for row, record in parsed:
        there.setdefault(kind_of(record), []).append(row)
    if len(set(kinds)) > 1 and len(there) > 1:
        raise DataError(f"{file} mixes kinds of rows: {_listed(there)}", "Split the file, or ask for one of the kinds.")
    kind = next((own for own in there if own in kinds), kinds[0]) if len(there) == 1 else kinds[0]
    others = {own: rows for own, rows in there.items() if own != kind}
    if hopeless := {own: rows for own, rows in others.items() if (own, kind) not in CONVERSIONS}:
        raise DataError(f"{file}: {kind} rows are needed, but there are {_listed(hopeless)}", accepted_shapes())
    given = [[record] if (own := kind_of(record)) == kind else CONVERSIONS[own, kind](record) for _, record in parsed]
    if empty := sum(not some for some in given):
        why = f"({_why_empty(others)})"
        if empty == len(parsed):
            raise DataError(f"{file}: none of its {empty} rows gives a {kind} row {why}")
        on_event(Warned(f"{file}: {empty} of {len(parsed)} rows give no {kind} row {why}"))
    return [record for some in given for record in some]


def _why_empty(converted: Iterable[str]) -> str:
    reasons = {"ranking": "all answers tie", "unpaired": "the answer is judged bad"}
    return ", ".join(reasons[kind] for kind in converted if kind in reasons)


def _listed(there: Mapping[str, Sequence[Row]]) -> str:
    """`300 pair rows (line 1, line 2, line 3, …), 1 ranking row (line 7)`."""
    return ", ".join(
        f"{len(rows)} {kind} {'row' if len(rows) == 1 else 'rows'} ({first_few([row.place for row in rows])})"
        for kind, rows in there.items()
    )


def _bad_rows(errors: Sequence[Row], rows: Sequence[Row]) -> DataError:
    """One error for all that is wrong, file by file."""
    lines = []
    for file in dict.fromkeys(row.file for row in errors):
        bad = [row for row in errors if row.file == file]
        lines.append(f"{file}: {len(bad)} of {sum(row.file == file for row in rows)} rows cannot be used")
        lines += [f"  {row.place}: {row.error}" for row in bad[:NAMED_ERRORS]]
        if len(bad) > NAMED_ERRORS:
            lines.append(f"  and {len(bad) - NAMED_ERRORS} more")
    return DataError("\n".join(lines), accepted_shapes())
