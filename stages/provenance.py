"""Tell where a file of Strata comes from: `python -m stages.provenance merged/model.safetensors`.

Prints, as JSON, the merge and the record of every stage that the file's own metadata holds. Nothing else is read.
"""

import json
import sys
from pathlib import Path

from stages.errors import MistakeError, run
from stages.weights.tensor_file import TensorFile


def main(*paths: str) -> None:
    """Print the provenance of one file.

    Raises:
        MistakeError: there is no such file, or it is none of Strata's.
    """
    if len(paths) != 1:
        raise MistakeError("python -m stages.provenance needs one file, such as merged/model.safetensors")
    metadata = TensorFile(Path(paths[0])).metadata
    if "strata" not in metadata:
        raise MistakeError(f"{paths[0]} has no provenance in its metadata; it was not written by Strata's merge")
    print(json.dumps(json.loads(metadata["strata"]), indent=2))


if __name__ == "__main__":
    run(main, *sys.argv[1:])
