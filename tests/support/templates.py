"""Chat templates of model families with a small tokenizer that has their control tokens, as the real ones have them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from support.shared_data import SHARED_DATA
from support.tiny_models import MERGES_FROM

FOLDER = Path(__file__).resolve().parents[1] / "templates"
BESIDE = SHARED_DATA.parent / "templates"
"""Where the real templates may lie: beside the project, under the names of the stand-ins."""


class Family(NamedTuple):
    """The tokens of a family that a tokenizer never splits."""

    bos: str
    eos: str
    others: tuple[str, ...]


_CHATML = Family("<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<think>", "</think>"))
_LLAMA = Family("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"))
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>")
FAMILIES = {
    "qwen3": _CHATML,
    "qwen3_5_nothink": _CHATML,
    "qwen3_6": _CHATML,
    "qwen3_8": _CHATML,
    "deepseek_r1_distill": Family(
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    ),
    "gptoss": Family("<|startoftext|>", "<|return|>", _HARMONY),
    "gemma3": Family("<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    "gemma4": Family("<bos>", "<turn|>", ("<|turn>", "<|channel>", "<channel|>", "<|think|>")),
    "llama3_1": _LLAMA,
    "llama3_2": _LLAMA,
    "mistral_v0_3": Family("<s>", "</s>", ("[INST]", "[/INST]")),
    "mistral_small": Family("<s>", "</s>", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "phi4": Family("<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>")),
    "smollm3": _CHATML,
}


def tokenizer_of(family: str, template: str | None = None) -> Any:
    """A byte-level BPE, line breaks merged as in Qwen's, with a family's control tokens and its template."""
    from transformers import PreTrainedTokenizerFast

    bos, eos, others = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bpe((bos, eos, *others)), bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template if template is not None else stand_in(family)
    return tokenizer


def stand_in(family: str) -> str:
    """The template of that name in this project."""
    return (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")


def real(family: str) -> str | None:
    """A family's real template, from beside the project or from an installed TRL; None where neither has it."""
    trl = find_spec("trl")
    folders = [BESIDE, *([Path(str(trl.origin)).parent / "chat_templates"] if trl else [])]
    files = [folder / f"{family}.jinja" for folder in folders]
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


@cache
def _bpe(special: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in special],
        show_progress=False,
    )
    tokenizer.train_from_iterator([MERGES_FROM, "\n\n".join("abcdefgh" * 9)], trainer)
    return tokenizer
