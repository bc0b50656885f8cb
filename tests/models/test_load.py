"""A folder that mlx-lm reads is loaded as the same function in every form; one that cannot be loaded says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.config import ModelConfig
from mlx_dpo.errors import ModelError, UsageError
from mlx_dpo.models import load as load_module
from mlx_dpo.models.load import is_quantized, load, model_folder, read_stored, unload_blocks
from support.tiny_models import tiny_model_folder

TOKENS = mx.array([[5, 9, 40, 41, 7, 100, 200, 3]])


def log_probs(model: Any) -> mx.array:
    logits = model(TOKENS).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def through_mlx_lm(folder: Path) -> mx.array:
    """What mlx-lm's own loading of the folder computes, with packed weights where they are packed."""
    from mlx_lm.utils import load_model

    return log_probs(load_model(folder)[0])


def assert_close(found: mx.array, expected: mx.array, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=tolerance)


def requantized(folder: Path, arch: str, bits: int, group_size: int, mode: str, **more: Any) -> Path:
    """A tiny model in one of MLX's packed forms, as mlx-lm's conversion writes it."""
    from mlx_lm.utils import load_model, quantize_model, save_config

    tiny_model_folder(folder, arch)
    model, settings = quantize_model(*load_model(folder), group_size, bits, mode=mode, **more)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_config(settings, config_path=folder / "config.json")
    return folder


# what is loaded


def test_a_loaded_model_is_frozen_in_evaluation_mode_and_knows_where_it_came_from(tiny_llama: Path) -> None:
    loaded = load(ModelConfig(path=str(tiny_llama)))
    assert tree_flatten(loaded.model.trainable_parameters()) == []
    assert not loaded.model.training
    assert (loaded.path, loaded.name) == (tiny_llama, str(tiny_llama))
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert loaded.config["model_type"] == "llama"
    assert_close(log_probs(loaded.model), through_mlx_lm(tiny_llama))


@pytest.mark.parametrize(
    ("arch", "bits", "group_size", "mode"),
    [
        ("llama", 4, 32, "affine"),
        ("llama_tied", 4, 64, "affine"),
        ("qwen3_moe", 8, 32, "affine"),
        ("llama", 3, 64, "affine"),
        ("llama", 4, 32, "mxfp4"),
        ("qwen3_moe", 4, 16, "nvfp4"),
        ("llama", 8, 32, "mxfp8"),
    ],
)
def test_on_a_cpu_packed_weights_are_unpacked_once_to_the_same_function(
    arch: str, bits: int, group_size: int, mode: str, tmp_path: Path
) -> None:
    folder = requantized(tmp_path, arch, bits, group_size, mode)
    with mx.stream(mx.cpu):
        loaded = load(ModelConfig(path=str(folder), compute_dtype="float32"))
        assert_close(log_probs(loaded.model), through_mlx_lm(folder), 2e-5)
    if mx.default_device() == mx.cpu:
        assert not is_quantized(loaded.model)
        assert {value.dtype for _, value in tree_flatten(loaded.model.parameters())} == {mx.float32}


def test_a_packed_folder_and_its_numbers_written_out_are_one_function(tmp_path: Path) -> None:
    """w = scale * q + bias, written as float32: log-probs to 1e-5."""
    packed, written = tiny_model_folder(tmp_path / "packed", quantize_bits=4), tmp_path / "written"
    tiny_model_folder(written)
    weights = mx.load(str(packed / "model.safetensors"))
    plain = {
        name: mx.dequantize(value, weights[name[:-6] + "scales"], weights[name[:-6] + "biases"], 32, 4)
        if name[:-6] + "scales" in weights
        else value
        for name, value in weights.items()
        if not name.endswith((".scales", ".biases"))
    }
    mx.save_safetensors(str(written / "model.safetensors"), plain)
    found, expected = (load(ModelConfig(path=str(folder), compute_dtype="float32")) for folder in (packed, written))
    assert_close(log_probs(found.model), log_probs(expected.model))


