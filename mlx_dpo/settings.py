"""Configuration files, flags and assignments to settings and back: merged, typed, all that is wrong said at once.

What there is to set, its types and defaults, is read from the dataclasses of config.py: nothing is listed twice.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from mlx_dpo import config as settings
from mlx_dpo.config import LoraConfig, OptimConfig, RunConfig
from mlx_dpo.errors import UsageError

SECTIONS: dict[str, Any] = get_type_hints(RunConfig)
"""The dataclass of each section, by its name."""


class Given(NamedTuple):
    """A value that somebody gave: `where` is how they said it (`--beta`), `key` its place (`loss.beta`)."""

    where: str
    key: str
    value: Any


class Setting(NamedTuple):
    """One field of a section: the type it was declared with, its default, and the comment beside it as its help."""

    key: str
    kind: Any
    default: Any
    note: str


def resolve(file: Path | None = None, flags: Iterable[Given] = (), assignments: Sequence[str] = ()) -> RunConfig:
    """The settings of a run: defaults, under a YAML `file`, under `flags`, under assignments like `optim.momentum=0.9`.

    Objects are merged key by key. What the run folder of `model.adapter` gave to the chat template stands under all
    that is said: an adapter is used with the template as it was trained.

    Raises:
        UsageError: the file cannot be read, or keys are unknown, values of the wrong type or out of range; all of them
            are listed, each with the file and key path or the flag it came from.
    """
    wrong: list[str] = []
    # Later ones win. Each is judged, even where a later one wins over it: a wrong line in a file is wrong all the same.
    given = [*(_read_file(file, wrong) if file else ()), *flags, *_read_assignments(assignments, wrong)]
    adapter = next((value for _, key, value in reversed(given) if key == "model.adapter"), None)
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for where, key, value in [*_remembered(adapter), *given]:
        try:
            converted = _convert(value, known_settings()[key].kind)
            both = isinstance(converted, dict) and isinstance(values.get(key), dict)
            values[key] = {**values[key], **converted} if both else converted
            said[key] = where
        except KeyError:
            wrong.append(f"{where}: {REFUSED.get(key) or f'unknown setting{_suggestion(key)}'}")
        except ValueError as error:
            wrong.append(f"{where}: must be {error}, not {value!r}")
    config = RunConfig(
        **{
            section: hint(**{key[len(section) + 1 :]: values[key] for key in values if key.startswith(section + ".")})
            for section, hint in SECTIONS.items()
        }
    )
    wrong += [f"{said.get(key, key)}: {text}" for key, text in _broken_rules(config)]
    _refuse(wrong)
    return config


def check_config(config: RunConfig) -> None:
    """Refuses what no run can do, whoever made `config`.

    Raises:
        UsageError: values are out of range or exclude each other; all of them are listed.
    """
    _refuse([f"{key}: {text}" for key, text in _broken_rules(config)])


def to_yaml(config: RunConfig) -> str:
    """A commented configuration file that `resolve` reads back as the same settings."""
    import yaml

    text = ""
    for section, hint in SECTIONS.items():
        text += f"{section}:  # {(inspect.getdoc(hint) or '').splitlines()[0]}\n"
        for field in fields(hint):
            value = getattr(getattr(config, section), field.name)
            plain = list(value) if isinstance(value, tuple) else value
            inline = yaml.safe_dump([plain], default_flow_style=True, allow_unicode=True, width=inf).strip()[1:-1]
            note = known_settings()[f"{section}.{field.name}"].note
            text += f"  {field.name}: {inline}" + (f"  # {note}" if note else "") + "\n"
    return text


@cache
def known_settings() -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of config.py."""
    notes = _notes()
    return {
        (key := f"{section}.{field.name}"): Setting(
            key, get_type_hints(hint)[field.name], field.default, notes.get(f"{hint.__name__}.{field.name}", "")
        )
        for section, hint in SECTIONS.items()
        for field in fields(hint)
    }


