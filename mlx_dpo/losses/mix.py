"""What `loss.type` says: one loss or a weighted mix, and whether the other settings go with it."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields
from typing import Literal, NamedTuple

from mlx_dpo.config import LossConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.losses.divergences import DIVERGENCES
from mlx_dpo.losses.table import LOSSES, LossSpec
from mlx_dpo.losses.views import ACCEPTS
from mlx_dpo.types import Kind

SHARED = ("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting")
"""Options that change what every preference term of a mix is made of, so each of them must know the option."""


class Term(NamedTuple):
    """One loss of a mix."""

    name: str
    weight: float

    @property
    def spec(self) -> LossSpec:
        """The loss's entry in the table."""
        return LOSSES[self.name]


def parse_mix(text: str) -> tuple[Term, ...]:
    """`sigmoid` or `sigmoid:0.8,bco_pair:0.2,sft:1.0` as terms; a loss without a weight weighs 1.

    Raises UsageError that lists every unknown name, repeated name and bad weight.
    """
    wrong: list[str] = []
    terms: list[Term] = []
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1)
            wrong.append(f"unknown loss {name!r}" + (f": did you mean {near[0]}?" if near else ""))
        elif name in (term.name for term in terms):
            wrong.append(f"{name} stands twice")
        weight = _positive(number) if colon else 1.0
        if weight is None:
            wrong.append(f"the weight of {name!r} must be a positive number, not {number!r}")
        terms.append(Term(name, weight or 0.0))
    if wrong:
        raise UsageError(
            _listed(f"loss type {text!r}", wrong),
            f"Losses are {', '.join(sorted(LOSSES))}; a mix is written sigmoid:0.8,sft:1.0.",
        )
    return tuple(terms)


def needs_reference(config: LossConfig) -> bool:
    """Whether this objective reads a reference's log-probs."""
    return config.reference != "none" and any(term.spec.reference != "unused" for term in parse_mix(config.type))


def accepted_kinds(config: LossConfig) -> frozenset[Kind]:
    """The kinds of rows that every loss of the mix can be trained on; empty when there is none."""
    return frozenset.intersection(*(ACCEPTS[term.spec.kind] for term in parse_mix(config.type)))


def mean_over(config: LossConfig) -> Literal["rows", "tokens", "batch"]:
    """What the objective is a mean over (`LossSpec.mean_over`); a mix of means over different things is `batch`.

    Of all but `batch`, micro-batches weighted by `batch_weight` add up to exactly the large batch's gradient.
    """
    kinds = {term.spec.mean_over for term in parse_mix(config.type)}
    return kinds.pop() if len(kinds) == 1 else "batch"


def reads_mismatched(config: LossConfig) -> bool:
    """Whether the objective reads another row's answer under each row's prompt: KTO, for its estimate of the KL."""
    return any(term.spec.reads_mismatched for term in parse_mix(config.type))


def row_kind(config: LossConfig) -> Kind:
    """The kind of rows that a loss is trained on: the one that loses nothing where it takes several."""
    kinds = accepted_kinds(config)
    return next(kind for kind in ("demonstration", "unpaired", "ranking", "pair") if kind in kinds)


def check_loss_config(config: LossConfig) -> None:
    """Raises UsageError that lists all that is wrong: options that the chosen losses do not read, values out of range.

    An option counts as given when it differs from its default. In a mix it is enough that one loss reads it, but the
    options in SHARED must be read by every term except sft, which has no preference to apply them to.
    """
    terms = parse_mix(config.type)
    wrong = [*_unread(config, terms), *_out_of_range(config, terms)]
    if not accepted_kinds(config):
        taken = ", ".join(f"{term.name} takes {' or '.join(sorted(ACCEPTS[term.spec.kind]))}" for term in terms)
        wrong.append(f"no row suits all of {config.type}: {taken}")
    if wrong:
        raise UsageError(
            _listed(f"loss {config.type}", wrong),
            "Leave out what the loss does not use, or choose a loss that does; mend what is out of range.",
        )


