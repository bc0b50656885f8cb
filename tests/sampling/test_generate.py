"""What a model answers: the same text as mlx-lm gives, with the adapter on and off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo.config import ModelConfig
from mlx_dpo.errors import DataError, UsageError
from mlx_dpo.models import lora
from mlx_dpo.models.load import LoadedModel, load
from mlx_dpo.sampling.generate import compare, encode, generate, stop_tokens
from support.adapters import write_adapter
from support.tiny_models import IM_END

PROMPTS = ["Hello there", "What does the question ask for?"]


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_llama, tmp_path_factory.mktemp("adapters") / "random", size=0.3)


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path, adapter: Path) -> LoadedModel:
    loaded = load(ModelConfig(path=str(tiny_llama)))
    lora.load(loaded.model, adapter)
    return loaded


def mlx_lm_says(model: Path, adapter: Path | None, prompt: str) -> str:
    from mlx_lm import generate as mlx_lm_generate
    from mlx_lm import load as mlx_lm_load

    loaded, tokenizer = mlx_lm_load(str(model), adapter_path=str(adapter) if adapter else None)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return mlx_lm_generate(loaded, tokenizer, tokenizer.encode(text, add_special_tokens=False), max_tokens=24)


def test_base_and_tuned_say_what_mlx_lm_says(tiny_llama: Path, adapter: Path, tuned: LoadedModel) -> None:
    for prompt, pair in zip(PROMPTS, compare(tuned, PROMPTS, max_tokens=24), strict=True):
        assert pair.prompt == prompt
        assert pair.base.text == mlx_lm_says(tiny_llama, None, prompt)
        assert pair.tuned.text == mlx_lm_says(tiny_llama, adapter, prompt)
        assert pair.base.text != pair.tuned.text


def test_after_the_adapter_was_off_it_is_on_again(tuned: LoadedModel) -> None:
    with_it = [answer.text for answer in generate(tuned, PROMPTS, max_tokens=8)]
    without = [answer.text for answer in generate(tuned, PROMPTS, max_tokens=8, adapter=False)]
    assert [answer.text for answer in generate(tuned, PROMPTS, max_tokens=8)] == with_it != without


def test_pieces_are_heard_as_they_come_and_make_the_text(tuned: LoadedModel) -> None:
    pieces: list[str] = []
    answer = next(generate(tuned, PROMPTS, max_tokens=24, on_token=pieces.append))
    assert "".join(pieces) == answer.text
    assert (answer.tokens, answer.finish) == (24, "length")
    sides: list[str] = []
    list(compare(tuned, PROMPTS[:1], max_tokens=2, on_token=lambda side, text: sides.append(side)))
    assert list(dict.fromkeys(sides)) == ["base", "tuned"]


def test_a_string_is_a_user_message_unless_it_is_raw(tuned: LoadedModel) -> None:
    message = [{"role": "user", "content": "Hello there"}]
    assert encode(tuned, "Hello there") == encode(tuned, message)
    assert tuned.tokenizer.decode(encode(tuned, message)) == (
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tuned.tokenizer.decode(encode(tuned, "Hello there", raw=True)) == "Hello there"


def test_sampling_repeats_with_its_seed_whatever_the_order(tuned: LoadedModel) -> None:
    first = [answer.text for answer in generate(tuned, PROMPTS, max_tokens=12, temp=1.0, top_p=0.9, seed=3)]
    mx.random.seed(11)
    again = [answer.text for answer in generate(tuned, PROMPTS[::-1], max_tokens=12, temp=1.0, top_p=0.9, seed=3)]
    other = [answer.text for answer in generate(tuned, PROMPTS, max_tokens=12, temp=1.0, top_p=0.9, seed=4)]
    assert first == again[::-1]
    assert first != other


def test_an_answer_ends_at_every_end_token_that_the_model_names(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    plain = load(ModelConfig(path=str(folder)))
    token = int(plain.model(mx.array([encode(plain, "Hello there")]))[0, -1].argmax())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [IM_END, token]}))
    stopping = load(ModelConfig(path=str(folder)))
    assert stop_tokens(stopping) == {IM_END, token}
    answer = next(generate(stopping, ["Hello there"], max_tokens=4))
    assert (answer.finish, answer.tokens, answer.text) == ("stop", 0, "")


def test_what_cannot_be_generated_is_said_at_once(tiny_llama: Path, tuned: LoadedModel) -> None:
    with pytest.raises(UsageError, match=r"--max-tokens 0.*--temp -1.*--top-p 2"):
        list(generate(tuned, PROMPTS, max_tokens=0, temp=-1, top_p=2))
    with pytest.raises(DataError, match="empty prompt"):
        list(generate(tuned, [""], raw=True))
    base = load(ModelConfig(path=str(tiny_llama)))
    with pytest.raises(UsageError, match="has no adapter"):
        list(compare(base, PROMPTS))
    base.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        list(generate(base, [[{"role": "user", "content": "Hello"}]]))


def test_the_template_gets_what_it_is_to_get(tiny_llama: Path) -> None:
    loaded = load(ModelConfig(path=str(tiny_llama)))
    assert loaded.tokenizer.chat_template
    loaded.tokenizer.chat_template += "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    off = {"enable_thinking": False}
    ids = encode(loaded, "Hello", chat_template_kwargs=off)
    assert loaded.tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")
    answer = next(generate(loaded, ["Hello"], max_tokens=2, chat_template_kwargs=off))
    assert answer.prompt_tokens == len(ids) > len(encode(loaded, "Hello"))
    with pytest.raises(UsageError, match="reads no effort"):
        next(generate(loaded, ["Hello"], chat_template_kwargs={"effort": "low"}))
    next(generate(loaded, ["Hello"], max_tokens=1, raw=True, chat_template_kwargs={"effort": "low"}))
