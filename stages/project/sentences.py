"""What pydantic finds wrong in params.yaml, in one sentence with the key and the fix."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from stages.methods import METHODS
from stages.records.sources import SOURCES
from stages.settings.section import nearest

KINDS = {"method": set(METHODS), "source": set(SOURCES)}  # pydantic tells what a key takes only if it is there


LONGEST = 80  # characters of a value in a sentence
WISHES = {  # in a user's words
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "too_short": "a longer list",
    "too_long": "a shorter list",
}


def sentence(error: ValidationError, content: Any) -> str:
    """The first mistake, such as `stages.sums.lr is missing; add it`.

    Args:
        error: what validating the content raised.
        content: of params.yaml.
    """
    first = error.errors(include_url=False)[0]
    key = _key(first, content)
    kind, found, context = first["type"], first["input"], first.get("ctx", {})
    match kind:
        case "mistake":
            return f"{key}{first['msg']}".removeprefix(".")
        case "missing":
            return f"{key} is missing; add it"
        case "union_tag_not_found" | "model_attributes_type" if isinstance(found, dict):
            known = KINDS[context["discriminator"].strip("'")] - ({"mix"} if "parts" in first["loc"] else set())
            return f"{_tag(key, context)} is missing; choose one of {', '.join(sorted(known))}"
        case "union_tag_invalid":
            return f"{_tag(key, context)} {context['tag']!r} is not known; {nearest(context['tag'], _tags(context))}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key} is {_shown(found)}; it needs its settings as keys below it"
        case "too_short" if isinstance(found, dict):
            return f"{key} needs at least one name with its settings below it"
        case "string_type" if first["loc"][-1] == "[key]":
            return f"{key} is no usable name; start with a letter and use only letters, digits, - and _"
    wish = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ").removeprefix("a valid ")
    return f"{key} is {_shown(found)}; it should be {WISHES.get(kind, wish)}"


def _shown(found: Any) -> str:
    """A value as it stands in the file, or its beginning."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(found), repr(found))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _key(error: ErrorDetails, content: Any) -> str:
    """Where the mistake stands: pydantic's place, less the names that it gives to classes and kinds."""
    place, parts = content, []
    for part in error["loc"]:
        known = part in place if isinstance(place, dict) else isinstance(place, list) and isinstance(part, int)
        if known:
            place = place[part]
            parts.append(str(part))
    if error["type"] == "missing":
        parts.append(str(error["loc"][-1]))
    return ".".join(parts)


def _tag(key: str, context: dict[str, Any]) -> str:
    return f"{key}.{context['discriminator'].strip(chr(39))}"


def _tags(context: dict[str, Any]) -> list[str]:
    """The values that a discriminator takes."""
    return [tag.strip(" '") for tag in context["expected_tags"].split(",")]
