"""Early stopping: a run ends when its held-out loss has not become better for some evaluations."""

from __future__ import annotations

from mlx_dpo.config import TrainConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.training.checkpoint import TrainerState


def stops_early(config: TrainConfig, state: TrainerState) -> bool:
    """Whether the last `early_stopping_patience` evaluations were all no better than one before them.

    As in transformers' EarlyStoppingCallback, the evaluation before the first step is no rival: the first one after it
    is the best so far. All of it is read off the state, so a resumed run decides as a straight one does.
    """
    patience = config.early_stopping_patience
    return patience is not None and sum(found["step"] > state.best_step for found in state.evaluations) >= patience


def check_early_stopping(config: TrainConfig, held_out: int, total_steps: int) -> None:
    """Refuses a patience that nothing could ever exhaust; `held_out` is the number of rows held out.

    Raises:
        UsageError: nothing is held out, or the first evaluation is the one at the end.
    """
    if config.early_stopping_patience is None:
        return
    if not held_out:
        raise UsageError(
            "--early-stopping-patience: nothing is held out, so no loss can say when to stop",
            "hold out a share of the prompts (--valid-fraction 0.1), or put a valid file beside the training file",
        )
    if not config.steps_per_eval or config.steps_per_eval >= total_steps:
        raise UsageError(
            f"--early-stopping-patience: the run takes {total_steps} steps, and nothing is evaluated before the last",
            f"evaluate more often: --steps-per-eval {max(1, total_steps // 10)}",
        )
