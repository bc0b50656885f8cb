"""Token ids to padded arrays, by length, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from mlx_dpo.config import TrainConfig
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.events import OnEvent, Progressed, ignore

WINDOW = 32
"""Micro-batches that are sorted by length together: wide enough to pad little, narrow enough to stay random."""


class Batch(NamedTuple):
    """R rows of K answers as arrays of int32; padding is 0 and lies on the right.

    `prompt [R, P]`, `prompt_length [R]`; `completion [R, K, C]`, `completion_length [R, K]` (0 where a row has fewer
    than K answers); `tokens [R·K, T]` each answer's whole sequence and `tokens_length [R·K]`; `mask [R, K, C]` 1 on
    scored completion tokens (the first token of a sequence without a prompt has nothing to be predicted from);
    `rank [R, K]` (0: no such answer); `label [R]`; `index [R]` row indices in the data set; `shares_prompt`: every
    answer continues its row's whole prompt.
    """

    prompt: np.ndarray
    prompt_length: np.ndarray
    completion: np.ndarray
    completion_length: np.ndarray
    tokens: np.ndarray
    tokens_length: np.ndarray
    mask: np.ndarray
    rank: np.ndarray
    label: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # shadows a method of tuples that nobody calls
    shares_prompt: bool


def make_batch(rows: Sequence[TokenizedRow], row_indices: Sequence[int]) -> Batch:
    """Pads rows into arrays; `row_indices` are theirs in the data set."""
    shape = len(rows), max(len(row.completions) for row in rows)
    completions: list[list[int]] = []
    contexts: list[list[int]] = []
    for row in rows:
        absent = shape[1] - len(row.completions)
        completions += [*row.completions, *[[]] * absent]
        # one token of padding in place of an absent answer: of none there would be no last position to index
        contexts += [*(row.context(k) for k in range(len(row.completions))), *[[0]] * absent]
    prompt, prompt_length = padded([row.prompt for row in rows])
    completion, completion_length = padded(completions)
    tokens, tokens_length = padded([context + ids for context, ids in zip(contexts, completions, strict=True)])
    column, first = np.arange(completion.shape[1]), np.array([not context for context in contexts])
    mask = (column >= first[:, None]) & (column < completion_length[:, None])
    return Batch(
        prompt=prompt,
        prompt_length=prompt_length,
        completion=completion.reshape(*shape, -1),
        completion_length=completion_length.reshape(shape),
        tokens=tokens,
        tokens_length=tokens_length,
        mask=mask.reshape(*shape, -1).astype(np.float32),
        rank=padded([row.ranks for row in rows], np.float32)[0],
        label=np.array([row.label for row in rows], np.int32),
        index=np.array(row_indices, np.int32),
        shares_prompt=all(row.shares_prompt for row in rows),
    )


def padded(rows: Sequence[Sequence[float]], dtype: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Rows of numbers as one array, with zeros on the right of the shorter ones, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    array = np.zeros((len(rows), lengths.max()), dtype)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return array, lengths


def length(row: TokenizedRow) -> int:
    """The length of a row's longest sequence: what its batch is padded to."""
    return len(row.prompt) + max(map(len, row.completions))


def own_length(row: TokenizedRow) -> int:
    """The same without a mismatched answer, so that rows come in the same batches with it and before it was chosen."""
    return len(row.prompt) + max(len(ids) for ids, rank in zip(row.completions, row.ranks, strict=True) if rank)


def by_length(rows: Sequence[TokenizedRow], row_indices: Iterable[int]) -> list[int]:
    """`row_indices` in an order in which neighbours pad little: by number of answers, then by length."""
    return sorted(row_indices, key=lambda i: (len(rows[i].completions), length(rows[i])))


