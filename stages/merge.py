"""Merge the picked stages: `python -m stages.merge`.

Writes merged/ in the forms that `merge.outputs` names: a model that plain transformers loads (model.safetensors
with the base's config and tokenizer), a PEFT adapter (adapter/), the delta alone (delta.safetensors). Each file has
its provenance in `__metadata__`, and lineage.json has the same facts.
"""

import gc
import importlib.metadata
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from stages.errors import run
from stages.files import BASE, CHECKPOINTS, MERGED, publish, read_json, write_json
from stages.merging.adapter_output import AdapterOutput, Fit, as_dora, check_errors, fit_dora, fit_lora
from stages.merging.merged import Merged
from stages.models.architecture import FILE as ARCHITECTURE
from stages.project.params import Params, load_params
from stages.weights.checkpoint import open_stages
from stages.weights.single_file import SingleFile, single_file
from stages.weights.tensor_file import DTYPES, size

NOT_COPIED = {
    "stage.json",
    ARCHITECTURE,
    "model.safetensors.index.json",
}  # files of the base alone
Part = tuple[str, float | None, bytes]  # module, error of its fit or None where it is replaced, tensors of the adapter


def main() -> None:
    """Write merged/ from the base and the stages of `merge.weights`."""
    settings = load_params()
    # Processes share the work, one thread each: that is faster, and their number does not change a bit.
    torch.set_num_threads(1)
    merged = Merged(*open_stages(sorted(settings.merge.weights)), settings.merge)
    facts = provenance(settings)
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
    with ExitStack() as stack:
        files: dict[str, SingleFile] = {}
        if "model" in outputs:
            copy_companions(merged, folder)
            names = {name: merged.specification(name) for name in merged.names(merged.modules)}
            files["model"] = stack.enter_context(single_file(folder / "model.safetensors", names, metadata))
        if "delta" in outputs:
            names = {name: (merged.specification(name)[0], "F32") for name in merged.names(merged.changed())}
            files["delta"] = stack.enter_context(single_file(folder / "delta.safetensors", names, metadata))
        writer = Writer(merged, files)
        paths = list(merged.modules) if "model" in outputs else merged.changed()
        for part in in_processes(writer, paths, processes):
            if part is not None:
                add_part(adapter, part)
    if "adapter" in outputs:
        save_adapter(merged, adapter, folder / "adapter", metadata)


class Writer:
    """Puts one module after another into the files; each is the work of one process."""

    def __init__(self, merged: Merged, files: dict[str, SingleFile]) -> None:
        self._merged, self._files, self._base = merged, files, merged.base
        self._changed = set(merged.changed())
        self._dtype = getattr(torch, merged.merge.dtype)
        self._adapter = "adapter" in merged.merge.outputs
        self._dora = self._adapter and any(merged.rank(path) and not merged.is_low_rank(path) for path in self._changed)

    def bytes(self, path: str) -> int:
        """How much there is to read for a module."""
        return sum(size(self._base.specification(name)) for name in self._merged.names([path]))

    def write(self, path: str) -> Part | None:
        """Merge module `path` and write it; its part of the adapter if there is one."""
        if path not in self._changed:
            for name in self._merged.names([path]):
                self._copy(name)
            return None
        weights = self._merged.module(path)
        for parameter, values in weights.items():
            name = f"{path}.{parameter}"
            if "model" in self._files:
                self._files["model"].put(name, values.to(DTYPES[self._merged.specification(name)[1]]))
            if "delta" in self._files:
                self._files["delta"].put(name, values - self._base.stored(name).float())
        return self._part(path, weights) if self._adapter else None

    def _copy(self, name: str) -> None:
        """A tensor that no stage changes, as bytes, with a piece of it in memory at a time."""
        file, stored = self._base.file(name)
        dtype = DTYPES[self._merged.specification(name)[1]]
        self._files["model"].put_pieces(name, (piece.to(dtype) for piece in file.pieces(stored)))

    def _part(self, path: str, weights: dict[str, torch.Tensor]) -> Part | None:
        """The module as an adapter: LoRA where the merge is low-rank, DoRA where it is not, else all of its weights."""
        before = self._base.module(path)
        if all(torch.equal(values, before[name]) for name, values in weights.items()):
            return None  # its stages have no weight here, or cancel
        rank = self._merged.rank(path)
        if rank is None:
            return path, None, save({name: values.contiguous() for name, values in weights.items()})
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
        if "bias" in weights and not torch.equal(weights["bias"], before["bias"]):
            tensors["bias"] = weights["bias"]
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
        adapter.add_linear(path, fit, tensors.get("bias"))


def save_adapter(merged: Merged, adapter: AdapterOutput, folder: Path, metadata: dict[str, str]) -> None:
    """Write the adapter and the error of each of its modules; refuse one that misses the tolerance."""
    folder.mkdir()
    base = read_json(BASE / "stage.json")
    # With room for methods it is another model than the hub's.
    is_hubs = base["revision"] and not any(base.get("room", {}).values())
    name, revision = (base["model"], base["revision"]) if is_hubs else (str(BASE), None)
    errors = adapter.save(folder, name, revision, any(map(merged.is_transposed, merged.changed())), metadata)
    write_json(folder / "errors.json", errors)
    check_errors(errors, merged.merge.adapter.tolerance)


def provenance(settings: Params) -> dict[str, Any]:
    """The merge's settings and the record of every stage in it, ancestors included; no timestamps."""
    names = {ancestor for name in settings.merge.weights for ancestor in settings.lineage(name)}
    return {
        "merge": settings.merge.model_dump() | {"weights": dict(sorted(settings.merge.weights.items()))},
        "base": read_json(BASE / "stage.json"),
        "stages": [read_json(CHECKPOINTS / name / "stage.json") for name in sorted(names)],
        "versions": {package: importlib.metadata.version(package) for package in ("mergekit", "peft", "torch")},
    }


def copy_companions(merged: Merged, folder: Path) -> None:
    """Copy config and tokenizer beside the weights; the config tells the new dtype, and whether the head is untied."""
    for path in merged.base.folder.iterdir():
        if path.suffix != ".safetensors" and path.name not in NOT_COPIED:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    config = read_json(folder / "config.json") | {"dtype": merged.merge.dtype}
    if merged.base.untied_by(merged.changed()):
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


if __name__ == "__main__":
    run(main)
