"""What a training run says to people: the facts before the first step, and its warnings."""

from __future__ import annotations

from math import log, sqrt

from mlx_dpo.config import RunConfig
from mlx_dpo.data.batching import make_batch
from mlx_dpo.logprobs.buckets import padding_share
from mlx_dpo.logprobs.precision import SURE
from mlx_dpo.logprobs.scorer import optimizations_on
from mlx_dpo.macos import told
from mlx_dpo.models.lora import mixture_modules
from mlx_dpo.models.trees import flat
from mlx_dpo.planning.machine import in_gb
from mlx_dpo.reference.choose import reference_model
from mlx_dpo.training.checkpoint import TrainerState
from mlx_dpo.training.setup import PreparedRun

SAME_FUNCTION = 1e-6
"""KL per token, in nats, within which two ways to compute one model in float32 agree: a token's log-prob to 1e-3."""

SAID = 1e-3
"""Rounding of a token's log-prob, in nats, that people are told of."""

LARGE_KL = 1.0
"""KL per token, in nats, above which a run may be ruining its language, whatever its loss says.

It is (log π − log π_ref)² / 2 on the data's answers: at 1 the tokens' probabilities have moved by a factor of 4 (e^√2,
root mean square). Of SmolLM2-135M on the demo's pairs at a learning rate of 5e-4, all sampled answers were language at
0.4 (DPO alone, 40 steps); with the sft term, the first word that is none came at 1.15, and short sentences held at 1.3.
So it is where to look, and no limit.
"""

FALL = 0.1
"""Share of its size by which the chosen answers' log-prob may fall before the run warns."""


def facts(prepared: PreparedRun) -> dict[str, str]:
    """What people want to know before the first step, by label."""
    config, adapter = prepared.config, prepared.adapter
    trained = sum(value.size for value in flat(prepared.loaded.model.trainable_parameters()).values())
    return {
        "model": f"{prepared.loaded.name} ({prepared.loaded.form})",
        "adapter": f"{'DoRA of ' if adapter.fine_tune_type == 'dora' else ''}rank {adapter.rank}, scale "
        f"{adapter.scale:g}, top {adapter.num_layers} blocks, {trained / 1e6:.2f} M parameters",
        **_not_adapted(prepared),
        "loss": f"{config.loss.type}, β {config.loss.beta:g}",
        "reference": _reference(prepared),
        "rows": f"{prepared.train_rows} to train on, {len(prepared.held_out)} held out",
        **_samples(prepared),
        "padding": f"{100 * _padding(prepared):.0f} % of the tokens that are read",
        "optimizations": _optimizations(prepared),
        "rounding": _rounding(prepared),
        "memory": _memory(prepared),
        **({"macOS": said} if (said := told(config.train.caffeinate)) else {}),
        "steps": f"{prepared.total_steps} of {config.train.batch_size} × {config.train.grad_accumulation_steps} rows",
    }


def warn_of_reference(prepared: PreparedRun) -> str | None:
    """DPO after SFT measures from the SFT model (Rafailov et al. 2023, sec. 4); from the base it pulls back to that."""
    start = prepared.config.model.adapter
    if not start or prepared.ref_logps is None or prepared.config.loss.reference != "base":
        return None
    return (
        f"the reference is the base model, and not {start}, from which training starts; after supervised "
        "fine-tuning it should be the latter: --reference start"
    )


def warn_of_first_step(prepared: PreparedRun, metrics: dict[str, float]) -> str | None:
    """Before the first update a fresh adapter is the base model, and DPO's loss is ln 2: a free check of everything.

    Dropout breaks it where the adapter is no fresh one: the policy is read with it, the reference without.
    """
    config, kl = prepared.config, metrics.get("kl/token", 0.0)
    reference = reference_model(config.loss.reference, config.model, config.model.adapter)
    rounding = (SURE * prepared.checked.noise) ** 2  # of log-probs that are off by x, the KL is x²/2
    if reference != config.model or kl <= max(SAME_FUNCTION, rounding):
        return None
    if config.lora.dropout and config.model.adapter:
        return (
            f"the first loss is {metrics['loss']:.4f}, where policy and reference are one function (sigmoid: ln 2 = "
            f"{log(2):.4f}): lora.dropout {config.lora.dropout:g} leaves out a part of the starting adapter in the "
            "policy, and nothing in the reference"
        )
    return (
        f"before the first update policy and reference should be one function, but differ (KL {kl:.2g} a token, loss "
        f"{metrics['loss']:.4f}): the model is not deterministic, or the reference cache belongs to other weights; "
        f"remove {prepared.ref_file} and start again"
    )


