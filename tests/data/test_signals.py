"""What is known about answers becomes the pairs that a person would make of it."""

from __future__ import annotations

import pytest

from mlx_dpo.data.records import KINDS, Context, Demonstration, PreferencePair, Ranking, Unpaired
from mlx_dpo.data.signals import CONVERSIONS, PAIRINGS, SIGNALS, number, pairs, ranking, ranking_to_pairs, signal, truth
from mlx_dpo.errors import DataError, UsageError

ASKED = Context(id="q", prompt="p", tools=({"name": "add"},))
TIED = Ranking(id="q", prompt="p", responses=("a", "b", "c", "d"), ranks=(1, 2, 2, 4))
PAIR = PreferencePair(id="q", prompt="p", chosen="good", rejected="bad")


def said(made: list[PreferencePair]) -> list[tuple[str, str]]:
    return [(str(pair.chosen), str(pair.rejected)) for pair in made]


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("best_worst", [("a", "d")]),
        ("all_pairs", [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]),
        ("adjacent", [("a", "b"), ("c", "d")]),  # b and c tie: no pair between them
    ],
)
def test_ties_give_no_pair(pairing: str, expected: list[tuple[str, str]]) -> None:
    assert said(pairs(TIED, TIED.responses, [-rank for rank in TIED.ranks], pairing=pairing)) == expected
    assert said(ranking_to_pairs(TIED)) == [("a", "d")]


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_answers_that_all_tie_give_nothing(pairing: str) -> None:
    assert pairs(ASKED, ["a", "b", "c"], [0.5, 0.5, 0.5], pairing=pairing) == []
    assert pairs(ASKED, [], [], pairing=pairing) == []


def test_without_ties_k_answers_give_the_counted_pairs() -> None:
    answers, scores = list("abcde"), [3.0, 1.0, 4.0, 1.5, 9.0]
    counts = {name: len(pairs(ASKED, answers, scores, pairing=name)) for name in PAIRINGS}
    assert counts == {"best_worst": 1, "all_pairs": 5 * 4 // 2, "adjacent": 4}
    assert said(pairs(ASKED, answers, scores)) == [("e", "b")]


def test_scores_closer_than_the_margin_give_no_pair() -> None:
    assert said(pairs(ASKED, ["a", "b", "c"], [1.0, 2.0, 4.0], pairing="all_pairs", margin=2.0)) == [
        ("c", "a"),
        ("c", "b"),
    ]
    assert pairs(ASKED, ["a", "b"], [1.0, 2.0], margin=1.5) == []


def test_each_answer_that_passed_stands_over_each_that_failed_up_to_a_cap() -> None:
    answers, passed = ["a", "b", "c", "d"], [SIGNALS["passed"](verdict) for verdict in (True, False, "true", 0)]
    every = pairs(ASKED, answers, passed, pairing="all_pairs")
    assert said(every) == [("a", "b"), ("a", "d"), ("c", "b"), ("c", "d")]
    capped = pairs(ASKED, answers, passed, pairing="all_pairs", cap=2)
    assert {pair.chosen for pair in capped} == {"a", "c"}


def test_a_cap_keeps_the_clearest_pairs() -> None:
    assert said(pairs(ASKED, ["a", "b", "c"], [0.0, 1.0, 5.0], pairing="all_pairs", cap=1)) == [("c", "a")]


def test_pairs_keep_what_belongs_to_the_prompt_and_get_names_of_their_own() -> None:
    (one,) = pairs(ASKED, ["a", "b"], [0.0, 1.0])
    assert one == PreferencePair(id="q", prompt="p", tools=({"name": "add"},), chosen="b", rejected="a")
    assert [pair.id for pair in pairs(ASKED, ["a", "b", "c"], [0, 1, 2], pairing="all_pairs")] == [
        "q/2-1",
        "q/3-1",
        "q/3-2",
    ]


def test_of_errors_the_lowest_is_best() -> None:
    scores = [SIGNALS["error"](error) for error in (0.5, 0.1, "0.9")]
    assert ranking(ASKED, ["a", "b", "c"], scores).responses == ("b", "a", "c")


def test_equal_scores_share_a_rank_and_the_next_one_is_skipped() -> None:
    assert ranking(ASKED, ["a", "b", "c", "d"], [1, 3, 3, 0]).ranks == (1, 1, 3, 4)


@pytest.mark.parametrize(
    ("name", "answer", "score"),
    [
        ("json", ' {"a": [1]}\n', 1),
        ("json", '{"a": 1', 0),
        ("json", "Sure: {}", 0),
        ("json", "", 0),
        (r"regex:\d+ apples", " 12 apples\n", 1),
        (r"regex:\d+ apples", "12 apples, I think", 0),
        ("regex:.*end", "first line\nend", 1),
    ],
)
def test_answers_are_judged_by_whether_they_parse_or_have_the_format(name: str, answer: str, score: float) -> None:
    assert signal(name)(answer) == score


def test_an_unknown_signal_or_a_broken_pattern_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match='no signal "jsn"'):
        signal("jsn")
    with pytest.raises(UsageError, match="cannot be read"):
        signal("regex:(")


@pytest.mark.parametrize("value", [None, True, "N/A", float("nan"), float("inf"), [1]])
def test_what_is_no_number_is_no_score(value: object) -> None:
    with pytest.raises(DataError):
        number(value)


@pytest.mark.parametrize("value", [None, 2, 0.5, "maybe", []])
def test_what_is_neither_true_nor_false_is_no_verdict(value: object) -> None:
    with pytest.raises(DataError):
        truth(value)


def test_kinds_become_others_as_the_table_says() -> None:
    good, bad = (
        Unpaired(id="q/chosen", prompt="p", completion="good", label=True),
        Unpaired(id="q/rejected", prompt="p", completion="bad", label=False),
    )
    ranked = Ranking(id="q", prompt="p", responses=("good", "bad"), ranks=(1, 2))
    shown = Demonstration(id="q", prompt="p", completion="good")
    assert CONVERSIONS["pair", "unpaired"](PAIR) == [good, bad]
    assert CONVERSIONS["pair", "ranking"](PAIR) == [ranked]
    assert CONVERSIONS["ranking", "pair"](ranked) == [PAIR]
    assert CONVERSIONS["pair", "demonstration"](PAIR) == CONVERSIONS["ranking", "demonstration"](ranked) == [shown]
    assert CONVERSIONS["unpaired", "demonstration"](good) == [
        Demonstration(id="q/chosen", prompt="p", completion="good")
    ]
    assert CONVERSIONS["unpaired", "demonstration"](bad) == []
    assert {kind for conversion in CONVERSIONS for kind in conversion} <= set(KINDS)
