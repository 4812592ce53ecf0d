"""Datasets by `source`. A new source is one new file here: it is found by itself."""

import importlib
import pkgutil

from stages.records.source import Source

# The mix comes last, for its parts are any of the others.
for _name in sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: (name == "mix", name)):
    importlib.import_module(f"{__name__}.{_name}")

SOURCES: dict[str, type[Source]] = {source.name(): source for source in Source.choices()}
