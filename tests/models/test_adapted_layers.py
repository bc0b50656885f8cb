"""Our adapted layers are mlx-lm's in all but the dtype they compute in: parameters, function and gradients."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner import dora as theirs_dora
from mlx_lm.tuner import lora as theirs_lora
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_dpo.config import LoraConfig, ModelConfig
from mlx_dpo.models import lora
from mlx_dpo.models.adapted_layers import OURS, use_own_layers
from mlx_dpo.models.load import load
from support.tiny_models import tiny_model_folder

WIDTH, OUT, VOCABULARY = 64, 96, 32
TOKENS = mx.array([[3, 5, 3, 0], [31, 1, 2, 8]])
HIDDEN = mx.random.normal((2, 4, WIDTH), key=mx.random.key(1))
EXPERTS = mx.array([[[0, 2], [1, 2], [0, 1], [2, 0]], [[1, 0], [1, 2], [2, 1], [0, 2]]])


def linear(bits: int = 0, bias: bool = False, mode: str = "affine") -> nn.Module:
    layer = nn.Linear(WIDTH, OUT, bias=bias)
    return nn.QuantizedLinear.from_linear(layer, 32, bits, mode=mode) if bits else layer


def embedding(bits: int = 0) -> nn.Module:
    layer = nn.Embedding(VOCABULARY, WIDTH)
    return nn.QuantizedEmbedding.from_embedding(layer, 32, bits) if bits else layer


def experts(bits: int = 0, bias: bool = False) -> nn.Module:
    layer = SwitchLinear(WIDTH, OUT, 3, bias=bias)
    return layer.to_quantized(32, bits) if bits else layer


def read(layer: Any, x: mx.array) -> mx.array:
    return layer(x)


def as_head(layer: Any, x: mx.array) -> mx.array:
    return layer.as_linear(x)


def by_experts(layer: Any, x: mx.array) -> mx.array:
    return layer(x[:, :, None, None], EXPERTS)


def by_sorted_experts(layer: Any, x: mx.array) -> mx.array:
    return layer(x.reshape(-1, 1, WIDTH), mx.array([0, 0, 1, 1, 1, 2, 2, 2]), sorted_indices=True)


LORA_LINEAR, DORA_LINEAR = theirs_lora.LoRALinear, theirs_dora.DoRALinear
LORA_EXPERTS = theirs_lora.LoRASwitchLinear
LORA_EMBEDDING, DORA_EMBEDDING = theirs_lora.LoRAEmbedding, theirs_dora.DoRAEmbedding
Case = tuple[Any, Callable[[], nn.Module], Callable[[Any, mx.array], mx.array], mx.array]
CASES: dict[str, Case] = {
    # mlx-lm's kind, what it adapts, how that is used, on what
    "lora": (LORA_LINEAR, linear, read, HIDDEN),
    "lora, bias": (LORA_LINEAR, lambda: linear(bias=True), read, HIDDEN),
    "lora, one row": (LORA_LINEAR, linear, read, HIDDEN[0, :1]),
    "lora, four dimensions": (LORA_LINEAR, linear, read, HIDDEN[:, None]),
    "lora, 4 bits": (LORA_LINEAR, lambda: linear(4), read, HIDDEN),
    "lora, 6 bits, bias": (LORA_LINEAR, lambda: linear(6, bias=True), read, HIDDEN),
    "lora, mxfp4": (LORA_LINEAR, lambda: linear(4, mode="mxfp4"), read, HIDDEN),
    "experts": (LORA_EXPERTS, experts, by_experts, HIDDEN),
    "experts, bias": (LORA_EXPERTS, lambda: experts(bias=True), by_experts, HIDDEN),
    "experts, 4 bits": (LORA_EXPERTS, lambda: experts(4), by_experts, HIDDEN),
    "experts, sorted": (LORA_EXPERTS, experts, by_sorted_experts, HIDDEN),
    "embedding": (LORA_EMBEDDING, embedding, read, TOKENS),
    "embedding, 4 bits": (LORA_EMBEDDING, lambda: embedding(4), read, TOKENS),
    "embedding as head": (LORA_EMBEDDING, embedding, as_head, HIDDEN),
    "embedding as head, 4 bits": (LORA_EMBEDDING, lambda: embedding(4), as_head, HIDDEN),
    "dora": (DORA_LINEAR, linear, read, HIDDEN),
    "dora, bias": (DORA_LINEAR, lambda: linear(bias=True), read, HIDDEN),
    "dora, 4 bits, bias": (DORA_LINEAR, lambda: linear(4, bias=True), read, HIDDEN),
    "dora embedding": (DORA_EMBEDDING, embedding, read, TOKENS),
    "dora embedding as head": (DORA_EMBEDDING, embedding, as_head, HIDDEN),
}
cases = pytest.mark.parametrize("name", CASES)


def adapted(name: str, dropout: float = 0.0) -> nn.Module:
    """A model of one layer with mlx-lm's adapter: every adapter parameter random, the base frozen."""
    kind, base, _, _ = CASES[name]
    mx.random.seed(7)
    model = nn.Module()
    model.layer = kind.from_base(base(), r=3, dropout=dropout, scale=3.0)
    if "bias" in (inner := model.layer.get("linear", {})):
        inner.bias = mx.random.normal(inner.bias.shape)
    model.freeze()
    model.unfreeze(keys=list(lora.LEAVES), strict=False)
    drawn = [(n, v + 0.1 * mx.random.normal(v.shape)) for n, v in tree_flatten(model.trainable_parameters())]
    return model.load_weights(drawn, strict=False)


