"""An adapter starts as no change, is switched off without a trace, and is one function here and in mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_dpo.config import LoraConfig, ModelConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.models import lora
from mlx_dpo.models.load import load
from support.tiny_models import tiny_model_folder

TOKENS = mx.array([[5, 9, 40, 41, 7, 100, 200, 3]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def model(tiny_llama: Path) -> nn.Module:
    return load(ModelConfig(path=str(tiny_llama))).model


def changed(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with an adapter that does something: every adapter parameter random."""
    keys = iter(mx.random.split(mx.random.key(seed), 300))
    weights = [
        (name, mx.random.normal(value.shape, scale=0.05, key=next(keys)))
        for name, value in lora.parameters(model).items()
    ]
    model.load_weights(weights, strict=False)
    return model


def equal(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b))


def close(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> bool:
    return bool(mx.abs(a - b).max().item() <= tolerance)


# a fresh adapter


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "lfm2", "qwen3_5", "mamba2", "gemma2"])
def test_a_fresh_adapter_changes_no_number(arch: str, tmp_path: Path) -> None:
    model = load(ModelConfig(path=str(tiny_model_folder(tmp_path, arch)))).model
    before = model(TOKENS)
    lora.attach(model, LoraConfig(num_layers=-1), seed=0)
    weights = lora.parameters(model)
    assert all(not value.any() for name, value in weights.items() if name.endswith("lora_b"))
    assert all(value.any() for name, value in weights.items() if name.endswith("lora_a"))
    assert equal(model(TOKENS), before)


def test_only_the_adapter_is_trained(model: nn.Module) -> None:
    lora.attach(model, LoraConfig(num_layers=2, rank=4), seed=0)
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert trained.keys() == lora.parameters(model).keys()
    assert len(trained) == 2 * 7 * 2, "two blocks of seven linear layers, A and B"
    assert {name.split(".")[2] for name in trained} == {"2", "3"}, "the blocks nearest to the head"
    assert trained["model.layers.3.self_attn.k_proj.lora_a"].shape == (64, 4)
    assert trained["model.layers.3.self_attn.k_proj.lora_b"].shape == (4, 32)


def test_the_seed_decides_the_adapter(tiny_llama: Path) -> None:
    def fresh(seed: int) -> mx.array:
        model = load(ModelConfig(path=str(tiny_llama))).model
        mx.random.normal((3,))  # what was drawn before does not matter
        lora.attach(model, LoraConfig(num_layers=2), seed=seed)
        return lora.parameters(model)["model.layers.3.mlp.up_proj.lora_a"]

    assert equal(fresh(1), fresh(1))
    assert not equal(fresh(1), fresh(2))


def test_scale_multiplies_what_the_adapter_adds(tiny_llama: Path) -> None:
    """y = W x + scale * B A x, by hand on one layer; alpha is PEFT's way to say scale * rank."""
    x = mx.random.normal((3, 64), key=mx.random.key(0))
    for said, scale in (({"scale": 5.0}, 5.0), ({"alpha": 16}, 4.0)):
        model = load(ModelConfig(path=str(tiny_llama))).model
        adapter = lora.attach(model, LoraConfig(num_layers=1, rank=4, **said), seed=0)
        assert adapter.scale == scale
        layer = changed(model).layers[-1].mlp.up_proj
        expected = x @ layer.linear.weight.T + scale * (x @ layer.lora_a @ layer.lora_b)
        assert close(layer(x), expected)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (("q_proj", "v_proj"), ["self_attn.q_proj", "self_attn.v_proj"]),
        (("self_attn.q_proj",), ["self_attn.q_proj"]),
        (("mlp.down_proj", "down_proj"), ["mlp.down_proj"]),
    ],
)
def test_keys_are_names_of_modules_or_their_ends(wanted: tuple[str, ...], found: list[str], model: nn.Module) -> None:
    adapter = lora.attach(model, LoraConfig(keys=wanted, num_layers=1), seed=0)
    assert list(adapter.keys) == found
    assert {name.split("layers.3.")[1].rsplit(".", 1)[0] for name in lora.parameters(model)} == set(found)


