"""Name what later stages read: `python -m stages.pick data`, or `checkpoints`.

DVC cannot make a list of dependencies from params.yaml, and a folder may hold what params.yaml does not name any more.
So picked/ has a list of the evaluation splits (data.json), one of how their answers are scored (scorers.json), one of
all stages with their records (checkpoints.json) and one of those that are merged (merged.json): a later stage depends
on a list, and runs again when its part has changed.
"""

import sys
from typing import Any

from stages.errors import MistakeError, run
from stages.files import CHECKPOINTS, DATA, PICKED, REPORTS, read_json, read_record, sha256, write_json
from stages.project.params import Params, load_params


def main(kind: str) -> None:
    """Write the lists of one kind."""
    params = load_params()
    if kind == "data":
        hashes = {name: sha256([DATA / name / "eval.jsonl"]) for name in params.datasets}
        write_json(PICKED / "data.json", hashes)
        write_json(PICKED / "scorers.json", {name: _scorers(name) for name in params.datasets})
    elif kind == "checkpoints":
        write_json(PICKED / "checkpoints.json", records(params, list(params.stages)))
        write_json(PICKED / "merged.json", records(params, sorted(params.merge.weights)))
    else:
        raise MistakeError(f"python -m stages.pick takes data or checkpoints, and not {kind!r}")


def records(params: Params, names: list[str]) -> dict[str, dict[str, Any]]:
    """stage.json and the size in bytes of the base, and of these stages with their ancestors, each after its parent."""
    lineage = dict.fromkeys(ancestor for name in names for ancestor in params.lineage(name))
    return {name: _record(name) for name in ["base", *lineage]}


def _scorers(dataset: str) -> dict[str, dict[str, str]]:
    """How answers are scored, by part; why is of no consequence."""
    chosen = read_json(REPORTS / "data" / f"{dataset}.json")[dataset]["scorers"]
    return {part: {key: each[key] for key in each if key != "why"} for part, each in chosen.items()}


def _record(name: str) -> dict[str, Any]:
    folder = CHECKPOINTS / name
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return read_record(folder) | {"bytes": size}


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
