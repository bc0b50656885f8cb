"""Groups of like length: nothing is lost, nothing is read twice, and the cut is the cheapest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from mlx_dpo.batching import Batch, make_batch
from mlx_dpo.encode import TokenizedRow
from mlx_dpo.layout import Layout, alike, split, whole


def some_batch(prompts: tuple[int, ...] = (5, 1, 0, 40), answers: tuple[tuple[int, ...], ...] = ()) -> Batch:
    """Every token a number of its own."""
    numbers = itertools.count(1)
    lengths = answers or ((3, 1), (2, 30), (1, 4), (2,))
    rows = [
        TokenizedRow(
            f"row {prompt}",
            [next(numbers) for _ in range(prompt)],
            tuple([next(numbers) for _ in range(count)] for count in counts),
            (0,) * len(counts),
            tuple(1.0 for _ in counts),
        )
        for prompt, counts in zip(prompts, lengths, strict=True)
    ]
    return make_batch(rows, range(len(rows)))


def partitions(places: list[int]) -> Iterator[list[list[int]]]:
    if not places:
        yield []
        return
    first, *rest = places
    for others in partitions(rest):
        yield [[first], *others]
        for i, group in enumerate(others):
            yield [*others[:i], [first, *group], *others[i + 1 :]]


@pytest.mark.parametrize("spare", [0, 3, 20, 1000])
def test_the_groups_are_the_cheapest_of_all(spare: int) -> None:
    lengths = [7, 30, 1, 8, 31, 15, 0]

    def cost(groups: list[list[int]]) -> int:
        return sum(spare + max(lengths[i] for i in group) * len(group) for group in groups)

    found = alike(lengths, spare)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    assert cost(found) == min(map(cost, partitions(list(range(len(lengths))))))


def test_one_length_is_one_group_and_nothing_costs_nothing() -> None:
    assert alike([4, 4, 4], 0) == [[0, 1, 2]]
    assert alike([], 5) == []


def predictors(layout: Layout, batch: Batch) -> dict[int, int]:
    """By scored token: the token that predicts it."""
    flat = np.concatenate([group.tokens.reshape(-1) for group in layout.answers])
    return {
        int(batch.completion[place]): int(flat[layout.position[place]])
        for place in zip(*np.nonzero(batch.mask), strict=True)
    }


@pytest.mark.parametrize("spare", [0, 4, 1000])
@pytest.mark.parametrize("read", [split, whole])
def test_each_scored_token_is_predicted_by_the_token_before_it(read: type, spare: int) -> None:
    batch = some_batch()
    layout: Layout = read(batch, spare)
    expected = {}
    for r, k in np.ndindex(*batch.completion_length.shape):
        prompt = batch.prompt[r, : batch.prompt_length[r]].tolist()
        sequence = prompt + batch.completion[r, k, : batch.completion_length[r, k]].tolist()
        expected |= {b: a for a, b in itertools.pairwise(sequence) if b not in prompt}
    assert predictors(layout, batch) == expected


def test_no_token_of_a_prompt_is_read_twice_but_the_last_one() -> None:
    batch = some_batch()
    layout = split(batch, 0)
    read = np.concatenate([group.tokens.reshape(-1) for group in layout.groups])
    times = np.bincount(read[read > 0])
    last = {
        int(batch.prompt[r, n - 1]): int((batch.completion_length[r] > 0).sum())
        for r, n in enumerate(batch.prompt_length)
        if n
    }
    for token in range(1, len(times)):
        assert times[token] <= last.get(token, 1)


@pytest.mark.parametrize("read", [split, whole])
def test_the_pieces_are_all_of_a_rows_states(read: type) -> None:
    prompts, counts = (5, 1, 40), ((3, 1), (2, 30), (2, 2))
    batch = some_batch(prompts, counts)
    wanted = [prompt + sum(n - 1 for n in answers) for prompt, answers in zip(prompts, counts, strict=True)]
    seen = [np.zeros(count, bool) for count in wanted]
    for group in read(batch, 0).groups:
        for line, pieces in zip(group.lines, group.pieces, strict=True):
            assert line >= 0
            for _, row, start, count in pieces:
                assert start + count <= wanted[row]
                seen[row][start : start + count] = True
    assert all(row.all() for row in seen)
