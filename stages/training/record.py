"""stage.json: what a checkpoint is, and all that it comes from."""

import hashlib
import importlib.metadata
import json
from typing import Any

from stages.files import BASE, CHECKPOINTS, FORMAT, read_record, sha256
from stages.project.params import Params
from stages.settings.ranges import numbers
from stages.settings.stage import Training
from stages.training.batches import hash_of, replays


def describe(name: str, stage: Training, settings: Params, seed: int) -> dict[str, Any]:
    """The part of stage.json that is known before training: lineage, data, layers, seed, versions."""
    num_layers = read_record(BASE)["layers"]
    data = {stage.dataset: hash_of(stage.dataset, ["train", "tune"] if stage.is_tuned else ["train"])}
    data |= {dataset: hash_of(dataset) for dataset in replays(settings, name, stage)}
    return {
        "format": FORMAT,
        "name": name,
        "parent": stage.parent,
        "parent_sha256": read_record(CHECKPOINTS / stage.parent)["sha256"],
        "lineage": lineage(stage.parent),
        "dataset": stage.dataset,
        "dataset_sha256": data,
        "method": stage.method,
        "layers": numbers(stage.layers, num_layers),
        "settings": stage.model_dump(exclude={"parent", "dataset", "method"}),
        "seed": seed,
        "threads": settings.thread_count,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def lineage(name: str) -> dict[str, str]:
    """A hash of the base and of every stage down to `name`, the base first: of all that a descendant may read of it.

    Of a stage these are its adapter, the inputs that it remembers and its data. Of the base all but the weights are
    small files, and stage.json among them has the weights' hash.
    """
    if name == "base":
        small = (file for file in BASE.rglob("*") if file.is_file() and file.suffix != ".safetensors")
        return {name: sha256(sorted(small))}
    record = read_record(CHECKPOINTS / name)
    read = {key: record.get(key) for key in ("sha256", "inputs_sha256", "dataset_sha256")}
    return lineage(record["parent"]) | {name: hashlib.sha256(json.dumps(read).encode()).hexdigest()}
