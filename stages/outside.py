"""Take an adapter that was trained elsewhere as the checkpoint of a stage (`method: import`)."""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from stages import params
from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, publish, read_json, sha256, write_json
from stages.layers import layer_stack, place
from stages.methods.outside import Import
from stages.weights.adapter import Adapter
from stages.weights.checkpoint import Checkpoint

FILES = ("adapter_config.json", "adapter_model.safetensors")


def take(name: str, settings: params.Params) -> int:
    """Publish checkpoints/NAME from the adapter that the stage names, once it is known to fit the base.

    Returns:
        How many numbers the adapter holds.

    Raises:
        MistakeError: it is not there, not what its hash pins, or does not fit the base.
    """
    stage = settings.stages[name]
    assert isinstance(stage, Import)
    where = f"params.yaml: stages.{name}"
    if stage.parent != "base":
        raise MistakeError(
            f"{where}.parent is {stage.parent!r}, but an imported adapter stands on the base; write base"
        )
    source = locate(stage, where)
    adapter = Adapter(source, Checkpoint(BASE, "base").skeleton)
    with publish(CHECKPOINTS / name) as folder:
        for file in FILES:
            shutil.copy(source / file, folder / file)
        write_json(folder / "stage.json", describe(name, stage, adapter, source))
    return adapter.parameters


def locate(stage: Import, where: str) -> Path:
    """Folder with the adapter's two files, downloaded if it is on the hub.

    Raises:
        MistakeError: it is not there, or a local one is not pinned by its hash.
    """
    if (stage.path is None) == (stage.id is None):
        raise MistakeError(f"{where} needs either path, a local folder, or id, an adapter on the hub")
    if stage.id is not None:
        return _download(stage.id, stage.revision, where)
    folder = Path(str(stage.path))
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise MistakeError(f"{where}.path {stage.path!r} holds no {missing[0]}; give the folder of a PEFT adapter")
    found = content(folder)
    if stage.sha256 is None:
        raise MistakeError(f"{where}.sha256 is missing; it pins what is merged, so add sha256: {found}")
    if stage.sha256 != found:
        raise MistakeError(f"{where}.sha256 is not that of {stage.path}; if it was meant to change, write {found}")
    return folder


def content(folder: Path) -> str:
    """Hash of both files of an adapter."""
    return sha256(folder / file for file in FILES)


def describe(name: str, stage: Import, adapter: Adapter, source: Path) -> dict[str, Any]:
    """stage.json of an imported adapter: where it comes from, and what it changes."""
    stack = layer_stack(adapter.skeleton)
    return {
        "name": name,
        "parent": stage.parent,
        "parent_sha256": read_json(BASE / "stage.json")["sha256"],
        "dataset": stage.dataset,
        "method": stage.method,
        "layers": sorted({place(path, stack)[0] for path in adapter.modules} - {-1}),
        "settings": stage.model_dump(exclude={"parent", "dataset", "method", "layers"}),
        "trained_parameters": adapter.parameters,
        "versions": {"peft": importlib.metadata.version("peft")},
        "sha256": content(source),
    }


def _download(identifier: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import snapshot_download

    if revision is None:
        raise MistakeError(f"{where}.revision is missing; a hub adapter needs the commit to be repeatable")
    try:
        return Path(snapshot_download(identifier, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the library raises its own, the hub's, and the network's
        reason = str(error).strip().splitlines()[0]
        raise MistakeError(f"{where}.id {identifier!r} does not load ({reason}); correct the id or revision") from None
