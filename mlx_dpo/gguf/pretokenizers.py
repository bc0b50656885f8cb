"""How text is cut into words before byte-pair merging: llama.cpp's names (`tokenizer.ggml.pre`) and their meaning.

Adding one is an entry in `PRETOKENIZERS`; the expressions are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass

GPT2 = "gpt2"  # the expression inside the ByteLevel pre-tokenizer
DIGITS = "digits"  # the Digits pre-tokenizer, each digit alone

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER = r"[^\r\n\p{L}\p{N}]?"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = rf"{_CONTRACTION}|{_OTHER}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTION}|{_OTHER}\p{{L}}+|\p{{N}}|{_TAIL}"
QWEN35 = (
    rf"{_CONTRACTION}|{_OTHER}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{_OTHER}{_UPPER}*{_LOWER}+|{_OTHER}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_TAIL}"
GPT4O = (
    rf"{_OTHER}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_OTHER}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
)

CASE_NOTE = "llama.cpp tells upper from lower case in ASCII only and cuts before combining marks"


@dataclass(frozen=True, kw_only=True)
class Pretokenizer:
    """One way to cut: `steps` one after the other, each an expression, `GPT2` or `DIGITS`."""

    steps: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole, whatever the merges say
    add_bos: bool = False  # llama.cpp's default where the file does not say
    nfc: bool = False  # the models' own tokenizers compose characters first; llama.cpp does not
    note: str = ""  # where llama.cpp is known to cut otherwise


PRETOKENIZERS: dict[str, Pretokenizer] = {
    "gpt-2": Pretokenizer(steps=(GPT2,)),
    "smollm": Pretokenizer(steps=(DIGITS, GPT2)),
    "llama-bpe": Pretokenizer(steps=(LLAMA3,), ignore_merges=True, add_bos=True),
    "smaug-bpe": Pretokenizer(steps=(LLAMA3,)),
    "qwen2": Pretokenizer(steps=(QWEN2,), nfc=True),
    "qwen35": Pretokenizer(steps=(QWEN35,), nfc=True),
    "tekken": Pretokenizer(steps=(TEKKEN,), ignore_merges=True, add_bos=True, note=CASE_NOTE),
    "gpt-4o": Pretokenizer(steps=(GPT4O,), note=CASE_NOTE),
}

SAME_AS = {
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "dbrx": "smaug-bpe",
    "deepseek-r1-qwen": "qwen2",
}


def pretokenizer_named(name: str) -> Pretokenizer | None:
    """The entry for a file's `tokenizer.ggml.pre`; None when the name is unknown here."""
    return PRETOKENIZERS.get(SAME_AS.get(name, name))