def choices(kind: Any) -> tuple[str, ...]:
    """What a setting declared as Literal may be; empty for every other type."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def required_type(kind: Any) -> Any:
    """The declared type without its `| None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(option for option in get_args(kind) if option is not types.NoneType)
    return kind


Test = Callable[[Any], bool]

at_least_1: tuple[str, Test] = ("at least 1", lambda n: n >= 1)
not_negative: tuple[str, Test] = ("0 or more", lambda x: 0 <= x < inf)
positive: tuple[str, Test] = ("more than 0", lambda x: 0 < x < inf)
below_1: tuple[str, Test] = ("at least 0 and below 1", lambda x: 0 <= x < 1)

RESERVED = ("messages", "tools", "add_generation_prompt", "tokenize")
"""What the chat template is given by us."""

RULES: dict[str, tuple[str, Test]] = {
    # what each value must be by itself, null aside; the loss checks its own section
    "model.quantize_bits": ("2, 3, 4, 5, 6 or 8", lambda n: n in (2, 3, 4, 5, 6, 8)),
    "model.quantize_group_size": ("32, 64 or 128", lambda n: n in (32, 64, 128)),
    "data.valid_fraction": below_1,
    "data.max_length": at_least_1,
    "data.chat_template_kwargs": (
        "arguments of the chat template's own, none of " + ", ".join(RESERVED),
        lambda given: not set(RESERVED) & set(given),
    ),
    "lora.rank": at_least_1,
    "lora.scale": positive,
    "lora.alpha": positive,
    "lora.dropout": below_1,
    "lora.num_layers": ("-1 or at least 1", lambda n: n == -1 or n >= 1),
    "lora.keys": ("null or at least one name", lambda keys: bool(keys) and all(keys)),
    "optim.learning_rate": positive,
    "optim.weight_decay": not_negative,
    "optim.adam_beta1": below_1,
    "optim.adam_beta2": below_1,
    "optim.adam_epsilon": positive,
    "optim.momentum": below_1,
    "optim.warmup_ratio": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "optim.warmup_steps": not_negative,
    "optim.max_grad_norm": not_negative,
    "speed.prefill_step_size": not_negative,
    "speed.activation_cache_memory_gb": not_negative,
    "speed.activation_cache_disk_gb": not_negative,
    "train.output": ("the name of a folder", lambda path: path != ""),
    "train.batch_size": at_least_1,
    "train.grad_accumulation_steps": at_least_1,
    "train.epochs": positive,
    "train.iters": at_least_1,
    "train.seed": not_negative,
    "train.steps_per_report": at_least_1,
    "train.steps_per_eval": at_least_1,
    "train.save_every": at_least_1,
    "train.save_every_minutes": positive,
    "train.keep_checkpoints": at_least_1,
    "train.early_stopping_patience": at_least_1,
    "train.eval_samples": not_negative,
}

READERS: dict[str, tuple[str, ...]] = {
    # which optimizers read an option; with another one it is refused, not ignored
    "weight_decay": ("adamw", "sgd", "lion", "adafactor", "muon"),
    "adam_beta1": ("adamw", "adam", "lion"),
    "adam_beta2": ("adamw", "adam", "lion"),
    "adam_epsilon": ("adamw", "adam"),
    "momentum": ("sgd", "muon"),
}


RENAMED = {
    # what a setting was called in earlier versions: refused, with its name of today
    "speed.trunk": "speed.activation_cache",
    "speed.trunk_memory_gb": "speed.activation_cache_memory_gb",
    "speed.trunk_disk_gb": "speed.activation_cache_disk_gb",
    "speed.groups": "speed.length_buckets",
    "speed.completion_head": "speed.chunked_logits",
}


REFUSED = {
    # settings of other trainers that people look for, and why there is none here
    "loss.router_aux_loss_coef": "the router's load-balancing loss is not computed here: the router is frozen unless "
    "lora.keys names it, so that loss would reach an adapter only through hidden states, and mlx-lm's models keep the "
    "router's logits to themselves; leave it out, and hold the model near the base by a higher loss.beta where routing "
    "matters"
}


def _broken_rules(config: RunConfig) -> Iterator[tuple[str, str]]:
    for key, (text, holds) in RULES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not holds(value):
            yield key, f"must be {text}, not {value!r}"
    if config.lora.alpha is not None and config.lora.scale != LoraConfig.scale:
        yield "lora.alpha", "lora.scale is given too; alpha is another way to say it (scale = alpha / rank)"
    if config.train.early_stopping_patience is not None and not config.train.keep_best:
        yield "train.early_stopping_patience", "the run would end after its best adapter, and train.keep_best is off"
    if config.train.early_stopping_patience is not None and config.train.steps_per_eval is None:
        yield "train.early_stopping_patience", "train.steps_per_eval is null: nothing is evaluated before the end"
    if config.lora.fine_tune_type == "dora" and config.loss.ref_model_sync_steps is not None:
        yield "lora.fine_tune_type", "a reference that follows the policy (loss.ref_model_sync_steps) needs lora"
    for option, optimizers in READERS.items():
        value = getattr(config.optim, option)
        if value != getattr(OptimConfig, option) and config.optim.name not in optimizers:
            yield f"optim.{option}", f"{value} is not used by {config.optim.name}; it is by {', '.join(optimizers)}"


@cache
def _notes() -> dict[str, str]:
    """The comments of config.py by `Class.field`: they are the one description of each setting."""
    notes, owner = {}, ""
    for line in inspect.getsource(settings).splitlines():
        if match := re.match(r"class (\w+)", line):
            owner = match[1]
        elif match := re.match(r"    (\w+): .*?  # (.+)", line):
            notes[f"{owner}.{match[1]}"] = match[2]
    return notes


def _read_file(file: Path, wrong: list[str]) -> Iterator[Given]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML takes the last of two equal keys in silence; here the first one's author wants to know."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in sorted({key for key in keys if keys.count(key) > 1}):
                wrong.append(f"{file}, line {node.start_mark.line + 1}: {key} stands twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except FileNotFoundError:
        raise UsageError(f"no configuration file {file}", "check the path given with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        problem = getattr(error, "problem", None) or error
        raise UsageError(
            f"{file}{line}: this is not YAML: {problem}", "check indentation, quotes and colons"
        ) from error
    if not isinstance(content, Mapping):
        raise UsageError(f"{file}: holds no keys", "write sections with keys, as in `loss:` and below it `  beta: 0.1`")
    for name, values in content.items():
        if name not in SECTIONS:
            wrong.append(f"{file}: {name}: unknown section{_suggestion(str(name))}")
        elif isinstance(values, Mapping):
            yield from (Given(f"{file}: {name}.{key}", f"{name}.{key}", value) for key, value in values.items())
        elif values is not None:
            wrong.append(
                f"{file}: {name}: is a section and must hold keys, not {values!r}{_suggestion(f'{name}.path')}"
            )


def _remembered(adapter: Any) -> Iterator[Given]:
    """What the run that made an adapter gave to the chat template, where the folder says it."""
    config = Path(adapter).expanduser() / "config.yaml" if isinstance(adapter, str) else None
    if config and config.is_file():
        yield from (given for given in _read_file(config, []) if given.key == "data.chat_template_kwargs")


def _read_assignments(assignments: Sequence[str], wrong: list[str]) -> Iterator[Given]:
    for text in assignments:
        key, equals, value = text.partition("=")
        if equals:
            yield Given(f"--set {text}", key.strip(), value.strip())
        else:
            wrong.append(f"--set {text}: must be written section.key=value")


def _suggestion(key: str) -> str:
    """`; did you mean …?` for a key in the wrong section or mistyped; else what there is."""
    known = list(known_settings())
    last = key.rsplit(".", 1)[-1]
    near = (  # the first that finds something: an earlier name, the right name elsewhere, a section, one mistyped
        [RENAMED[name] for name in (key, f"speed.{key}") if name in RENAMED]
        or [name for name in known if name == key or name.endswith(f".{last}")]
        or ("." not in key and difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.7))
        or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        or [
            next(name for name in known if name.endswith(f".{match}"))
            for match in difflib.get_close_matches(last, [name.split(".")[1] for name in known], n=1, cutoff=0.7)
        ]
    )
    if near:
        return f"; did you mean {' or '.join(near)}?"
    section = key.split(".")[0]
    names = [name.split(".")[1] for name in known if name.startswith(f"{section}.")] or list(SECTIONS)
    return f"; there are {', '.join(names)}"


def _refuse(wrong: list[str]) -> None:
    if len(wrong) == 1:
        raise UsageError(wrong[0])
    if wrong:
        raise UsageError(f"{len(wrong)} settings cannot be used:\n" + "\n".join(f"- {text}" for text in wrong))


def _convert(value: Any, kind: Any) -> Any:
    """`value`, as YAML or a command line gave it, as the declared type; ValueError names what it must be."""
    plain = required_type(kind)
    optional = plain is not kind
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("null", "none"))):
        return None
    allowed = choices(plain)
    if allowed:
        if value in allowed:
            return value
        raise ValueError(f"one of {', '.join(allowed)}")
    name, convert = CONVERTERS[get_origin(plain) or plain]
    try:
        return convert(value)
    except (ValueError, TypeError):
        raise ValueError(f"{name} or null" if optional else name) from None


def _of(kind: type, *refused: type) -> Callable[[Any], Any]:
    """Converts to `kind`; what Python would convert in silence (True to 1, 8.5 to 8) is a ValueError."""

    def convert(value: Any) -> Any:
        if isinstance(value, refused):
            raise ValueError
        return kind(value)

    return convert


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _truth(value: Any) -> bool:
    return ("false", "true").index(str(value).lower()) == 1


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_text(part).strip() for part in (value.split(",") if isinstance(value, str) else value))


def _object(value: Any) -> dict[str, Any]:
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ValueError
    return dict(found)


CONVERTERS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("text (in quotes if it looks like a number)", _text),
    int: ("a whole number", _of(int, bool, float)),
    float: ("a number", _of(float, bool)),
    bool: ("true or false", _truth),
    tuple: ("a list of names", _names),
    dict: ("a JSON object", _object),
}