def test_by_default_every_linear_layer_of_a_block_is_adapted(model: nn.Module) -> None:
    adapter = lora.attach(model, LoraConfig(num_layers=1), seed=0)
    assert sorted(key.split(".")[1] for key in adapter.keys) == sorted(LINEAR)


ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
SHARED = ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("arch", "bits", "names"),
    [
        ("mixtral", None, [f"self_attn.{name}" for name in ATTENTION]),
        ("qwen3_moe", None, [f"self_attn.{name}" for name in ATTENTION]),
        ("qwen3_moe", 4, [f"self_attn.{name}" for name in ATTENTION]),
        (
            "qwen2_moe",
            None,
            [f"mlp.shared_expert.{name}" for name in SHARED]
            + ["mlp.shared_expert_gate"]
            + [f"self_attn.{name}" for name in ATTENTION],
        ),
    ],
)
def test_by_default_neither_experts_nor_the_router_are_adapted(
    arch: str, bits: int | None, names: list[str], tmp_path: Path
) -> None:
    model, _ = load_model(tiny_model_folder(tmp_path, arch, quantize_bits=bits))
    adapter = lora.attach(model, LoraConfig(num_layers=2), seed=0)
    assert sorted(adapter.keys) == names


def test_experts_are_adapted_when_a_key_names_them(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "qwen2_moe")
    for keys, found in (
        (("mlp.switch_mlp.down_proj",), ["mlp.switch_mlp.down_proj"]),
        (("q_proj", "down_proj"), ["self_attn.q_proj", "mlp.switch_mlp.down_proj", "mlp.shared_expert.down_proj"]),
        (("mlp.gate",), ["mlp.gate"]),
    ):
        model = load(ModelConfig(path=str(folder))).model
        before = model(TOKENS)
        assert sorted(lora.attach(model, LoraConfig(num_layers=2, keys=keys), seed=0).keys) == sorted(found)
        assert not close(changed(model)(TOKENS), before, 1e-3)


def test_the_parts_of_a_mixture_are_known_adapted_or_not(tmp_path: Path) -> None:
    model = load(ModelConfig(path=str(tiny_model_folder(tmp_path, "qwen2_moe")))).model
    experts = {f"mlp.switch_mlp.{name}": "experts" for name in SHARED}
    before = lora.mixture_modules(model.layers)
    assert before == experts | {"mlp.gate": "router"}
    lora.attach(model, LoraConfig(keys=("mlp.gate", "down_proj")), seed=0)
    assert lora.mixture_modules(model.layers) == before


def module(**children: Any) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def test_experts_in_a_list_of_modules_are_experts_too() -> None:
    """As dbrx has them: a module for each expert, and its router inside a module of its own."""
    linear = nn.Linear(8, 8)
    mlp = module(router=module(layer=linear), experts=[module(w1=linear), module(w1=linear)])
    block = module(attn=module(out=linear), ffn=mlp, shared_experts=[module(w1=linear)])
    experts = {f"ffn.experts.{i}.w1": "experts" for i in range(2)}
    assert lora.mixture_modules([block]) == experts | {"ffn.router.layer": "router"}


# dora


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "qwen3_5"])
def test_a_fresh_dora_changes_no_number_and_trains_magnitudes_too(arch: str, tmp_path: Path) -> None:
    import mlx_lm

    folder = tiny_model_folder(tmp_path / "model", arch)
    model = load(ModelConfig(path=str(folder))).model
    before = model(TOKENS)
    adapter = lora.attach(model, LoraConfig(num_layers=2, fine_tune_type="dora"), seed=0)
    assert adapter.fine_tune_type == "dora"
    assert close(model(TOKENS), before, 1e-5)
    assert {name.rsplit(".", 1)[-1] for name in lora.parameters(model)} == {"lora_a", "lora_b", "m"}
    theirs, _ = mlx_lm.load(str(folder), adapter_path=str(saved(changed(model), adapter, tmp_path / "adapter")))
    theirs.eval()
    assert close(theirs(TOKENS), model(TOKENS), 2e-5)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_dora_on_3_5_and_6_bits_is_that_of_the_unpacked_weights(bits: int, tmp_path: Path) -> None:
    """mlx-lm gives A a wrong shape there; what is saved is read back here."""
    folder = tiny_model_folder(tmp_path / "model", quantize_bits=bits)
    packed, _ = load_model(folder)
    adapter = lora.attach(packed, LoraConfig(num_layers=2, fine_tune_type="dora"), seed=0)
    assert lora.parameters(packed)["model.layers.3.self_attn.q_proj.lora_a"].shape == (64, 8)
    written = saved(changed(packed), adapter, tmp_path / "adapter")
    plain = load(ModelConfig(path=str(folder), compute_dtype="float32")).model
    lora.load(plain, written)
    assert close(plain(TOKENS), packed(TOKENS), 1e-4)
    again, _ = load_model(folder)
    lora.load(again, written)
    assert equal(again(TOKENS), packed(TOKENS))


