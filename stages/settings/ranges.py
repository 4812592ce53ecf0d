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
        numbers(setting, None)
    except MistakeError as error:
        raise mistake(f": {error}") from None
    return setting


def parse(text: Range, num_layers: int | None) -> list[int]:
    """Layer numbers that `text` names, sorted.

    Args:
        text: `all`, `5`, `0-3`, `0-3,20-24` (both ends included), `last 6` or a list of numbers.
        num_layers: how many layers the model has; where that is not known, any number will do.

    Raises:
        MistakeError: the text is no layer range or names a layer the model does not have.
    """
    if isinstance(text, list):
        text = ",".join(map(str, text))
    text = str(text)
    if not RANGES.fullmatch(text):
        raise MistakeError(f"{text!r} is no layer range; write all, 0-3, 0-3,20-24, [0, 3] or last 6")
    last_layer = int(max(re.findall(r"\d+", text), key=int, default=0)) if num_layers is None else num_layers - 1
    if text == "all":
        return list(range(last_layer + 1))
    if text.startswith("last "):
        ranges = [(last_layer + 1 - int(text.removeprefix("last ")), last_layer)]
    else:
        ends = [part.strip().split("-") for part in text.split(",")]
        ranges = [(int(end[0]), int(end[-1])) for end in ends]
    for first, last in ranges:
        if first > last:
            raise MistakeError(f"{text!r} runs backwards; write the smaller layer first")
        if first < 0 or last > last_layer:
            raise MistakeError(f"{text!r} is outside the model, which has layers 0-{last_layer}; stay within them")
    return sorted({layer for first, last in ranges for layer in range(first, last + 1)})


def numbers(setting: Layers, num_layers: int | None) -> list[int]:
    """Every layer that a stage's `layers` names, whatever the modules; embeddings belong to none."""
    if not isinstance(setting, dict):
        return parse(setting, num_layers)
    if not setting:
        raise MistakeError("it names no modules; write a range, or groups of modules with their ranges")
    ranges = {group: parse(text, num_layers) for group, text in setting.items()}
    if setting.get("embeddings", "all") != "all":
        raise MistakeError("embeddings belong to no layer; write embeddings: all, or leave them out")
    return sorted({layer for group, found in ranges.items() if group != "embeddings" for layer in found})
