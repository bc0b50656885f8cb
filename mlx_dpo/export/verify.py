"""Every export held against what was trained: log-probs of the same rows, token by token, and with the adapter off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.config import DataConfig, ModelConfig, SpeedConfig
from mlx_dpo.data.load import load_records
from mlx_dpo.data.tokenize import TokenizedRow, encode_records
from mlx_dpo.errors import ModelError
from mlx_dpo.evaluation.rows import score_rows
from mlx_dpo.events import OnEvent, Progressed, Warned, ignore
from mlx_dpo.export.forms import Form, rounded
from mlx_dpo.gguf.base import open_base
from mlx_dpo.gguf.verify import TOLERANCES, VerifyReport, compare_in_llama_cpp, float32_log_probs
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.models import lora
from mlx_dpo.models.load import load, model_folder, read_stored
from mlx_dpo.models.merge import adapted_layers, full_weight, merged_weight
from mlx_dpo.reference.store import RefLogps
from mlx_dpo.sampling.generate import load_tuned

EXACT = 1e-3
"""Largest difference of a token's log-prob, in nats, that float32 on two ways to the same numbers explains."""

ANOTHER_MODEL = 1.0
"""A difference of a token's log-prob, in nats, that no way of computing the same model explains."""

DROWNED = 0.5
"""Where weights were rounded: how large the error may be beside the adapter's own effect before the check fails."""

SAME_WEIGHT = 1e-5
"""Difference of a weight matrix, in its own Frobenius norm, that the order of float32 sums explains."""

Runtime = Callable[[Sequence[TokenizedRow], RefLogps], RefLogps]
"""Token log-probs of rows as another runtime computes them; it is given those of our base model."""

PLAIN = SpeedConfig(shared_prompt=False, activation_cache=False)
"""Whole sequences, as every runtime reads them."""


@dataclass(frozen=True)
class Trained:
    """What an export is held against: base + `model.adapter`, on the first `rows` of `data`.

    Where `data` has no path they are the demo's rows.
    """

    model: ModelConfig
    data: DataConfig | None = None
    rows: int = 32
    on_event: OnEvent = ignore


@dataclass(frozen=True)
class Verified:
    """How far an export is from what was trained; all of log-probs of `tokens` scored tokens, in nats.

    `largest` and `error` are the largest and the root-mean-square difference between export and trained model, `effect`
    the root-mean-square difference that the adapter makes, `off` that between export and base. An exact export has
    `largest` within `tolerance`; a rounded one (`tolerance` None) an error well below the effect. `accuracy` is the
    share of pairs that the export ranks right by its margin over the base, `trained_accuracy` the same of what was
    trained; None without pairs.
    """

    runtime: str
    rows: int
    tokens: int
    largest: float
    error: float
    effect: float
    off: float
    tolerance: float | None
    accuracy: float | None
    trained_accuracy: float | None

    @property
    def holds(self) -> bool:
        """Whether the export is the trained model, and not the base."""
        close = self.error <= DROWNED * self.effect if self.tolerance is None else self.largest <= self.tolerance
        return close and (self.error < self.off or not self.effect)


def verify_folder(trained: Trained, folder: Path, *, adapter: Path | None = None, exact: bool) -> Verified:
    """Holds an mlx-lm folder (with `adapter` on it, where the export is an adapter) against what was trained.

    Raises:
        ModelError: the folder cannot be loaded; or, if `exact`, it computes something else than was trained.
    """
    on_it = None if adapter is None else str(adapter)
    other = replace(trained.model, path=str(folder), revision=None, adapter=on_it, quantize_bits=None)

    def run(tokenized: Sequence[TokenizedRow], off: RefLogps) -> RefLogps:
        return score_rows(Scorer(load_tuned(other).model, PLAIN), tokenized, 8)

    return verify(trained, "mlx-lm", run, tolerance=EXACT if exact else None)