def test_dora_of_experts_is_refused(tmp_path: Path) -> None:
    model = load(ModelConfig(path=str(tiny_model_folder(tmp_path, "qwen3_moe")))).model
    with pytest.raises(UsageError, match=r"no DoRA of experts \(mlp.switch_mlp.down_proj\)"):
        lora.attach(model, LoraConfig(keys=("q_proj", "down_proj"), fine_tune_type="dora"), seed=0)


@pytest.mark.parametrize(
    ("arch", "key", "said"),
    [
        ("qwen3_moe", "mlp.switch_mlp.down_proj", "down_proj (experts)"),
        ("llama_tied", "model.embed_tokens", "model.embed_tokens (a quantized embedding)"),
    ],
)
def test_a_dora_folder_of_what_has_none_is_refused(arch: str, key: str, said: str, tmp_path: Path) -> None:
    model, _ = load_model(tiny_model_folder(tmp_path / "model", arch, quantize_bits=4))
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": [key]}
    (tmp_path / "adapter").mkdir()
    folder = write(
        tmp_path / "adapter", {"fine_tune_type": "dora", "num_layers": 1, "lora_parameters": settings}, WEIGHTS
    )
    with pytest.raises(ModelError) as caught:
        lora.load(model, folder)
    assert said in str(caught.value)
    assert "fuse it where it was trained" in caught.value.remedy


def test_keys_that_name_nothing_are_all_named_with_what_there_is(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="q_prj, lm_head") as caught:
        lora.attach(model, LoraConfig(keys=("q_prj", "v_proj", "lm_head"), num_layers=2), seed=0)
    assert "self_attn.q_proj" in caught.value.remedy


@pytest.mark.parametrize("count", [0, -2])
def test_no_block_at_all_cannot_be_adapted(count: int, model: nn.Module) -> None:
    with pytest.raises(UsageError, match=f"--num-layers {count}"):
        lora.attach(model, LoraConfig(num_layers=count), seed=0)


def test_a_model_with_fewer_blocks_than_asked_for_gets_all_of_them_adapted(tmp_path: Path) -> None:
    model = load(ModelConfig(path=str(tiny_model_folder(tmp_path / "m", num_hidden_layers=3)))).model
    assert lora.attach(model, LoraConfig(num_layers=16), seed=0).num_layers == 3


def test_minus_one_means_all_blocks(model: nn.Module) -> None:
    assert lora.attach(model, LoraConfig(num_layers=-1), seed=0).num_layers == 4


def test_dropout_acts_in_training_and_nowhere_else(model: nn.Module) -> None:
    lora.attach(model, LoraConfig(num_layers=-1, dropout=0.5), seed=0)
    changed(model)
    model.eval()
    assert equal(model(TOKENS), model(TOKENS))
    still = model(TOKENS)
    model.train()
    assert not equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert equal(model(TOKENS), still)


# switched off


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "qwen3_5"])
def test_switched_off_is_the_base_model_and_afterwards_the_adapter_is_back(arch: str, tmp_path: Path) -> None:
    model = load(ModelConfig(path=str(tiny_model_folder(tmp_path, arch)))).model
    base = model(TOKENS)
    lora.attach(model, LoraConfig(num_layers=2), seed=0)
    changed(model)
    adapted, trained = model(TOKENS), dict(tree_flatten(model.trainable_parameters()))
    with lora.switched_off(model):
        assert equal(model(TOKENS), base)
        assert lora.parameters(model) == {}
    assert equal(model(TOKENS), adapted)
    after = dict(tree_flatten(model.trainable_parameters()))
    assert after.keys() == trained.keys()
    assert all(equal(after[name], value) for name, value in trained.items())


def test_an_error_inside_leaves_the_adapter_on(model: nn.Module) -> None:
    lora.attach(model, LoraConfig(num_layers=2), seed=0)
    adapted = changed(model)(TOKENS)
    with pytest.raises(KeyboardInterrupt), lora.switched_off(model):
        raise KeyboardInterrupt
    assert equal(model(TOKENS), adapted)


