"""What carries arrays between log-probs, losses and metrics: NamedTuples, which pass through MLX's transforms whole."""

from __future__ import annotations

from typing import Literal, NamedTuple

import mlx.core as mx

Kind = Literal["pair", "ranking", "unpaired", "demonstration"]
"""What a batch's rows are; it decides what the K answers of a row mean.

- pair: K = 2, chosen first; `rank` is [1, 2].
- ranking: K answers, best first; `rank` ascends from the best, equal ranks are ties, 0 marks an absent answer, whose
  mask is 0 too.
- unpaired: K = 2. Answer 0 is the row's completion, judged by `label` (+1 good, -1 bad). Answer 1 is another row's
  completion under this row's prompt, from which KTO estimates its KL; `rank` is [1, 0], since it is no answer to judge.
  A loss without that KL also takes K = 1.
- demonstration: K = 1, `rank` is [1].
"""


class TokenLogps(NamedTuple):
    """Log-probs of R rows with K answers of at most C tokens each; everything is [R, K, C] and 0 where the mask is.

    `logps`: log π(token | what stands before it), nats, float32, differentiable. The rest is without gradient and None
    unless asked for: `entropy` of the predictive distribution in nats, `mean_logit` over the vocabulary, `correct` 1
    where the token is the argmax, `log_sum_p2` = log Σ_v p_v², the log of the probability that two samples agree (WPO).
    """

    logps: mx.array
    entropy: mx.array | None = None
    mean_logit: mx.array | None = None
    correct: mx.array | None = None
    log_sum_p2: mx.array | None = None


class LossOutput(NamedTuple):
    """A micro-batch's loss, and without gradient what the metrics are made of.

    `loss` []: the mean; it stands first, since MLX differentiates element 0.
    `logps` [R, K]: log π(y|x) summed over the answer's tokens, with LD-DPO's weights where they are asked for.
    `rewards` [R, K]: the implicit rewards as TRL logs them; None where the loss knows none (sft without a reference).
    `kl` []: KTO's estimate of KL(π‖π_ref); None where no mismatched answers are given.
    """

    loss: mx.array
    logps: mx.array
    rewards: mx.array | None = None
    kl: mx.array | None = None
