"""Mistakes that a user can mend, told in one sentence instead of a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class MistakeError(Exception):
    """Something in a file the user wrote is wrong; the message names the file, the key and the fix."""


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Within the block the sentence of a mistake begins with `where`, such as `params.yaml: stages.sums.`."""
    try:
        yield
    except MistakeError as mistake:
        raise MistakeError(f"{where}{mistake}") from None


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(main: Callable[..., None], *args: str, **named: Any) -> None:
    """Call `main`; on a MistakeError print its sentence to stderr and exit with code 1."""
    if sys.platform == "win32":
        sys.exit("error: Strata runs on Linux and macOS; on Windows, run it in WSL")
    try:
        main(*args, **named)
    except MistakeError as mistake:
        sys.exit(f"error: {mistake}")
