"""A place where a killed stage finds its last step again.

The folder is named by everything the stage depends on, so a changed setting never resumes another's work.
It lies in the main repository's .dvc/tmp (DVC sets DVC_ROOT in its temporary workspaces), and a lock keeps
an orphan of a killed `dvc repro` from racing the next one.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from accelerate import Accelerator


def scratch(name: str) -> Path:
    """A folder that outlives a run, in the main repository even from DVC's temporary workspaces."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".dvc" / "tmp" / name


@contextmanager
def resume_folder(key: dict[str, Any], accelerator: "Accelerator | None" = None) -> Iterator[Path]:
    """Yield the locked folder of this key; it is removed when the block ends without an error.

    Of several processes the main one locks and removes it, and the others wait for it.
    """
    leads = accelerator is None or accelerator.is_main_process
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = scratch("resume") / digest
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if leads:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if accelerator:
            accelerator.wait_for_everyone()
        yield folder
        if accelerator:
            accelerator.wait_for_everyone()
    if leads:
        shutil.rmtree(folder)


def save_state(folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Replace the folder's state in one step; a kill leaves the old one or the new one."""
    temporary = folder / "state.tmp"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        temporary,
        {"facts": json.dumps(facts)},
    )
    os.replace(temporary, folder / "state.safetensors")


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and facts of the last saved step, or None at the first start."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as state:
        tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        return tensors, json.loads(state.metadata()["facts"])
