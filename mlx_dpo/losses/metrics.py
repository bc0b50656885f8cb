"""What a batch says about the run: TRL's metrics under TRL's names, kept as sums so that averages are exact."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx

from mlx_dpo.types import Kind, LossOutput, TokenLogps


class Mean(NamedTuple):
    """A mean that can be continued over batches: `total` / `number`, both []."""

    total: mx.array
    number: mx.array


Sums = dict[str, Mean]


def batch_metrics(
    output: LossOutput,
    policy: TokenLogps,
    reference: mx.array | None,
    mask: mx.array,
    rank: mx.array,
    label: mx.array | None,
    kind: Kind,
    *,
    weight: float | None = None,
) -> Sums:
    """The metrics of a micro-batch of R rows; takes what `compute_loss` takes, and its output. Fit for `mx.compile`.

    Chosen and rejected are, of a ranking, the answers of the best and of the worst rank; of unpaired rows, the good and
    the bad; of demonstrations, all are chosen.

    - loss: mean over micro-batches by their `weight`, which is the number of rows unless it is given.
    - rewards/chosen, rewards/rejected: mean implicit reward. rewards/margins is made of them by `averages`.
    - rewards/accuracies: share of the pairs of unequal rank whose better answer has the higher reward; a tie is wrong.
    - rewards/kendall_tau, of rankings: mean τ-b.
    - logps/chosen, logps/rejected: mean log π(y|x), summed over tokens.
    - kl, of unpaired rows: KTO's z.
    - kl/sequence, kl/token, with a reference: KL(π‖π_ref) as `kl_k2` sees it on the data's answers.
    - entropy: mean over completion tokens, nats; logits/chosen, logits/rejected: mean over tokens of the mean logit;
      mean_token_accuracy: share of chosen tokens that are the argmax. Each only where `policy` has what it is made of.
    """
    # What is counted is counted once: mx.compile of value_and_grad fails on two outputs of the same expression.
    chosen, rejected = roles(rank, label)
    answers = (rank > 0).astype(mask.dtype)
    tokens = mask * answers[..., None]
    token_count = tokens.sum()
    rows = mx.array(float(rank.shape[0]))
    count = rows if weight is None else mx.array(weight)
    sums = {"loss": Mean(mx.stop_gradient(output.loss) * count, count)}
    sides = {"chosen": chosen} if kind == "demonstration" else {"chosen": chosen, "rejected": rejected}
    for side, share in sides.items():
        count = share.sum()
        side_tokens = mask * share[..., None]
        side_token_count = side_tokens.sum()
        sums[f"logps/{side}"] = Mean((output.logps * share).sum(), count)
        if output.rewards is not None:
            sums[f"rewards/{side}"] = Mean((output.rewards * share).sum(), count)
        if policy.mean_logit is not None:
            sums[f"logits/{side}"] = Mean((policy.mean_logit * side_tokens).sum(), side_token_count)
        if policy.correct is not None and side == "chosen":
            sums["mean_token_accuracy"] = Mean((policy.correct * side_tokens).sum(), side_token_count)
    if output.rewards is not None and kind in ("pair", "ranking"):
        sums["rewards/accuracies"] = ranked_accuracy(output.rewards, rank)
    if output.rewards is not None and kind == "ranking":
        tau, defined = kendall_tau(output.rewards, rank)
        sums["rewards/kendall_tau"] = Mean(tau.sum(), defined.sum())
    if policy.entropy is not None:
        sums["entropy"] = Mean((policy.entropy * tokens).sum(), token_count)
    if output.kl is not None:
        sums["kl"] = Mean(output.kl * rows, rows)
    if reference is not None:
        drift = (kl_k2(mx.stop_gradient(policy.logps) - reference) * tokens).sum()
        sums["kl/sequence"] = Mean(drift, answers.sum())
        sums["kl/token"] = Mean(drift, token_count)
    return sums


def averages(parts: Iterable[Sums]) -> dict[str, float]:
    """The metrics of several micro-batches as if they had been one: Σ totals / Σ numbers. Evaluates the arrays.

    Adds rewards/margins, the mean chosen reward less the mean rejected one. A mean over nothing is left out.
    """
    totals: dict[str, list[float]] = {}
    for part in parts:
        for name, mean in part.items():
            sums = totals.setdefault(name, [0.0, 0.0])
            sums[0] += float(mean.total)
            sums[1] += float(mean.number)
    means = {name: total / count for name, (total, count) in totals.items() if count > 0}
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def roles(rank: mx.array, label: mx.array | None) -> tuple[mx.array, mx.array]:
    """Which answers are chosen and which rejected, two masks [R, K]; `rank` [R, K], `label` [R] of unpaired rows."""
    present = rank > 0
    if label is not None:
        good = (label > 0)[:, None]
        return (present & good).astype(mx.float32), (present & ~good).astype(mx.float32)
    best = mx.where(present, rank, mx.inf).min(axis=-1, keepdims=True)
    worst = rank.max(axis=-1, keepdims=True)
    return (present & (rank == best)).astype(mx.float32), (present & (rank == worst) & (rank > best)).astype(mx.float32)


def ranked_accuracy(rewards: mx.array, rank: mx.array) -> Mean:
    """Pairs of answers of one row whose better-ranked one has the strictly higher reward, of all pairs of unequal rank.

    `rewards`, `rank` [R, K]. For K = 2 it is TRL's rewards/accuracies.
    """
    better = _better(rank)
    right = better & (rewards[:, :, None] > rewards[:, None, :])
    return Mean(right.sum().astype(mx.float32), better.sum().astype(mx.float32))


def kendall_tau(rewards: mx.array, rank: mx.array) -> tuple[mx.array, mx.array]:
    """Kendall's τ-b between the order by reward and the order by rank of each row: (τ [R], defined [R]).

    τ-b = (C - D) / √((P - T_rank)(P - T_reward)): C pairs ordered alike, D otherwise, P all pairs, T those tied in one
    order. A row all of whose answers are tied in one of the orders has no τ: 0, with `defined` 0.
    Kendall 1945, "The treatment of ties in ranking problems".
    Example: rewards 3, 1, 2 for ranks 1, 2, 3: C = 2, D = 1, P = 3: 1/3.
    """
    present = rank > 0
    better = _better(rank)
    comparable = present[:, :, None] & present[:, None, :]
    difference = rewards[:, :, None] - rewards[:, None, :]
    agreement = mx.where(better, mx.sign(difference), 0.0).sum(axis=(1, 2))
    unequal_rank = better.sum(axis=(1, 2)).astype(mx.float32)
    unequal_reward = (comparable & (difference > 0)).sum(axis=(1, 2)).astype(mx.float32)
    scale = mx.sqrt(unequal_rank * unequal_reward)
    return agreement / mx.maximum(scale, 1.0), (scale > 0).astype(mx.float32)


def kl_k2(log_ratio: mx.array) -> mx.array:
    """KL(π‖π_ref) of each token from x = log π - log π_ref of the token that stands there: k2 = x²/2, nats; any shape.

    Averaged over tokens it is the KL per token; summed over a sequence's tokens and averaged over sequences, the KL per
    sequence. The unbiased k1 = x and k3 = e^-x - 1 + x hold on text that the policy wrote; on other text, such as a
    data set's answers, k2 is right to second order near the reference, never negative, and grows slowly.
    Schulman 2020, "Approximating KL Divergence".
    """
    return log_ratio * log_ratio / 2


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share from `successes` of `n` independent trials; (0, 1) when n is 0.

    It stays inside [0, 1] and holds for few trials, unlike p ± 1.96 √(p (1 - p) / n). Wilson 1927.
    Raises ValueError unless 0 ≤ successes ≤ n. Example: 8 of 10: (0.490, 0.943).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _better(rank: mx.array) -> mx.array:
    """[R, i, j]: answer i of a row is ranked strictly better than answer j."""
    present = rank > 0
    return (rank[:, :, None] < rank[:, None, :]) & present[:, :, None] & present[:, None, :]
