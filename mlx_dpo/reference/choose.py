"""Which model the reference is, and its log-probs of the rows at hand: one answer for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.config import ModelConfig
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.logprobs.scorer import UNCHECKED, Scorer
from mlx_dpo.models import lora
from mlx_dpo.models.gated_delta import trainable_gated_delta
from mlx_dpo.models.load import LoadedModel, load
from mlx_dpo.reference import store
from mlx_dpo.reference.store import RefLogps
from mlx_dpo.settings import resolve


class Reference(NamedTuple):
    """log π_ref of some rows, and the file that keeps it."""

    logps: RefLogps
    file: Path


def reference_model(wanted: str, policy: ModelConfig, start: str | None) -> ModelConfig:
    """The model that `loss.reference` names, for a policy that `policy` loads and whose training began at `start`.

    `base` is the policy's model with the adapter off; `start` the adapter that training started from, or the base where
    it started from none; else the folder of an adapter for the same model, or another model by folder or Hub name.
    """
    if wanted == "base":
        return replace(policy, adapter=None)
    if wanted == "start":
        return replace(policy, adapter=start)
    if (Path(wanted).expanduser() / "adapter_config.json").is_file():
        return replace(policy, adapter=wanted)
    return replace(policy, path=wanted, revision=None, adapter=None)


def started_from(adapter: str | None) -> str | None:
    """The adapter that the training of `adapter` started from, which its run folder's config.yaml says.

    Raises:
        UsageError: the folder does not say it.
    """
    config = Path(adapter or "").expanduser() / "config.yaml"
    if adapter is None or not config.is_file():
        raise UsageError(
            "the reference is to be the starting adapter, but which one that was is not said"
            + (f": {adapter} is no run folder, it has no config.yaml" if adapter else ""),
            "name its folder as the reference",
        )
    return resolve(config).model.adapter


def is_other_model(reference: ModelConfig, policy: ModelConfig) -> bool:
    """Whether the reference must be loaded beside the policy: it is neither the policy as loaded nor its base."""
    return reference not in (policy, replace(policy, adapter=None))


def compute_ref_logps(
    reference: ModelConfig,
    policy: ModelConfig,
    loaded: LoadedModel,
    scorer: Scorer | None,
    rows: Sequence[TokenizedRow],
    **how: Any,
) -> Reference:
    """log π_ref of `rows`, stored or computed; `how` as in `store.compute_reference`.

    `loaded` is the policy, its adapter on, and `scorer` reads it. By its weights, with the adapter off or as it is now,
    the reference is scored if it is that; another model is loaded for it and gone afterwards, and needs no `scorer`.

    Raises:
        ModelError: the reference cannot be loaded, or reads other tokens than the policy.
    """
    adapter_off = reference.adapter is None
    if is_other_model(reference, policy):
        loaded, scorer, adapter_off = *_load_other(reference, policy, loaded.tokenizer), False
    assert scorer is not None
    digest = store.model_digest(loaded, with_adapter=reference.adapter is not None)
    loaded.model.eval()
    # of a hybrid by the rule that the policy is trained with: two rules differ by what 16 bits round
    with trainable_gated_delta(loaded.model), lora.switched_off(loaded.model) if adapter_off else nullcontext():
        return Reference(store.compute_reference(scorer, rows, digest, **how), store.store_file(digest))


def _load_other(reference: ModelConfig, policy: ModelConfig, tokenizer: Any) -> tuple[LoadedModel, Scorer]:
    """A model beside the policy, which must read token ids as the policy's `tokenizer` made them."""
    other = load(reference)
    if reference.path != policy.path and other.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"the reference {reference.path} has another tokenizer than {policy.path}: ids mean other tokens",
            "a reference must read the same tokens, as another size or stage of the same model family does",
        )
    if reference.adapter:
        lora.load(other.model, reference.adapter)
    return other, Scorer(other.model, UNCHECKED)  # which nobody held against its plain path