def _unread(config: LossConfig, terms: tuple[Term, ...]) -> list[str]:
    wrong = []
    for field in fields(LossConfig):
        value = getattr(config, field.name)
        if field.name == "type" or value == field.default:
            continue
        readers = [name for name, spec in LOSSES.items() if field.name in spec.options]
        deaf = [term.name for term in terms if field.name not in term.spec.options]
        if field.name in SHARED:
            deaf = [name for name in deaf if LOSSES[name].kind != "demonstration" or len(terms) == 1]
        elif len(deaf) < len(terms) or (field.name == "reference" and value == "none"):
            continue
        if deaf:
            wrong.append(
                f"{field.name} = {value} (default {field.default}) is not used by {', '.join(deaf)}; "
                f"it is by {', '.join(readers)}"
            )
    return wrong


def _out_of_range(config: LossConfig, terms: tuple[Term, ...]) -> list[str]:
    names = {term.name for term in terms}
    options = frozenset().union(*(term.spec.options for term in terms))
    smoothing, noisy = config.label_smoothing, names & {"robust", "cdpo"}
    divergent = config.f_divergence_type != "reverse_kl"
    tied = [term.name for term in terms if term.spec.reference == "required"]
    failed = {
        "beta must be positive": "beta" in options and not config.beta > 0,
        "label_smoothing must lie in [0, 1)": not 0 <= smoothing < 1,
        f"label_smoothing of {' and '.join(sorted(noisy))} must be below 0.5": noisy and smoothing >= 0.5,
        "exo_pair needs label_smoothing > 0; its paper recommends 0.001": "exo_pair" in names and smoothing == 0,
        "cdpo needs label_smoothing > 0, e.g. 0.1; at 0 it is sigmoid": "cdpo" in names and smoothing == 0,
        "ld_alpha must lie in [0, 1]": config.ld_alpha is not None and not 0 <= config.ld_alpha <= 1,
        "discopop_tau must be positive": not config.discopop_tau > 0,
        "dpop_lambda must not be negative": not config.dpop_lambda >= 0,
        "simpo_gamma must not be negative": not config.simpo_gamma >= 0,
        "cpo_alpha must not be negative": not config.cpo_alpha >= 0,
        "unlikelihood_alpha must lie in [0, 1]": not 0 <= config.unlikelihood_alpha <= 1,
        "desirable_weight must not be negative": not config.desirable_weight >= 0,
        "undesirable_weight must not be negative": not config.undesirable_weight >= 0,
        f"f_divergence_type must be one of {', '.join(DIVERGENCES)}": config.f_divergence_type not in DIVERGENCES,
        "f_alpha_divergence_coef is used by f_divergence_type alpha_divergence only": (
            config.f_alpha_divergence_coef != LossConfig.f_alpha_divergence_coef
            and config.f_divergence_type != "alpha_divergence"
        ),
        "ref_model_sync_steps must be positive": (
            config.ref_model_sync_steps is not None and config.ref_model_sync_steps < 1
        ),
        "ref_model_mixup_alpha must lie in (0, 1]": not 0 < config.ref_model_mixup_alpha <= 1,
        "ref_model_mixup_alpha is used with ref_model_sync_steps only": (
            config.ref_model_mixup_alpha != LossConfig.ref_model_mixup_alpha and config.ref_model_sync_steps is None
        ),
        f"a reference that follows the policy starts from base or start, not from {config.reference}": (
            config.ref_model_sync_steps is not None and config.reference not in ("base", "start")
        ),
        f"reference none leaves {', '.join(tied)} nothing to measure from": config.reference == "none" and tied,
        f"{config.f_divergence_type} is a divergence from a reference, and reference is none": (
            config.reference == "none" and divergent
        ),
    }
    return [message for message, fails in failed.items() if fails]


def _positive(number: str) -> float | None:
    try:
        value = float(number)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def _listed(head: str, wrong: list[str]) -> str:
    return f"{head}: {wrong[0]}" if len(wrong) == 1 else f"{head}:" + "".join(f"\n  - {item}" for item in wrong)
