"""Log-probs, statistics and gradients are TRL's, and the head in chunks is the plain path in less memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, SpeedConfig
from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.data.formats import parse_row
from mlx_dpo.data.tokenize import TokenizedRow, encode_records
from mlx_dpo.logprobs import head as head_module
from mlx_dpo.logprobs.scorer import STATS, Scorer, plain_logps
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.metrics import averages, batch_metrics
from mlx_dpo.models import lora
from mlx_dpo.models.load import LoadedModel, load
from mlx_dpo.types import LossOutput, TokenLogps
from support.tiny_models import TINY_MODELS, tiny_model_folder

HEAD = SpeedConfig(shared_prompt=False, activation_cache=False)
"""The head's optimization alone; how all of them go together is told in test_check."""

Score = Callable[..., TokenLogps]


def plainly(model: nn.Module) -> Score:
    return lambda batch, stats=(), *, gradient: plain_logps(model, batch, stats)


# TRL's numbers


class Golden(NamedTuple):
    """TRL's case of a data format, with the model it was computed with."""

    loaded: LoadedModel
    case: dict[str, Any]
    records: list[Any]

    def batch(self, count: int, **data: Any) -> Batch:
        rows, _ = encode_records(self.records, self.loaded.tokenizer, DataConfig(**{"max_length": None} | data))
        return make_batch(rows[:count], range(count))


@pytest.fixture(scope="module")
def adapted(golden: Path) -> LoadedModel:
    loaded = load(ModelConfig(path=str(golden / "models/llama"), compute_dtype="float32"))
    lora.load(loaded.model, golden / "adapters/llama")
    return loaded


@pytest.fixture(scope="module", params=["standard", "conversational"])
def trl(request: pytest.FixtureRequest, golden: Path, adapted: LoadedModel) -> Golden:
    case = json.loads((golden / "golden.json").read_text())["cases"][f"llama/{request.param}"]
    lines = (golden / f"data/{request.param}.jsonl").read_text().splitlines()
    return Golden(adapted, case, [parse_row(json.loads(line), str(i)) for i, line in enumerate(lines)])


def ways(model: nn.Module) -> dict[str, Score]:
    return {"plain": plainly(model), "head in chunks": Scorer(model, HEAD), "all optimizations": Scorer(model)}


@pytest.mark.parametrize("way", ["plain", "head in chunks", "all optimizations"])
@pytest.mark.parametrize("side", ["policy", "ref"])
def test_log_probs_of_every_pair_are_trls(side: str, way: str, trl: Golden) -> None:
    """To 1e-4, or to one unit in the last place of a float32 where the sum is too large for that (below -1024)."""
    model, batch = trl.loaded.model, trl.batch(24)
    if side == "ref":
        with lora.switched_off(model):
            found = ways(model)[way](batch, gradient=True).logps
            mx.eval(found)
    else:
        found = ways(model)[way](batch, gradient=True).logps
    sums = np.array(found.sum(-1))
    for r, pair in enumerate(trl.case["pairs"]):
        for k, answer in enumerate(("chosen", "rejected")):
            expected = pair[f"{side}_{answer}_logp"]
            assert abs(sums[r, k] - expected) <= max(1e-4, float(np.spacing(np.float32(abs(expected)))))
            if side == "policy":
                tokens = pair[f"policy_{answer}_token_logps"]
                np.testing.assert_allclose(np.array(found[r, k, : len(tokens)]), tokens, atol=3e-5)


def losses_and_gradients(
    trl: Golden, batch: Batch, loss: LossConfig, *, from_start: bool = False, stats: tuple[str, ...] = STATS
) -> tuple[LossOutput, dict[str, mx.array], dict[str, float]]:
    model, score = trl.loaded.model, Scorer(trl.loaded.model)
    mask, rank = mx.array(batch.mask), mx.array(batch.rank)
    if from_start:
        base = score(batch, gradient=False).logps
    else:
        with lora.switched_off(model):
            base = score(batch, gradient=False).logps
            mx.eval(base)

    def objective(model: nn.Module) -> tuple[mx.array, LossOutput, TokenLogps]:
        policy = score(batch, stats, gradient=True)
        output = compute_loss(policy, base, mask, rank, None, loss)
        return output.loss, output, policy

    (_, output, policy), gradient = nn.value_and_grad(model, objective)(model)
    metrics = averages([batch_metrics(output, policy, base, mask, rank, None, "pair")])
    return output, dict(tree_flatten(gradient)), metrics


def norm(gradient: dict[str, mx.array]) -> float:
    return math.sqrt(sum((value * value).sum().item() for value in gradient.values()))


