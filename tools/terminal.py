"""What commands have in common: arguments, and text in a terminal."""

import re
from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """An argument that is a number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def visible(text: str) -> str:
    """Text without characters that a terminal would obey, line breaks among them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
