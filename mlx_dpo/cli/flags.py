"""Flags made from the settings: each field of config.py is one, with its own default and comment as help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from mlx_dpo.settings import REFUSED, SECTIONS, Given, Setting, choices, known_settings, required_type

NAMES = {
    # where a flag is not called like its field
    "model.path": ("--model", "-m"),
    "data.path": ("--data", "-d"),
    "loss.type": ("--loss",),
    "optim.name": ("--optimizer",),
    "train.output": ("--output", "-o"),
}

METAVARS = {int: "N", float: "X", str: "TEXT", bool: "", dict: "JSON"}

TEMPLATE = "data.chat_template_kwargs"
Thinking = Annotated[
    Literal["on", "off"] | None,
    typer.Option(
        "--thinking",
        metavar="WORD",
        help="Whether the model is to think before it answers: the chat template's enable_thinking. (on, off)",
        rich_help_panel="Which rows, and how they become tokens",
        show_default=False,
    ),
]
"""One argument of the chat template, with a flag of its own."""

CONFIG_HELP = "A YAML file with any of the settings; flags win over it."
SET_HELP = "Any setting by its place in the file, e.g. optim.momentum=0.9; wins over flags. Again for more."


class Asked(NamedTuple):
    """The settings that a command line asks for, in the form in which `resolve` takes them."""

    file: Path | None
    flags: list[Given]
    assignments: list[str]


def with_settings(
    *keys: str, notes: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb, whose first argument is an `Asked`, a flag for each setting of `keys`, `--config` and `--set`.

    A key is a section (`lora`) or one setting (`train.batch_size`). `notes` replaces a setting's comment as help, where
    a verb uses it otherwise. Values reach `resolve` as they were typed: types and ranges are judged in one
    place. A setting that is true or false has one flag, which turns it from its default.
    """
    wanted = [setting for key, setting in known_settings().items() if key in keys or key.split(".")[0] in keys]
    refused = [Setting(key, str | None, None, "") for key in REFUSED if "train" in keys]

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]

        @wraps(verb)
        def command(**values: Any) -> None:
            given = []
            for setting in (*wanted, *refused):
                value = values.pop(_parameter(setting))
                # not given is None whatever the default: a flag left out must not win over the file
                if value is not None:
                    typed = not setting.default if value is True else value
                    given.append(Given(flag_names(setting)[0], setting.key, typed))
            if thinking := values.pop("thinking", None):
                given.append(Given("--thinking", TEMPLATE, {"enable_thinking": thinking == "on"}))
            verb(Asked(values.pop("config"), given, values.pop("assignments")), **values)

        parameters = [*own, *_files(), *(_flag(setting, notes or {}) for setting in wanted)]
        parameters += [_flag(setting, {}, hidden=True) for setting in refused]  # so that resolve can say why not
        if any(setting.key == TEMPLATE for setting in wanted):
            parameters.append(
                inspect.Parameter("thinking", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Thinking)
            )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def flag_names(setting: Setting) -> tuple[str, ...]:
    """What the flags of a setting are called: `--learning-rate` for optim.learning_rate."""
    no = "no-" if setting.default is True else ""
    return NAMES.get(setting.key) or (f"--{no}{setting.key.split('.')[1].replace('_', '-')}",)


def _parameter(setting: Setting) -> str:
    return setting.key.replace(".", "__")


def _files() -> Iterable[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    config = Annotated[Path | None, typer.Option("--config", "-c", help=CONFIG_HELP)]
    assignments = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP, show_default=False)]
    yield inspect.Parameter("config", kind, default=None, annotation=config)
    yield inspect.Parameter("assignments", kind, default=[], annotation=assignments)


def _flag(setting: Setting, notes: Mapping[str, str], *, hidden: bool = False) -> inspect.Parameter:
    kind = required_type(setting.kind)
    allowed = choices(kind)
    parts = [
        notes.get(setting.key, setting.note),
        f"({', '.join(allowed)})" if allowed else "",
        "" if kind is bool or setting.default in (None, "") else f"[default: {setting.default}]",
    ]
    option = typer.Option(
        *flag_names(setting),
        help=" ".join(part.replace("[", "\\[") for part in parts if part),
        metavar=METAVARS.get(kind, "WORD" if allowed else "NAMES"),
        autocompletion=(lambda incomplete: [c for c in allowed if c.startswith(incomplete)]) if allowed else None,
        rich_help_panel=(inspect.getdoc(SECTIONS[setting.key.split(".")[0]]) or "").splitlines()[0].rstrip("."),
        show_default=False,
        hidden=hidden,
    )
    return inspect.Parameter(
        _parameter(setting),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(bool if kind is bool else str) | None, option],
    )
