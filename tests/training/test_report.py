"""What a run warns of, and that it says what to do."""

from __future__ import annotations

from mlx_dpo.training.checkpoint import TrainerState
from mlx_dpo.training.report import warn_of_drift


def test_a_falling_chosen_log_prob_is_told_once_with_what_to_do() -> None:
    state = TrainerState()
    assert warn_of_drift(state, {"logps/chosen": -105.0, "logps/chosen_drift": -5.0}) is None
    said = warn_of_drift(state, {"logps/chosen": -130.0, "logps/chosen_drift": -30.0})
    assert said and "-100.0 → -130.0" in said and "sigmoid:1,sft:0.2" in said
    assert warn_of_drift(state, {"logps/chosen": -130.0, "logps/chosen_drift": -30.0}) is None, "once"
