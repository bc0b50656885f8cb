"""llama.cpp itself: log-probs and token ids by a GGUF file, in this process through `xllamacpp`, and its quantizer."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mlx_dpo.errors import MlxDpoError, UsageError
from mlx_dpo.files import written_whole

QUANTIZER = "llama-quantize"
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""Kinds that llama.cpp's own quantizer makes, which alone knows how."""


@dataclass(frozen=True)
class LlamaCpp:
    """A running server of one model file. It listens on a port of the loopback interface until it is garbage."""

    server: Any
    vocab_size: int
    drawn: int  # the token that every answer consists of, whatever the log-probs


def runtime_installed() -> bool:
    """Whether llama.cpp can be had in this process."""
    return importlib.util.find_spec("xllamacpp") is not None


def open_llama_cpp(model: str | Path, adapter: str | Path | None = None, *, context: int = 1024) -> LlamaCpp:
    """Start llama.cpp on a model file and, on top, an adapter file, set to float32 on the CPU.

    Flash attention is off and the cache is float32: each alone would cost more than the differences that are looked
    for. Raises MlxDpoError when `xllamacpp` is missing.
    """
    if not runtime_installed():
        raise MlxDpoError(
            "Checking a GGUF file with llama.cpp needs the `xllamacpp` package.",
            "Install it with: pip install xllamacpp",
        )
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx = context
    params.n_parallel = 1
    params.n_gpu_layers = 0
    # ggml's threads wait for each other by spinning: on a machine with other work, two are slower than one.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.verbosity = -1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    vocab_size = len(gguf.GGUFReader(model).fields["tokenizer.ggml.tokens"].data)
    return LlamaCpp(server, vocab_size, tokenize(server, "a")[-1])


def next_log_probs(llama: LlamaCpp, ids: list[int], top: int | None = None) -> np.ndarray:
    """log p of every next token after `ids`, float32 `[vocab]`; with `top`, of the likeliest alone, -inf elsewhere.

    The whole of a large vocabulary takes seconds a position, the likeliest 2,000 some hundredths.
    """
    # The log-probs are those before sampling. A token drawn that ends the answer, or half a character, would have none.
    request = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": top or llama.vocab_size}
    answer = llama.server.handle_completions(request | {"logit_bias": [[llama.drawn, 1e4]]})
    (step,) = answer["choices"][0]["logprobs"]["content"]
    found = np.full(llama.vocab_size, -np.inf, np.float32)
    for candidate in step["top_logprobs"]:
        found[candidate["id"]] = candidate["logprob"]
    return found


def tokenize(server: Any, text: str) -> list[int]:
    """Token ids of `text` without a beginning token; special tokens written out are recognised."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def quantize_gguf(source: str | Path, out: str | Path, kind: str) -> Path:
    """Quantize the GGUF file `source` to one of `K_QUANTS`, as the file `out`.

    It runs `llama-quantize` where that is installed. Raises MlxDpoError with the exact command where it is not, and
    with what the program said where it fails; UsageError for another kind or a file that exists.
    """
    source, out = Path(source), Path(out)
    if kind not in K_QUANTS:
        raise UsageError(f"{kind!r} is no K-quant.", f"Choose one of {', '.join(K_QUANTS)}.")
    if out.exists():
        raise UsageError(f"{out} exists already.", "Name a file that does not exist yet, or remove it first.")
    program = shutil.which(QUANTIZER)
    if program is None:
        raise MlxDpoError(
            f"K-quants are made by llama.cpp's quantizer, and {QUANTIZER} is not installed.",
            f"Install llama.cpp (brew install llama.cpp), then run: {QUANTIZER} {source} {out} {kind.upper()}",
        )
    with written_whole(out) as beside:
        command = [program, str(source), str(beside), kind.upper()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not beside.is_file():
            last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            raise MlxDpoError(f"{QUANTIZER} {source} {out} {kind.upper()} failed ({done.returncode}):\n{last}")
    return out
