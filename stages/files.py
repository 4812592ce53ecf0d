"""Files that are whole or absent: written under a temporary name, then renamed, and removed after an error."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

from stages.errors import MistakeError, first_line

CHECKPOINTS = Path("checkpoints")
BASE = CHECKPOINTS / "base"
PICKED = Path("picked")
DATA = Path("data")
MERGED = Path("merged")
ROUTED = Path("routed")
REPORTS = Path("reports")
OUTPUTS = (CHECKPOINTS, PICKED, DATA, MERGED, ROUTED, REPORTS)
TRACKED = Path("tracked")  # for trackers, if params.yaml names one
ANSWERS = REPORTS / "answers"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # the files of a PEFT adapter
NAMES: dict[type, str] = {dict: "object", list: "list"}  # in JSON's words
DIGITS = 6  # significant ones of a number in a file
FORMAT = 1  # of checkpoints, in stage.json; what tells none is of the first


def sha256(paths: Iterable[Path]) -> str:
    """Hash the contents of `paths`, in the order given, as one hex digest."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def refuse_untracked(path: Path, where: str) -> None:
    """Raise a MistakeError if a file or folder of the user's is there, but not in DVC's temporary workspace.

    Or if the system does not say whether it is there, as of a name that is too long or in a folder that is closed.

    Args:
        path: from the folder of params.yaml.
        where: the key that names it, such as `params.yaml: base.model`.
    """
    try:
        is_elsewhere = not path.exists() and (Path(os.environ.get("DVC_ROOT", ".")) / path).exists()
    except OSError as error:
        raise MistakeError(f"{where} cannot be looked up ({error.strerror}); correct the path") from None
    if is_elsewhere:
        raise MistakeError(
            f"{where} {str(path)!r} is not in the workspace of --temp or --queue, which has only what git tracks; git"
            " add it, or write its full path"
        )


class LackingError(MistakeError, KeyError):
    """A JSON file lacks a key that is asked for."""

    __str__ = Exception.__str__  # a KeyError's has the sentence in quotes


class _Content(dict[str, Any]):
    """An object of a JSON file, which tells of the file where a key is missing."""

    _file = Path()

    def __missing__(self, key: str) -> Any:
        raise LackingError(f"{self._file} has no {key!r}; {_again(self._file)}")


def read_json(path: Path, kind: type = dict) -> Any:
    """Parse the JSON file at `path`, which holds an object, or what `kind` says.

    Raises:
        MistakeError: it is not there, not JSON, or something else; later a LackingError, where an object lacks a key.
    """

    def content(found: dict[str, Any]) -> _Content:
        whole = _Content(found)
        whole._file = path
        return whole

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=content)
    except FileNotFoundError:
        raise MistakeError(f"{path} is missing; run `dvc repro`") from None
    except (ValueError, RecursionError) as error:
        raise MistakeError(f"{path} is not valid JSON ({first_line(error)}); {_again(path)}") from None
    if not isinstance(found, kind):
        raise MistakeError(f"{path} holds {found!r:.20} and no {NAMES[kind]}; {_again(path)}")
    return found


def _again(path: Path) -> str:
    """How a file becomes what it should be."""
    is_output = path.parts[:1] in [folder.parts for folder in OUTPUTS]
    return "run `dvc repro`, which makes it again" if is_output else "write it anew"


def read_record(folder: Path) -> dict[str, Any]:
    """stage.json of a checkpoint: what it is, and where it comes from.

    Raises:
        MistakeError: it is of another format than this version of Strata reads.
    """
    record: dict[str, Any] = read_json(folder / "stage.json")
    found = record.get("format", 1)
    if found != FORMAT:
        raise MistakeError(
            f"{folder} has checkpoint format {found!r}, and this version of Strata reads {FORMAT}; make it again with"
            " `dvc repro`, or take the version that wrote it"
        )
    return record


def rounded(content: Any) -> Any:
    """Content for a JSON file with floats of DIGITS significant digits; None in place of one that is not finite."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    if isinstance(content, float):
        return float(f"{content:.{DIGITS}g}") if math.isfinite(content) else None
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes `path`, whose folder is made, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, creating its folder."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write `table` to `path` as parquet in one step, creating its folder."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error.

    What stood at `folder` is replaced; after an error it stands as it was.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
