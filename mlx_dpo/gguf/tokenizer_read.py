"""A Hugging Face tokenizer folder from the tokenizer that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.pretokenizers import DIGITS, GPT2, Pretokenizer, pretokenizer_named

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
SPACE = "▁"
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_tokenizer(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json from a file's `tokenizer.*` fields.

    Raises ModelError for a tokenizer kind that is not byte-pair encoding, or a pre-tokenizer that is unknown.
    """
    kind = fields.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _byte_fallback}
    if kind not in builders:
        raise ModelError(
            f"The file's tokenizer is of the kind {kind!r}; those that can be read are {', '.join(builders)}.",
            "Give the original model's folder or Hub name instead of the GGUF file.",
        )
    tokenizer, add_bos = builders[kind](fields)
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
        for key, name in SPECIAL.items()
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in special
    if add_bos:
        tokenizer["post_processor"] = _prefixed(special["bos_token"], fields["tokenizer.ggml.bos_token_id"])
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
    return list(dict.fromkeys([int(i) for i in named if i is not None] + known))


def _byte_level(fields: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    name = fields.get("tokenizer.ggml.pre", "default")
    cut = pretokenizer_named(name)
    if cut is None:
        raise ModelError(
            f"The file's pre-tokenizer {name!r} (tokenizer.ggml.pre) is unknown here; another would cut words wrongly.",
            "Give the original model's folder or Hub name instead of the GGUF file.",
        )
    tokenizer = _bpe(
        fields,
        normalizer={"type": "NFC"} if cut.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": _steps(cut)},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        ignore_merges=cut.ignore_merges,
        merges=[merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
    )
    return tokenizer, cut.add_bos


def _steps(cut: Pretokenizer) -> list[dict[str, Any]]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    named = {DIGITS: {"type": "Digits", "individual_digits": True}, GPT2: byte_level | {"use_regex": True}}
    steps = [
        named.get(step) or {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in cut.steps
    ]
    return steps if cut.steps[-1] == GPT2 else [*steps, byte_level | {"use_regex": False}]


def _byte_fallback(fields: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    vocab = _vocab(fields)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    tokenizer = _bpe(
        fields,
        normalizer=prepend if prefix else replace,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        unk_token=tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)],
        fuse_unk=True,
        byte_fallback=True,
        merges=merges_of_scores(vocab, {piece: scores[i] for piece, i in vocab.items()}),
    )
    return tokenizer, True


def merges_of_scores(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[list[str]]:
    """Merges, best first, that byte-pair encoding needs to do what sentencepiece does with scores.

    A merge makes a piece of two pieces of the vocabulary; it is as good as the piece's score, and between merges that
    make the same piece the one of earlier pieces is first.
    """
    merges = []
    for piece in sorted(vocab, key=lambda piece: (-scores[piece], vocab[piece])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        merges += [[left, right] for left, right in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    return merges


def _bpe(
    fields: Mapping[str, Any], *, normalizer: Any, pre_tokenizer: Any, decoder: dict[str, Any], **model: Any
) -> dict[str, Any]:
    """tokenizer.json of a byte-pair encoding; `model` is what it has besides the defaults."""
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(fields),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {"type": "BPE"} | plain | flags | {"vocab": _vocab(fields)} | model,
    }


def _vocab(fields: Mapping[str, Any]) -> dict[str, int]:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    return {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}


def _added_tokens(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _prefixed(bos: str, bos_id: int) -> dict[str, Any]:
    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [int(bos_id)], "tokens": [bos]}},
    }