def verify_layers(trained: Trained, folder: Path, forms: Mapping[str, Form]) -> int:
    """Holds the adapted layers of a fused folder, as they were written, against W + scale · B A rounded to `forms`.

    For who has no room to load the folder: one layer is in memory at a time, and nothing is run. Gives their number.

    Raises:
        ModelError: a layer is something else; it is named.
    """
    base, _, _ = read_stored(model_folder(trained.model.path, trained.model.revision), trained.model)
    lora.load(base, trained.model.adapter or "")
    written = dict(read_stored(folder, ModelConfig(path=str(folder)))[0].named_modules())
    adapted = adapted_layers(base)
    for done, (name, module) in enumerate(adapted):
        trained.on_event(Progressed("checking layer by layer", done, len(adapted), "layers"))
        expected, found = rounded(merged_weight(module), forms[name]), full_weight(written[name])
        difference = mx.linalg.norm(found - expected) / mx.linalg.norm(expected)
        off = float(difference)  # waits: one layer's weights at a time
        if not off <= SAME_WEIGHT:
            raise ModelError(
                f"the export is not what was trained: {name} is {off:.3g} of its size off base + adapter",
                "nothing was kept of it; please report the model's architecture and the adapter's settings",
            )
    trained.on_event(Progressed("checking layer by layer", len(adapted), len(adapted), "layers"))
    return len(adapted)


def verify(trained: Trained, runtime: str, run: Runtime, *, tolerance: float | None) -> Verified:
    """Holds what `run` computes against what was trained.

    Raises:
        ModelError: `tolerance` is given, and the export computes something else than was trained, or does nothing.
    """
    trained.on_event(Progressed(f"checking in {runtime}", 0, 1, ""))
    loaded = load(trained.model)
    tokenized = first_rows(trained, loaded.tokenizer)
    off = score_rows(Scorer(loaded.model, PLAIN), tokenized, 8)
    if trained.model.adapter:
        lora.load(loaded.model, trained.model.adapter)
    on = score_rows(Scorer(loaded.model, PLAIN), tokenized, 8)
    del loaded  # the other runtime needs the room
    found = compare_logps(runtime, tokenized, off, on, run(tokenized, off), tolerance)
    trained.on_event(Progressed(f"checking in {runtime}", 1, 1, ""))
    if tolerance is not None and not found.holds:
        raise ModelError(
            f"the export is not what was trained: in {runtime} log-probs differ by up to {found.largest:.3g} nats from "
            f"ours (tolerance {tolerance:g}); it is {found.off:.3g} off the base, what was trained {found.effect:.3g}",
            "nothing was kept of it; please report the model's architecture and the adapter's settings",
        )
    return found


def first_rows(trained: Trained, tokenizer: Any) -> list[TokenizedRow]:
    """The rows to compare on as token ids; of the package's own held-out rows for who has none."""
    data = trained.data or DataConfig()
    if not data.path:
        data = replace(data, path=str(files("mlx_dpo") / "demo" / "data" / "test.jsonl"))
    return encode_records(load_records(data.path)[: trained.rows], tokenizer, data)[0]


def compare_logps(
    runtime: str,
    rows: Sequence[TokenizedRow],
    off: RefLogps,
    on: RefLogps,
    exported: RefLogps,
    tolerance: float | None,
) -> Verified:
    """The differences between three models' token log-probs of the same rows: base, trained, exported."""
    base, trained, other = map(_joined, (off, on, exported))
    pairs = [i for i, row in enumerate(rows) if len(row.completions) == 2 and row.ranks[0] < row.ranks[1]]
    return Verified(
        runtime=runtime,
        rows=len(rows),
        tokens=len(base),
        largest=float(np.abs(other - trained).max()),
        error=_rms(other - trained),
        effect=_rms(trained - base),
        off=_rms(other - base),
        tolerance=tolerance,
        accuracy=_accuracy(pairs, off, exported),
        trained_accuracy=_accuracy(pairs, off, on),
    )


