"""Where things are said: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from mlx_dpo.errors import MlxDpoError


def stderr() -> Console:
    """The console for people; colours, bars and lines of its width only where it is a terminal."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def stdout() -> Console:
    """The console for results that people read; what programs read is printed plainly."""
    return Console(highlight=False)


def show_error(error: MlxDpoError) -> None:
    """What is wrong, and below it what to do."""
    console = stderr()
    # As Text and not as a string: rich would take "[full]" in a message for its markup and swallow it.
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    if error.remedy:
        console.print(Text(error.remedy, style="dim"))


def show_warning(console: Console, text: str) -> None:
    """Something that the user should look at."""
    console.print(Text.assemble(("warning: ", "bold yellow"), text))
