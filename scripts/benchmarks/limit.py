"""The least arithmetic that a step can do, counted from the model's matrices and the rows' lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.lengths import Lengths


class Matrices(NamedTuple):
    """What a decoder is made of, as far as matrix products go; blocks are alike.

    `block`: weights of a block's linear modules together; `entry`: of those among them that read the block's input (the
    projections to queries, keys and values), whose input gradient the lowest adapted block need not have; `query`:
    features of all query heads; `adapter`: Σ over adapted modules of a block of input + output features.
    """

    blocks: int
    adapted: int
    block: int
    entry: int
    query: int
    hidden: int
    vocabulary: int
    adapter: int


def step_flops(batch: Sequence[Lengths], m: Matrices, rank: int, *, activations_known: bool) -> dict[str, float]:
    """Floating-point operations of one step over pairs, by part. A multiplication with an addition counts as 2.

    Counted: every prompt once, every answer's last token never as input, logits only where a token of an answer is
    predicted, frozen weights without a gradient of their own, nothing below the lowest adapted block in the backward
    pass, nor with `activations_known` in the forward pass. Not counted: elementwise work, and the reference, which is
    computed once for all steps.
    """
    parts = dict.fromkeys(("forward", "attention", "backward", "head", "adapter"), 0.0)
    forward = m.adapted if activations_known else m.blocks
    for prompt, *answers in batch:
        read = prompt + sum(answer - 1 for answer in answers)
        scored = sum(answers)
        seen = prompt * (prompt + 1) / 2 + sum(prompt * (a - 1) + (a - 1) * a / 2 for a in answers)
        parts["forward"] += forward * 2 * read * m.block
        parts["backward"] += 2 * read * (m.adapted * m.block - m.entry)
        parts["attention"] += (forward + 2 * m.adapted) * 4 * m.query * seen  # twice as much in the backward pass
        parts["head"] += 2 * 2 * scored * m.hidden * m.vocabulary  # logits, and their gradient by the hidden state
        parts["adapter"] += m.adapted * 3 * 2 * read * rank * m.adapter  # forward, by the input, by A and B
    return parts


def matrices(model: Any, config: dict[str, Any], keys: Sequence[str], top_layers: int) -> Matrices:
    """The matrices of a loaded mlx-lm decoder whose blocks are alike."""
    import mlx.nn as nn

    block = model.layers[-1]
    linear = {
        name.rsplit(".", 1)[-1]: _features(module)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return Matrices(
        blocks=len(model.layers),
        adapted=min(top_layers, len(model.layers)),
        block=sum(a * b for a, b in linear.values()),
        entry=sum(a * b for name, (a, b) in linear.items() if name in ("q_proj", "k_proj", "v_proj", "qkv_proj")),
        query=config["num_attention_heads"] * head,
        hidden=config["hidden_size"],
        vocabulary=config["vocab_size"],
        adapter=sum(sum(features) for name, features in linear.items() if name in keys),
    )


def _features(module: Any) -> tuple[int, int]:
    """Output and input features of a linear module."""
    rows, columns = module.weight.shape
    return rows, columns * 32 // module.bits if hasattr(module, "bits") else columns
