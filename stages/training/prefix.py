"""What the frozen layers below the first trained one make of a batch, computed once and kept on disk.

They see the same batches in every pass, and in every stage and experiment that shares the parent and the dataset. A
batch that comes again starts at the first trained layer, from the same bits as before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.models.architecture import layer_stack, place
from stages.models.losses import Batch
from stages.training.resume import scratch


class Prefix:
    """The frozen layers of one model, with a folder of what they gave.

    Args:
        model: a causal language model whose trained parameters, and they alone, require a gradient.
        key: what the frozen layers depend on, such as the parent's hash and the dtype.
        limit: bytes on disk, of this folder and of those that other models left.
    """

    def __init__(self, model: Any, key: dict[str, Any], limit: float) -> None:
        self._layers = list(model.get_submodule(layer_stack(model)))
        self.depth = _first_trained(model)
        digest = hashlib.sha256(repr(sorted({**key, "depth": self.depth}.items())).encode()).hexdigest()[:16]
        self.folder = scratch("prefix") / digest
        self._limit, self._used = limit, sum(map(_size, scratch("prefix").glob("*")))
        if self.folder.exists():
            os.utime(self.folder)  # folders that have not been used for the longest time make room

    @contextmanager
    def __call__(self, model: Any, batch: Batch) -> Iterator[None]:
        """Within the block `model` skips its frozen layers for this batch; where that is not possible, it does not."""
        if not self.depth or not self._limit or _drops(model):
            yield
            return
        hidden = self._hidden(model, batch)
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

    def _hidden(self, model: Any, batch: Batch) -> torch.Tensor:
        """Input of the first trained layer, [examples, length, width]."""
        content = batch.ids.cpu().numpy().tobytes() + batch.present.cpu().numpy().tobytes()
        path = self.folder / f"{hashlib.sha256(repr(batch.ids.shape).encode() + content).hexdigest()[:32]}.safetensors"
        if path.exists():
            return load_file(path)["hidden"].to(batch.ids.device)
        hidden = _run(model, self._layers[self.depth], batch)
        if self._make_room(hidden.nbytes):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"hidden": hidden.cpu().contiguous()}, temporary)
            os.replace(temporary, path)
            self._used += hidden.nbytes
        return hidden

    def _make_room(self, size: int) -> bool:
        """Delete what other models left, the longest unused first, until `size` bytes fit; whether they do."""
        others = (folder for folder in self.folder.parent.glob("*") if folder != self.folder)
        for folder in sorted(others, key=lambda folder: folder.stat().st_mtime):
            if self._used + size > self._limit:
                self._used -= _size(folder)
                shutil.rmtree(folder, ignore_errors=True)
        return self._used + size <= self._limit


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


def _drops(model: Any) -> bool:
    """Whether layers of the base drop out at random, so that no two passes are alike."""
    config = model.config
    rates = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout")
    return any(getattr(config, rate, 0) for rate in rates)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
