"""Layer ranges, as a user writes them."""

import re
from typing import Any

from stages.errors import MistakeError
from stages.settings.section import mistake

RANGES = re.compile(r"all|last [1-9]\d{0,5}|\d{1,6}(-\d{1,6})?(, ?\d{1,6}(-\d{1,6})?)*", re.ASCII)
Range = str | int | list[int]
Layers = Range | dict[str, Range]  # one range for all modules, or one for each group or name of modules


def check_layers(setting: Any) -> Any:
    """Refuse what is neither a range nor a mapping of modules to ranges, whatever the model.

    Raises:
        ValueError: says what it should be.
    """
    for each in setting.values() if isinstance(setting, dict) else [setting]:
        numbered = isinstance(each, list) and all(type(number) is int for number in each)
        if type(each) not in (str, int) and not numbered:
            raise ValueError("all, 5, 0-3,20-24, last 6, a list of numbers, or one of these for each group of modules")
        try:
            check_range(each)
        except MistakeError as error:
            raise mistake(f": {error}") from None
    if setting == {}:
        raise mistake(": it names no modules; write a range, or groups of modules with their ranges")
    if isinstance(setting, dict) and setting.get("embeddings", "all") != "all":
        raise mistake(": embeddings belong to no layer; write embeddings: all, or leave them out")
    return setting


def check_range(text: Range) -> str:
    """A range in words and numbers, a list of numbers too.

    Raises:
        MistakeError: it is no layer range, or runs backwards.
    """
    written = ",".join(map(str, text)) if isinstance(text, list) else str(text)
    if not RANGES.fullmatch(written):
        raise MistakeError(f"{written!r} is no layer range; write all, 0-3, 0-3,20-24, [0, 3] or last 6")
    if any(first > last for first, last in _ends(written)):
        raise MistakeError(f"{written!r} runs backwards; write the smaller layer first")
    return written


def parse(text: Range, num_layers: int) -> list[int]:
    """Layer numbers that `text` names, sorted.

    Args:
        text: `all`, `5`, `0-3`, `0-3,20-24` (both ends included), `last 6` or a list of numbers.
        num_layers: how many layers the model has.

    Raises:
        MistakeError: the text is no layer range or names a layer the model does not have.
    """
    written, last_layer = check_range(text), num_layers - 1
    if written == "all":
        return list(range(num_layers))
    ranges = _ends(written) or [(num_layers - int(written.removeprefix("last ")), last_layer)]
    if any(first < 0 or last > last_layer for first, last in ranges):
        raise MistakeError(f"{written!r} is outside the model, which has layers 0-{last_layer}; stay within them")
    return sorted({layer for first, last in ranges for layer in range(first, last + 1)})


def _ends(written: str) -> list[tuple[int, int]]:
    """First and last number of each part; none of `all` and `last 6`, which the model decides."""
    parts = written.split(",") if written[0].isdigit() else []
    return [(int(part.split("-")[0]), int(part.split("-")[-1])) for part in parts]


def numbers(setting: Layers, num_layers: int) -> list[int]:
    """Every layer that a stage's `layers` names, whatever the modules; embeddings belong to none."""
    if not isinstance(setting, dict):
        return parse(setting, num_layers)
    ranges = {group: parse(text, num_layers) for group, text in setting.items()}
    return sorted({layer for group, found in ranges.items() if group != "embeddings" for layer in found})
