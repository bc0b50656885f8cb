"""Rows become padded arrays without losing or moving a token, in an order that visits each once and can be resumed."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from mlx_dpo.data.batching import WINDOW, length, make_batch, mismatched, order_batches
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.buckets import ONE_BUCKET, padding_share, whole_sequences


def row(prompt: int, *answers: int, starts: tuple[int, ...] = (), ranks: tuple[float, ...] = ()) -> TokenizedRow:
    """A row with that many tokens of prompt and of each answer; every token another number."""
    ids = iter(range(100, 1000))
    return TokenizedRow(
        "row",
        [next(ids) for _ in range(prompt)],
        tuple([next(ids) for _ in range(count)] for count in answers),
        starts or (0,) * len(answers),
        ranks or tuple(float(k + 1) for k in range(len(answers))),
    )


# arrays


def test_every_token_stands_where_its_length_says() -> None:
    rows = [row(2, 3, 1), row(4, 1, 2)]
    batch = make_batch(rows, [7, 5])
    assert batch.prompt.shape == (2, 4)
    assert batch.completion.shape == batch.mask.shape == (2, 2, 3)
    assert batch.tokens.shape == (4, 6)
    assert batch.index.tolist() == [7, 5]
    assert batch.shares_prompt
    for r, whole in enumerate(rows):
        assert batch.prompt[r, : batch.prompt_length[r]].tolist() == whole.prompt
        for k, ids in enumerate(whole.completions):
            assert batch.completion[r, k, : batch.completion_length[r, k]].tolist() == ids
            assert batch.mask[r, k].tolist() == [1] * len(ids) + [0] * (3 - len(ids))
            assert batch.tokens[2 * r + k, : batch.tokens_length[2 * r + k]].tolist() == whole.prompt + ids
    assert batch.rank.tolist() == [[1, 2], [1, 2]]


def test_padding_is_zero_and_on_the_right() -> None:
    batch = make_batch([row(2, 3, 1), row(4, 1, 2)], [0, 1])
    assert batch.prompt[0, 2:].tolist() == [0, 0]
    assert batch.completion[0, 1, 1:].tolist() == [0, 0]
    assert batch.tokens[1, 3:].tolist() == [0, 0, 0]


def test_the_first_token_of_an_answer_without_prompt_is_not_scored() -> None:
    batch = make_batch([row(0, 3, 2)], [0])
    assert batch.mask[0].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert not batch.shares_prompt


def test_an_answer_whose_prompt_was_cut_at_the_beginning_keeps_its_own_context() -> None:
    whole = row(4, 3, 1, starts=(2, 0))
    batch = make_batch([whole], [0])
    assert batch.tokens[0, :5].tolist() == whole.prompt[2:] + whole.completions[0]
    assert batch.tokens[1, :5].tolist() == whole.prompt + whole.completions[1]
    assert not batch.shares_prompt


def test_a_row_with_fewer_answers_has_empty_places() -> None:
    batch = make_batch([row(2, 3, 1, 2, ranks=(1, 2, 2)), row(1, 1, 1)], [0, 1])
    assert batch.rank.tolist() == [[1, 2, 2], [1, 2, 0]]
    assert batch.completion_length[1].tolist() == [1, 1, 0]
    assert batch.mask[1, 2].tolist() == [0, 0, 0]


def test_eight_rows_lie_as_in_trls_collator(golden: Path) -> None:
    """TRL stacks the chosen sequences over the rejected ones; here a row's answers lie beside each other."""
    case = json.loads((golden / "golden.json").read_text())["cases"]["llama/standard"]
    rows = [
        TokenizedRow("", pair["prompt_ids"], (pair["chosen_ids"], pair["rejected_ids"]), (0, 0), (1.0, 2.0))
        for pair in case["pairs"][:8]
    ]
    batch = make_batch(rows, range(8))
    trl = {
        name: np.array(values)
        for name, values in case["collated_batch_first8"].items()
        if name.endswith(("ids", "mask"))
    }
    stacked = np.concatenate([batch.tokens[0::2], batch.tokens[1::2]])
    lengths = np.concatenate([batch.tokens_length[0::2], batch.tokens_length[1::2]])
    scored = np.concatenate([batch.mask[:, 0].sum(-1), batch.mask[:, 1].sum(-1)])
    np.testing.assert_array_equal(stacked, trl["input_ids"])
    np.testing.assert_array_equal(lengths, trl["attention_mask"].sum(-1))
    np.testing.assert_array_equal(scored, trl["completion_mask"].sum(-1))


