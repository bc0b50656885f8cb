"""How a batch is read: prompts apart from their answers or whole sequences, in groups of like length.

One array of many sequences is as wide as the longest of them, and every block computes the padding too. A batch of
pairs is mostly padding where one answer is long; read in groups, each as wide as its own longest, it has little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlx_dpo.data.batching import Batch

SPARE = 48
"""Tokens of padding that cost as much as one more group: each block is called, and its weights are read, once more."""

NEVER = 10**9
"""More of them than any batch has: all its sequences are one group."""

Piece = tuple[int, int, int, int]
"""What lies where in a sequence: first column, row of the batch, first token of the row's states, number of tokens."""


class Group(NamedTuple):
    """Sequences that are read as one array.

    `lines` says which they are, `tokens [n, width]` has them padded on the right, `pieces` what of a row's states each
    of them holds. `before` tokens at most stand before them, in their prompts.
    """

    lines: list[int]
    tokens: np.ndarray
    pieces: list[list[Piece]]
    before: int = 0


class Layout(NamedTuple):
    """`prompts` are read first, one line a row; then `answers`, one line for each, on top of them. Without `prompts`
    the answers' lines are whole sequences.

    `before [R]` counts the tokens of a row's prompt line. `position [R, K, C]` is where, in the answers' groups
    flattened and laid end to end, that stands which predicts a completion token.
    """

    prompts: list[Group]
    answers: list[Group]
    before: np.ndarray
    position: np.ndarray

    @property
    def groups(self) -> list[Group]:
        """All of them in the order in which they are read."""
        return [*self.prompts, *self.answers]


def split(batch: Batch, spare: int = SPARE) -> Layout:
    """Prompts without their last token, which each answer begins with: it predicts the answer's first one.

    So a prompt is read for its keys and values alone, and all that is scored comes out of the answers. No prompt is
    empty.
    """
    before = batch.prompt_length - 1
    prompts = [batch.prompt[r, : before[r]] for r in range(len(before))]
    lines: list[np.ndarray] = []
    pieces: list[list[Piece]] = []
    for r, k, start in _answers(batch):
        count = int(batch.completion_length[r, k])
        last = batch.prompt[r, before[r] : before[r] + min(count, 1)]
        lines.append(np.concatenate([last, batch.completion[r, k, : max(count - 1, 0)]]))
        pieces.append([(0, r, int(before[r]), len(last)), (len(last), r, start, len(lines[-1]) - len(last))])
    groups = _groups(lines, pieces, spare)
    answers = batch.completion.shape[1]
    groups = [g._replace(before=max(1, int(before[[line // answers for line in g.lines]].max()))) for g in groups]
    own = [[(0, r, 0, len(prompt))] for r, prompt in enumerate(prompts)]
    context = np.ones(len(lines), np.int32)
    return Layout(_groups(prompts, own, spare, all_lines=True), groups, before, _position(batch, groups, context))


def whole(batch: Batch, spare: int = SPARE) -> Layout:
    """Each answer behind its prompt; the last token, which predicts nothing, is left out."""
    rows, answers, _ = batch.completion.shape
    lines: list[np.ndarray] = []
    pieces: list[list[Piece]] = []
    for r, k, start in _answers(batch):
        sequence = r * answers + k
        count, length = int(batch.completion_length[r, k]), int(batch.tokens_length[sequence])
        prompt = length - count
        lines.append(batch.tokens[sequence, : length - 1 if count else 0])
        pieces.append([(0, r, 0, prompt), (prompt, r, start, max(count - 1, 0))] if count else [])
    groups = _groups(lines, pieces, spare)
    context = batch.tokens_length - batch.completion_length.reshape(-1)
    return Layout([], groups, np.zeros(rows, np.int32), _position(batch, groups, context))


def _answers(batch: Batch) -> list[tuple[int, int, int]]:
    """Row, answer, and the first token of its own among the row's states: the prompt's, then each answer's but the
    last.
    """
    found = []
    for r, lengths in enumerate(batch.completion_length):
        start = int(batch.prompt_length[r])
        for k, count in enumerate(lengths):
            found.append((r, k, start))
            start += max(int(count) - 1, 0)
    return found


def _groups(
    sequences: Sequence[np.ndarray], pieces: Sequence[list[Piece]], spare: int, *, all_lines: bool = False
) -> list[Group]:
    lengths = [len(sequence) for sequence in sequences]
    wanted = [i for i, length in enumerate(lengths) if length or all_lines] or [0]
    groups = []
    for places in alike([lengths[i] for i in wanted], spare):
        lines = [wanted[place] for place in places]
        tokens = np.zeros((len(lines), max(1, *(lengths[i] for i in lines))), np.int32)
        for at, i in enumerate(lines):
            tokens[at, : lengths[i]] = sequences[i]
        groups.append(Group(lines, tokens, [pieces[i] for i in lines]))
    return groups


def alike(lengths: Sequence[int], spare: int) -> list[list[int]]:
    """The places of `lengths` in groups whose padded tokens, and `spare` for each group, are the fewest in sum."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cost, cut = [0], [0]
    for end in range(1, len(order) + 1):
        width = lengths[order[end - 1]]
        best = min(range(end), key=lambda start: cost[start] + width * (end - start))
        cost.append(cost[best] + width * (end - best) + spare)
        cut.append(best)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]


MOST_STEPS = 8
"""Steps in which a sequence is read at most. With so many, 7/16 of all pairs of tokens are left out, of 1/2 that are
masked; and each step keeps the keys and values of those before it for the backward pass once more."""


def prefill_steps(group: Group, size: int) -> list[tuple[int, int]]:
    """Where each step begins and ends in which a group is read: equal ones of about `size` tokens, or one for 0.

    A step is not shorter than the prompts that stand before it, whose keys and values it reads again.
    """
    width = group.tokens.shape[1]
    count = min(MOST_STEPS, max(1, round(width / max(size, group.before)))) if size else 1
    cuts = [width * i // count for i in range(count + 1)]
    return list(pairwise(cuts))


def _position(batch: Batch, groups: Sequence[Group], context: np.ndarray) -> np.ndarray:
    """`[R, K, C]`; `context [R·K]` tokens stand before an answer's first one in its line."""
    columns = batch.completion.shape[2]
    found = np.zeros((batch.completion.shape[0] * batch.completion.shape[1], columns), np.int64)
    base = 0
    for group in groups:
        width = group.tokens.shape[1]
        for at, line in enumerate(group.lines):
            found[line] = base + at * width + context[line] - 1 + np.arange(columns)
        base += group.tokens.size
    return found.reshape(batch.completion.shape)


def padding_share(groups: Iterable[Group]) -> float:
    """Share of the tokens in these groups that are padding, from 0 to 1."""
    read = real = 0
    for group in groups:
        read += group.tokens.size
        real += sum(count for pieces in group.pieces for *_, count in pieces)
    return 1 - real / read