def warn_of_drift(state: TrainerState, found: dict[str, float]) -> str | None:
    """Says once, while it happens, that the chosen answers become less likely, and what people do about it."""
    drift, start = found["logps/chosen_drift"], found["logps/chosen"] - found["logps/chosen_drift"]
    if drift >= -FALL * abs(start) or state.warned_of_drift:
        return None
    state.warned_of_drift = True
    return (
        f"held-out chosen answers have become less likely: log-prob {start:.1f} → {found['logps/chosen']:.1f}. "
        "The margin can grow while both fall: DPO sees their difference alone. If answers get worse or longer, "
        "add imitation (--loss sigmoid:1,sft:0.2), hold the chosen one up (--loss dpop), compare per token "
        "(--loss sigmoid_norm), or take smaller steps (a lower --learning-rate, a higher --beta)"
    )


def warn_of_kl(state: TrainerState, config: RunConfig, metrics: dict[str, float], rows: str) -> str | None:
    """Says once, while it happens, that the policy has gone so far from the reference that language may suffer.

    `rows` says of which the metrics are: those of a step, or those held out.
    """
    kl = metrics.get("kl/token", 0.0)
    if kl <= LARGE_KL or state.warned_of_kl or state.step < 2:  # until then it says what the run began with
        return None
    state.warned_of_kl = True
    sft = "" if "sft" in config.loss.type else ", or add imitation (--loss sigmoid:1,sft:0.2)"
    return (
        f"step {state.step}: {rows} are {kl:.2f} nats a token from the reference, and above {LARGE_KL:g} language "
        "may break, however good the accuracy looks. Look at the sampled answers; where they are bad, hold the model "
        f"closer by a higher --beta (now {config.loss.beta:g}), a lower --learning-rate (now "
        f"{config.optim.learning_rate:g}), fewer --epochs{sft}"
    )


def _not_adapted(prepared: PreparedRun) -> dict[str, str]:
    """What of a mixture of experts has no adapter, and how to ask for one."""
    keys = prepared.adapter.keys
    mixture = mixture_modules(prepared.loaded.model.layers[-prepared.adapter.num_layers :])
    said = []
    for kind in ("experts", "router"):
        left = [name for name in mixture if mixture[name] == kind and name not in keys]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            said.append(f"{kind} ({', '.join(left[:3])}{more})")
    if not said:
        return {}
    how = "" if prepared.config.model.adapter else "; to adapt them too, name all that is to be adapted with --keys"
    return {"not adapted": " and ".join(said) + how}


def _samples(prepared: PreparedRun) -> dict[str, str]:
    count, which = len(prepared.samples), "held-out" if prepared.held_out else "training"
    none = "" if prepared.held_out else " (nothing is held out)"
    return {"samples": f"{count} {which} prompts{none} answered at each evaluation"} if count else {}


def _padding(prepared: PreparedRun) -> float:
    """Share of the tokens that are read which is padding, in the first batches, from 0 to 1."""
    batches = [make_batch([prepared.rows[i] for i in indices], indices) for indices in prepared.batches(0)[:64]]
    return padding_share(bucket for batch in batches for bucket in prepared.scorer.layout(batch).buckets)


def _optimizations(prepared: PreparedRun) -> str:
    taken = optimizations_on(prepared.scorer.speed)
    frozen = prepared.scorer.first_adapted > 0
    on = [name.replace("_", " ") for name in taken if name != "activation_cache" or frozen]
    return (
        f"{', '.join(on)}; off the plain path by {prepared.checked.difference:.1g} nats"
        if on
        else "none: the plain path"
    )


def _rounding(prepared: PreparedRun) -> str:
    noise = prepared.checked.noise
    if noise < SAID:
        return "none that shows"
    answers = [len(ids) for row in prepared.rows for ids in row.completions]
    margin = prepared.config.loss.beta * SURE * noise * sqrt(2 * sum(answers) / max(len(answers), 1))
    return f"moves a token's log-prob by {noise:.2g} nats, so that a margin below {margin:.2g} says nothing"


def _memory(prepared: PreparedRun) -> str:
    plan, train = prepared.plan, prepared.config.train
    checkpointing = ", activations computed twice" if train.grad_checkpoint else ""
    return (f"{in_gb(plan.peak)} foreseen" if plan else "not foreseen") + checkpointing


def _reference(prepared: PreparedRun) -> str:
    if prepared.ref_logps is None:
        return "none"
    start, loss = prepared.config.model.adapter, prepared.config.loss
    moves = f", following the policy every {loss.ref_model_sync_steps} steps" if loss.ref_model_sync_steps else ""
    if loss.reference not in ("base", "start"):
        return loss.reference
    if not start:
        return "base model (adapter off), which a fresh adapter equals" + moves
    return (f"the starting adapter {start}" if loss.reference == "start" else "base model (adapter off)") + moves
