"""Mistakes that a user can mend, told in one sentence instead of a traceback."""

import sys
from collections.abc import Callable


class MistakeError(Exception):
    """Something in a file the user wrote is wrong; the message names the file, the key and the fix."""


def run(main: Callable[..., None], *args: str) -> None:
    """Call `main(*args)`; on a MistakeError print its sentence to stderr and exit with code 1."""
    try:
        main(*args)
    except MistakeError as mistake:
        sys.exit(f"error: {mistake}")
