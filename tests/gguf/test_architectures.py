"""Names of tensors go to GGUF and come back; test_read.py and test_llamacpp.py do so with whole models."""

from __future__ import annotations

import pytest

from mlx_dpo.gguf.architectures import (
    ARCHITECTURES,
    LLAMA3_DEFAULTS,
    llama3_factors,
    model_type_of,
    to_gguf_name,
    to_mlx_name,
)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_name_goes_there_and_comes_back(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    names = [f"blk.3.{part}.weight" for part in architecture.block] + ["token_embd.weight", "output_norm.weight"]
    for name in names:
        theirs = to_mlx_name(architecture, name)
        assert theirs is not None
        assert to_gguf_name(architecture, theirs) == name


def test_what_has_no_place_has_no_name() -> None:
    assert to_mlx_name(ARCHITECTURES["llama"], "blk.0.ssm_conv1d.weight") is None
    assert to_gguf_name(ARCHITECTURES["llama"], "model.layers.0.mixer.weight") is None
    assert model_type_of("mamba") is None


def test_llama_3_stretches_long_waves_and_leaves_short_ones() -> None:
    # frequency 0 has wavelength 2π, far below 8192 / 4; the last, 2π · 500000^(126/128), far above 8192 / 1
    factors = llama3_factors(128, 500000.0, LLAMA3_DEFAULTS | {"factor": 8.0})
    assert factors.shape == (64,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
