"""The settings of a run: one frozen dataclass a concern; each default stands here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and in what form it is held in memory."""

    path: str = ""  # folder or Hub name of any model that mlx-lm loads
    revision: str | None = None  # branch, tag or commit on the Hub
    adapter: str | None = None  # adapter folder (mlx-lm or PEFT) that training starts from
    quantize_bits: int | None = None  # quantize a full-precision model while loading
    quantize_group_size: int = 64  # weights that share a scale
    compute_dtype: Dtype = "auto"  # auto: as stored on a GPU; float32, dequantized once, on a CPU
    trust_remote_code: bool = False  # run code that comes with the model


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how they become tokens."""

    path: str = ""  # file, or folder with train/valid/test files
    valid_fraction: float = 0.1  # share of prompts held out when the data has no validation file
    split_seed: int = 0  # of the choice of held-out prompts
    max_length: int | None = 1024  # tokens of prompt and completion together; null for no limit
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"  # what stays of a row that is too long
    chat_template_kwargs: dict[str, Any] | None = None  # what the chat template gets of all rows; a row's own win


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter. y = W x + scale · B A x."""

    rank: int = 8  # rows of A, columns of B
    scale: float = 2.0  # the weight of B A
    alpha: float | None = None  # PEFT's way to say scale: alpha / rank; excludes scale
    dropout: float = 0.0  # share of the inputs of A that is dropped while training
    num_layers: int = 16  # blocks from the top that get an adapter; -1 for all
    keys: tuple[str, ...] | None = None  # modules of a block, e.g. q_proj; null: all linear ones but experts and router
    fine_tune_type: Literal["lora", "dora"] = "lora"  # dora: rows of the weight get a trained length too; slower


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective."""

    type: str = "sigmoid"  # a loss, or a weighted mix: sigmoid:0.8,bco_pair:0.2,sft:1.0
    beta: float = 0.1  # strength of the tie to the reference; τ of ipo, λ of orpo
    reference: str = "base"  # base (adapter off), start (the starting adapter), none, or a folder
    ref_model_sync_steps: int | None = None  # TR-DPO: steps after which the reference follows the policy; null: never
    ref_model_mixup_alpha: float = 0.6  # TR-DPO: how much of the policy goes into the reference then, 0 to 1
    label_smoothing: float = 0.0  # ε, the share of labels taken to be wrong: cdpo, robust, exo_pair, aot, cpo, simpo
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5  # α of alpha_divergence
    ld_alpha: float | None = None  # LD-DPO: weight of the tokens that one answer has more than the other; null: 1
    use_weighting: bool = False  # WPO: weigh each pair by how likely the policy is to write it
    discopop_tau: float = 0.05  # temperature of discopop's blend
    dpop_lambda: float = 50.0  # weight of dpop's penalty
    simpo_gamma: float = 0.5  # margin that simpo asks for
    cpo_alpha: float = 1.0  # weight of the chosen answer's NLL in cpo, cpo_hinge, cpo_ipo
    alphapo_alpha: float = 0.0  # shape of AlphaPO's reward in cpo, cpo_hinge, cpo_ipo, simpo; 0 is log p
    unlikelihood_alpha: float = 0.5  # weight of unlikelihood's second term, 0 to 1
    desirable_weight: float = 1.0  # kto: weight of good answers
    undesirable_weight: float = 1.0  # kto: weight of bad answers


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and the learning rate over time."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"  # the update rule
    learning_rate: float = 1e-4  # the highest one, after the warm-up
    weight_decay: float = 0.0  # not of adam
    adam_beta1: float = 0.9  # adamw, adam and lion: memory of the gradient
    adam_beta2: float = 0.999  # adamw, adam and lion: memory of its square
    adam_epsilon: float = 1e-8  # adamw and adam
    momentum: float | None = None  # sgd (null: 0) and muon (null: 0.95)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"  # the way down after the warm-up
    warmup_ratio: float = 0.1  # share of the steps over which the rate rises from 0
    warmup_steps: int | None = None  # the same in steps; wins over the ratio
    max_grad_norm: float = 1.0  # 0 for no clipping


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    output: str = "runs/dpo"  # run folder
    batch_size: int = 4  # rows of a micro-batch
    grad_accumulation_steps: int = 1  # micro-batches of an optimizer step
    epochs: float = 1.0  # passes over the rows to train on
    iters: int | None = None  # optimizer steps; wins over epochs
    seed: int = 0  # of the adapter, the order of rows and dropout
    shuffle: bool = True  # false: rows in file order
    grad_checkpoint: bool = False  # compute activations twice instead of keeping them: less memory, more time
    auto: bool = False  # smaller micro-batches, more of them, and grad_checkpoint, as far as the memory here needs it
    token_metrics: bool = False  # also entropy, logits and token accuracy, which cost a part of the head
    steps_per_report: int = 1  # optimizer steps between lines of metrics.jsonl
    steps_per_eval: int | None = 50  # optimizer steps between evaluations; null: only at the end
    save_every: int = 50  # optimizer steps between checkpoints
    save_every_minutes: float | None = 10.0  # and minutes, where so many steps take longer; null: steps alone
    keep_checkpoints: int = 2  # the newest ones
    caffeinate: bool = True  # macOS: keep the machine awake as long as it trains
    keep_best: bool = True  # adapters.safetensors is the best evaluation's, not the last step's
    early_stopping_patience: int | None = None  # evaluations without a better held-out loss that end the run
    eval_samples: int = 3  # prompts answered at each evaluation, by base and tuned model side by side; 0 for none


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Work that is left out without changing a number; each can be switched off to measure it."""

    shared_prompt: bool = True  # a prompt is read once for all its answers
    prefill_step_size: int | None = None  # tokens read at a time; 0: all; null: 128 on a CPU, 512 on Metal
    length_buckets: bool = True  # sequences are read in buckets of similar length, so that little is padding
    chunked_logits: bool = True  # logits in chunks, and never kept
    activation_cache: bool = True  # the frozen blocks' output is computed once a row, and kept
    activation_cache_memory_gb: float = 2.0  # room for it in memory
    activation_cache_disk_gb: float = 20.0  # and on disk, where it goes as a whole when memory has no room for it


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of it: the sections of a configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
