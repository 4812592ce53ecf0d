"""Take an adapter that was trained elsewhere as the checkpoint of a stage (`method: import`)."""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from stages.errors import MistakeError, first_line, placed
from stages.files import ADAPTER, BASE, CHECKPOINTS, FORMAT, publish, read_record, sha256, write_json
from stages.models.architecture import OUTSIDE
from stages.settings.stage import Imported
from stages.training.batches import hash_of
from stages.weights.adapter import Adapter
from stages.weights.checkpoint import Checkpoint


def import_adapter(name: str, stage: Imported, lineage: dict[str, str]) -> int:
    """Publish checkpoints/NAME from the adapter that the stage names, once it is known to fit the base.

    Args:
        name: of the stage.
        stage: its settings.
        lineage: hash of the base, by its name.

    Returns:
        How many numbers the adapter holds.

    Raises:
        MistakeError: it is not there, not what its hash pins, or does not fit the base.
    """
    with placed(f"params.yaml: stages.{name}."):
        source = stage.locate()
    adapter = _opened(source)
    with publish(CHECKPOINTS / name) as folder:
        for file in ADAPTER:
            shutil.copy(source / file, folder / file)
        write_json(folder / "stage.json", describe(name, stage, lineage, adapter, folder))
    return adapter.parameters


def _opened(folder: Path) -> Adapter:
    """The adapter, once each of its modules has been merged: what cannot be is told now, and not by the merge."""
    base = Checkpoint(BASE, "base")
    try:
        adapter = Adapter(folder, base.architecture)
        for path in sorted(adapter.modules):
            adapter.apply(path, base.module(path))
    except MistakeError:
        raise
    except Exception as error:  # PEFT's own, and whatever a config raises that holds what it should not
        raise MistakeError(
            f"{folder} holds an adapter that cannot be merged ({first_line(error)}); use one that PEFT has saved"
        ) from None
    return adapter


def describe(name: str, stage: Imported, lineage: dict[str, str], adapter: Adapter, folder: Path) -> dict[str, Any]:
    """stage.json of an imported adapter: where it comes from, and what it changes."""
    return {
        "format": FORMAT,
        "name": name,
        "parent": stage.parent,
        "parent_sha256": read_record(BASE)["sha256"],
        "lineage": lineage,
        "dataset": stage.dataset,
        "dataset_sha256": {stage.dataset: hash_of(stage.dataset)},  # a later stage may replay it
        "method": stage.method,
        "layers": sorted({adapter.architecture.place(path)[0] for path in adapter.modules} - {OUTSIDE}),
        "settings": stage.model_dump(exclude={"parent", "dataset", "method", "layers"}),
        "trained_parameters": adapter.parameters,
        "versions": {"peft": importlib.metadata.version("peft")},
        "sha256": sha256(folder / file for file in ADAPTER),
    }