def _joined(logps: RefLogps) -> np.ndarray:
    """The log-probs of every row's every answer, float64 `[tokens]`."""
    return np.concatenate([answer for row in logps for answer in row]).astype(np.float64)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _accuracy(pairs: Sequence[int], off: RefLogps, model: RefLogps) -> float | None:
    def gain(i: int, answer: int) -> float:
        return float((model[i][answer].astype(np.float64) - off[i][answer]).sum())

    return sum(gain(i, 0) > gain(i, 1) for i in pairs) / len(pairs) if pairs else None


def verify_peft(trained: Trained, base: Path, adapter: Path) -> Verified | None:
    """Holds what a PEFT folder adds to `base` in transformers against what was trained; both in float32.

    transformers' own base may differ a little (a scale that mlx-lm rounds, say), so the adapter's effect is compared.
    None, with a warning, where it is another model altogether: some folders are laid out for MLX alone.

    Raises:
        ModelError: it computes something else than was trained.
    """

    def run(tokenized: Sequence[TokenizedRow], off: RefLogps) -> RefLogps:
        from transformers import AutoModelForCausalLM

        torch, peft = import_module("torch"), import_module("peft")  # no dependencies of ours

        def logps(model: Any, context: list[int], completion: list[int]) -> np.ndarray:
            ids = torch.tensor([context + completion])
            with torch.no_grad():
                every = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
            picked: np.ndarray = every.gather(-1, ids[0, 1:, None])[:, 0].numpy()
            return picked[len(context) - 1 :] if context else np.concatenate([np.zeros(1, np.float32), picked])

        def of(model: Any) -> RefLogps:
            return [[logps(model, row.context(k), ids) for k, ids in enumerate(row.completions)] for row in tokenized]

        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        own = of(plain)
        if np.abs(_joined(own) - _joined(off)).max() > ANOTHER_MODEL:
            raise _OtherModelError
        on = of(peft.PeftModel.from_pretrained(plain, adapter).eval())
        return [
            [ours + with_it - without for ours, with_it, without in zip(*answers, strict=True)]
            for answers in zip(off, on, own, strict=True)
        ]

    exact = replace(trained, model=replace(trained.model, compute_dtype="float32"))
    try:
        with warnings.catch_warnings():  # of peft about transformers, and the like
            warnings.simplefilter("ignore")
            return verify(exact, "peft", run, tolerance=EXACT)
    except _OtherModelError:
        trained.on_event(
            Warned(f"not checked in peft: transformers does not read {base} as the model that it is in MLX")
        )
        return None


class _OtherModelError(Exception):
    """A runtime reads the base as something else."""


def verify_gguf(trained: Trained, file: Path, outtype: str, *, adapter_file: Path | None = None) -> VerifyReport:
    """Holds a GGUF file, fused or the base's with `adapter_file` on top, against what was trained.

    llama.cpp computes the likeliest tokens' log-probs at some positions of the rows; `outtype` is the type of what was
    written, which decides how much rounding may make.

    Raises:
        MlxDpoError: llama.cpp is not installed, or the file computes something else than was trained, or does nothing.
    """
    from mlx_lm.utils import load_tokenizer

    trained.on_event(Progressed("checking in llama.cpp", 0, 1, ""))
    folder = model_folder(trained.model.path, trained.model.revision)
    tokenized = first_rows(trained, load_tokenizer(folder)._tokenizer)
    on, off = float32_log_probs(folder, trained.model.adapter)
    tolerance = TOLERANCES[outtype] + open_base(folder).architecture.own_rounding
    ids = [row.context(0) + row.completions[0] for row in tokenized]
    report = compare_in_llama_cpp(file, ids, on, adapter_gguf=adapter_file, adapter_off=off, tolerance=tolerance)
    trained.on_event(Progressed("checking in llama.cpp", 1, 1, ""))
    return report
