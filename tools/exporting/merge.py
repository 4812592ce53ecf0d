"""The merge that is exported: as merged/ has it, or computed anew from the stages in float32."""

import os
import shutil
from pathlib import Path
from typing import Any

from stages.errors import MistakeError
from stages.files import BASE, MERGED, read_json
from stages.merge import provenance
from stages.merging.merged import Merged
from stages.project.params import PARAMS, Params
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_stages

EXPORT = Path("export")
WEIGHTS = "model.safetensors"


def read_lineage(params: Params) -> dict[str, Any]:
    """lineage.json of merged/, whose model is the one that params.yaml describes.

    Raises:
        MistakeError: the model is not there, or is another one.
    """
    if "model" not in params.merge.outputs:
        raise MistakeError(f"{PARAMS}: merge.outputs names no model to export; add model to it")
    found = read_json(MERGED / "lineage.json")
    settings = params.merge.model_copy(update={"dtype": found["merge"]["dtype"]})
    told = provenance(params.model_copy(update={"merge": settings}))
    is_other_dtype = params.merge.dtype not in ("auto", settings.dtype)
    if is_other_dtype or any(found[key] != told[key] for key in ("merge", "base", "stages")):
        raise MistakeError(f"{MERGED} is not what {PARAMS} and {BASE.parent} describe now; run `dvc repro`")
    return found


def in_float32(merge: Merge) -> Merged:
    """A merge that is not rounded, whatever dtype params.yaml asks for; nothing is written."""
    exact = merge.model_copy(update={"dtype": "float32", "rounding": "nearest", "outputs": ["model"]})
    return Merged(*open_stages(sorted(merge.weights)), exact)


def copy_companions(folder: Path) -> None:
    """Copy all that lies in merged/ beside its weights; people may edit the copies."""
    for path in MERGED.iterdir():
        if path.suffix != ".safetensors" and path.name != "adapter":
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)


def link(source: Path, target: Path) -> None:
    """Have a large file a second time without its bytes, where the disk can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
