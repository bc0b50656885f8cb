"""What was found, as a page that stands by itself and as a few sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

Entry = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --bad: #c33; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; } h2 small { font-weight: normal; opacity: .7; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; background: var(--soft); }
td.text { text-align: left; } .bad { color: var(--bad); white-space: pre-wrap; } li.bad::marker { content: "✗ "; }
"""


def page(results: Sequence[Entry]) -> str:
    """The whole page, HTML without anything from outside."""
    sentences = "".join(f"<li{' class=bad' if is_bad(text) else ''}>{escape(text)}</li>" for text in said(results))
    sections = "".join(_section(entry) for entry in results)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>mac-check</title><style>{STYLE}</style><h1>mac-check</h1><ul>{sentences}</ul>{sections}</html>\n"
    )


def is_bad(sentence: str) -> bool:
    """Whether a sentence of `said` tells of something that is not as it should be."""
    return sentence.startswith("NOT")


def said(results: Iterable[Entry]) -> list[str]:
    """What the figures mean, a sentence each; what is not as it should be begins with NOT."""
    sentences = []
    for entry in results:
        where = f"{entry['section']} ({entry['model'].rsplit('/', 1)[-1]}, {entry['dtype']})"
        if "error" in entry:
            sentences.append(f"NOT measured: {where}: {entry['error'].splitlines()[-1]}")
        elif entry["section"] in VERDICTS:
            sentences.append(f"{VERDICTS[entry['section']](entry['found'])}: {where}")
    return sentences


def _exact(found: Entry) -> str:
    widened = found["float32"]
    worst = max(of.get("largest", 0.0) for of in widened.values())
    gradient = max(of.get("gradient", 0.0) for of in widened.values())
    failing = [name for name, of in widened.items() if "fails" in of]
    text = f"in float32 log-probs agree to {worst:.1g}, gradients to {gradient:.1g}"
    text += f"; rounding noise {found['rounding noise, nats']:.2g} nats a token"
    if failing:
        text += f"; left out by this model: {', '.join(failing)}"
    return text if worst <= 1e-3 and gradient <= 1e-2 else f"NOT exact: {text}"


def _steps(found: Entry) -> str:
    best, planned = found["without none"], found["forecast peak, MB"]
    slower = {
        name.removeprefix("without "): of for name, of in found.items() if isinstance(of, dict) and of is not best
    }
    gains = ", ".join(f"{name} {of['seconds a step'] / best['seconds a step']:.2f}×" for name, of in slower.items())
    return (
        f"{best['seconds a step']:.3f} s a step at {best['peak, MB']:.0f} MB ({planned:.0f} foreseen); "
        f"a step without one of them takes: {gains}"
    )


def _hybrid(found: Entry) -> str:
    return f"a gated-delta hybrid trains, {found['steps']} steps"


def _resume(found: Entry) -> str:
    differing = [arch for arch, of in found.items() if not of["the same bits"]]
    return f"NOT the same after --resume: {', '.join(differing)}" if differing else "a resumed run has the same bits"


def _display(found: Entry) -> str:
    return f"{found['steps']} steps with the display on, the slowest {found['slowest']:.2f} s"


VERDICTS = {"exactness": _exact, "steps": _steps, "hybrid": _hybrid, "resume": _resume, "display": _display}


def _section(entry: Entry) -> str:
    title = f"{entry['section']} <small>{escape(entry['model'])}, {entry['dtype']}, {entry['seconds']:.0f} s</small>"
    if "error" in entry:
        return f"<h2>{title}</h2><p class=bad>{escape(entry['error'])}</p>"
    found = entry["found"]
    nested = [
        name for name, of in found.items() if isinstance(of, dict) and any(isinstance(v, dict) for v in of.values())
    ]
    html = _table({name: of for name, of in found.items() if name not in nested})
    return f"<h2>{title}</h2>{html}" + "".join(f"<h3>{escape(name)}</h3>{_table(found[name])}" for name in nested)


def _table(found: Entry) -> str:
    """Plain values a line each; dictionaries of values a line each under common columns."""
    rows = {name: of for name, of in found.items() if isinstance(of, dict)}
    plain = "".join(_row(name, [of]) for name, of in found.items() if name not in rows)
    columns = list(dict.fromkeys(column for of in rows.values() for column in of))
    table = f"<table>{plain}</table>" if plain else ""
    if rows:
        head = "".join(f"<th>{escape(column)}</th>" for column in ["", *columns])
        body = "".join(_row(name, [of.get(column, "") for column in columns]) for name, of in rows.items())
        table += f"<table><tr>{head}</tr>{body}</table>"
    return f"<div class=wide>{table}</div>"


def _row(name: str, values: Sequence[Any]) -> str:
    return f"<tr><td>{escape(name)}</td>" + "".join(map(_cell, values)) + "</tr>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        words = ", ".join(_figure(v) for v in value) if isinstance(value, list) else str(value)
        return f"<td class=text>{escape(words)}</td>"
    return f"<td>{_figure(value)}</td>"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
