"""The errors that a user can cause: what is wrong and where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


class DeviceError(MlxDpoError):
    """The GPU gave up, or there was no memory."""


PLAN = (
    "`mlx-dpo plan` says what a run needs; --auto takes settings that fit; a smaller --batch-size or --max-length "
    "needs less; closing other programs helps too"
)

DEVICE_ERRORS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    # what MLX's RuntimeErrors say (mlx/backend/metal/device.cpp, allocator.cpp; cuda/allocator.cpp) and with it macOS:
    # words of which one is in it, what that means, what to do. The first line that fits.
    (
        ("ImpactingInteractivity", "ErrorTimeout", "ErrorHang"),
        "macOS ended a computation on the GPU, since it kept the display waiting",
        "let the display sleep while it runs; leave AGX_RELAX_CDM_CTXSTORE_TIMEOUT at 1, as mlx-dpo sets it; shorter "
        "computations help too: a smaller --batch-size, --set speed.prefill_step_size=256",
    ),
    (
        ("Resource limit",),
        "there are more arrays at once than the GPU can have",
        "read more tokens at a time (--set speed.prefill_step_size=0), or take a smaller --batch-size",
    ),
    (
        ("maximum allowed buffer size",),
        "one array is larger than the GPU allows",
        "take a smaller --batch-size or --max-length, and leave speed.chunked_logits on",
    ),
    (("ErrorOutOfMemory", "[malloc] Unable to allocate", "out of memory"), "there is not enough memory", PLAN),
    (
        ("Command buffer execution failed",),
        "the GPU failed",
        "run it again; if another program uses the GPU, close that first",
    ),
)


def device_error(error: BaseException) -> DeviceError | None:
    """What an error of MLX means where it is the device's or the memory's; None for any other one."""
    said = str(error)
    for words, meaning, remedy in DEVICE_ERRORS:
        if isinstance(error, RuntimeError) and any(word in said for word in words):
            return DeviceError(f"{meaning} ({said})", remedy)
    return None


@contextmanager
def device_errors() -> Iterator[None]:
    """Inside the `with`, an error of the device or of memory becomes a `DeviceError`."""
    try:
        yield
    except RuntimeError as error:
        if (found := device_error(error)) is None:
            raise
        raise found from error
