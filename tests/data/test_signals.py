"""What is known about answers becomes the pairs that a person would make of it."""

from __future__ import annotations

import pytest

from mlx_dpo.data.records import KINDS, Context, Demonstration, PreferencePair, Ranking, Unpaired
from mlx_dpo.data.signals import CONVERSIONS, SIGNALS, number, pairs, ranking, ranking_to_pairs, signal, truth
from mlx_dpo.errors import DataError, UsageError

ASKED = Context(id="q", prompt="p", tools=({"name": "add"},))
TIED = Ranking(id="q", prompt="p", responses=("a", "b", "c", "d"), ranks=(1, 2, 2, 4))
PAIR = PreferencePair(id="q", prompt="p", chosen="good", rejected="bad")


def said(made: list[PreferencePair]) -> list[tuple[str, str]]:
    return [(str(pair.chosen), str(pair.rejected)) for pair in made]


def test_the_best_stands_over_the_worst_and_the_first_of_several_that_score_the_same_counts() -> None:
    assert said(pairs(TIED, TIED.responses, [-rank for rank in TIED.ranks])) == [("a", "d")]
    assert said(ranking_to_pairs(TIED)) == [("a", "d")]
    assert said(pairs(ASKED, list("abcde"), [3.0, 1.0, 4.0, 1.5, 9.0])) == [("e", "b")]
    passed = [SIGNALS["passed"](verdict) for verdict in (False, True, "true", 0)]
    assert said(pairs(ASKED, list("abcd"), passed)) == [("b", "a")]


def test_answers_that_all_tie_give_nothing() -> None:
    assert pairs(ASKED, ["a", "b", "c"], [0.5, 0.5, 0.5]) == []
    assert pairs(ASKED, [], []) == []


def test_scores_closer_than_the_margin_give_no_pair() -> None:
    assert said(pairs(ASKED, ["a", "b", "c"], [1.0, 2.0, 4.0], margin=3.0)) == [("c", "a")]
    assert pairs(ASKED, ["a", "b"], [1.0, 2.0], margin=1.5) == []


def test_a_pair_keeps_what_belongs_to_the_prompt() -> None:
    (one,) = pairs(ASKED, ["a", "b"], [0.0, 1.0])
    assert one == PreferencePair(id="q", prompt="p", tools=({"name": "add"},), chosen="b", rejected="a")


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