# order


def rows_of_many_lengths(count: int) -> list[TokenizedRow]:
    random = np.random.default_rng(0)
    return [row(int(n), 2, 3) for n in random.integers(1, 90, count)]


@pytest.mark.parametrize(("count", "batch_size"), [(100, 8), (7, 8), (1, 1), (33, 1), (600, 4)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_an_epoch(count: int, batch_size: int, shuffle: bool) -> None:
    batches = order_batches(rows_of_many_lengths(count), batch_size, seed=0, epoch=0, shuffle=shuffle)
    assert sorted(chain(*batches)) == list(range(count))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-count // batch_size)


def test_the_order_depends_on_nothing_but_seed_and_epoch() -> None:
    rows = rows_of_many_lengths(100)
    first = order_batches(rows, 4, seed=3, epoch=2, shuffle=True)
    np.random.seed(99)
    np.random.rand()
    assert order_batches(rows, 4, seed=3, epoch=2, shuffle=True) == first
    assert order_batches(rows, 4, seed=3, epoch=3, shuffle=True) != first
    assert order_batches(rows, 4, seed=4, epoch=2, shuffle=True) != first


def test_epochs_put_other_rows_together() -> None:
    rows = rows_of_many_lengths(300)
    together = [
        {frozenset(batch) for batch in order_batches(rows, 2, seed=0, epoch=epoch, shuffle=True)} for epoch in (0, 1)
    ]
    assert len(together[0] & together[1]) < 30, "of 150 batches few are the same"


def test_unshuffled_rows_come_in_file_order_every_epoch() -> None:
    rows = rows_of_many_lengths(5)
    for epoch in (0, 1):
        assert order_batches(rows, 2, seed=0, epoch=epoch, shuffle=False) == [[0, 1], [2, 3], [4]]


def test_batches_are_of_like_length_but_do_not_drift_from_short_to_long() -> None:
    rows = rows_of_many_lengths(4 * WINDOW * 4)
    batches = order_batches(rows, 4, seed=0, epoch=0, shuffle=True)
    in_file_order = order_batches(rows, 4, seed=0, epoch=0, shuffle=False)

    def padding(cut: list[list[int]]) -> float:
        made = [make_batch([rows[i] for i in batch], batch) for batch in cut]
        return padding_share(bucket for batch in made for bucket in whole_sequences(batch, ONE_BUCKET).buckets)

    assert padding(batches) < padding(in_file_order) / 5
    means = [np.mean([length(rows[i]) for i in batch]) for batch in batches]
    assert abs(np.corrcoef(range(len(means)), means)[0, 1]) < 0.25


# mismatched answers, for KTO


def judged(prompts: str) -> list[TokenizedRow]:
    """A judged row for each letter, its prompt; answers are numbers of their own."""
    return [TokenizedRow(str(i), [ord(p)], ([10 + i],), (0,), (1.0,), 1) for i, p in enumerate(prompts)]


def test_a_mismatched_answer_is_that_of_the_row_before_in_its_micro_batch() -> None:
    found = mismatched(judged("abcde"), [[0, 2, 4], [3, 1]])
    assert [row.completions for row in found] == [([10], [14]), ([11], [13]), ([12], [10]), ([13], [11]), ([14], [12])]
    assert [row.ranks for row in found] == [(1.0, 0.0)] * 5, "it is no answer to judge"
    assert all(row.starts == (0, 0) for row in found)


def test_a_mismatched_answer_never_answers_its_own_prompt() -> None:
    found = mismatched(judged("aabb"), [[0, 1], [2, 3]])
    assert [row.completions[1] for row in found] == [[13], [13], [11], [11]], "the nearest before it in the data"
    inside = mismatched(judged("aabb"), [[0, 1, 2, 3]])
    assert [row.completions[1] for row in inside] == [[13], [13], [11], [11]]


def test_one_prompt_in_all_the_data_leaves_no_choice() -> None:
    assert [row.completions[1] for row in mismatched(judged("aaa"), [[0, 1, 2]])] == [[12], [10], [11]]


def test_the_batches_of_an_epoch_do_not_change_with_the_mismatched_answers() -> None:
    rows = [row._replace(completions=([1] * (1 + i % 7),)) for i, row in enumerate(judged("abcdefgh" * 5))]
    batches = order_batches(rows, 4, seed=1, epoch=0, shuffle=True)
    assert order_batches(mismatched(rows, batches), 4, seed=1, epoch=0, shuffle=True) == batches
