"""Training state on disk, for resuming a killed stage.

The folder is named by everything the stage depends on, so a changed setting never resumes another's work.
It lies in the main repository's .dvc/tmp (DVC sets DVC_ROOT in its temporary workspaces), and a lock keeps
an orphan of a killed `dvc repro` from racing the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stages.files import replacing

try:
    import fcntl
except ImportError:  # Windows: without locks of files, DVC's own lock of the repository is the only one
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from accelerate import Accelerator


def scratch(name: str) -> Path:
    """A folder that outlives a run, in the main repository even from DVC's temporary workspaces."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".dvc" / "tmp" / name


@contextmanager
def resume_folder(key: dict[str, Any], accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Yield the locked folder of this key; it is removed when the block ends without an error.

    Of several processes the main one locks and removes it, and the others wait for it.
    """
    leads = accelerator is None or accelerator.is_main_process
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = scratch("resume") / digest
    for removed in folder.parent.glob("*.removed"):  # by who was killed at it
        shutil.rmtree(removed, ignore_errors=True)
    with _locked(folder) if leads else nullcontext():
        if accelerator:
            accelerator.wait_for_everyone()
        yield folder
        if accelerator:
            accelerator.wait_for_everyone()
        if leads:
            _remove(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock; without `fcntl`, make it alone."""
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    while (lock := _lock(folder)) is None:
        pass
    with lock:
        yield


def _lock(folder: Path) -> TextIOWrapper | None:
    """The folder's lock, once nobody else holds it; None if the folder was removed meanwhile, by who held it."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, suppress(FileNotFoundError):
        lock = stack.enter_context((folder / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
            stack.pop_all()  # it stays open
            return lock
    return None


def _remove(folder: Path) -> None:
    """Remove the folder in one step, so that nobody opens a lock in one that is half removed."""
    removed = folder.with_name(f"{folder.name}.{os.getpid()}.removed")
    os.replace(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)  # another process may be at it


def save_state(folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Replace the folder's state in one step; a kill leaves the old one or the new one."""
    with replacing(folder / "state.safetensors") as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"facts": json.dumps(facts)},
        )


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and facts of the last saved step, or None at the first start."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as state:
        tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        return tensors, json.loads(state.metadata()["facts"])


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's random generators, that of the processor and that of `device`, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Bring back what `random_states` gave."""
    for kind, state in states.items():
        own = state.clone()  # torch reads a view from the start of what it is a part of
        if kind == "cpu":
            torch.set_rng_state(own)
        else:
            torch.get_device_module(kind).set_rng_state(own)
