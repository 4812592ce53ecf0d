"""Numbers as they are written in the report."""

from __future__ import annotations

import math


def percent(share: float, digits: int = 2) -> str:
    """A share as a percentage of `digits` significant digits, such as `0.14 %`."""
    if share == 0 or not math.isfinite(share):
        return "0 %" if share == 0 else "–"
    places = max(0, digits - 1 - math.floor(math.log10(abs(100 * share))))
    return f"{100 * share:.{places}f} %"
