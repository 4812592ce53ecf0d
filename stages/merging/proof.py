"""What holds of every merged file, read back from it while it is written.

A tensor that got lost, or came to another place, is told here and not by whoever loads the file.
"""

from pathlib import Path

import torch

from stages.errors import MistakeError
from stages.merging.merged import Merged
from stages.models.names import assemble
from stages.weights.adapter import Tensors
from stages.weights.tensor_file import DTYPES, NAMES, Specification, TensorFile

AGAIN = "run `dvc repro` again, and report it if it happens again"


class Proof:
    """Holds a merged model's file against the base and the merge, module by module.

    Args:
        merged: what is to be in it.
        path: the file, of which the header is there.
    """

    def __init__(self, merged: Merged, path: Path) -> None:
        self._merged, self._base, self._file = merged, merged.base, TensorFile(path)

    def header(self) -> None:
        """Names and shapes are the base's, and an untied module's; dtypes too, but for most weights' `merge.dtype`.

        Raises:
            MistakeError: they are not, or there is no place for a module that a stage adapts.
        """
        if lost := sorted(self._merged.adapted() - self._merged.modules.keys()):
            raise MistakeError(f"the merged file has no place for {lost[0]}, which a stage changed; {AGAIN}")
        dtypes = {self._base.dtype: NAMES[getattr(torch, self._merged.merge.dtype)]}
        wanted = {name: self._base.file(name).specification(name) for name in self._base.stored_names}
        for path in self._base.untied_by(self._merged.adapted()):
            for name in (f"{path}.{parameter}" for parameter in self._base.parameters(path)):
                wanted[self._merged.pieces(name)[0][0]] = self._base.specification(name)
        own = self._base.beside
        wanted = {n: (shape, dtype if n in own else dtypes.get(dtype, dtype)) for n, (shape, dtype) in wanted.items()}
        found: dict[str, Specification] = {name: self._file.specification(name) for name in self._file}
        if wrong := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
            raise MistakeError(
                f"the merged file has {wrong[0]} as {_told(found.get(wrong[0]))}, where the base makes it"
                f" {_told(wanted.get(wrong[0]))}; {AGAIN}"
            )

    def untouched(self, path: str) -> None:
        """Module `path` is the base's to the bit, rounded once where the file has another dtype.

        Raises:
            MistakeError: it is not.
        """
        for name in self._merged.names([path]):
            for (source, _), (piece, _) in zip(self._base.pieces(name), self._merged.pieces(name), strict=True):
                pairs = zip(self._base.file(source).pieces(source), self._file.pieces(piece), strict=True)
                if not all(torch.equal(_bits(before.to(after.dtype)), _bits(after)) for before, after in pairs):
                    raise MistakeError(f"the merged file has other numbers in {piece} than the base; {AGAIN}")

    def changed(self, path: str, weights: Tensors, stored: Tensors) -> None:
        """Module `path` is the merge, rounded once; it is the base's only where rounding takes all of the change.

        Args:
            path: of a module that a stage adapts, or unties.
            weights: its merged parameters, float32.
            stored: the same as they were rounded, once, for the file.

        Raises:
            MistakeError: it is not.
        """
        moved = False
        for parameter, values in stored.items():
            name = f"{path}.{parameter}"
            found = assemble(self._merged.pieces(name), self._file.read)
            if found.dtype != values.dtype or not torch.equal(_bits(found), _bits(values)):
                raise MistakeError(f"the merged file has other numbers in {name} than the merge; {AGAIN}")
            moved = moved or not torch.equal(found, self._base.stored(name).to(found.dtype))
        if not moved:
            self._refuse_absent(path, weights)

    def _refuse_absent(self, path: str, weights: Tensors) -> None:
        """Raise a MistakeError if the merge is a sum of changes, and theirs is more than rounding takes."""
        before = self._base.module(path)
        alone = {stage.name: stage.alone(path) for stage in self._merged.stages}
        places = [(parameter, *place) for parameter in weights for place in self._merged.matrices(path, parameter)]
        for parameter, name, place in places:
            weight, dtype = before[parameter][place], DTYPES[self._merged.specification(f"{path}.{parameter}")[1]]
            deltas = {stage: values[parameter][place] - weight for stage, values in alone.items()}
            deltas = {stage: delta for stage, delta in deltas.items() if delta.any()}
            coefficients = self._merged.coefficients(name, list(deltas)) if deltas else None
            if coefficients is None:
                continue
            total = torch.stack([coefficients[stage] * delta.double() for stage, delta in deltas.items()]).sum(0)
            room = weight.abs() * torch.finfo(dtype).eps
            if (total.abs() > room).any():
                changed = f"{', '.join(deltas)} changed in {name}"
                raise MistakeError(f"the merged file has nothing of what {changed}; {AGAIN}")


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Numbers as integers, eight bytes at once if they are so many; NaN, which a vision tower may hold, is itself."""
    return values.flatten().view(torch.int64 if values.nbytes % 8 == 0 else torch.uint8)


def _told(specification: Specification | None) -> str:
    return f"{specification[1]} {specification[0]}" if specification else "missing"