def in_dtype(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The model with its base in `dtype`; the adapter stays float32."""
    trained = tree_flatten(model.trainable_parameters())
    model.set_dtype(dtype)
    return model.load_weights(trained, strict=False)


def measured(model: nn.Module, name: str, dtype: mx.Dtype = mx.float32, weight: float = 1.0) -> dict[str, mx.array]:
    """The output, and by each adapter parameter and by the input the gradient of a sum with uneven weights."""
    _, _, use, x = CASES[name]
    reads_tokens = x.dtype == mx.int32
    x = x if reads_tokens else x.astype(dtype)
    mx.random.seed(11)  # dropout draws the same

    def total(trained: dict[str, mx.array], x: mx.array) -> tuple[mx.array, mx.array]:
        model.update(trained)
        out = use(model.layer, x)
        return weight * (out.astype(mx.float32) * mx.random.normal(out.shape, key=mx.random.key(5))).sum(), out

    trained = model.trainable_parameters()
    (_, out), gradients = mx.value_and_grad(total, argnums=[0] if reads_tokens else [0, 1])(trained, x)
    model.update(trained)
    by_adapter, *by_input = gradients if isinstance(gradients, tuple) else (gradients,)
    named = {name.split(".")[-1]: value for name, value in tree_flatten(by_adapter)}
    return {"out": out, **named, **({"x": by_input[0]} if by_input else {})}


def difference(ours: mx.array, theirs: mx.array) -> float:
    """The greatest difference, in units of the greatest number."""
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    return (mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@cases
def test_values_and_gradients_are_mlx_lms(name: str, dropout: float) -> None:
    model = adapted(name, dropout)
    for training in (True, False):
        model.train(training)
        model.layer.__class__ = CASES[name][0]
        theirs = measured(model, name)
        use_own_layers(model)
        assert type(model.layer) is OURS[CASES[name][0]]
        ours = measured(model, name)
        assert ours.keys() == theirs.keys() >= {"out", "lora_a", "lora_b"}
        assert {key: value.shape for key, value in ours.items()} == {key: v.shape for key, v in theirs.items()}
        worst = {key: difference(ours[key], theirs[key]) for key in ours}
        assert max(worst.values()) < 2e-6, worst


def runs_here(name: str) -> bool:
    """MLX's CPU backend gathers experts in float32 only, unless they are packed."""
    return not name.startswith("experts") or "bits" in name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", [name for name in CASES if runs_here(name)])
def test_in_16_bits_the_output_is_16_bits_and_gradients_stay_float32(name: str, dtype: mx.Dtype) -> None:
    model = in_dtype(adapted(name), dtype)
    use_own_layers(model)
    found = measured(model, name, dtype)
    assert found["out"].dtype == dtype
    assert {found[key].dtype for key in ("lora_a", "lora_b", "m") if key in found} == {mx.float32}
    exact = measured(adapted(name), name)
    worst = {key: difference(found[key], exact[key]) for key in found}
    assert max(worst.values()) < (0.03 if dtype == mx.bfloat16 else 0.005), worst


@pytest.mark.parametrize(
    "name", [name for name, (*_, x) in CASES.items() if x.dtype == mx.float32 and "experts" not in name]
)
def test_no_float32_copy_of_16_bit_activations_is_made(name: str) -> None:
    """Of all that forward and backward pass compute, nothing of the input's or the output's size is float32."""
    _, _, use, x = CASES[name]
    model = in_dtype(adapted(name), mx.bfloat16)
    use_own_layers(model)
    x = x.astype(mx.bfloat16)
    names, arrays = zip(*tree_flatten(model.trainable_parameters()), strict=True)
    out = use(model.layer, x)
    mx.eval(model.parameters(), out)

    def backward(x: mx.array, cotangent: mx.array, *arrays: mx.array) -> list[mx.array]:
        def forward(x: mx.array, *arrays: mx.array) -> mx.array:
            model.load_weights(list(zip(names, arrays, strict=True)), strict=False)
            return use(model.layer, x)

        return mx.vjp(forward, [x, *arrays], [cotangent])[1]

    described: list[dict[str, Any]] = []
    mx.export_function(described.append, backward, x, mx.ones_like(out), *arrays)
    made = [array for node in described if node["type"] == "primitive" for array in node["outputs"]]
    wide = [shape for _, shape, dtype in made if dtype == mx.float32 and prod(shape) in (x.size, out.size)]
    assert made and not wide


def test_a_small_gradient_is_not_lost_in_float16() -> None:
    """B after one step of 1e-5, a loss over many tokens: by A, what is 1e-9 a token is 0 in float16."""
    exact, half = (adapted("lora") for _ in range(2))
    for model in (exact, half):
        model.layer.lora_b = model.layer.lora_b * 1e-5
    half = in_dtype(half, mx.float16)
    use_own_layers(half)
    found, expected = measured(half, "lora", mx.float16, weight=1e-4), measured(exact, "lora", weight=1e-4)
    assert 0 < mx.abs(expected["lora_a"]).max().item() < 6e-8, "less than float16 has"
    assert difference(found["lora_a"], expected["lora_a"]) < 0.005


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_a_fresh_adapter_has_mlx_lms_bits(arch: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, arch)
    ours = load(ModelConfig(path=str(folder))).model
    adapter = lora.attach(ours, LoraConfig(num_layers=2, rank=4, dropout=0.1), seed=3)
    theirs = load(ModelConfig(path=str(folder))).model
    mx.random.seed(3)
    linear_to_lora_layers(theirs, 2, adapter.to_json("")["lora_parameters"])
    found, expected = lora.parameters(ours), lora.parameters(theirs)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_layers_that_a_model_brings_itself_stay_its_own() -> None:
    class Own(theirs_lora.LoRALinear):
        pass

    model = nn.Module()
    model.layers = [Own(8, 8), theirs_lora.LoRALinear(8, 8)]
    use_own_layers(model)
    assert [type(layer) for layer in model.layers] == [Own, OURS[theirs_lora.LoRALinear]]
