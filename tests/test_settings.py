"""Configuration files, flags and assignments: what wins, what is refused; a written file reads back the same."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from mlx_dpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mlx_dpo.errors import UsageError
from mlx_dpo.settings import READERS, RENAMED, RULES, SECTIONS, Given, check_config, known_settings, resolve, to_yaml


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(UsageError) as refused:
        resolve(written(folder, text))
    return refused.value.message


def test_nothing_given_is_the_defaults() -> None:
    assert resolve() == RunConfig()


def test_assignments_win_over_flags_over_the_file_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "loss: {beta: 0.2, label_smoothing: 0.2}\nlora: {rank: 32, dropout: 0.5}\n")
    flags = [Given("--beta", "loss.beta", "0.3"), Given("--rank", "lora.rank", "64")]
    config = resolve(file, flags, ["loss.beta=0.4"])
    assert (config.loss.beta, config.lora.rank, config.lora.dropout) == (0.4, 64, 0.5)
    assert config.loss.label_smoothing == 0.2
    assert config.lora.num_layers == LoraConfig().num_layers


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path: Path) -> None:
    assert resolve(written(tmp_path, "")) == RunConfig()
    assert resolve(written(tmp_path, "model:\nlora:\n")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim: {learning_rate: 2e-5}", "optim.learning_rate", 2e-5),  # YAML 1.1 reads text, not a number
        ("optim: {learning_rate: 1}", "optim.learning_rate", 1.0),
        ("train: {epochs: '1.5'}", "train.epochs", 1.5),
        ("train: {seed: 7}", "train.seed", 7),
        ("train: {shuffle: no}", "train.shuffle", False),
        ("train: {shuffle: 'false'}", "train.shuffle", False),
        ("data: {max_length: null}", "data.max_length", None),
        ("data: {max_length: ~}", "data.max_length", None),
        ("model: {adapter: }", "model.adapter", None),
        ("lora: {keys: [q_proj, v_proj]}", "lora.keys", ("q_proj", "v_proj")),
        ("lora: {keys: 'q_proj, v_proj'}", "lora.keys", ("q_proj", "v_proj")),
        ("optim: {name: lion}", "optim.name", "lion"),
    ],
)
def test_values_of_a_file_become_the_declared_types(tmp_path: Path, text: str, key: str, value: object) -> None:
    section, name = key.split(".")
    found = getattr(getattr(resolve(written(tmp_path, text)), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("data.max_length=null", "data.max_length", None),
        ("train.grad_checkpoint=true", "train.grad_checkpoint", True),
        ("model.path=a=b", "model.path", "a=b"),
        ("lora.keys=q_proj,v_proj", "lora.keys", ("q_proj", "v_proj")),
        ("train.steps_per_eval=none", "train.steps_per_eval", None),
    ],
)
def test_words_of_a_command_line_become_the_declared_types(assignment: str, key: str, value: object) -> None:
    section, name = key.split(".")
    assert getattr(getattr(resolve(assignments=[assignment]), section), name) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora: {dropot: 0.1}", "lora.dropot: unknown setting; did you mean lora.dropout?"),
        ("loss: {router_aux_loss_coef: 0.001}", "loss.router_aux_loss_coef: the router's load-balancing loss is not"),
        ("lora: {batch_size: 3}", "lora.batch_size: unknown setting; did you mean train.batch_size?"),
        ("learning_rate: 1e-5", "learning_rate: unknown section; did you mean optim.learning_rate?"),
        ("optimizer: {name: adam}", "optimizer: unknown section; did you mean optim?"),
        ("model: mlx-community/some-model", "model: is a section and must hold keys, not 'mlx-community/some-model'"),
        ("loss: {zzz: 1}", "loss.zzz: unknown setting; there are type, beta, reference"),
        ("lora: {rank: big}", "lora.rank: must be a whole number, not 'big'"),
        ("lora: {rank: 8.5}", "lora.rank: must be a whole number, not 8.5"),
        ("lora: {rank: true}", "lora.rank: must be a whole number, not True"),
        ("lora: {rank: null}", "lora.rank: must be a whole number, not None"),
        ("optim: {learning_rate: yes}", "optim.learning_rate: must be a number, not True"),
        ("optim: {name: adamx}", "optim.name: must be one of adamw, adam, sgd, lion, adafactor, muon, not 'adamx'"),
        ("train: {shuffle: 1}", "train.shuffle: must be true or false, not 1"),
        ("model: {path: 7}", "model.path: must be text (in quotes if it looks like a number), not 7"),
        ("lora: {keys: [1]}", "lora.keys: must be a list of names or null, not [1]"),
        ("loss: {beta: 0.1, beta: 0.2}", "line 1: beta stands twice"),
    ],
)
def test_what_cannot_be_a_setting_is_refused_with_file_and_key_path(tmp_path: Path, text: str, said: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(str(tmp_path / "run.yaml"))
    assert said in message


def test_arguments_of_the_chat_template_are_merged_and_read_back(tmp_path: Path) -> None:
    file = written(tmp_path, "data:\n  chat_template_kwargs: {enable_thinking: true, style: short}\n")
    given = Given("--chat-template-kwargs", "data.chat_template_kwargs", '{"enable_thinking": false}')
    config = resolve(file, [given])
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "style": "short"}
    assert resolve(written(tmp_path, to_yaml(config))) == config
    assert resolve(file, assignments=["data.chat_template_kwargs=null"]).data.chat_template_kwargs is None


def test_an_adapter_is_used_with_the_chat_template_as_it_was_trained(tmp_path: Path) -> None:
    """Nothing else of its run is taken over, and whatever else is said about the template wins."""
    run = tmp_path / "run"
    run.mkdir()
    asked = [Given("--adapter", "model.adapter", str(run))]
    assert resolve(flags=asked).data.chat_template_kwargs is None, "no run folder, only an adapter"
    (run / "config.yaml").write_text(
        "data: {path: old.jsonl, chat_template_kwargs: {enable_thinking: false}}\nno: 1\nlora: {rank: 2}\n"
    )
    config = resolve(flags=asked)
    assert config == RunConfig(
        model=ModelConfig(adapter=str(run)), data=DataConfig(chat_template_kwargs={"enable_thinking": False})
    )
    on = Given("--thinking", "data.chat_template_kwargs", {"enable_thinking": True})
    assert resolve(flags=[*asked, on]).data.chat_template_kwargs == {"enable_thinking": True}
    assert resolve(flags=asked, assignments=["data.chat_template_kwargs=null"]).data.chat_template_kwargs is None
    by_file = written(tmp_path, f"model: {{adapter: {run}}}\ndata: {{chat_template_kwargs: {{style: short}}}}\n")
    assert resolve(by_file).data.chat_template_kwargs == {"enable_thinking": False, "style": "short"}


@pytest.mark.parametrize(("earlier", "today"), RENAMED.items())
def test_settings_of_earlier_versions_are_refused_with_their_name_of_today(
    tmp_path: Path, earlier: str, today: str
) -> None:
    section, name = earlier.split(".")
    said = f"unknown setting; did you mean {today}?"
    file = tmp_path / "run.yaml"
    assert refusal(tmp_path, f"{section}: {{{name}: 1}}") == f"{file}: {earlier}: {said}"
    with pytest.raises(UsageError) as refused:
        resolve(assignments=[f"{earlier}=1"])
    assert refused.value.message == f"--set {earlier}=1: {said}"
    with pytest.raises(UsageError) as refused:
        resolve(assignments=[f"{name}=1"])  # the section forgotten as well
    assert refused.value.message == f"--set {name}=1: {said}"
    assert today in known_settings() and earlier not in known_settings()


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "lora: {rank: x, dropot: 0.1}\ntrain: {batch_size: 0}\n")
    with pytest.raises(UsageError) as refused:
        resolve(file, [Given("--beta", "loss.beta", "strong")], ["train.epochs=-1", "seed 3"])
    assert refused.value.message.splitlines() == [
        "6 settings cannot be used:",
        "- --set seed 3: must be written section.key=value",
        f"- {file}: lora.rank: must be a whole number, not 'x'",
        f"- {file}: lora.dropot: unknown setting; did you mean lora.dropout?",
        "- --beta: must be a number, not 'strong'",
        f"- {file}: train.batch_size: must be at least 1, not 0",
        "- --set train.epochs=-1: must be more than 0, not -1.0",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora:\n  rank: 8\n rank: 9\n", "line 3: this is not YAML"),
        ("- a\n- b\n", "holds no keys"),
        ("just words", "holds no keys"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no configuration file .*nowhere\.yaml"):
        resolve(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "assignment",
    [
        "lora.rank=0",
        "lora.dropout=1",
        "lora.num_layers=0",
        "lora.keys=",
        "data.valid_fraction=1",
        "data.max_length=0",
        "optim.learning_rate=0",
        "optim.learning_rate=nan",
        "optim.learning_rate=inf",
        "train.batch_size=0",
        "train.iters=0",
        "train.epochs=0",
        "train.output=",
        "model.quantize_bits=7",
        "model.quantize_group_size=48",
    ],
)
def test_values_out_of_range_are_refused(assignment: str) -> None:
    with pytest.raises(UsageError, match=f"^--set {assignment}: must be "):
        resolve(assignments=[assignment])


def test_the_same_holds_for_settings_made_in_a_script() -> None:
    check_config(RunConfig())
    with pytest.raises(UsageError, match=r"lora\.rank: must be at least 1, not 0"):
        check_config(RunConfig(lora=LoraConfig(rank=0)))


def test_scale_and_alpha_exclude_each_other() -> None:
    assert resolve(assignments=["lora.alpha=16"]).lora.alpha == 16.0
    with pytest.raises(UsageError, match=r"lora\.scale is given too"):
        resolve(assignments=["lora.alpha=16", "lora.scale=4"])


def test_an_option_that_the_optimizer_does_not_read_is_refused() -> None:
    assert resolve(assignments=["optim.name=sgd", "optim.momentum=0.9"]).optim.momentum == 0.9
    with pytest.raises(UsageError, match=r"0\.9 is not used by adamw; it is by sgd, muon"):
        resolve(assignments=["optim.momentum=0.9"])
    with pytest.raises(UsageError, match=r"is not used by sgd"):
        resolve(assignments=["optim.name=sgd", "optim.adam_beta1=0.8"])


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(
            model=ModelConfig(path="owner/model: a #1 'quoted'\nname", adapter="runs/ä", quantize_bits=4),
            lora=LoraConfig(keys=("q_proj", "self_attn.v_proj"), alpha=16.0),
            loss=LossConfig(type="sigmoid:0.8,sft:1.0", beta=1e-7),
            optim=OptimConfig(learning_rate=2e-5, warmup_steps=0),
            train=TrainConfig(output="runs/1.5", iters=10, shuffle=False, steps_per_eval=None),
        ),
    ],
)
def test_a_written_configuration_reads_back_the_same(tmp_path: Path, config: RunConfig) -> None:
    assert resolve(written(tmp_path, to_yaml(config))) == config


def test_a_written_configuration_explains_its_keys() -> None:
    lines = to_yaml(RunConfig()).splitlines()
    assert "  max_length: 1024  # tokens of prompt and completion together; null for no limit" in lines
    assert yaml.safe_load("\n".join(lines))["data"]["max_length"] == 1024


def test_every_setting_is_described() -> None:
    loss = {key for key in known_settings() if key.startswith("loss.")}
    assert [key for key, setting in known_settings().items() if not setting.note and key not in loss] == []


def test_rules_speak_of_settings_that_there_are() -> None:
    assert set(RULES) <= set(known_settings())
    assert {f"optim.{name}" for name in READERS} <= set(known_settings())
    assert list(SECTIONS) == [section.name for section in fields(RunConfig)]


def test_a_default_may_be_said_with_any_optimizer() -> None:
    check_config(replace(RunConfig(), optim=OptimConfig(name="sgd", adam_beta1=OptimConfig.adam_beta1)))