@pytest.mark.parametrize("trl", ["standard"], indirect=True)
def test_gradients_of_every_adapter_parameter_are_trls(golden: Path, trl: Golden) -> None:
    _, gradient, _ = losses_and_gradients(trl, trl.batch(8), LossConfig())
    expected = mx.load(str(golden / "grads/llama_standard_sigmoid_beta0.1.safetensors"))
    assert len(gradient) == len(expected) == 3 * 7 * 2
    for name, value in expected.items():
        ours = name.removeprefix("base_model.model.").replace(".default.weight", "")
        ours = ours.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        scale = mx.abs(value).max().item()
        np.testing.assert_allclose(np.array(gradient[ours]), np.array(value.T), atol=2e-5 * scale, err_msg=name)


EXTRAS = {
    # TRL's name: what it says in our settings, of the data and of the loss
    "max_length=40/sigmoid": ({"max_length": 40}, {}),
    "max_length=60/ipo": ({"max_length": 60}, {"type": "ipo"}),
    "max_length=40,keep_end/sigmoid": ({"max_length": 40, "truncation_mode": "keep_end"}, {}),
    "precompute_ref_log_probs/sigmoid": ({}, {}),
    "peft_model_given/sigmoid": ({}, {"reference": "start"}),
    "ld_alpha=0.5/sigmoid": ({}, {"ld_alpha": 0.5}),
    "f=js_divergence/sigmoid": ({}, {"f_divergence_type": "js_divergence"}),
    "multi/mpo": ({}, {"type": "sigmoid:0.8,bco_pair:0.2,sft:1.0"}),
} | {
    f"wpo/{name}": ({}, {"type": name, "use_weighting": True, "label_smoothing": 0.1 if name == "exo_pair" else 0.0})
    for name in (
        "sigmoid",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
        "sigmoid_norm",
    )
}


@pytest.mark.parametrize("name", EXTRAS)
def test_losses_gradients_and_metrics_through_the_model_are_trls(name: str, trl: Golden) -> None:
    data, loss = EXTRAS[name]
    expected = trl.case["extras"][name]
    output, gradient, metrics = losses_and_gradients(
        trl, trl.batch(8, **data), LossConfig(**loss), from_start=loss.get("reference") == "start"
    )
    assert output.loss.item() == pytest.approx(expected["loss"], rel=3e-5, abs=1e-7)
    assert norm(gradient) == pytest.approx(expected["grad_norm"], rel=1e-4)
    compared = metrics.keys() & expected["metrics"].keys()
    if loss.get("reference") == "start":
        compared.remove("rewards/accuracies")  # all rewards are 0 up to rounding, which then ranks some pairs right
    assert {"rewards/chosen", "logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy"} <= compared
    for metric in compared:
        assert metrics[metric] == pytest.approx(expected["metrics"][metric], rel=2e-5, abs=2e-5), metric


# the head in chunks against the plain path


def random_rows(vocabulary: int, prompts: tuple[int, ...] = (17, 9, 1, 23), answers: int = 2) -> list[TokenizedRow]:
    """Rows of unequal prompts and answers, one answer a single token long."""
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return [int(token) for token in random.integers(3, vocabulary, count)]

    return [
        TokenizedRow(
            str(prompt),
            ids(prompt),
            tuple(ids(1 if prompt == 9 and k == 0 else 3 + 4 * k + prompt % 5) for k in range(answers)),
            (0,) * answers,
            tuple(float(k + 1) for k in range(answers)),
        )
        for prompt in prompts
    ]


def adapted_tiny(folder: Path, arch: str, **config: Any) -> LoadedModel:
    loaded = load(ModelConfig(path=str(tiny_model_folder(folder, arch, **config)), compute_dtype="float32"))
    lora.attach(loaded.model, LoraConfig(num_layers=2, rank=4), seed=0)
    keys = iter(mx.random.split(mx.random.key(1), 200))
    loaded.model.load_weights(
        [
            (name, mx.random.normal(value.shape, scale=0.05, key=next(keys)))
            for name, value in lora.parameters(loaded.model).items()
            if name.endswith("lora_b")
        ],
        strict=False,
    )
    return loaded


def measured(model: nn.Module, score: Score, batch: Batch, stats: tuple[str, ...]) -> tuple[TokenLogps, mx.array]:
    """What `score` gives, and the gradient of its log-probs under fixed random weights, as one vector."""
    weight = mx.random.normal(batch.mask.shape, key=mx.random.key(7))

    def objective(model: nn.Module) -> tuple[mx.array, TokenLogps]:
        out = score(batch, stats, gradient=True)
        return (out.logps * weight).sum(), out

    (_, out), gradient = nn.value_and_grad(model, objective)(model)
    return out, mx.concatenate([value.reshape(-1) for _, value in sorted(tree_flatten(gradient))])