def test_expert_weights_with_a_scale_of_their_own_are_the_same_function_too(tmp_path: Path) -> None:
    """nvfp4 knows 4 and 6 and nothing between: an error up to 1/6 of a group's largest weight, and 1/16 of its scale.

    Without the experts' own scales the weights would be some thousand times too large.
    """
    plain = tiny_model_folder(tmp_path / "plain", "qwen3_moe")
    folder = requantized(tmp_path / "packed", "qwen3_moe", 4, 16, "nvfp4", global_scale=True)
    with mx.stream(mx.cpu):
        loaded = load(ModelConfig(path=str(folder), compute_dtype="float32"))
    if mx.default_device() == mx.cpu:
        found = loaded.model.layers[1].mlp.switch_mlp.up_proj.weight
        expected = load(ModelConfig(path=str(plain))).model.layers[1].mlp.switch_mlp.up_proj.weight
        assert_close(found, expected, (1 / 6 + 1 / 16) * mx.abs(expected).max().item())


def test_scales_kept_in_half_precision_are_not_rounded_again(tmp_path: Path) -> None:
    """w = scale * q + bias of the 16-bit scale and bias as stored, in float32."""
    folder = tiny_model_folder(tmp_path, quantize_bits=4)
    weights = {
        name: value.astype(mx.bfloat16) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in mx.load(str(folder / "model.safetensors")).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    name = "model.layers.0.self_attn.q_proj"
    packed = np.array(weights[f"{name}.weight"])
    unpacked = (packed[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15  # 8 numbers of 4 bits in a word
    scale, bias = (
        np.repeat(np.array(weights[f"{name}.{part}"].astype(mx.float32)), 32, axis=1) for part in ("scales", "biases")
    )
    loaded = load(ModelConfig(path=str(folder), compute_dtype="float32"))
    if mx.default_device() == mx.cpu:
        found = loaded.model.layers[0].self_attn.q_proj.weight
        np.testing.assert_allclose(np.array(found), scale * unpacked.reshape(packed.shape[0], -1) + bias, atol=1e-6)
        half = load(ModelConfig(path=str(folder), compute_dtype="bfloat16"))
        rounded = half.model.layers[0].self_attn.q_proj.weight
        assert mx.array_equal(rounded, found.astype(mx.bfloat16)), "rounded once, after unpacking"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.2), ("bfloat16", 1.0)])
def test_a_named_compute_dtype_is_what_the_weights_are_in(dtype: Any, tolerance: float, tiny_llama: Path) -> None:
    loaded = load(ModelConfig(path=str(tiny_llama), compute_dtype=dtype))
    assert {str(value.dtype) for _, value in tree_flatten(loaded.model.parameters())} == {f"mlx.core.{dtype}"}
    assert_close(log_probs(loaded.model), through_mlx_lm(tiny_llama), tolerance)
    assert dtype in loaded.form


def test_the_form_tells_every_way_of_holding_a_model_apart(tmp_path: Path, tiny_llama: Path) -> None:
    """It is a part of the reference store's key: other numbers must have another name."""
    packed = tiny_model_folder(tmp_path, quantize_bits=4)
    forms = [
        load(config).form
        for config in (
            ModelConfig(path=str(tiny_llama), compute_dtype="float32"),
            ModelConfig(path=str(tiny_llama), compute_dtype="bfloat16"),
            ModelConfig(path=str(tiny_llama), quantize_bits=4, quantize_group_size=32),
            ModelConfig(path=str(tiny_llama), quantize_bits=4, quantize_group_size=64),
            ModelConfig(path=str(tiny_llama), quantize_bits=8, quantize_group_size=64),
            ModelConfig(path=str(packed)),
        )
    ]
    assert len(set(forms)) == len(forms)


# on a GPU weights stay as they are stored, but for floats of mixed width; whether there is one does not matter for that


