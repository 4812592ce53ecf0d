"""Tell where a file of Strata comes from: `strata provenance merged/model.safetensors`.

Prints, as JSON, the merge and the record of every stage that the file's own metadata holds. Nothing else is read.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

from stages.errors import MistakeError
from stages.weights.tensor_file import TensorFile


def add_arguments(parser: ArgumentParser) -> None:
    """Which file."""
    parser.add_argument("file", type=Path, help="a safetensors file that Strata wrote")


def main(file: Path) -> None:
    """Print the provenance of one file.

    Raises:
        MistakeError: there is no such file, or it is none of Strata's.
    """
    try:
        metadata = TensorFile(file).metadata
    except MistakeError:
        raise MistakeError(f"{file} is no safetensors file; name one, such as merged/model.safetensors") from None
    if "strata" not in metadata:
        raise MistakeError(f"{file} has no provenance in its metadata; it was not written by Strata's merge")
    print(json.dumps(json.loads(metadata["strata"]), indent=2))
