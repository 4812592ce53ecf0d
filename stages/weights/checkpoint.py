"""Virtual checkpoints: the weights of base, stage or merged model, computed module by module when asked.

Nothing but the base and the adapters is on disk. A stage's effective weights are its parent's with its
adapter applied, in float32 whatever the files hold; its delta is the difference of the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch

from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, MERGED, read_record
from stages.models.architecture import Architecture
from stages.models.names import Piece, assemble, full_name, weight_files, whole_shape
from stages.weights.adapter import Adapter, Tensors
from stages.weights.tensor_file import REPRO, Specification, TensorFile, size


class Checkpoint:
    """A model's weights in one or several safetensors files of one folder.

    Args:
        folder: holds config.json and the files of `weight_files`; or one such file, of an architecture that is told.
        name: what reports call it.
        like: what it was made of, which saves reading its own architecture; its file has the same names.
        fix: what to do with a file that is not whole.

    Raises:
        MistakeError: it holds no weights, or not all.
    """

    def __init__(self, folder: Path, name: str, like: Checkpoint | None = None, fix: str = REPRO) -> None:
        self.folder, self.name, self.base, self._like = folder, name, self, like
        files = [TensorFile(path, fix) for path in weight_files(folder)]
        self._where = {key: file for file in files for key in file}
        if not self._where:
            raise MistakeError(f"{folder} holds no .safetensors file; run `dvc repro`")

    @cached_property
    def architecture(self) -> Architecture:
        """Every module with its name and shapes."""
        return self._like.architecture if self._like else Architecture.of(self.folder)

    @cached_property
    def modules(self) -> dict[str, list[str]]:
        """Names of the parameters stored under each module, such as `{"lm_head": ["weight"]}`.

        They are those in memory; what the file holds beside the model, such as a vision tower, has its name there.
        """
        pieces = self.architecture.pieces
        named = {piece for parts in pieces.values() for piece, _ in parts}
        own = self._where.keys() - named - {*self.copies.values()}
        modules: dict[str, list[str]] = {}
        for name in sorted(own | {name for name in pieces if self._holds(name)}):
            module, _, parameter = name.rpartition(".")
            modules.setdefault(module, []).append(parameter)
        return modules

    @cached_property
    def beside(self) -> set[str]:
        """Names of what is no weight of the text model, such as a vision tower; it is carried over in its own dtype."""
        modules, pieces = self.architecture.modules.items(), self.architecture.pieces.values()
        known = {full_name(path, name) for path, module in modules for name in module.parameters}
        return self._where.keys() - known - {piece for parts in pieces for piece, _ in parts}

    @cached_property
    def copies(self) -> dict[str, str]:
        """Tied parameters that the base's file holds all the same, with their names there; they are not read."""
        names = [] if self._like else self.architecture.copies
        return {name: self.architecture.pieces.get(name, [(name, [])])[0][0] for name in names}

    @cached_property
    def dtype(self) -> str:
        """The safetensors dtype of most of its text model's numbers, such as `BF16`."""
        bytes_of: Counter[str] = Counter()
        for name, file in self._where.items():
            if name in self.beside:
                continue
            bytes_of[file.specification(name)[1]] += size(file.specification(name))
        return bytes_of.most_common(1)[0][0]

    @cached_property
    def tied(self) -> dict[str, str]:
        """Modules with no weight of their own because they share one, such as `{"lm_head": "model.embed_tokens"}`."""
        pairs = self.architecture.tied.items()
        return {head.rpartition(".")[0]: source.rpartition(".")[0] for head, source in pairs if not self._holds(head)}

    def untied_by(self, changed: Iterable[str]) -> set[str]:
        """Tied modules that need a weight of their own once these modules change.

        Raises:
            MistakeError: one lies in a layer, and transformers would have it tied all the same.
        """
        paths = set(changed)
        if common := sorted(paths & self.architecture.shared.keys()):
            raise MistakeError(
                f"{self.folder}: {common[0]} has its weights in common with {self.architecture.shared[common[0]]}, and"
                " an adapter changes one of them; use one without these modules"
            )
        return {head for head, source in self.tied.items() if paths & {head, source}}

    def pieces(self, name: str) -> list[Piece]:
        """Tensors of the file that a parameter is made of, and where in it; a tied head is made of the embedding's.

        Raises:
            KeyError: the file does not hold it.
        """
        if not self._holds(name):
            name = self.architecture.tied[name]
        return self.architecture.pieces.get(name, [(name, [])])

    @property
    def stored_names(self) -> list[str]:
        """Names of the tensors in its files."""
        return list(self._where)

    def file(self, piece: str) -> TensorFile:
        """Where a tensor is stored, by its name in the file.

        Raises:
            KeyError: no tensor of that name.
        """
        return self._where[piece]

    def stored(self, name: str) -> torch.Tensor:
        """One parameter in the dtype that the file holds it in."""
        return assemble(self.pieces(name), lambda piece: self._where[piece].read(piece))

    def specification(self, name: str) -> Specification:
        """Shape and safetensors dtype (such as `BF16`) of one parameter, read from the header alone."""
        pieces = self.pieces(name)
        shape, dtype = self._where[pieces[0][0]].specification(pieces[0][0])
        return whole_shape(shape, pieces), dtype

    def _holds(self, name: str) -> bool:
        """Whether the file has all pieces of a parameter, and they are no copies of another one's."""
        pieces = self.architecture.pieces.get(name, [(name, [])])
        return name not in self.copies and bool(pieces) and all(piece in self._where for piece, _ in pieces)

    def parameters(self, path: str) -> list[str]:
        """Names of the parameters of module `path`, such as `["weight"]`."""
        return self.modules.get(path) or self.modules[self.tied[path]]

    def module(self, path: str) -> Tensors:
        """Parameters of module `path`, in float32."""
        return {parameter: self.stored(full_name(path, parameter)).float() for parameter in self.parameters(path)}

    def changed(self) -> list[str]:
        """Modules that differ from the file's: none here, a stage's lineage in a virtual checkpoint."""
        return []


