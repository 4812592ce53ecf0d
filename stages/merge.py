"""Merge the picked stages: `python -m stages.merge`.

Writes merged/ in the forms that `merge.outputs` names: a model that plain transformers loads (model.safetensors
with the base's config and tokenizer), a PEFT adapter (adapter/), the delta alone (delta.safetensors). Each file has
its provenance in `__metadata__`, and lineage.json has the same facts.
"""

import importlib.metadata
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from stages.errors import MistakeError, run
from stages.files import BASE, CHECKPOINTS, MERGED, publish, read_json, read_record, write_json
from stages.merging.adapter_output import AdapterOutput, check_errors
from stages.merging.merged import Merged
from stages.merging.writer import Writer, add_part, in_processes
from stages.models.architecture import FILE as ARCHITECTURE
from stages.project.params import Params, load_params
from stages.weights.checkpoint import open_stages
from stages.weights.places import misplaced
from stages.weights.single_file import SingleFile, single_file
from stages.weights.tensor_file import NAMES

NOT_COPIED = {"stage.json", ARCHITECTURE, "model.safetensors.index.json"}  # files of the base alone


def main() -> None:
    """Write merged/ from the base and the stages of `merge.weights`."""
    settings = load_params()
    # Processes share the work, one thread each: that is faster, and their number does not change a bit.
    torch.set_num_threads(1)
    merged = Merged(*open_stages(sorted(settings.merge.weights)), settings.merge)
    facts = provenance(settings.model_copy(update={"merge": merged.merge}))
    with publish(MERGED) as folder:
        write_json(folder / "lineage.json", facts)
        write(merged, folder, {"format": "pt", "strata": json.dumps(facts, sort_keys=True)}, settings.thread_count)


def write(merged: Merged, folder: Path, metadata: dict[str, str], processes: int = 1) -> None:
    """Stream the merge into `folder` in one pass, one module in memory per process.

    Tensors that no stage touched are the base's, byte for byte when the file's dtype is the base's.

    Raises:
        MistakeError: a merged tensor is not finite, a file cannot be written, or the adapter misses its tolerance.
    """
    outputs, adapter = merged.merge.outputs, AdapterOutput()
    replaced = merged.replaced if "adapter" in outputs else {}
    with ExitStack() as stack:
        files: dict[str, SingleFile] = {}
        if "model" in outputs:
            copy_companions(merged, folder)
            files["model"] = stack.enter_context(single_file(folder / "model.safetensors", merged.layout(), metadata))
        if "delta" in outputs:
            names = {name: (merged.specification(name)[0], "F32") for name in merged.names(merged.changed())}
            files["delta"] = stack.enter_context(single_file(folder / "delta.safetensors", names, metadata))
        writer = Writer(merged, files)
        paths = list(merged.modules) if "model" in outputs else sorted({*merged.changed(), *replaced})
        for part in in_processes(writer, paths, processes):
            if part is not None:
                add_part(adapter, part)
    if "adapter" in outputs:
        save_adapter(merged, adapter, folder / "adapter", metadata)


def save_adapter(merged: Merged, adapter: AdapterOutput, folder: Path, metadata: dict[str, str]) -> None:
    """Write the adapter and the error of each of its modules; refuse one that misses the tolerance."""
    folder.mkdir()
    errors = adapter.save(folder, *base_name(), any(map(merged.is_transposed, merged.changed())), metadata)
    write_json(folder / "errors.json", errors)
    check_errors(errors, merged.merge.adapter.tolerance)
    refuse_unopened(folder)


def base_name() -> tuple[str, str | None]:
    """Hub id and revision of the base, or its folder here; with room for methods it is another model than the hub's."""
    base = read_record(BASE)
    is_hubs = base["revision"] and not any(base.get("room", {}).values())
    return (base["model"], base["revision"]) if is_hubs else (str(BASE), None)


def refuse_unopened(folder: Path) -> None:
    """Raise a MistakeError unless PEFT, given the adapter on the base, has a place for each of its tensors."""
    try:
        lost = misplaced(folder)
    except MistakeError as mistake:
        reason, _, _ = str(mistake).partition(";")
        raise MistakeError(f"params.yaml: merge.outputs names adapter, but {reason}; write model or delta") from None
    if lost:
        raise MistakeError(
            f"params.yaml: merge.outputs names adapter, but PEFT would not take {lost[0]} on this base, for it takes"
            " its module for another; write model or delta"
        )


def provenance(settings: Params) -> dict[str, Any]:
    """The merge's settings and the record of every stage in it, ancestors included; no timestamps."""
    names = {ancestor for name in settings.merge.weights for ancestor in settings.lineage(name)}
    return {
        "merge": settings.merge.model_dump() | {"weights": dict(sorted(settings.merge.weights.items()))},
        "base": read_record(BASE),
        "stages": [read_record(CHECKPOINTS / name) for name in sorted(names)],
        "versions": {package: importlib.metadata.version(package) for package in ("mergekit", "peft", "torch")},
    }


def copy_beside(base: Path, folder: Path) -> None:
    """Copy what stands beside a base's weights, such as its tokenizer."""
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name not in NOT_COPIED:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)


def copy_companions(merged: Merged, folder: Path) -> None:
    """Copy config and tokenizer beside the weights; the config tells a new dtype, and whether the head is untied."""
    copy_beside(merged.base.folder, folder)
    config = read_json(folder / "config.json")
    if NAMES[getattr(torch, merged.merge.dtype)] != merged.base.dtype:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part is config or {"dtype", "torch_dtype"} & part.keys():  # the second in older ones
                part.pop("torch_dtype", None)
                part["dtype"] = merged.merge.dtype
    if merged.base.untied_by(merged.changed()):
        config["tie_word_embeddings"] = False
        if "text_config" in config:
            config["text_config"]["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


if __name__ == "__main__":
    run(main)