def batches_by_length(
    rows: Sequence[TokenizedRow],
    batch_size: int,
    row_indices: Iterable[int] | None = None,
    *,
    work: str = "",
    on_event: OnEvent = ignore,
) -> Iterator[Batch]:
    """Batches that pad little, of the rows at `row_indices` (of all without them), for passes in any order.

    `on_event` hears how much of the `work` on them is done.
    """
    order = by_length(rows, range(len(rows)) if row_indices is None else row_indices)
    for start in range(0, len(order), batch_size):
        on_event(Progressed(work, start, len(order), "rows"))
        part = order[start : start + batch_size]
        yield make_batch([rows[i] for i in part], part)
    on_event(Progressed(work, len(order), len(order), "rows"))


def mismatched(rows: Sequence[TokenizedRow], batches: Sequence[Sequence[int]]) -> list[TokenizedRow]:
    """Unpaired rows with another row's answer as their second one, from which KTO estimates its KL.

    It is the answer of the row before in the same micro-batch, of the first row the last one's: TRL's KTOTrainer, and
    turned the other way Ethayarajh et al. 2024 (arXiv 2402.01306, section 4). But where that is an answer to this very
    prompt, as in pairs that became judged answers, it is no mismatch, and the estimate would follow what the row itself
    is taught: then the nearest row before it is taken that has another answer, in the micro-batch, else in the data.
    """
    answers: dict[tuple[int, ...], list[list[int]]] = {}
    for row in rows:
        answers.setdefault(tuple(row.prompt), []).append(row.completions[0])
    found = list(rows)
    for batch in batches:
        for position, i in enumerate(batch):
            in_batch = (batch[position - step] for step in range(1, len(batch)))
            in_data = ((i - step) % len(rows) for step in range(1, len(rows)))
            candidates = (rows[j] for j in chain(in_batch, in_data))
            own = answers[tuple(rows[i].prompt)]
            other = next((row for row in candidates if row.completions[0] not in own), rows[i - 1])
            found[i] = rows[i]._replace(
                completions=rows[i].completions + other.completions, starts=rows[i].starts * 2, ranks=(1.0, 0.0)
            )
    return found


def order_batches(
    rows: Sequence[TokenizedRow], batch_size: int, *, seed: int, epoch: int, shuffle: bool
) -> list[list[int]]:
    """The micro-batches of one epoch as row indices: a pure function of its arguments, so a run can resume.

    Every row comes exactly once. Shuffled, rows are dealt at random into windows, sorted by number of answers and by
    length inside a window, cut into batches, and the batches shuffled again: little padding, other batches in every
    epoch, and no drift from short to long (which hurts learning). The last batch may be smaller.
    """
    row_indices = list(range(len(rows)))
    if not shuffle:
        return [row_indices[i : i + batch_size] for i in range(0, len(row_indices), batch_size)]
    random = np.random.default_rng([seed, epoch])  # no running state: a resumed run has not drawn the earlier epochs
    random.shuffle(row_indices)
    window = WINDOW * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(row_indices), window):
        part = row_indices[start : start + window]
        part.sort(key=lambda i: (len(rows[i].completions), own_length(rows[i])))
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    random.shuffle(batches)
    return batches


def epoch_batches(rows: Sequence[TokenizedRow], train: TrainConfig, epoch: int) -> list[list[int]]:
    """The micro-batches of one epoch over the rows that a run trains on."""
    return order_batches(rows, train.batch_size, seed=train.seed, epoch=epoch, shuffle=train.shuffle)


def steps_of(rows: int, train: TrainConfig) -> tuple[int, int]:
    """The optimizer steps of an epoch over so many rows, and of the run. The last of an epoch may be a smaller one."""
    an_epoch = ceil(ceil(rows / train.batch_size) / train.grad_accumulation_steps)
    return an_epoch, train.iters or ceil(train.epochs * an_epoch)


def visited_batches(rows: Sequence[TokenizedRow], train: TrainConfig, epochs: int = 8) -> list[list[int]]:
    """The micro-batches that a run comes to, as far as its first `epochs` have them; later ones have the same rows."""
    an_epoch, total = steps_of(len(rows), train)
    return [
        batch
        for epoch in range(min(epochs, ceil(total / an_epoch)))
        for batch in epoch_batches(rows, train, epoch)[: (total - epoch * an_epoch) * train.grad_accumulation_steps]
    ]
