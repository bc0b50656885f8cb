"""llama.cpp cuts text into the tokens of the folder's tokenizer, and a tokenizer read back from a file is the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from support.shared_data import SHARED_DATA
from support.tiny_models import CHATML, SPECIAL_TOKENS, tiny_model_folder

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

import gguf

from mlx_dpo.errors import ModelError
from mlx_dpo.gguf.pretokenizers import DIGITS, GPT2, PRETOKENIZERS
from mlx_dpo.gguf.read import import_gguf
from mlx_dpo.gguf.tokenizer_read import CONTROL, USER_DEFINED, merges_of_scores
from mlx_dpo.gguf.tokenizer_write import general_name, recognise_pretokenizer, scores_of_merges
from mlx_dpo.gguf.write import export_model_gguf

ALPHABET = list(
    " \n\t\r  abcdefXYZ0123456789.,!?'\"-_éüñßçøÆŒ中文日本한국ไทยहिन्दीعربى🚀👩‍👩‍👧<|>[]{}()½²٣\u200b\u00a0\u3000▁Ġ\x07"
)
PASSAGE = (
    "the answer they prefer is short and clear, it says what the question asks for; I've said we'LL see THEY'RE don'T "
    "1234567 3.14 2025-09-30 naïve café Zürich straße ÆON Œuvre 東京 北京 서울 привет мир שלום नमस्ते "
    "for (int i = 0; i < n; ++i) {\n\treturn x[i] * 2;\n}\n\n    if a != b:\r\n        pass"
)
WORDS = PASSAGE.split(" ")
TEXT = " ".join(WORDS * 8)


def strings() -> list[str]:
    """About a thousand: mixtures of scripts, spaces, digits and marks, and the odd rows of real data where they lie."""
    draw = random.Random(0)
    mixed = ["".join(draw.choice(ALPHABET) for _ in range(draw.randint(1, 40))) for _ in range(500)]
    spoken = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12))) for _ in range(400)]
    edges = [
        "",
        " ",
        "  ",
        "\n",
        " \n \n\n",
        "a" * 50,
        "  x  y ",
        "x " * 5,
        "<|im_start|>user\nhi<|im_end|>\n",
        "don't",
    ]
    return list(dict.fromkeys(mixed + spoken + edges + odd_strings()))


def odd_strings() -> list[str]:
    """Every prompt and answer of the odd rows of real data; none where they are not there."""
    odd = SHARED_DATA / "odd.jsonl"
    rows = [json.loads(line) for line in odd.read_text("utf-8").split("\n") if line] if odd.is_file() else []
    values = [row.get(key) for row in rows for key in ("prompt", "chosen", "rejected")]
    messages = [m.get("content") for value in values if isinstance(value, list) for m in value if isinstance(m, dict)]
    return [value for value in values + messages if isinstance(value, str)]


def byte_level(name: str) -> Tokenizer:
    kind = PRETOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    named = {
        DIGITS: pre_tokenizers.Digits(individual_digits=True),
        GPT2: pre_tokenizers.ByteLevel(False, use_regex=True),
    }
    steps = [named.get(step) or pre_tokenizers.Split(_regex(step), "isolated") for step in kind.steps]
    if kind.steps[-1] != GPT2:
        steps.append(pre_tokenizers.ByteLevel(False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def byte_fallback(prefix: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.normalizer = replace
    if prefix != "none":
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decode)
    return _trained(tokenizer, ["▁"], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])


def phi3() -> Tokenizer:
    """Byte-fallback with special tokens that swallow the white space after them."""
    state = json.loads(byte_fallback("prepend").to_str())
    plain = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    names = {"<s>": False, "</s>": True, "<|user|>": True, "<|end|>": True}
    for content, rstrip in names.items():
        state["model"]["vocab"][content] = len(state["model"]["vocab"])
        added = {"id": state["model"]["vocab"][content], "content": content, "rstrip": rstrip}
        state["added_tokens"].append(added | plain)
    for added in state["added_tokens"]:
        if added["content"] in ("<|im_start|>", "<|im_end|>"):
            added["rstrip"] = True
    return Tokenizer.from_str(json.dumps(state))


def _regex(expression: str) -> Any:
    from tokenizers import Regex

    return Regex(expression)


def _trained(tokenizer: Tokenizer, alphabet: list[str], first: list[str] | None = None) -> Tokenizer:
    special = [AddedToken(token, special=True) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=(first or []) + special, show_progress=False
    )
    # The trainer learns merges over whole lines where nothing cuts them: cut them here.
    tokenizer.train_from_iterator([TEXT] if tokenizer.pre_tokenizer else TEXT.split("\n"), trainer)
    state = json.loads(tokenizer.to_str())
    names = set(SPECIAL_TOKENS) | {"<unk>"}
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] in names]
    return Tokenizer.from_str(json.dumps(state))


def make_folder(folder: Path, tokenizer: Tokenizer) -> Path:
    """A model of one layer with this tokenizer, whose vocabulary is padded by 24 tokens."""
    tiny_model_folder(folder, "llama", num_hidden_layers=1, vocab_size=tokenizer.get_vocab_size() + 24)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


KINDS = {name: (byte_level, name) for name in PRETOKENIZERS} | {
    f"byte-fallback, {prefix}": (byte_fallback, prefix) for prefix in ("none", "prepend", "metaspace")
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_finds_the_same_tokens(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="real llama.cpp is not installed: pip install xllamacpp")
    from mlx_dpo.gguf.llamacpp import open_llama_cpp, tokenize

    build, name = KINDS[kind]
    tokenizer = build(name)
    export_model_gguf(make_folder(tmp_path / "base", tokenizer), None, tmp_path / "model.gguf", "f16")
    llama = open_llama_cpp(tmp_path / "model.gguf")
    texts = strings()
    if name == "metaspace":  # llama.cpp puts the space after special tokens too, and before a space that is there
        texts = [t for t in texts if not t.startswith(("▁", " ")) and not any(token in t for token in SPECIAL_TOKENS)]
    if name in PRETOKENIZERS and PRETOKENIZERS[name].note:  # known to differ in marks and letters beyond ASCII
        texts = [text.encode("ascii", "ignore").decode() for text in texts]
    different = [
        (text, found, expected)
        for text in texts
        if (found := tokenize(llama.server, text)) != (expected := tokenizer.encode(text, add_special_tokens=False).ids)
    ]
    assert not different, f"{len(different)} of {len(texts)}, the first: {different[0]}"
    assert len(texts) > 800


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "metaspace" not in kind])
def test_a_tokenizer_read_back_from_its_file_is_the_same(kind: str, tmp_path: Path) -> None:
    build, name = KINDS[kind]
    tokenizer = build(name)
    export_model_gguf(make_folder(tmp_path / "base", tokenizer), None, tmp_path / "model.gguf", "f16")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    for text in strings():
        if PRETOKENIZERS.get(name) and PRETOKENIZERS[name].nfc and normalizers.NFC().normalize_str(text) != text:
            continue  # read back with the models' own composition of characters
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert back.encode(text, add_special_tokens=False).ids == ids, text
        assert back.decode(ids) == tokenizer.decode(ids)
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHATML
    assert settings["eos_token"] == "<|im_end|>"
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]


def test_special_tokens_that_swallow_white_space_do_so_in_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="real llama.cpp is not installed: pip install xllamacpp")
    from mlx_dpo.gguf.llamacpp import open_llama_cpp, tokenize

    tokenizer = phi3()
    export_model_gguf(make_folder(tmp_path / "base", tokenizer), None, tmp_path / "model.gguf", "f16")
    llama = open_llama_cpp(tmp_path / "model.gguf")
    for text in (
        "<|user|>\n What is it?<|end|>\n<|im_start|>  x",
        "a </s>  b",
        "<s> a <|endoftext|> b",
        *strings()[:300],
    ):
        assert tokenize(llama.server, text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_scores_say_which_merge_comes_first() -> None:
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]
    scores = scores_of_merges(merges)
    assert scores == {"ab": 0.0, "bc": -1.0, "abc": -2.0}  # abc is first made by the third merge
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    again = merges_of_scores(vocab, {piece: scores.get(piece, -9.0) for piece in vocab})
    assert again == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


def test_a_pretokenizer_that_is_not_known_is_refused_with_what_was_found(tmp_path: Path) -> None:
    tokenizer = {"model": {}, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    with pytest.raises(ModelError, match="WhitespaceSplit"):
        recognise_pretokenizer(tmp_path, tokenizer)
    tokenizer = {"model": {}, "pre_tokenizer": None, "normalizer": {"type": "Lowercase"}}
    with pytest.raises(ModelError, match="Lowercase"):
        recognise_pretokenizer(tmp_path, tokenizer)


def test_a_name_says_phi_3_exactly_when_the_tokenizer_is_of_that_kind(tmp_path: Path) -> None:
    byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    assert general_name(tmp_path, "my-model") == "my-model"
    assert general_name(tmp_path, "Phi-3-like") == "model"  # llama.cpp would look for tokens that are not there
    swallowing = [
        {"id": i, "content": token, "rstrip": True, "special": True}
        for i, token in enumerate(("</s>", "<unk>", "<s>", "<|endoftext|>"))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": swallowing}))
    assert general_name(tmp_path, "Phi-3-mini") == "Phi-3-mini"
    assert general_name(tmp_path, "tuned") == "Phi-3 tuned"


def test_what_marks_gemma_4s_thoughts_and_tool_calls_is_printed(tmp_path: Path) -> None:
    tokenizer = byte_fallback("none")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|channel>", "<turn|>")])
    make_folder(tmp_path / "base", tokenizer)
    export_model_gguf(tmp_path / "base", None, tmp_path / "model.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [types[tokenizer.token_to_id(token)] for token in ("<|channel>", "<turn|>")] == [USER_DEFINED, CONTROL]


@pytest.mark.parametrize(("case", "begins"), [("gemma4", True), ("llama", False)])
def test_whether_a_text_begins_with_a_token_for_it_where_the_folder_does_not_say(
    case: str, begins: bool, tmp_path: Path
) -> None:
    base = tiny_model_folder(tmp_path / "base", case)
    export_model_gguf(base, None, tmp_path / "model.gguf", "f16")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is begins
