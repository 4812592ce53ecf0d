"""Take an adapter that was trained elsewhere as the checkpoint of a stage (`method: import`)."""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stages.errors import MistakeError, first_line, placed
from stages.files import ADAPTER, BASE, CHECKPOINTS, FORMAT, publish, read_record, sha256, write_json
from stages.models.architecture import OUTSIDE
from stages.settings.stage import Imported
from stages.training.batches import hash_of
from stages.weights.adapter import Adapter
from stages.weights.checkpoint import Checkpoint
from stages.weights.foreign import AGAIN, names_in_peft, read_config
from stages.weights.tensor_file import TensorFile


def import_adapter(name: str, stage: Imported, lineage: dict[str, str]) -> int:
    """Publish checkpoints/NAME from the adapter that the stage names, once it is known to fit the base.

    Args:
        name: of the stage.
        stage: its settings.
        lineage: hash of the base, by its name.

    Returns:
        How many numbers the adapter holds.

    Raises:
        MistakeError: it is not there, not what its hash pins, does not fit the base, or PEFT would take it otherwise.
    """
    with placed(f"params.yaml: stages.{name}."):
        source = stage.locate()
    config, weights = (source / file for file in ADAPTER)
    file = TensorFile(weights, AGAIN)
    names = names_in_peft(file, read_config(config))
    with publish(CHECKPOINTS / name) as folder:
        shutil.copy(config, folder)
        if is_same := {key: key for key in file} == names:
            shutil.copy(weights, folder)
        else:
            save_file({peft: file.read(key) for key, peft in names.items()}, folder / weights.name, {"format": "pt"})
        base = Checkpoint(BASE, "base")
        adapter = Adapter(source if is_same else folder, base.architecture)
        base.untied_by(adapter.modules)
        try_out(adapter, base, source)
        write_json(folder / "stage.json", describe(name, stage, lineage, adapter, folder))
    return adapter.parameters


def try_out(adapter: Adapter, base: Checkpoint, source: Path) -> None:
    """Merge one module of each kind, as every later stage will.

    Args:
        adapter: the imported one.
        base: what it stands on.
        source: where it comes from.

    Raises:
        MistakeError: that cannot be done.
    """
    kinds = {adapter.architecture.place(path)[1]: path for path in sorted(adapter.modules)}
    for path in kinds.values():
        try:
            merged = adapter.apply(path, base.module(path))
        except Exception as error:  # PEFT raises what it likes for what it cannot do
            raise MistakeError(
                f"{source}: the adapter on {path} cannot be merged ({first_line(error)}); use one without this module"
            ) from None
        if not all(values.isfinite().all() for values in merged.values()):
            raise MistakeError(
                f"{source}: the adapter makes numbers of {path} infinite; correct lora_alpha or what scales it in"
                " adapter_config.json, or take an adapter that trained well"
            )


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
