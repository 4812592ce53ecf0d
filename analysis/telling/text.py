"""Numbers as they are written in the report; what has no value is a dash."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stages.settings.ranges import Layers, parse

if TYPE_CHECKING:
    from analysis.changes.metrics import Metric

NOTHING = "–"


def percent(share: float | None, digits: int = 2) -> str:
    """A share as a percentage of `digits` significant digits, such as `0.14 %`."""
    if share is None or not math.isfinite(share):
        return NOTHING
    if share == 0:
        return "0 %"
    places = max(0, digits - 1 - math.floor(math.log10(abs(100 * share))))
    return f"{100 * share:.{places}f} %"


def whole_percent(share: float | None) -> str:
    """A share as a percentage without decimals, such as `78 %`."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


def number(value: float | None, form: str) -> str:
    """A number in Python's format `form`, such as `.3f`."""
    return NOTHING if value is None or not math.isfinite(value) else format(value, form)


def measured(value: float | None, metric: Metric) -> str:
    """The value of a metric."""
    return percent(value) if metric.is_share else number(value, ".2g")


UNITS = {"accuracy": "", "chrf": "chrF ", "rouge_l": "ROUGE-L ", "score": "score ", "loss": "loss "}


def score(value: float, measure: str) -> str:
    """An accuracy as `78 %`, chrF and ROUGE-L as `78` of 100, a loss in nats or a score of the user's own as `1.23`."""
    if measure == "accuracy":
        return whole_percent(value)
    return number(100 * value, ".0f") if measure in ("chrf", "rouge_l") else number(value, ".2f")


def scored(value: float, measure: str) -> str:
    """The same with its unit, such as `chrF 78`."""
    return UNITS[measure] + score(value, measure)


def ranges(layers: list[int]) -> str:
    """Sorted layer numbers as `0-3, 8`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def in_layers(layers: list[int]) -> str:
    """Sorted layer numbers as `layers 0-3`; an embedding lies in none."""
    return f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}" if layers else "outside the layers"


def in_modules(setting: Layers, count: int) -> str:
    """What `layers` of a stage names, such as `layers 0-3`, or `attention in layers 0-3, mlp in layers 2-5`.

    Args:
        setting: of params.yaml.
        count: how many layers the model has.
    """
    if not isinstance(setting, dict):
        return in_layers(parse(setting, count))
    groups: dict[str, list[str]] = {}
    for group, text in setting.items():
        where = "" if group == "embeddings" else f" in {in_layers(parse(text, count))}"
        groups.setdefault(where, []).append(group)
    return ", ".join(f"{' and '.join(names)}{where}" for where, names in groups.items())
