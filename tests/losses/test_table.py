"""Every loss has an entry, a number reckoned by hand, and a docstring that says where it comes from."""

from __future__ import annotations

from mlx_dpo.losses.table import LOSSES
from support.worked_losses import PAIRWISE, REFERENCE_FREE


def test_every_loss_has_a_number_by_hand() -> None:
    elsewhere = {"sft", "aot", "aot_unpaired", "plackett_luce", "kto", "apo_zero_unpaired"}  # in tests of their own
    assert {case[0] for case in (*PAIRWISE, *REFERENCE_FREE)} | elsewhere == set(LOSSES)


def test_every_loss_says_in_one_line_what_it_is_for_and_where_it_comes_from() -> None:
    for name, spec in LOSSES.items():
        intent, _, rest = (spec.fn.__doc__ or "").partition("\n\n")
        assert intent, name
        assert "\n" not in intent, name
        assert "arXiv" in rest or "TRL" in rest or "Mitchell" in rest, name
        assert "Example:" in rest, name