def relative(found: mx.array, expected: mx.array) -> float:
    return (mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item()


@pytest.mark.parametrize("arch", TINY_MODELS)
def test_head_in_chunks_gives_every_number_and_gradient_of_the_plain_path(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied and untied heads, soft-capped and scaled logits; three chunks, the last of them not full."""
    loaded = adapted_tiny(tmp_path, arch)
    vocabulary = len(loaded.tokenizer)
    monkeypatch.setitem(head_module.CHUNK_LOGITS, head_module.device_size(), vocabulary * 20)
    batch = make_batch(random_rows(vocabulary), range(4))
    assert 40 < batch.mask.sum() < 60
    expected, expected_gradient = measured(loaded.model, plainly(loaded.model), batch, STATS)
    for gradient in (True, False):
        found = Scorer(loaded.model, HEAD)(batch, STATS, gradient=gradient)
        for name in ("logps", *STATS):
            np.testing.assert_allclose(
                np.array(getattr(found, name)), np.array(getattr(expected, name)), atol=6e-5, err_msg=name
            )
    _, gradient_found = measured(loaded.model, Scorer(loaded.model, HEAD), batch, STATS)
    assert relative(gradient_found, expected_gradient) < 3e-5


def test_soft_capping_of_logits_is_in_the_head(tmp_path: Path) -> None:
    """A cap of 1 leaves logits between -1 and 1, and log p of 320 tokens within 2 of -log 320."""
    loaded = adapted_tiny(tmp_path, "gemma2", final_logit_softcapping=1.0)
    batch = make_batch(random_rows(320), range(4))
    logps = np.array(Scorer(loaded.model, HEAD)(batch, gradient=True).logps)[batch.mask > 0]
    assert np.abs(logps + math.log(320)).max() < 2


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 48, 50])
def test_no_token_is_lost_where_chunks_meet(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens; log p, its statistics and gradient by the definition, in float64."""
    monkeypatch.setitem(head_module.CHUNK_LOGITS, head_module.device_size(), 1)
    random = np.random.default_rng(count)
    weight, hidden = random.normal(size=(8, 11)), random.normal(size=(count, 8))
    target, cotangent = random.integers(0, 11, count), random.normal(size=count)
    logits = hidden @ weight
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p, hit = np.exp(log_p), np.eye(11)[target]

    def total(hidden: mx.array) -> tuple[mx.array, mx.array]:
        out = head_module.head_logps(lambda h: h @ mx.array(weight), hidden, mx.array(target), STATS, gradient=True)
        return (out[:, 0] * mx.array(cotangent)).sum(), out

    (_, found), gradient = mx.value_and_grad(total)(mx.array(hidden.astype(np.float32)))
    definition = [
        log_p[np.arange(count), target],
        -(p * log_p).sum(-1),
        logits.mean(-1),
        logits.argmax(-1) == target,
        np.log((p**2).sum(-1)),
    ]
    np.testing.assert_allclose(np.array(found), np.stack(definition, axis=-1), atol=1e-5)
    np.testing.assert_allclose(np.array(gradient), cotangent[:, None] * ((hit - p) @ weight.T), atol=1e-5)


def test_a_packed_head_has_the_gradient_of_its_unpacked_numbers() -> None:
    packed = nn.QuantizedLinear.from_linear(nn.Linear(64, 96, bias=False), group_size=32, bits=4)
    weight = mx.dequantize(packed.weight, packed.scales, packed.biases, 32, 4)
    hidden, target = mx.random.normal((40, 64), key=mx.random.key(0)), mx.arange(40)

    def total(head: Any) -> Callable[[mx.array], mx.array]:
        return lambda hidden: head_module.head_logps(head, hidden, target, gradient=True).sum()

    found, expected = mx.grad(total(packed))(hidden), mx.grad(total(lambda h: h @ weight.T))(hidden)
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_log_probs_are_float32_whatever_the_model_computes_in(dtype: Any, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    exact, half = (
        load(ModelConfig(path=str(folder), compute_dtype="float32")),
        load(ModelConfig(path=str(folder), compute_dtype=dtype)),
    )
    batch = make_batch(random_rows(len(exact.tokenizer)), range(4))
    expected = np.array(plain_logps(exact.model, batch).logps)
    lora.attach(half.model, LoraConfig(num_layers=2), seed=0)
    for score in (plainly(half.model), Scorer(half.model, HEAD)):
        out, gradient = measured(half.model, score, batch, STATS)
        assert {value.dtype for value in out} == {mx.float32}
        assert np.abs(np.array(out.logps) - expected).mean() < 0.1
        assert mx.isfinite(gradient).all()


def test_a_head_that_is_trained_takes_the_plain_path(tmp_path: Path) -> None:
    """The chunked head gives no gradient to its own weights, so it stands back where they have one."""
    loaded = adapted_tiny(tmp_path, "llama")
    loaded.model.lm_head.unfreeze()
    batch = make_batch(random_rows(len(loaded.tokenizer)), range(4))
    _, expected = measured(loaded.model, plainly(loaded.model), batch, ())
    _, found = measured(loaded.model, Scorer(loaded.model, HEAD), batch, ())
    assert found.size > loaded.model.lm_head.weight.size
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("device", "vocabulary", "tokens"),
    [
        ("cpu", 49_152, 85),
        ("cpu", 151_936, 32),
        ("gpu", 49_152, 160),
        ("gpu", 128_256, 64),
        ("gpu", 262_144, 64),
        ("large gpu", 49_152, 320),
        ("large gpu", 151_936, 96),
        ("large gpu", 262_144, 64),
    ],
)
def test_a_gpu_gets_larger_products_of_the_head(device: str, vocabulary: int, tokens: int) -> None:
    assert head_module.chunk_tokens(vocabulary, device) == tokens


# memory


def test_the_heads_memory_does_not_grow_with_the_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65,536 words: the logits of a token are 256 KiB, of 254 scored ones 64 MiB, and the plain path holds several.

    In chunks of 16 tokens (4 MiB) a dozen arrays may live at once, and twice the tokens cost no more of them.
    """
    monkeypatch.setitem(head_module.CHUNK_LOGITS, head_module.device_size(), 16 * 2**16)
    loaded = adapted_tiny(tmp_path, "llama", vocab_size=2**16)
    (row,) = random_rows(300, prompts=(1,))
    long = row._replace(completions=tuple((ids * 200)[:127] for ids in row.completions))

    def peak(score: Score, count: int) -> float:
        batch = make_batch([long] * count, range(count))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(measured(loaded.model, score, batch, ()))
        return (mx.get_peak_memory() - before) / 2**20

    chunked, plain = Scorer(loaded.model, HEAD), plainly(loaded.model)
    assert peak(chunked, 2) < 90
    assert peak(chunked, 2) - peak(chunked, 1) < 16
    assert peak(plain, 1) > 4 * 63


# a row's log-probs are its own


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3_5", "mamba2", "lfm2", "qwen3_moe"])
def test_neither_padding_nor_neighbours_change_a_rows_log_probs(arch: str, tmp_path: Path) -> None:
    loaded = adapted_tiny(tmp_path, arch)
    rows = random_rows(len(loaded.tokenizer))
    score = Scorer(loaded.model, HEAD)
    together = score(make_batch(rows, range(4)), gradient=False).logps
    for r, row in enumerate(rows):
        alone = score(make_batch([row], [0]), gradient=False).logps
        for k, ids in enumerate(row.completions):
            np.testing.assert_allclose(
                np.array(together[r, k, : len(ids)]), np.array(alone[0, k, : len(ids)]), atol=3e-5
            )
            assert not together[r, k, len(ids) :].any(), "nothing is scored in the padding"


def test_a_sequence_without_prompt_begins_with_a_token_that_is_not_scored(tmp_path: Path) -> None:
    loaded = adapted_tiny(tmp_path, "llama")
    row = TokenizedRow("", [], ([5, 9, 7], [5, 9]), (0, 0), (1.0, 2.0))
    found = Scorer(loaded.model)(make_batch([row], [0]), gradient=False).logps
    logits = loaded.model(mx.array([[5, 9, 7]]))[0].astype(mx.float32)
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = [[0, log_p[0, 9].item(), log_p[1, 7].item()], [0, log_p[0, 9].item(), 0]]
    np.testing.assert_allclose(np.array(found[0]), expected, atol=1e-5)


def test_an_answer_whose_prompt_lost_its_beginning_is_read_without_it(tmp_path: Path) -> None:
    loaded = adapted_tiny(tmp_path, "llama")
    (row,) = random_rows(300, prompts=(17,))
    cut = row._replace(starts=(4, 0))
    by_hand = row._replace(prompt=row.prompt[4:])
    score = Scorer(loaded.model)
    found = score(make_batch([cut], [0]), gradient=False).logps
    np.testing.assert_allclose(
        np.array(found[0, 0]), np.array(score(make_batch([by_hand], [0]), gradient=False).logps[0, 0]), atol=1e-5
    )
    np.testing.assert_allclose(
        np.array(found[0, 1]), np.array(score(make_batch([row], [0]), gradient=False).logps[0, 1]), atol=1e-5
    )
