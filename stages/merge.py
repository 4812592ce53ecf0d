"""Merge the picked stages into one file: `python -m stages.merge`.

Writes merged/, which plain transformers loads: model.safetensors with its provenance in `__metadata__`, the
base's config and tokenizer, and lineage.json with the same facts as the metadata.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stages import params
from stages.errors import MistakeError, run
from stages.files import CHECKPOINTS, MERGED, PICKED, publish, read_json, write_json
from stages.merging.kernels import find_method, merge_tensor
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint, open_stages
from stages.weights.single_file import NAMES, Specification, write_single_file


def main() -> None:
    """Write merged/ from the base and the stages of `merge.weights`."""
    settings = params.load()
    torch.set_num_threads(settings.threads)
    find_method(settings.merge)
    forget_unlisted(list(settings.merge.weights))
    base, stages = open_stages(sorted(settings.merge.weights))
    with publish(MERGED) as folder:
        copy_companions(base.folder, folder, settings.merge.dtype)
        facts = lineage(settings)
        write_json(folder / "lineage.json", facts)
        metadata = {"format": "pt", "strata": json.dumps(facts, sort_keys=True)}
        merge_into(folder / "model.safetensors", base, stages, settings.merge, metadata)


def merge_into(
    path: Path,
    base: Checkpoint,
    stages: list[VirtualCheckpoint],
    merge: params.Merge,
    metadata: dict[str, str],
) -> None:
    """Stream the merged model into one safetensors file, one module in memory at a time.

    A stage takes part in a tensor where its delta is not zero. Tensors that no stage touched are the base's,
    byte for byte when the file's dtype is the base's.

    Raises:
        MistakeError: the merge of a tensor is not finite.
    """
    method = find_method(merge)
    dtype = getattr(torch, merge.dtype)
    specifications = {name: _specification(base, name, dtype) for name in _names(base)}
    progress = tqdm(total=len(specifications), desc="merge", unit="tensor", dynamic_ncols=True)

    def tensor(name: str) -> torch.Tensor:
        path, _, parameter = name.rpartition(".")
        progress.update()
        deltas = {stage.name: stage.delta(path)[parameter] for stage in stages if path in stage.adapter.modules}
        deltas = {stage: delta for stage, delta in deltas.items() if torch.linalg.vector_norm(delta) != 0}
        stored = base.stored(name)
        if not deltas:
            return stored.to(dtype) if stored.is_floating_point() else stored
        merged = merge_tensor(method, name, stored.float(), deltas, merge)
        if not torch.linalg.vector_norm(merged).isfinite():
            raise MistakeError(
                f"checkpoints: the merge of {name} from {', '.join(deltas)} is not finite; lower the lr of that stage"
            )
        return merged.to(dtype)

    write_single_file(path, specifications, tensor, metadata)
    progress.close()


def lineage(settings: params.Params) -> dict[str, Any]:
    """The merge's settings and the record of every stage in it, ancestors included; no timestamps."""
    names = {ancestor for name in settings.merge.weights for ancestor in [*settings.ancestors(name), name]}
    return {
        "merge": settings.merge.model_dump() | {"weights": dict(sorted(settings.merge.weights.items()))},
        "base": read_json(CHECKPOINTS / "base" / "stage.json"),
        "stages": [read_json(CHECKPOINTS / name / "stage.json") for name in sorted(names)],
    }


def copy_companions(base: Path, folder: Path, dtype: str) -> None:
    """Copy config and tokenizer beside the weights; the config tells the new dtype."""
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("stage.json", "model.safetensors.index.json"):
            shutil.copy(path, folder / path.name)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"dtype": dtype})


def forget_unlisted(listed: list[str]) -> None:
    """Delete manifests of stages that are no longer merged, for DVC leaves them where they are."""
    for manifest in PICKED.glob("*.json"):
        if manifest.stem not in listed:
            manifest.unlink()


def _names(base: Checkpoint) -> list[str]:
    return [f"{module}.{parameter}" for module, parameters in base.modules.items() for parameter in parameters]


def _specification(base: Checkpoint, name: str, dtype: torch.dtype) -> Specification:
    shape, stored = base.specification(name)
    return shape, NAMES[dtype] if stored in ("F64", *NAMES.values()) else stored


if __name__ == "__main__":
    run(main)
