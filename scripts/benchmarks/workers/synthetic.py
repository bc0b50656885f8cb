"""One pair of stated lengths, of random tokens: what a step of mlx_dpo costs in time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.workers.ours import run_config
from benchmarks.workers.probe import Probe, read_spec, write_result
from mlx_dpo.data.batching import Batch, make_batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.activation_cache import ActivationCache
from mlx_dpo.logprobs.check import Checked
from mlx_dpo.logprobs.scorer import Scorer
from mlx_dpo.models import lora
from mlx_dpo.models.load import LoadedModel, load
from mlx_dpo.training.checkpoint import TrainerState
from mlx_dpo.training.optim import make_optimizer
from mlx_dpo.training.setup import PreparedRun
from mlx_dpo.training.step import Steps

ROWS = 3
"""Different rows; the first one's step is the process's first and does not count."""


def run(spec: dict[str, Any]) -> None:
    """Reads the activations of each row, takes a step on each with the reference as if known, writes what was seen."""
    options, probe = spec["options"], Probe()
    config = run_config(spec | {"batches": []})
    loaded = _tiny(options["vocabulary"], config.train.seed) if "vocabulary" in options else load(config.model)
    adapter = lora.attach(loaded.model, config.lora, seed=config.train.seed)
    rows = _rows(options["prompt"], options["answer"], loaded.config["vocab_size"])
    activation_cache = ActivationCache(
        rows, config.speed.activation_cache_memory_gb * 1e9, config.speed.activation_cache_disk_gb * 1e9
    )
    scorer = Scorer(
        loaded.model, config.speed, checkpoint=config.train.grad_checkpoint, activation_cache=activation_cache
    )
    reference = [[np.zeros(len(ids), np.float32) for ids in row.completions] for row in rows]
    prepared = PreparedRun(
        config, loaded, adapter, scorer, rows, len(rows), reference, None, "pair", ROWS, Checked(config.speed, 0.0)
    )
    optimizer, state = make_optimizer(config.optim), TrainerState(fingerprint={})
    optimizer.init(loaded.model.trainable_parameters())
    step = Steps(prepared, optimizer)
    model_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    if config.speed.activation_cache and scorer.first_adapted > 0:
        for i in range(ROWS):
            with probe.prepared("frozen_blocks" if i else "first frozen_blocks"):
                _fill_activation_cache(scorer, make_batch([rows[i]], [i]))
    probe.start()
    for i in range(ROWS):
        metrics = step([[i]], config.optim.learning_rate, state)
        probe.step(loss=metrics["loss"])
    write_result(probe, peak_bytes=mx.get_peak_memory(), model_mb=model_bytes / 2**20)


def _fill_activation_cache(scorer: Scorer, batch: Batch) -> None:
    states = scorer.score(batch, gradient=False).states
    mx.eval(states)
    scorer.keep(batch, states)


def _rows(prompt: int, answer: int, vocabulary: int) -> list[TokenizedRow]:
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return [int(token) for token in random.integers(3, vocabulary, count)]

    return [TokenizedRow(str(i), ids(prompt), (ids(answer), ids(answer)), (0, 0), (1.0, 2.0)) for i in range(ROWS)]


def _tiny(vocabulary: int, seed: int) -> LoadedModel:
    """A random Llama of four narrow blocks under a head of `vocabulary` tokens."""
    from mlx_lm.models.llama import Model, ModelArgs

    settings = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(settings))
    model.freeze()
    mx.eval(model.parameters())
    return LoadedModel(model, None, None, settings, Path(), "tiny", "float32")


if __name__ == "__main__":
    run(read_spec())