def stored(folder: Path, wide: Any, half: mx.Dtype) -> Any:
    """The model of a folder whose floats are 16-bit, except float32 where `wide(name)` says so, as a GPU gets it."""
    weights = {
        name: value if not mx.issubdtype(value.dtype, mx.floating) or wide(name) else value.astype(half)
        for name, value in mx.load(str(folder / "model.safetensors")).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return read_stored(folder, ModelConfig(path=str(folder)))[0]


@pytest.mark.parametrize(
    ("arch", "half", "expected"),
    [
        ("llama", mx.float16, "float16"),
        ("qwen3", mx.bfloat16, "bfloat16"),
        ("gemma3", mx.float16, "bfloat16"),  # its activations overflow float16
    ],
)
@pytest.mark.parametrize("quantize_bits", [None, 8])
def test_on_a_gpu_norms_and_scales_in_float32_do_not_make_a_16_bit_model_compute_in_float32(
    quantize_bits: int | None, arch: str, half: mx.Dtype, expected: str, tmp_path: Path
) -> None:
    """As a GGUF file is imported: norms and the embedding's scales in float32."""
    folder = tiny_model_folder(tmp_path, arch, quantize_bits=quantize_bits)
    model = stored(folder, lambda name: "norm" in name or "embed_tokens" in name, half)
    assert model(TOKENS).dtype == mx.float32, "else there is nothing to mend"
    before = log_probs(model)
    assert load_module._as_stored(model) == f"stored, {expected}"
    assert str(model(TOKENS).dtype) == f"mlx.core.{expected}"
    assert mx.abs(log_probs(model) - before).mean() < 0.3


@pytest.mark.parametrize(("wide", "half"), [(False, mx.bfloat16), (True, mx.bfloat16)])
def test_on_a_gpu_a_model_of_one_width_stays_as_it_is(wide: bool, half: mx.Dtype, tmp_path: Path) -> None:
    model = stored(tiny_model_folder(tmp_path), lambda name: wide, half)
    before = dict(tree_flatten(model.parameters()))
    assert load_module._as_stored(model) == "stored"
    assert all(value is before[name] for name, value in tree_flatten(model.parameters()))


# AutoAWQ's packing: eight 4-bit numbers in a word, in the order 0 2 4 6 1 3 5 7, and w = (q - zero) * scale

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_awq(numbers: np.ndarray) -> np.ndarray:
    """`[rows, columns]` of 0 to 15 into `[rows, columns / 8]` int32."""
    eights = numbers.reshape(numbers.shape[0], -1, 8).astype(np.uint32)
    return np.sum([eights[..., n] << (4 * i) for i, n in enumerate(AWQ_ORDER)], axis=0, dtype=np.uint32).view(np.int32)


def test_an_awq_folder_is_the_function_that_its_numbers_say(tmp_path: Path) -> None:
    plain, packed = tiny_model_folder(tmp_path / "plain"), tiny_model_folder(tmp_path / "awq")
    weights = mx.load(str(plain / "model.safetensors"))
    random = np.random.default_rng(0)
    awq: dict[str, mx.array] = {}
    for name, value in weights.items():
        if not name.endswith("proj.weight"):
            awq[name] = value
            continue
        out, into = value.shape
        q = random.integers(0, 16, (into, out))
        zeros = random.integers(0, 16, (into // 32, out))
        scales = random.uniform(0.02, 0.05, (into // 32, out)).astype(np.float32)
        weights[name] = mx.array(
            ((q - np.repeat(zeros, 32, axis=0)) * np.repeat(scales, 32, axis=0)).T.astype(np.float32)
        )
        prefix = name.removesuffix(".weight")
        awq |= {
            f"{prefix}.qweight": mx.array(pack_awq(q)),
            f"{prefix}.qzeros": mx.array(pack_awq(zeros)),
            f"{prefix}.scales": mx.array(scales),
        }
    mx.save_safetensors(str(plain / "model.safetensors"), weights)
    mx.save_safetensors(str(packed / "model.safetensors"), awq)
    settings = json.loads((packed / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (packed / "config.json").write_text(json.dumps(settings))
    found = load(ModelConfig(path=str(packed), compute_dtype="float32"))
    expected = load(ModelConfig(path=str(plain), compute_dtype="float32"))
    assert_close(log_probs(found.model), log_probs(expected.model), 2e-5)


# memory given back


@pytest.mark.parametrize("more", [{}, {"quantize_bits": 4, "quantize_group_size": 32}])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_blocks_at_rest_take_no_memory_and_come_back_when_they_are_needed(
    arch: str, more: dict[str, int], tmp_path: Path
) -> None:
    config = ModelConfig(path=str(tiny_model_folder(tmp_path, arch)), **more)
    loaded = load(config)
    before = log_probs(loaded.model)
    mx.eval(before)
    held = mx.get_active_memory()
    lowest = sum(value.nbytes for block in loaded.model.layers[:3] for _, value in tree_flatten(block.parameters()))
    unload_blocks(loaded, config, 3)
    assert held - mx.get_active_memory() > 0.95 * lowest
    assert mx.array_equal(log_probs(loaded.model), before)
    assert not tree_flatten(loaded.model.trainable_parameters()) and not loaded.model.training


# quantization on load


def test_quantizing_on_load_is_mlx_lms_quantization(tmp_path: Path, tiny_llama: Path, capsys: Any) -> None:
    folder = requantized(tmp_path, "llama", 4, 32, "affine")
    capsys.readouterr()
    loaded = load(ModelConfig(path=str(tiny_llama), quantize_bits=4, quantize_group_size=32))
    assert_close(log_probs(loaded.model), through_mlx_lm(folder), 2e-5)
    assert capsys.readouterr().out == "", "standard output is for data"


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, quantize_bits=4)
    with pytest.raises(UsageError, match="quantized already"):
        load(ModelConfig(path=str(folder), quantize_bits=8))


@pytest.mark.parametrize(("bits", "group_size"), [(7, 64), (9, 64)])
def test_bits_and_groups_that_mlx_does_not_know_are_refused(bits: int, group_size: int, tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=f"--quantize-bits {bits} --quantize-group-size {group_size}") as caught:
        load(ModelConfig(path=str(tiny_llama), quantize_bits=bits, quantize_group_size=group_size))
    assert "groups of 32, 64 or 128" in caught.value.remedy


@pytest.mark.parametrize("group_size", [48, 256])
def test_groups_that_divide_no_layer_are_refused(group_size: int, tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=f"no layer is a multiple of {group_size} wide"):
        load(ModelConfig(path=str(tiny_llama), quantize_bits=4, quantize_group_size=group_size))


# what cannot be loaded


def test_no_model_is_a_question_of_usage() -> None:
    with pytest.raises(UsageError, match="no model") as caught:
        load(ModelConfig())
    assert "--model" in caught.value.remedy


def test_all_that_a_folder_lacks_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json.*weights.*tokenizer"):
        load(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (["model.safetensors"], "weights"),
        (["config.json"], "config.json"),
        (["tokenizer.json", "tokenizer_config.json"], "a tokenizer"),
    ],
)
def test_what_a_folder_lacks_is_named(gone: list[str], named: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=f"lacks {named}"):
        load(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        model_folder(name)


def test_a_hub_name_that_the_hub_does_not_give_says_what_to_check() -> None:
    """Tests run with the Hub switched off, as on a machine without a network."""
    with pytest.raises(ModelError, match="nobody/nothing") as caught:
        model_folder("nobody/nothing")
    assert "network" in caught.value.remedy


def test_a_gguf_file_is_no_folder_and_the_way_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file") as caught:
        model_folder(str(file))
    assert "import" in caught.value.remedy


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "abacus"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="abacus"):
        load(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("keep", [0, 5000])
def test_a_weights_file_cut_short_is_an_error_and_no_crash(keep: int, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: keep or -100_000])
    with pytest.raises(ModelError):
        load(ModelConfig(path=str(folder)))


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["model.layers.2.mlp.up_proj.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ModelError) as caught:
        load(ModelConfig(path=str(folder)))
    assert "model.layers.2.mlp.up_proj.weight" in str(caught.value)


def test_code_of_a_models_author_runs_only_when_asked_for(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    settings = json.loads((folder / "config.json").read_text()) | {"model_file": "own.py"}
    (folder / "config.json").write_text(json.dumps(settings))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
    )
    with pytest.raises(ModelError) as caught:
        load(ModelConfig(path=str(folder)))
    assert not ran.exists()
    assert "--trust-remote-code" in caught.value.remedy
    loaded = load(ModelConfig(path=str(folder), trust_remote_code=True))
    assert ran.exists()
    assert_close(log_probs(loaded.model), through_mlx_lm(tiny_llama))