# to and from folders


def saved(model: nn.Module, adapter: lora.Adapter, folder: Path, base: str = "base") -> Path:
    folder.mkdir(exist_ok=True)
    lora.save(model, adapter, folder, base=base)
    return folder


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "qwen3_5", "lfm2"])
def test_mlx_lm_loads_what_is_saved_and_computes_the_same(arch: str, tmp_path: Path) -> None:
    import mlx_lm

    folder = tiny_model_folder(tmp_path / "model", arch)
    model = load(ModelConfig(path=str(folder))).model
    adapter = lora.attach(model, LoraConfig(num_layers=2, rank=4, scale=3.0), seed=0)
    adapters = saved(changed(model), adapter, tmp_path / "adapter")
    theirs, _ = mlx_lm.load(str(folder), adapter_path=str(adapters))
    theirs.eval()
    assert close(theirs(TOKENS), model(TOKENS))
    assert not close(theirs(TOKENS), load(ModelConfig(path=str(folder))).model(TOKENS), 0.01)


def test_the_saved_settings_are_what_mlx_lm_reads(model: nn.Module, tmp_path: Path) -> None:
    adapter = lora.attach(model, LoraConfig(num_layers=2, rank=4, alpha=8, dropout=0.1, keys=("q_proj",)), seed=0)
    folder = saved(model, adapter, tmp_path, base="owner/model")
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "model": "owner/model",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
    }


