"""The errors that a user can cause: what is wrong and where, and what to do about it."""

from __future__ import annotations


class MlxDpoError(Exception):
    """Something went wrong that the user can mend; the CLI prints it without a traceback and exits with 1.

    `message` says what is wrong and where (file, line, row, flag); `remedy` says what to do.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class UsageError(MlxDpoError):
    """A flag, a configuration key or a combination of them that cannot be; exit status 2."""

    exit_code = 2


class DataError(MlxDpoError):
    """A data file or a row of it that cannot be used."""


class ModelError(MlxDpoError):
    """A model, tokenizer or adapter folder that cannot be used."""


class RunError(MlxDpoError):
    """A run folder or a checkpoint that cannot be used, or a run that cannot go on."""
