"""The only writer of params.yaml: comments, and all else that is not changed, stay.

What a change makes wrong is a MistakeError, and the file stays as it was.
"""

import difflib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from stages.errors import MistakeError
from stages.files import write_text
from stages.project.check import load_checked
from stages.project.params import PARAMS, load_params

yaml = YAML()  # with the indents of the repository's params.yaml
yaml.indent(mapping=2, sequence=4, offset=2)
yaml.preserve_quotes, yaml.width = True, 4096


def stages() -> pd.DataFrame:
    """The stages, a row each; what a stage does not name is empty."""
    found = _content()["stages"]
    keys = dict.fromkeys(key for stage in found.values() for key in stage)
    rows = [[stage.get(key, "") for key in keys] for stage in found.values()]
    return pd.DataFrame(rows, list(found), list(keys), dtype=object)


def write(table: pd.DataFrame) -> None:
    """Make the stages those of the table; a row more or less is a stage more or less."""
    with _edited() as content:
        found = content["stages"]
        for gone in [name for name in found if name not in table.index]:
            del found[gone]
        for name, row in table.astype(object).fillna("").iterrows():
            stage = found.setdefault(name, {})
            for key, value in row.items():
                if value == "":
                    stage.pop(key, None)
                elif stage.get(key) != value:
                    stage[key] = value


def change(key: str, value: Any) -> None:
    """Give a key, such as merge.method, another value."""
    *parents, last = key.split(".")
    with _edited() as place:
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value


def _content() -> Any:
    """What is written, with its comments and without defaults."""
    load_params()
    return yaml.load(PARAMS)


@contextmanager
def _edited() -> Iterator[Any]:
    """Yield the content, which is written after the block; print the lines that became others."""
    content, before, after = _content(), PARAMS.read_text(encoding="utf-8"), io.StringIO()
    yield content
    yaml.dump(content, after)
    write_text(PARAMS, after.getvalue())
    try:
        load_checked()
    except MistakeError:
        write_text(PARAMS, before)
        raise
    lines = difflib.ndiff(before.splitlines(), after.getvalue().splitlines())
    print("\n".join(line for line in lines if line[0] in "+-") or f"{PARAMS} stays as it is")
