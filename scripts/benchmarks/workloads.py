"""The rows that are trained on: three lengths of preference pairs, the same batches in the same order for everyone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from mlx_dpo.data.load import load_records
from mlx_dpo.data.records import PreferencePair, Record
from mlx_dpo.data.tokenize import encode_prompt, encode_record
from mlx_dpo.errors import UsageError

Pair = dict[str, Any]
"""`prompt`, `chosen`, `rejected` as messages, and `prompt_ids`, `chosen_ids`, `rejected_ids` as tokens."""

SEED = 7
ANY = (1, 10**9)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Pairs of some files whose prompts and answers have a number of tokens in the given ranges.

    With `lengthened`, other conversations of the same files are put before a prompt that is too short.
    """

    batch: int
    max_length: int
    files: tuple[str, ...]
    prompt: tuple[int, int] = ANY
    answer: tuple[int, int] = ANY
    lengthened: bool = False


WORKLOADS = {
    "short": Workload(batch=4, max_length=1024, files=("sentiment_pairs.jsonl",)),
    "medium": Workload(batch=2, max_length=512, files=("helpful_pairs.jsonl",)),
    "prompt-heavy": Workload(
        batch=2,
        max_length=1024,
        files=("hh_train.messages.jsonl",),
        prompt=(300, 500),
        answer=(30, 80),
        lengthened=True,
    ),
}
"""Of the folder that `--data` names."""

DEMO = ("train.jsonl",)
DEMO_WORKLOADS = {
    "short": replace(WORKLOADS["short"], files=DEMO),
    "medium": replace(WORKLOADS["medium"], files=DEMO, prompt=(100, 250), lengthened=True),
    "prompt-heavy": replace(WORKLOADS["prompt-heavy"], files=DEMO, answer=ANY),
}
"""The same lengths of prompts from the preferences that come with the package; their answers are shorter."""


def workloads(folder: Path) -> dict[str, Workload]:
    """The workloads that a data folder has the files for. Raises UsageError where it has none's."""
    for table in (WORKLOADS, DEMO_WORKLOADS):
        found = {name: w for name, w in table.items() if all((folder / file).is_file() for file in w.files)}
        if found:
            return found
    files = sorted({file for w in (*WORKLOADS.values(), *DEMO_WORKLOADS.values()) for file in w.files})
    raise UsageError(f"--data {folder} has no rows for any workload", f"it needs one of {', '.join(files)}")


def batches(workload: Workload, folder: Path, tokenizer: Any, steps: int) -> list[list[Pair]]:
    """The workload's first `steps` batches: of like length each, in an order that is the same on every call.

    Raises UsageError where the files have too few fitting rows.
    """
    wanted = steps * workload.batch
    records = [r for file in workload.files for r in load_records(folder / file, "pair") if _is_chat(r)]
    pairs = [pair for record in records if (pair := _fitting(record, tokenizer, workload)) is not None]
    if workload.lengthened:
        for record in _lengthened(records, tokenizer, workload):
            if len(pairs) >= wanted:
                break
            if (pair := _fitting(record, tokenizer, workload)) is not None:
                pairs.append(pair)
    if len(pairs) < wanted:
        raise UsageError(f"{len(pairs)} rows of {', '.join(workload.files)} fit, {wanted} are wanted", "fewer --steps")
    pairs.sort(key=lambda pair: len(pair["prompt_ids"]) + len(pair["chosen_ids"]))
    cut = [pairs[i : i + workload.batch] for i in range(0, len(pairs) - workload.batch + 1, workload.batch)]
    random.Random(SEED).shuffle(cut)
    return cut[:steps]


def _is_chat(record: Record) -> TypeGuard[PreferencePair]:
    return not isinstance(record.prompt, str) and record.prompt[0]["role"] == "user" and not record.tools


def _fitting(record: PreferencePair, tokenizer: Any, workload: Workload) -> Pair | None:
    """The record as a pair; None where its lengths are others, or a token merges over the end of the prompt.

    Trainers differ in what they make of such a token; without it they all see the same ones.
    """
    row, taken_off, _ = encode_record(record, tokenizer)
    chosen, rejected = row.completions
    fits = (
        _within(len(row.prompt), workload.prompt)
        and all(_within(len(ids), workload.answer) for ids in (chosen, rejected))
        and len(row.prompt) + max(len(chosen), len(rejected)) <= workload.max_length
    )
    if taken_off or not fits or chosen == rejected:
        return None
    texts = {name: [_plain(m) for m in getattr(record, name)] for name in ("prompt", "chosen", "rejected")}
    return texts | {"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _lengthened(records: list[PreferencePair], tokenizer: Any, workload: Workload) -> Iterator[PreferencePair]:
    """Records with as many other conversations before their prompt as it takes to reach the wanted length."""
    choice = random.Random(SEED)
    least = workload.prompt[0]
    for record in records:
        longer = record
        while len(encode_prompt(tokenizer, longer)) < least:
            other = choice.choice(records)
            longer = replace(longer, prompt=(*other.prompt, *other.chosen, *longer.prompt))
        if longer is not record:
            yield longer


def _within(count: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= count <= limits[1]


def _plain(message: Any) -> dict[str, str]:
    return {"role": message["role"], "content": message["content"]}
