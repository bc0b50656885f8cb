"""The tokenizer of a GGUF file from a Hugging Face tokenizer folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.base import ANOTHER_WAY
from mlx_dpo.gguf.pretokenizers import DIGITS, GPT2, PRETOKENIZERS
from mlx_dpo.gguf.tokenizer_read import CONTROL, SPACE, UNUSED, USER_DEFINED
from mlx_dpo.models.trees import read_json

NORMAL, UNKNOWN, BYTE = 1, 2, 6  # of tokenizer.ggml.token_type
NEVER_MERGED = -1e6  # the score of a piece that no merge makes
DIGIT_PATTERNS = (r"\p{N}", r"\d")
SHOWN = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
"""Gemma 4's special tokens that llama.cpp must print, since it reads thoughts and tool calls from what it prints."""

PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def write_tokenizer(folder: Path, vocab_size: int, writer: Any, add_bos: bool) -> list[str]:
    """Add the tokenizer of `folder` to a `gguf.GGUFWriter`, padded to `vocab_size` tokens.

    `add_bos` says whether a text begins with a token for it where the folder does not.
    Returns what is known to be cut otherwise by llama.cpp, a sentence each. Raises ModelError for a tokenizer that
    llama.cpp would run otherwise: not byte-pair encoding, an unknown pre-tokenizer or normalizer, or more tokens than
    the model has.
    """
    tokenizer = read_json(folder / "tokenizer.json", ANOTHER_WAY)
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refusal(folder, f"its model is {model.get('type')}, not byte-pair encoding")
    tokens = dict(model["vocab"]) | {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    if max(tokens.values()) >= vocab_size:
        raise _refusal(folder, f"it has {max(tokens.values()) + 1} tokens and the model {vocab_size}")
    pieces, types = _pieces(tokenizer, tokens, vocab_size)
    notes = []
    if model.get("byte_fallback"):
        prefix = _space_prefix(folder, tokenizer)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        scores = scores_of_merges(merges)
        writer.add_token_scores([scores.get(piece, NEVER_MERGED) for piece in pieces])
        writer.add_add_space_prefix(prefix)
        if prefix and (tokenizer.get("pre_tokenizer") or {}).get("prepend_scheme") == "first":
            notes.append("llama.cpp puts a space before text that follows a special token; this tokenizer does not")
        # A user-defined token is matched against the text, in which a space is a space.
        pieces = [p.replace(SPACE, " ") if t == USER_DEFINED else p for p, t in zip(pieces, types, strict=True)]
    else:
        name = recognise_pretokenizer(folder, tokenizer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        notes += [PRETOKENIZERS[name].note] * bool(PRETOKENIZERS[name].note)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    # It warns of templates for pairs of texts, which a language model never sees.
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=vocab_size)
    # llama.cpp adds a beginning token to some pre-tokenizers unless the file says no, which a folder may leave unsaid
    special.add_special_token.setdefault("bos", add_bos)
    special.add_to_gguf(writer, quiet=True)
    return notes


def recognise_pretokenizer(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text, from the expressions in its tokenizer.json.

    Raises ModelError, naming what was found, when no entry of `PRETOKENIZERS` is the same.
    """
    normalizer = tokenizer.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        raise _refusal(folder, f"its normalizer is {json.dumps(normalizer)}")
    steps = tuple(_steps(folder, tokenizer.get("pre_tokenizer")))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    for name, known in PRETOKENIZERS.items():
        if known.steps == steps and known.ignore_merges == ignore_merges:
            return name
    raise _refusal(folder, f"it cuts words by {' then '.join(steps)!r} (ignore_merges {ignore_merges})")


def scores_of_merges(merges: list[list[str]]) -> dict[str, float]:
    """Scores by which sentencepiece does what `merges` say: minus the rank of the first that makes a piece.

    Pieces that nothing makes have none; single characters need none.
    """
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    return scores


def general_name(folder: Path, name: str) -> str:
    """`name`, mended where llama.cpp reads more into it than a name.

    A name with "phi-3" or "phi3" in it makes special tokens swallow white space after them, and needs four tokens to
    be there: so it stands in the name exactly when the tokenizer has tokens that do so.
    """
    tokenizer = read_json(folder / "tokenizer.json", ANOTHER_WAY)
    tokens = set(tokenizer["model"]["vocab"]) | {added["content"] for added in tokenizer["added_tokens"]}
    swallows = any(added.get("rstrip") for added in tokenizer["added_tokens"]) and tokens.issuperset(PHI3_TOKENS)
    says_so = any(word in name.lower() for word in ("phi-3", "phi3"))
    if says_so == swallows:
        return name
    return f"Phi-3 {name}" if swallows else "model"


def _pieces(tokenizer: dict[str, Any], tokens: dict[str, int], vocab_size: int) -> tuple[list[str], list[int]]:
    pieces = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    fallback = tokenizer["model"].get("byte_fallback")
    for piece, i in tokens.items():
        is_byte = fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        pieces[i], types[i] = piece, BYTE if is_byte else NORMAL
    if fallback and tokenizer["model"].get("unk_token") in tokens:
        types[tokens[tokenizer["model"]["unk_token"]]] = UNKNOWN
    for added in tokenizer["added_tokens"]:
        if types[added["id"]] != UNKNOWN:
            hidden = added["special"] and added["content"] not in SHOWN
            types[added["id"]] = CONTROL if hidden else USER_DEFINED
    return pieces, types


def _steps(folder: Path, step: dict[str, Any] | None) -> list[str]:
    """The expressions by which a pre-tokenizer cuts, in order, in the terms of `PRETOKENIZERS`."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [name for part in step["pretokenizers"] for name in _steps(folder, part)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [DIGITS]
    expression = step.get("pattern", {}).get("Regex")
    cuts = (step.get("behavior"), bool(step.get("invert")))
    if kind == "Split" and expression and cuts in (("Isolated", False), ("Removed", True)):
        return [DIGITS if expression in DIGIT_PATTERNS else expression]
    raise _refusal(folder, f"it cuts words by {json.dumps(step)}")


def _space_prefix(folder: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether a byte-fallback tokenizer puts a space before the text; ModelError when it does anything else to it."""
    normalizer, cut = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if replace in steps and all(step in (prepend, replace) for step in steps):
        # Once spaces are replaced, cutting at spaces cuts nothing.
        if cut is None or (cut["type"] == "Split" and cut.get("pattern") == {"String": " "}):
            return prepend in steps
    elif normalizer is None and cut and cut["type"] == "Metaspace" and cut.get("replacement") == SPACE:
        scheme = cut.get("prepend_scheme", "always" if cut.get("add_prefix_space", True) else "never")
        if not cut.get("split", True):
            return scheme != "never"
    raise _refusal(folder, f"it normalizes and cuts by {json.dumps(normalizer)} and {json.dumps(cut)}")


def _refusal(folder: Path, reason: str) -> ModelError:
    return ModelError(f"The tokenizer of {folder} cannot be written as GGUF: {reason}.", ANOTHER_WAY)
