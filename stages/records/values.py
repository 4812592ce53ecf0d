"""Single values of a row, as people write them."""

import json
from datetime import date, time, timedelta
from decimal import Decimal
from math import isinf, isnan
from typing import Any

from stages.errors import MistakeError
from stages.settings.section import nearest


def look_up(row: dict[str, Any], path: str, where: str) -> Any:
    """The value of a column, or of what is in it: `answers.text.0` is the first of a list; None beyond its end.

    Raises:
        MistakeError: there is no such column or key.
    """
    if path in row:
        return row[path]
    value: Any = row
    known = ""
    for key in path.split("."):
        if value is None:
            return None
        if isinstance(value, list) and key.isdecimal():
            value = value[int(key)] if int(key) < len(value) else None
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
            raise MistakeError(
                f"{where} has no {path!r}, which columns names;"
                f" {nearest(f'{known}{key}', [f'{known}{each}' for each in keys if each != ''], 'it has')}"
            )
        known += f"{key}."
    return value


def some(value: Any) -> Any:
    """The value, or None for the NaN that tables have in its place."""
    return None if isinstance(value, float) and isnan(value) else value


def as_text(value: Any, where: str) -> str:
    """A value as text: nothing is empty, a number is as short as it can be (42, 0.5), a date as ISO has it.

    Raises:
        MistakeError: it is true, false or infinite, which people write in several ways, or a list or mapping.
    """
    if some(value) is None:
        return ""
    if isinstance(value, float) and not isinf(value):
        return repr(value).removesuffix(".0")
    if isinstance(value, str | int | date | time | timedelta | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, dict | list):
        inside = ", ".join(map(str, value)) if isinstance(value, dict) else "list"
        raise MistakeError(
            f"{where} is no text but holds {inside}; name the text in it with columns and dots, as in a.b.0"
        )
    raise MistakeError(f"{where} is {value!r} and no text; write it as text")


def as_json(value: Any, where: str) -> Any:
    """A list or mapping, which a table may have as text of JSON; None where there is nothing."""
    if some(value) in (None, ""):
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise MistakeError(f"{where} is text that is not JSON; write a list or mapping, or JSON of one") from None


def as_mappings(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of mappings without what is null in them; empty where there is nothing."""
    found = as_json(value, where)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise MistakeError(f"{where} is no list of mappings; write [{{…}}, …]")
    return [{key: item for key, item in each.items() if item is not None} for each in found]
