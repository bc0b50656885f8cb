"""A Hugging Face tokenizer folder from the tokenizer that a GGUF file carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.pretokenizers import DIGITS, GPT2, Pretokenizer, pretokenizer_named

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
SPACE = "▁"
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|call|>",
    "<|end|>",
    "<|endoftext|>",
)
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_tokenizer(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json from a file's `tokenizer.*` fields.

    Raises ModelError for a tokenizer kind that is not byte-pair encoding, or a pre-tokenizer that is unknown.
    """
    kind = fields.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _byte_fallback, "gemma4": _byte_fallback}
    if kind not in builders:
        raise ModelError(
            f"The file's tokenizer is of the kind {kind!r}; those that can be read are {', '.join(builders)}.",
            "Give the original model's folder or Hub name instead of the GGUF file.",
        )
    built, add_bos = builders[kind](fields)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    built.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    special = {
        key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
        for key, name in SPECIAL.items()
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in special
    if add_bos:
        bos, bos_id = special["bos_token"], int(fields["tokenizer.ggml.bos_token_id"])
        built.post_processor = TemplateProcessing([bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"], [(bos, bos_id)])
    tokenizer = json.loads(built.to_str())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in (dict(token) for token in tokenizer["added_tokens"])
        },
        **special,
    }
    context = next((v for k, v in fields.items() if k.endswith(".context_length")), None)
    if context is not None:
        settings["model_max_length"] = int(context)
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer, settings


def eos_token_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer: the file's own end tokens, then the control tokens known to close a turn."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    named = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [
        i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == CONTROL and token in END_OF_TURN
    ]
    found = list(dict.fromkeys([int(i) for i in named if i is not None] + known))
    # gpt-oss ends a thought with <|end|>, and an answer follows
    return [i for i in found if tokens[i] != "<|end|>"] if "<|return|>" in tokens else found


def _byte_level(fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = fields.get("tokenizer.ggml.pre", "default")
    cut = pretokenizer_named(name)
    if cut is None:
        raise ModelError(
            f"The file's pre-tokenizer {name!r} (tokenizer.ggml.pre) is unknown here; another would cut words wrongly.",
            "Give the original model's folder or Hub name instead of the GGUF file.",
        )
    tokenizer = Tokenizer(BPE(_vocab(fields), _merges(fields), ignore_merges=cut.ignore_merges))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_steps(cut))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.add_bos


def _steps(cut: Pretokenizer) -> list[pre_tokenizers.PreTokenizer]:
    named = {
        DIGITS: pre_tokenizers.Digits(individual_digits=True),
        GPT2: pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    steps = [named.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in cut.steps]
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return steps if cut.steps[-1] == GPT2 else [*steps, encode]


def _byte_fallback(fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    tokens, vocab = fields["tokenizer.ggml.tokens"], _vocab(fields)
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    if fields["tokenizer.ggml.model"] == "gemma4":
        merges = _merges(fields)
    else:
        scores = fields["tokenizer.ggml.scores"]
        merges = merges_of_scores(vocab, {piece: scores[i] for piece, i in vocab.items()})
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer, True


def _merges(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"])
    return [(left, right) for left, right in pairs]


def merges_of_scores(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges, best first, that byte-pair encoding needs to do what sentencepiece does with scores.

    A merge makes a piece of two pieces of the vocabulary; it is as good as the piece's score, and between merges that
    make the same piece the one of earlier pieces is first.
    """
    merges = []
    for piece in sorted(vocab, key=lambda piece: (-scores[piece], vocab[piece])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _vocab(fields: Mapping[str, Any]) -> dict[str, int]:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    return {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
