"""docs/params.schema.json: pydantic's schema of the settings, and what pydantic cannot know of them."""

from functools import cache
from typing import Any

from mergekit.merge_methods import registered_methods
from pydantic.json_schema import GenerateJsonSchema

import stages.merging.methods  # noqa: F401  registers them beside mergekit's
from stages.methods import METHODS
from stages.project.params import Params
from stages.records.source import Source
from stages.records.sources import SOURCES
from stages.settings.ranges import RANGES
from stages.settings.section import PLAIN
from stages.settings.stage import Stage

Schema = dict[str, Any]

RANGE: list[Schema] = [
    {"type": "string", "pattern": f"^({RANGES.pattern})$"},
    {"type": "integer", "minimum": 0},
    {"type": "array", "items": {"type": "integer", "minimum": 0}},
]
LAYERS: Schema = {
    "title": "layers",
    "anyOf": [*RANGE, {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": RANGE}}],
}

VALUE: list[Schema] = [
    {"type": ["number", "boolean"]},
    {"type": "array", "minItems": 1, "items": {"type": ["number", "boolean"]}},
]
FILTERED: Schema = {
    "type": "object",
    "properties": {"filter": {"type": ["string", "null"]}, "value": {"anyOf": VALUE}},
    "required": ["value"],
    "additionalProperties": False,
}
SETTING: Schema = {"title": "setting", "anyOf": [*VALUE, {"type": "array", "minItems": 1, "items": FILTERED}]}


class Untitled(GenerateJsonSchema):
    """pydantic's, without the title of a key, which repeats the key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


@cache
def schema() -> Schema:
    """The schema of params.yaml, for editors."""
    found = Params.model_json_schema(schema_generator=Untitled)
    found["$defs"] |= {"Layers": LAYERS, "Setting": SETTING, "MergeMethod": _merge_method()}
    _refine_kinds(found["$defs"])
    _refine_merges(found["$defs"])
    _refine_names(found)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "params.yaml"}


def _merge_method() -> Schema:
    return {"title": "merge method", "enum": sorted(method.spec.name for method in registered_methods())}


def _refine_kinds(kinds: dict[str, Schema]) -> None:
    """Say which source or method a kind is, what that key is for, and what a range of layers looks like."""
    for tag, base, classes in (("source", Source, SOURCES), ("method", Stage, METHODS)):
        for name, each in classes.items():
            kind = kinds[each.__name__]
            kind["title"] = f"{tag}: {name}"
            kind["properties"][tag]["description"] = base.model_fields[tag].description
    for method in METHODS.values():
        layers = kinds[method.__name__]["properties"]["layers"]
        del layers["anyOf"]
        layers["$ref"] = "#/$defs/Layers"


def _refine_merges(kinds: dict[str, Schema]) -> None:
    """Name the merge methods, and say what shapes a weight or parameter may have."""
    setting, method = {"$ref": "#/$defs/Setting"}, {"$ref": "#/$defs/MergeMethod"}
    merge = kinds["Merge"]["properties"]
    del merge["method"]["type"]
    merge["method"] |= method
    kinds["Search"]["properties"]["methods"]["anyOf"][0]["items"] = method
    merge["depth_scaling"] |= setting
    merge["weights"]["additionalProperties"] = setting
    merge["parameters"]["additionalProperties"] = {
        "anyOf": [setting, {"type": "object", "additionalProperties": setting}]
    }


def _refine_names(found: Schema) -> None:
    """Say what names may look like, and how few threads there may be."""
    sections = found["properties"]
    parts = found["$defs"]["Mix"]["properties"]["parts"]
    for named in (*(sections[name] for name in ("datasets", "selections", "stages", "routers")), parts):
        named["propertyNames"] = {"pattern": f"^{PLAIN.pattern}$"}
    sections["threads"]["anyOf"][1]["minimum"] = 1
