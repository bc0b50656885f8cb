"""Buckets of like length: nothing is lost, nothing is read twice, and the cut is the cheapest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.buckets import (
    ONE_BUCKET,
    Bucket,
    Layout,
    bucket_by_length,
    padding_share,
    prefill_steps,
    split_prompts,
    whole_sequences,
)

Reader = Callable[[Batch, int], Layout]


def some_batch(prompts: tuple[int, ...] = (5, 1, 2, 40), answers: tuple[tuple[int, ...], ...] = ()) -> Batch:
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
        for i, bucket in enumerate(others):
            yield [*others[:i], [first, *bucket], *others[i + 1 :]]


@pytest.mark.parametrize("bucket_overhead", [0, 3, 20, 1000])
def test_the_groups_are_the_cheapest_of_all(bucket_overhead: int) -> None:
    lengths = [7, 30, 1, 8, 31, 15, 0]

    def cost(buckets: list[list[int]]) -> int:
        return sum(bucket_overhead + max(lengths[i] for i in bucket) * len(bucket) for bucket in buckets)

    found = bucket_by_length(lengths, bucket_overhead)
    assert sorted(i for bucket in found for i in bucket) == list(range(len(lengths)))
    assert cost(found) == min(map(cost, partitions(list(range(len(lengths))))))


def test_one_length_is_one_group_and_nothing_costs_nothing() -> None:
    assert bucket_by_length([4, 4, 4], 0) == [[0, 1, 2]]
    assert bucket_by_length([], 5) == []


def predictors(layout: Layout, batch: Batch) -> dict[int, int]:
    """By scored token: the token that predicts it."""
    flat = np.concatenate([bucket.tokens.reshape(-1) for bucket in layout.answers])
    return {
        int(batch.completion[place]): int(flat[layout.position[place]])
        for place in zip(*np.nonzero(batch.mask), strict=True)
    }


@pytest.mark.parametrize("bucket_overhead", [0, 4, 1000])
@pytest.mark.parametrize("read", [split_prompts, whole_sequences])
def test_each_scored_token_is_predicted_by_the_token_before_it(read: Reader, bucket_overhead: int) -> None:
    batch = some_batch()
    layout = read(batch, bucket_overhead)
    expected = {}
    for r, k in np.ndindex(*batch.completion_length.shape):
        prompt = batch.prompt[r, : batch.prompt_length[r]].tolist()
        sequence = prompt + batch.completion[r, k, : batch.completion_length[r, k]].tolist()
        expected |= {b: a for a, b in itertools.pairwise(sequence) if b not in prompt}
    assert predictors(layout, batch) == expected


def test_each_token_is_read_once_but_a_prompts_last_one_for_each_answer() -> None:
    batch = some_batch()
    read = np.concatenate([bucket.tokens.reshape(-1) for bucket in split_prompts(batch, 0).buckets])
    expected: dict[int, int] = {}
    for r, k in np.ndindex(*batch.completion_length.shape):
        answer = batch.completion[r, k, : batch.completion_length[r, k]].tolist()
        expected |= dict.fromkeys(answer[:-1], 1) | dict.fromkeys(answer[-1:], 0)
    for r, length in enumerate(batch.prompt_length):
        *prompt, last = batch.prompt[r, :length].tolist()
        expected |= dict.fromkeys(prompt, 1) | {last: int((batch.completion_length[r] > 0).sum())}
    assert {token: int((read == token).sum()) for token in expected} == expected


@pytest.mark.parametrize("read", [split_prompts, whole_sequences])
def test_the_pieces_are_all_of_a_rows_states_and_lie_where_they_say(read: Reader) -> None:
    batch = some_batch()
    for r, lengths in enumerate(batch.completion_length):
        tokens = batch.prompt[r, : batch.prompt_length[r]].tolist()
        for k, count in enumerate(lengths):
            tokens += batch.completion[r, k, : max(count - 1, 0)].tolist()
        found: dict[int, set[int]] = {}
        for bucket in read(batch, 4).buckets:
            for line, pieces in zip(bucket.tokens, bucket.spans, strict=True):
                for column, row, start, count in pieces:
                    for i in range(count if row == r else 0):
                        found.setdefault(start + i, set()).add(int(line[column + i]))
        assert found == {place: {token} for place, token in enumerate(tokens)}


def test_padding_is_counted_over_what_is_read() -> None:
    """Prompts of 4 and 0 tokens without their last, answers of 3, 1, 2 and 30 with it: 4 + 36 real tokens."""
    batch = some_batch((5, 1), ((3, 1), (2, 30)))
    assert padding_share(split_prompts(batch, ONE_BUCKET).buckets) == pytest.approx(1 - 40 / (2 * 4 + 4 * 30))
    assert padding_share(split_prompts(batch, 0).buckets) == pytest.approx(2 / 42), (
        "a prompt without tokens is one of padding, and an answer of one has another"
    )


@pytest.mark.parametrize(
    ("width", "before", "size", "widths"),
    [
        (0, 0, 8, [0]),
        (5, 0, 0, [5]),
        (11, 0, 8, [11]),
        (13, 0, 8, [6, 7]),
        (400, 0, 128, [133, 133, 134]),
        (384, 640, 128, [384]),
        (1000, 500, 128, [500, 500]),
        (4096, 0, 128, [512] * 8),
    ],
)
def test_a_long_sequence_is_read_in_equal_steps(width: int, before: int, size: int, widths: list[int]) -> None:
    """Of about the size asked for, not many, and none shorter than the prompts before it."""
    steps = prefill_steps(Bucket([0], np.zeros((1, width), np.int32), [[]], before), size)
    assert [end - start for start, end in steps] == widths
    assert [start for start, _ in steps] == [0, *(end for _, end in steps[:-1])]
