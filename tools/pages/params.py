"""docs/params.md: every key of params.yaml, in the order of the file."""

import json
from collections.abc import Mapping

from stages.methods import METHODS
from stages.records.source import Single
from stages.records.sources import SOURCES
from stages.settings.section import Settings
from stages.settings.stage import Training
from tools.pages.schema import Schema, schema
from tools.pages.text import linked, paragraphs, table

INTRO = """\
# Every key of params.yaml

Made by `uv run strata docs` from the settings' own descriptions. A key that is "needed" has no default.

`uv run strata check` tells the first mistake in params.yaml in one sentence. An editor with a YAML language server (in
VS Code the extension "YAML" of Red Hat) completes keys, shows these texts and marks mistakes while you type: it finds
docs/params.schema.json by the first line of params.yaml."""

NOUNS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def params_page() -> str:
    """The whole page."""
    sections = schema()["properties"]
    plain = {key: each for key, each in sections.items() if not _is_section(each)}
    parts = [INTRO, "## At the top", _keys(plain, schema()["required"])]
    for key, section in sections.items():
        if _is_section(section):
            parts += [f"## `{key}`", *_section(key, section)]
    return "\n\n".join(parts) + "\n"


def _section(key: str, section: Schema) -> list[str]:
    """Text and tables of one section."""
    if key == "datasets":
        several = "Every source but `mix` has these keys, and its own below."
        return [section["description"], several, *_kinds("source", SOURCES, Single)]
    if key == "stages":
        several = "Every method has these keys, and its own below; `import` has the first four alone."
        return [section["description"], several, *_kinds("method", METHODS, Training)]
    definition = _definition(section.get("additionalProperties", section))
    parts = [*_told(definition["description"]), _keys(definition["properties"], definition.get("required", []))]
    for name, each in definition["properties"].items():
        if "$ref" in each and "properties" in (below := _definition(each)):
            parts += [f"### `{key}.{name}`", *_told(below["description"]), _keys(below["properties"], [])]
    return parts


def _kinds(tag: str, classes: Mapping[str, type[Settings]], base: type[Settings]) -> list[str]:
    """Keys that all kinds of a dataset or stage have, and each kind's own."""
    whole = next(kind for kind in classes.values() if issubclass(kind, base))
    definition = schema()["$defs"][whole.__name__]
    common = {name: definition["properties"][name] for name in base.model_fields}
    common[tag] = {"title": f"{tag} below", "description": base.model_fields[tag].description}
    parts = [_keys(common, definition["required"])]
    for name in sorted(classes):
        definition = schema()["$defs"][classes[name].__name__]
        own = {key: each for key, each in definition["properties"].items() if key != tag and common.get(key) != each}
        parts += [f"### `{tag}: {name}`", *map(linked, paragraphs(classes[name]))]
        parts += [_keys(own, definition["required"])] if own else []
    return parts


def _keys(keys: dict[str, Schema], required: list[str]) -> str:
    rows = [
        [f"`{key}`", words(each), "needed" if key in required else _default(each), " ".join(_told(each["description"]))]
        for key, each in keys.items()
    ]
    return table(["key", "what", "default", "meaning"], rows)


def words(kind: Schema) -> str:
    """What a value may be, such as `number > 0`."""
    if "$ref" in kind:
        definition = _definition(kind)
        return "keys of its own" if "properties" in definition else words(definition)
    if "title" in kind:
        return kind["title"]
    if "const" in kind:
        return f"`{kind['const']}`"
    if "enum" in kind:
        return _either([f"`{value}`" for value in kind["enum"]])
    if "anyOf" in kind:
        return _either([words(each) for each in kind["anyOf"] if each.get("type") != "null"])
    if kind["type"] == "array":
        return f"{kind.get('maxItems', 'list of')} {_several(words(kind['items']))}"
    if kind["type"] == "object":
        return "mapping"
    bounds = [f"{sign} {kind[bound]:g}" for bound, sign in BOUNDS.items() if bound in kind]
    return f"{NOUNS[kind['type']]} {' and '.join(bounds)}".strip()


def _several(words: str) -> str:
    return f"{words}s" if words[-1].isalpha() else words


def _either(kinds: list[str]) -> str:
    *first, last = kinds
    return f"{', '.join(first)} or {last}" if first else last


def _default(kind: Schema) -> str:
    value = kind.get("default")
    if value in (None, {}, []) or isinstance(value, dict):
        return "–"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _is_section(content: Schema) -> bool:
    return "$ref" in content or content.get("type") == "object"


def _definition(kind: Schema) -> Schema:
    return schema()["$defs"][kind["$ref"].rpartition("/")[2]]


def _told(description: str) -> list[str]:
    """Paragraphs of a description, each in one line."""
    return [linked(" ".join(paragraph.split())) for paragraph in description.split("\n\n")]