class VirtualCheckpoint:
    """A stage: its parent's weights with its own adapter applied.

    Args:
        name: the stage's.
        parent: what it was trained on.
        folder: its PEFT adapter.

    The last module is kept, so that a chain, or several stages with one parent, compute it once.
    """

    def __init__(self, name: str, parent: Checkpoint | VirtualCheckpoint, folder: Path) -> None:
        self.name, self.parent, self.folder = name, parent, folder
        self.base: Checkpoint = parent.base if isinstance(parent, VirtualCheckpoint) else parent
        self.adapter = Adapter(folder, self.base.architecture)
        self._last: tuple[str, Tensors] = ("", {})

    def module(self, path: str) -> Tensors:
        """Effective parameters of module `path`, in float32."""
        if self._last[0] != path:
            weights = self.parent.module(path)
            self._last = (
                path,
                self.adapter.apply(path, weights) if path in self.adapter.modules else weights,
            )
        return self._last[1]

    def delta(self, path: str) -> Tensors:
        """What this stage itself changed in module `path`: effective minus the parent's, in float32."""
        before = self.parent.module(path)
        if path not in self.adapter.modules:
            return {parameter: torch.zeros_like(weight) for parameter, weight in before.items()}
        return {parameter: weight - before[parameter] for parameter, weight in self.module(path).items()}

    def alone(self, path: str) -> Tensors:
        """Parameters of module `path` as if this stage stood on the base: the base's plus its own delta, in float32."""
        if self.parent is self.base:
            return self.module(path)
        base = self.base.module(path)
        return {parameter: base[parameter] + delta for parameter, delta in self.delta(path).items()}

    def changed(self) -> list[str]:
        """Modules that this stage or one of its ancestors adapts, and tied ones that this unties."""
        paths = {*self.parent.changed(), *self.adapter.modules}
        return sorted(paths | self.base.untied_by(paths))


def open_checkpoint(name: str, opened: dict[str, Checkpoint | VirtualCheckpoint]) -> Checkpoint | VirtualCheckpoint:
    """The base or a stage by name, with its lineage; what is in `opened` already is shared, not read again."""
    if name not in opened:
        if name == "base":
            opened[name] = Checkpoint(BASE, name)
        else:
            folder = CHECKPOINTS / name
            if not (folder / "stage.json").exists():
                raise MistakeError(f"checkpoints/{name} holds no trained stage; run `dvc repro train@{name}`")
            parent = read_record(folder)["parent"]
            opened[name] = VirtualCheckpoint(name, open_checkpoint(parent, opened), folder)
    return opened[name]


def open_stages(names: list[str]) -> tuple[Checkpoint, list[VirtualCheckpoint]]:
    """The base, and the stages of these names; common ancestors are opened once."""
    opened: dict[str, Checkpoint | VirtualCheckpoint] = {}
    base = open_checkpoint("base", opened)
    stages = [open_checkpoint(name, opened) for name in names]
    assert isinstance(base, Checkpoint)
    return base, [stage for stage in stages if isinstance(stage, VirtualCheckpoint)]


def open_base() -> Checkpoint:
    """The base."""
    return Checkpoint(BASE, "base")


def open_model(name: str) -> Checkpoint | VirtualCheckpoint | Shifted:
    """The base, a stage, or `merged`: what the merge wrote, the model before the adapter before the delta.

    Raises:
        MistakeError: it is not there.
    """
    if name != "merged":
        return open_checkpoint(name, {})
    if (MERGED / "model.safetensors").exists():
        return Checkpoint(MERGED, name, open_base())
    if (MERGED / "adapter").exists():
        return VirtualCheckpoint(name, open_base(), MERGED / "adapter")
    if not (MERGED / "delta.safetensors").exists():
        raise MistakeError(f"{MERGED} holds no merged model; run `dvc repro merge`")
    return Shifted(name, open_base(), MERGED / "delta.safetensors")


class Shifted:
    """The base plus a delta in a file of its own.

    Args:
        name: of the whole.
        base: what the delta is added to.
        file: the delta, float32, of the tensors that it changes.

    Raises:
        MistakeError: the file is not there.
    """

    def __init__(self, name: str, base: Checkpoint, file: Path) -> None:
        self.name, self.base, self._delta = name, base, TensorFile(file)
        self._changed = {tensor.rpartition(".")[0] for tensor in self._delta}

    def module(self, path: str) -> Tensors:
        """Parameters of module `path`, in float32."""
        added = {name: self._delta.read(name) for name in self._delta if name.rpartition(".")[0] == path}
        weights = self.base.module(path)
        return {name: weight + added.get(f"{path}.{name}", 0) for name, weight in weights.items()}

    def changed(self) -> list[str]:
        """Modules that differ from the base's."""
        return sorted(self._changed)
