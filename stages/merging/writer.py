"""Write a merge module by module, several processes side by side."""

import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from stages.errors import end_with_parent
from stages.merging.adapter_output import AdapterOutput, Fit, as_dora, fit_dora, fit_lora
from stages.merging.merged import Merged
from stages.merging.proof import Proof
from stages.models.names import part
from stages.weights.single_file import SingleFile
from stages.weights.tensor_file import size

# Module, error of its fit or None where it or what is in it is replaced, tensors of the adapter by their names in it.
Part = tuple[str, float | None, bytes]


class Writer:
    """Puts one module after another into the files, and reads back what it wrote; each is the work of one process."""

    def __init__(self, merged: Merged, files: dict[str, SingleFile]) -> None:
        self._merged, self._files, self._base = merged, files, merged.base
        self._proof = Proof(merged, files["model"].path) if "model" in files else None
        if self._proof:
            self._proof.header()
        self._changed = set(merged.changed())
        self._adapter = "adapter" in merged.merge.outputs
        self._replaced = merged.replaced if self._adapter else {}
        self._dora = self._adapter and any(merged.rank(path) and not merged.is_low_rank(path) for path in self._changed)

    def bytes(self, path: str) -> int:
        """How much there is to read for a module."""
        return sum(size(self._base.specification(name)) for name in self._merged.names([path]))

    def write(self, path: str) -> Part | None:
        """Merge module `path` and write it; its part of the adapter if there is one."""
        if path not in self._changed:
            if self._proof:
                for name in self._merged.names([path]):
                    self._copy(name)
                self._proof.untouched(path)
            return self._part(path, self._base.module(path)) if path in self._replaced else None
        weights, stored = self._merged.module(path), {}
        for parameter, values in weights.items():
            name = f"{path}.{parameter}"
            if "model" in self._files:
                stored[parameter] = self._merged.rounded(name, values)
                for piece, index in self._merged.pieces(name):
                    self._files["model"].put(piece, part(stored[parameter], index))
            if "delta" in self._files:
                self._files["delta"].put(name, values - self._base.stored(name).float())
        if self._proof:
            self._proof.changed(path, weights, stored)
        return self._part(path, weights) if self._adapter else None

    def _copy(self, name: str) -> None:
        """A tensor that no stage changes, as bytes, with a piece of it in memory at a time."""
        for (source, _), (piece, _) in zip(self._base.pieces(name), self._merged.pieces(name), strict=True):
            parts = self._base.file(source).pieces(source)
            self._files["model"].put_pieces(piece, (self._merged.rounded(name, values) for values in parts))

    def _part(self, path: str, weights: dict[str, torch.Tensor]) -> Part | None:
        """The module as an adapter: LoRA where the merge is low-rank, DoRA where it is not, else all of its weights."""
        if whole := self._replaced.get(path):
            names = {name: f"{path}.{name}".removeprefix(f"{whole}.") for name in weights}
            return whole, None, save({names[name]: values.contiguous() for name, values in weights.items()})
        before, rank = self._base.module(path), self._merged.rank(path)
        assert rank is not None  # else it is replaced
        if all(torch.equal(values, before[name]) for name, values in weights.items()):
            return None  # its stages have no weight here, or cancel
        transposed = self._merged.is_transposed(path)
        base, target = (w["weight"].T if transposed else w["weight"] for w in (before, weights))
        factors = self._merged.factors(path)
        if factors is None:
            fit = fit_dora(base, target, rank)
        else:
            left, right = factors
            fit = fit_lora(right.T, left.T) if transposed else fit_lora(left, right)
            fit = as_dora(fit, base, target) if self._dora else fit
        tensors = {"A": fit.A, "B": fit.B}
        if fit.magnitude is not None:
            tensors["magnitude"] = fit.magnitude
        if "bias" in weights:
            is_old = torch.equal(weights["bias"], before["bias"])
            tensors["old_bias" if is_old else "bias"] = weights["bias"]
        return path, fit.error, save(tensors)


_writer: Writer  # of a worker process


def in_processes(writer: Writer, paths: list[str], processes: int) -> Iterator[Part | None]:
    """Write every module, the large ones first, and yield what each returns, in that order."""
    paths = sorted(paths, key=lambda path: (-writer.bytes(path), path))
    total = sum(map(writer.bytes, paths))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, desc="merge", unit="B", unit_scale=True, dynamic_ncols=True))
        write: Callable[[str], Part | None] = writer.write
        mapped: Callable[..., Iterator[Part | None]] = map
        if processes > 1 and sys.platform == "linux":  # macOS's libraries do not survive a fork
            # Forked workers inherit the opened checkpoints and files; nothing but names is sent to them.
            gc.freeze()  # the garbage collector would write to the pages that they share
            stack.callback(gc.unfreeze)
            context = multiprocessing.get_context("fork")
            pool = stack.enter_context(ProcessPoolExecutor(processes, context, _adopt, (writer,)))
            write, mapped = _write, pool.map
        for path, part in zip(paths, mapped(write, paths), strict=True):
            bar.update(writer.bytes(path))
            yield part


def _adopt(writer: Writer) -> None:
    global _writer
    end_with_parent()  # a killed merge would leave its workers waiting for ever
    _writer = writer


def _write(path: str) -> Part | None:
    return _writer.write(path)


def add_part(adapter: AdapterOutput, part: Part) -> None:
    """Collect what a process made of one module."""
    path, error, content = part
    tensors = load(content)
    if error is None:
        adapter.add_replacement(path, tensors)
    else:
        fit = Fit(tensors["A"], tensors["B"], tensors.get("magnitude"), error)
        adapter.add_linear(path, fit, tensors.get("bias"), tensors.get("old_bias"))