def test_what_is_saved_is_loaded_bit_for_bit(tiny_llama: Path, model: nn.Module, tmp_path: Path) -> None:
    adapter = lora.attach(model, LoraConfig(num_layers=2, rank=4, dropout=0.3), seed=0)
    folder = saved(changed(model), adapter, tmp_path)
    again = load(ModelConfig(path=str(tiny_llama))).model
    assert lora.load(again, folder) == adapter
    assert all(equal(value, lora.parameters(again)[name]) for name, value in lora.parameters(model).items())
    assert equal(again(TOKENS), model(TOKENS))
    assert dict(tree_flatten(again.trainable_parameters())).keys() == lora.parameters(model).keys()


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_mlx_lm_made_is_the_same_here(use_dora: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """As `mlx_lm.lora` writes it: no `keys`, and its other options beside."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    theirs, _ = load_model(tiny_llama)
    theirs.freeze()
    settings = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(theirs, 2, settings, use_dora=use_dora)
    keys = iter(mx.random.split(mx.random.key(0), 100))
    theirs.load_weights(
        [
            (name, value + mx.random.normal(value.shape, scale=0.02, key=next(keys)))
            for name, value in tree_flatten(theirs.trainable_parameters())
        ],
        strict=False,
    )
    kind = "dora" if use_dora else "lora"
    written = {
        "fine_tune_type": kind,
        "num_layers": 2,
        "lora_parameters": settings,
        "model": "x",
        "iters": 3,
        "lr": 1e-5,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(tree_flatten(theirs.trainable_parameters())))
    model = load(ModelConfig(path=str(tiny_llama))).model
    base = model(TOKENS)
    adapter = lora.load(model, tmp_path)
    assert (adapter.rank, adapter.scale, adapter.num_layers, adapter.fine_tune_type) == (8, 20.0, 2, kind)
    assert close(model(TOKENS), theirs(TOKENS), 2e-5)
    with lora.switched_off(model):
        assert equal(model(TOKENS), base)


def test_an_adapter_in_half_precision_is_trained_in_float32(tiny_llama: Path, model: nn.Module, tmp_path: Path) -> None:
    adapter = lora.attach(model, LoraConfig(num_layers=1), seed=0)
    folder = saved(changed(model), adapter, tmp_path)
    file = str(folder / "adapters.safetensors")
    half = {name: value.astype(mx.bfloat16) for name, value in mx.load(file).items()}
    mx.eval(half)
    mx.save_safetensors(file, half)
    again = load(ModelConfig(path=str(tiny_llama))).model
    lora.load(again, folder)
    assert {value.dtype for value in lora.parameters(again).values()} == {mx.float32}
    assert all(equal(value, half[name].astype(mx.float32)) for name, value in lora.parameters(again).items())


def test_modules_that_an_adapter_leaves_alone_stay_alone(tiny_llama: Path, model: nn.Module, tmp_path: Path) -> None:
    """An adapter of q_proj in block 2 and up_proj in block 3: no other module may get a random A of its own."""
    adapter = lora.attach(model, LoraConfig(num_layers=2, keys=("q_proj", "up_proj")), seed=0)
    folder = saved(changed(model), adapter, tmp_path)
    file = str(folder / "adapters.safetensors")
    some = {n: v for n, v in mx.load(file).items() if "2.self_attn.q_proj" in n or "3.mlp.up_proj" in n}
    mx.eval(some)
    mx.save_safetensors(file, some)
    again = load(ModelConfig(path=str(tiny_llama))).model
    lora.load(again, folder)
    assert lora.parameters(again).keys() == some.keys()
    assert dict(tree_flatten(again.trainable_parameters())).keys() == some.keys()
    import mlx_lm

    theirs, _ = mlx_lm.load(str(tiny_llama), adapter_path=str(folder))
    assert close(again(TOKENS), theirs(TOKENS))


# what is not an adapter, or not for this model


def write(folder: Path, settings: Any, weights: dict[str, mx.array] | None) -> Path:
    if settings is not None:
        (folder / "adapter_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    if weights is not None:
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


GOOD = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
Q = "model.layers.3.self_attn.q_proj"
WEIGHTS = {f"{Q}.lora_a": mx.zeros((64, 4)), f"{Q}.lora_b": mx.zeros((4, 64))}


@pytest.mark.parametrize(
    ("settings", "weights", "said"),
    [
        (None, WEIGHTS, "adapter_config.json is missing"),
        ("{", WEIGHTS, "is not JSON"),
        (GOOD, None, "adapters.safetensors is missing"),
        (GOOD | {"fine_tune_type": "full"}, WEIGHTS, "'full' fine-tune"),
        ({"num_layers": 1}, WEIGHTS, "lora_parameters"),
        (GOOD | {"lora_parameters": {"rank": 4, "alpha": 8}}, WEIGHTS, "scale"),
        (GOOD | {"num_layers": 9}, WEIGHTS, "for 9 blocks, the model has 4"),
        (GOOD, {}, "no adapter parameter"),
        (GOOD, {f"{Q}.lora_a": mx.zeros((64, 4))}, f"{Q}.lora_b: missing"),
    ],
)
def test_a_folder_that_holds_no_whole_adapter_says_what_is_wrong(
    settings: Any, weights: Any, said: str, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        lora.load(model, write(tmp_path, settings, weights))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_adapters_file_cut_short_is_an_error_and_no_crash(model: nn.Module, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, WEIGHTS) / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ModelError, match="cannot be read"):
        lora.load(model, tmp_path)


def test_an_adapter_for_another_model_is_refused_with_all_misfits(model: nn.Module, tmp_path: Path) -> None:
    other = load(
        ModelConfig(path=str(tiny_model_folder(tmp_path / "other", hidden_size=96, num_key_value_heads=4)))
    ).model
    adapter = lora.attach(other, LoraConfig(num_layers=2, keys=("q_proj", "k_proj")), seed=0)
    folder = saved(other, adapter, tmp_path / "adapter")
    with pytest.raises(ModelError) as caught:
        lora.load(model, folder)
    said = str(caught.value)
    assert "is for another model" in said
    assert said.count("the model wants") == 5
    assert "… and 1 more" in said, "A of both keys and B of k_proj, in two blocks"
    assert "shape (96, 8), the model wants (64, 8)" in said


def test_an_adapter_for_another_architecture_is_refused(model: nn.Module, tmp_path: Path) -> None:
    other = load(ModelConfig(path=str(tiny_model_folder(tmp_path / "other", "mamba2")))).model
    folder = saved(other, lora.attach(other, LoraConfig(num_layers=1), seed=0), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"backbone\.layers\.3"):
        lora.load(model, folder)


def test_after_a_refusal_the_model_is_what_it_was(model: nn.Module, tmp_path: Path) -> None:
    before = model(TOKENS)
    with pytest.raises(ModelError):
        lora.load(model, write(tmp_path, GOOD, {f"{Q}.lora_a": mx.ones((64, 4)), f"{Q}.lora_b": mx.ones((5, 64))}))
    assert equal(model(TOKENS), before)
