"""`mlx-dpo sft`: supervised fine-tuning on the same loop, the stage before DPO."""

from __future__ import annotations

from mlx_dpo.cli.flags import Asked, with_settings
from mlx_dpo.cli.options import Quiet
from mlx_dpo.cli.train import Resume, run_training
from mlx_dpo.settings import Given


@with_settings("model", "data", "lora", "optim", "train")
def sft(asked: Asked, resume: Resume = False, quiet: Quiet = False) -> None:
    """Teach a model to imitate answers, before preferences or without.

    \b
    [bold]Examples[/bold]
      mlx-dpo sft --model MODEL --data answers.jsonl --output runs/sft
      mlx-dpo train --model MODEL --data pairs.jsonl --adapter runs/sft --reference start --output runs/dpo

    It takes prompts with completions, conversations, plain text, and of preferences the preferred answer.
    The second command is the paper's way: DPO whose reference is the model that was fine-tuned first.
    """
    run_training(asked._replace(flags=[*asked.flags, Given("sft", "loss.type", "sft")]), resume=resume, quiet=quiet)
