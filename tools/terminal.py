"""What commands have in common: arguments, and text in a terminal."""

import re
from argparse import ArgumentTypeError
from collections import Counter
from pathlib import Path


def positive(text: str) -> int:
    """An argument that is a number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def visible(text: str) -> str:
    """Text without characters that a terminal would obey, line breaks among them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4 s, 3 min, 2 h 10 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def size(count: float) -> str:
    """Bytes as a person says them: 12 kB, 3.4 MB, 2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def short_names(folders: list[Path]) -> list[str]:
    """Names of folders, with the folder above where two have one name."""
    counts = Counter(folder.name for folder in folders)
    return [f.name if counts[f.name] == 1 else "/".join(f.resolve().parts[-2:]) for f in folders]
