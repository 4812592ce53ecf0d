"""Name one checkpoint as an input of the merge: `python -m stages.pick NAME`.

DVC cannot make a list of dependencies from params.yaml, so each merged stage leaves a manifest with its
hash in picked/, and the merge depends on that folder.
"""

import sys

from stages.errors import run
from stages.files import CHECKPOINTS, PICKED, read_json, write_json
from stages.project.params import load_params


def main(name: str) -> None:
    """Write picked/NAME.json: the stage and the hashes of its lineage."""
    settings = load_params()
    lineage = settings.lineage(name)
    hashes = {stage: read_json(CHECKPOINTS / stage / "stage.json")["sha256"] for stage in ["base", *lineage]}
    write_json(PICKED / f"{name}.json", {"stage": name, "sha256": hashes})


if __name__ == "__main__":
    run(main, *sys.argv[1:])
