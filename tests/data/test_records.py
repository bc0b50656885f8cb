"""A record gives its answers in the order in which losses expect them, and knows its kind."""

from __future__ import annotations

import pytest

from mlx_dpo.data.records import KINDS, Context, Demonstration, PreferencePair, Ranking, Record, Unpaired, kind_of


@pytest.mark.parametrize(
    ("record", "kind", "completions"),
    [
        (PreferencePair(id="1", prompt="p", chosen="c", rejected="r"), "pair", ("c", "r")),
        (Ranking(id="1", prompt="p", responses=("a", "b", "c"), ranks=(1, 2, 2)), "ranking", ("a", "b", "c")),
        (Unpaired(id="1", prompt="p", completion="a", label=False), "unpaired", ("a",)),
        (Demonstration(id="1", prompt="p", completion="a"), "demonstration", ("a",)),
    ],
)
def test_each_kind_has_its_name_and_its_answers(record: Record, kind: str, completions: tuple[str, ...]) -> None:
    assert (kind_of(record), record.completions) == (kind, completions)
    assert KINDS[kind] is type(record)


def test_a_prompt_alone_has_no_answers() -> None:
    with pytest.raises(TypeError, match="Context holds no answer"):
        _ = Context(id="1", prompt="p").completions


def test_records_are_equal_whatever_shape_they_were_written_in() -> None:
    one = Demonstration(id="1", prompt="p", completion="a", shape="text")
    assert one == Demonstration(id="1", prompt="p", completion="a", shape="demonstration")
