"""Disk cache of the hidden states that enter the first trained layer.

The frozen layers below it see the same batches in every pass, and in every stage and experiment that shares the parent
and the dataset. A batch that comes again starts at the first trained layer, from the same bits as before.

Several runs share the folder and its room without a lock: what one deletes, another computes again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stages.models.architecture import layer_stack, place
from stages.models.losses import Batch
from stages.training.resume import random_states, scratch, set_random_states

# Of the trial: rows that no tuple of outputs has as many parts of, and what kernels may differ by.
ROWS, TOKENS, TOLERANCE = 5, 8, 1e-3


class Prefix:
    """Cached outputs of one model's frozen layers.

    Layers that draw random numbers, such as dropout does in training, are not cached: no two passes are alike. Nor are
    those of models whose layers hand on more than hidden states, or which are no stack: a few tokens show it.

    Args:
        model: a causal language model whose trained parameters, and they alone, require a gradient.
        key: what the frozen layers' bits depend on, such as the parent's hash, the dtype and the threads.
        limit: bytes on disk, of this folder and of those that other models left.
    """

    def __init__(self, model: Any, key: dict[str, Any], limit: float) -> None:
        self._layers = list(model.get_submodule(layer_stack(model)))
        self.depth = _first_trained(model)
        digest = hashlib.sha256(repr(sorted({**key, "depth": self.depth}.items())).encode()).hexdigest()[:16]
        self.folder = scratch("prefix") / digest
        self._limit, self._used = limit, sum(map(_size, scratch("prefix").glob("*")))
        self._is_right: bool | None = None  # whether the model comes to the same without them; None until it was tried
        self._draws: dict[bool, bool] = {}  # whether the layers draw random numbers, in training and otherwise
        for temporary in self.folder.glob("*.tmp"):  # left by a killed run; one that is alive goes on without it
            temporary.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            os.utime(self.folder)  # folders that have not been used for the longest time make room

    @contextmanager
    def __call__(self, model: Any, batch: Batch) -> Iterator[None]:
        """Within the block `model` skips its frozen layers for this batch; where that is not possible, it does not."""
        hidden = self._hidden(model, batch) if self.depth and self._limit else None
        if hidden is None:
            yield
        else:
            with self._skipped(hidden):
                yield

    @contextmanager
    def _skipped(self, hidden: torch.Tensor) -> Iterator[None]:
        """Within the block `hidden` comes into the first trained layer, and those below do nothing."""
        entry = self._layers[self.depth].register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
        skipped = self._layers[: self.depth]
        for layer in skipped:
            layer.forward = _same
        try:
            yield
        finally:
            entry.remove()
            for layer in skipped:
                del layer.forward  # the class's own is seen again

    def _comes_to_the_same(self, model: Any, batch: Batch) -> bool:
        """Whether a few tokens of the batch have the same logits where the frozen layers are skipped."""
        ids = batch.ids[:1, :TOKENS].repeat(ROWS, 1)
        few = Batch(ids, torch.ones_like(ids), torch.ones(ids.shape, device=ids.device))
        before, mode = random_states(ids.device), model.training
        model.eval()
        try:
            truth = _logits(model, few)
            with self._skipped(_run(model, self._layers[self.depth], few)):
                found = _logits(model, few)
        except Exception:  # each model has its own way to miss what its layers hand on
            return False
        finally:
            model.train(mode)
            set_random_states(before)
        return bool((found - truth).norm() <= TOLERANCE * truth.norm())

    def _hidden(self, model: Any, batch: Batch) -> torch.Tensor | None:
        """Input of the first trained layer, [examples, length, width]; None where it is random."""
        if self._is_right is None:
            self._is_right = self._comes_to_the_same(model, batch)
        if not self._is_right or self._draws.get(model.training):
            return None
        path = self.folder / f"{_name(model, batch)}.safetensors"
        with suppress(OSError, SafetensorError):  # not there, or deleted by another run meanwhile
            return load_file(path)["hidden"].to(batch.ids.device)
        before = random_states(batch.ids.device)
        hidden = _run(model, self._layers[self.depth], batch)
        after = random_states(batch.ids.device)
        self._draws[model.training] = not all(torch.equal(before[kind], after[kind]) for kind in before)
        if self._draws[model.training]:
            set_random_states(before)  # as if it had not been tried
            return None
        if self._make_room(hidden.nbytes):
            self._keep(hidden, path)
        return hidden

    def _keep(self, hidden: torch.Tensor, path: Path) -> None:
        """Write the hidden states, unless another run deletes the folder at this moment or the disk is full."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": hidden.cpu().contiguous()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)
        else:
            self._used += hidden.nbytes

    def _make_room(self, size: int) -> bool:
        """Delete what other models left, the longest unused first, until `size` bytes fit; whether they do."""
        others = (folder for folder in self.folder.parent.glob("*") if folder != self.folder)
        for folder in sorted(others, key=_last_used):
            if self._used + size > self._limit:
                self._used -= _size(folder)
                shutil.rmtree(folder, ignore_errors=True)
        return self._used + size <= self._limit


@torch.no_grad()
def _logits(model: Any, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch.ids, attention_mask=batch.present, use_cache=False).logits.float()


def _name(model: Any, batch: Batch) -> str:
    """A name for what the model makes of a batch; in training it may be another than in evaluation."""
    content = batch.ids.cpu().numpy().tobytes() + batch.present.cpu().numpy().tobytes()
    return hashlib.sha256(repr((batch.ids.shape, model.training)).encode() + content).hexdigest()[:32]


def _same(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden


class _ReachedError(Exception):
    pass


@torch.no_grad()
def _run(model: Any, layer: nn.Module, batch: Batch) -> torch.Tensor:
    """Run the model up to `layer` and return what comes in there."""
    found: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise _ReachedError

    hook = layer.register_forward_pre_hook(stop)
    try:
        model(input_ids=batch.ids, attention_mask=batch.present, use_cache=False)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]


def _first_trained(model: Any) -> int:
    """Number of the first layer with something trained in it; 0 where something outside the layers is trained."""
    stack = layer_stack(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return max(0, min(place(name, stack)[0] for name in trained))


def _size(folder: Path) -> int:
    """Bytes of what a folder holds, which another run may be deleting."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in folder.glob("*"))
    return 0


def _last_used(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0
