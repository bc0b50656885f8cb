"""`mlx-dpo sft` is `train` with another loss."""

from __future__ import annotations

from mlx_dpo.config import RunConfig
from support.command_line import call


def test_sft_is_training_with_the_loss_that_imitates(trained: list[tuple[RunConfig, bool]]) -> None:
    call("sft", "--model", "m", "--data", "d", "--rank", "4")
    config, _ = trained[0]
    assert (config.loss.type, config.lora.rank) == ("sft", 4)
