"""A file as its base plus a factor times each adapter's change, tensor by tensor: how much of what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from analysis.changes.deltas import delta_of
from analysis.changes.measured import Matrix
from analysis.changes.tables import inverse
from analysis.changes.tensors import chunks, spacing
from stages.models.architecture import Architecture
from stages.models.names import COMPUTED, full_name
from stages.weights.adapter import Tensors
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint
from stages.weights.tensor_file import DTYPES

BY_GROUP = ("norms", "experts", "router")  # groups whose modules go by one name here


@dataclass(frozen=True)
class Fitted:
    """One parameter of a file, with its adapters' changes, n of them in all.

    Attributes:
        path: of its module.
        parameter: its name there.
        kind: what its like are called together, such as `q_proj`, `norms` or `biases`.
        layer: its number, or OUTSIDE.
        entries: how many numbers it has.
        is_matrix: whether it has two dimensions or more.
        is_finite: whether the file has a number wherever the base has one.
        size: ‖W‖² of the base; 0 where the file holds just that.
        noise: of a file of such digits, the most that any rounding leaves, Σ (spacing/2)².
        lost: ‖·‖² of what a right merge is rounded by.
        gram: inner products, float64 [n + 2, n + 2], of the adapters' changes; of what of their sum is left when it is
            rounded to the digits of the file; and of what the file holds.
        dtype: the digits of the file: fewer than its dtype has where its numbers were rounded before.
    """

    path: str
    parameter: str
    kind: str
    layer: int
    entries: int
    is_matrix: bool
    is_finite: bool
    size: float
    noise: float
    lost: float
    gram: Matrix
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """In memory."""
        return full_name(self.path, self.parameter)

    @property
    def is_changed(self) -> bool:
        """Whether the file holds anything but the base."""
        return bool(self.gram[-1, -1] > 0)

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes it."""
        return bool(np.diag(self.gram)[:-2].any())

    @cached_property
    def solved(self) -> Solved:
        """The factors of this tensor alone."""
        return solve([self])

    @property
    def is_explained(self) -> bool:
        """Whether what it holds is its adapters' changes and what rounding makes of them, but for a rest of 30 %."""
        if not self.is_adapted:
            return not self.is_changed
        rest = self.solved.rest
        return rest <= max(0.3 * self.gram[-1, -1], self.noise, 4 * self.solved.rest_right)


@dataclass(frozen=True)
class Solved:
    """Least squares over some tensors: held = Σ cᵢΔᵢ + rest, jointly for all adapters.

    Attributes:
        held: c [n], of what the file holds; not a number for an adapter that changes nothing here.
        right: the same of a right merge with all factors 1, below 1 where rounding takes of it.
        error: standard error of `held` [n], from the rest.
        rest: ‖rest‖² of what the file holds.
        rest_right: the same of a right merge.
    """

    held: Matrix
    right: Matrix
    error: Matrix
    rest: float
    rest_right: float


def solve(tensors: Iterable[Fitted]) -> Solved:
    """The factors over some tensors, at least one, taken as one long vector."""
    tensors = list(tensors)
    gram = np.sum([tensor.gram for tensor in tensors], axis=0)
    held, right, error = np.full((3, len(gram) - 2), np.nan)
    here = np.flatnonzero(np.diag(gram)[:-2])
    inverted = inverse(gram[np.ix_(here, here)])
    rests = []
    for row, factors in ((-1, held), (-2, right)):
        factors[here] = inverted @ gram[here, row]
        rests.append(max(0.0, float(gram[row, row] - factors[here] @ gram[here, row])))
    error[here] = np.sqrt(np.diag(inverted) * rests[0] / sum(tensor.entries for tensor in tensors))
    return Solved(held, right, error, *rests)


@dataclass(frozen=True)
class Apart:
    """What of two models cannot be compared.

    Attributes:
        missing: names of what the file lacks of the base; tied weights may be there or not.
        extra: names of what it has beside.
        unlike: in words, what sets a parameter apart, by name.
    """

    missing: list[str]
    extra: list[str]
    unlike: dict[str, str]


def set_apart(base: Checkpoint, file: Checkpoint) -> Apart:
    """Hold names, shapes and dtypes of a file against the base's."""
    wanted, found = (
        {full_name(path, name) for path, names in model.modules.items() for name in names} for model in (base, file)
    )
    missing = {name for name in wanted - found if name.rpartition(".")[0] not in file.tied}
    extra = found - wanted - {f"{head}.weight" for head in base.tied}
    unlike = {}
    for name in (full_name(path, name) for path in _modules(base, file) for name in base.parameters(path)):
        if name in missing:
            continue
        (shape, dtype), (own_shape, own) = file.specification(name), base.specification(name)
        if shape != own_shape:
            unlike[name] = f"as {shape}, and not {own_shape}"
        elif DTYPES[own].is_floating_point and not DTYPES[dtype].is_floating_point:
            unlike[name] = f"in {dtype}, and not {own}"
    lacking, beside = (sorted(n for n in names if not n.endswith(COMPUTED)) for names in (missing, extra))
    return Apart(lacking, beside, unlike)


def fit(base: Checkpoint, file: Checkpoint, adapters: list[VirtualCheckpoint], apart: Apart) -> Iterator[Fitted]:
    """Every parameter that can be compared, one module in memory at a time.

    Args:
        base: what the file is to be made of.
        file: named as the base in memory.
        adapters: those whose changes are looked for.
        apart: what cannot be compared.
    """
    for path, sources in _modules(base, file).items():
        deltas = {
            number: _delta(adapter, sources)
            for number, adapter in enumerate(adapters)
            if adapter.adapter.modules.intersection(sources)
        }
        for parameter in base.parameters(path):
            name = full_name(path, parameter)
            if name in apart.unlike or name in apart.missing:
                continue
            yield Fitted(
                path=path,
                parameter=parameter,
                kind=_kind(base.architecture, path, parameter),
                layer=base.architecture.place(path)[0],
                **_products(
                    base.stored(name),
                    file.stored(name),
                    {number: delta[parameter] for number, delta in deltas.items() if parameter in delta},
                    len(adapters),
                ),
            )


def _modules(base: Checkpoint, file: Checkpoint) -> dict[str, list[str]]:
    """Modules to compare, each with those whose changes it holds: an embedding also those of a head tied to it."""
    modules = {path: [path] for path in base.modules}
    for head, source in base.tied.items():
        if head in file.tied:
            modules[source].append(head)
        else:
            modules[head] = [head]
    return modules


def _delta(adapter: VirtualCheckpoint, paths: list[str]) -> Tensors:
    """What an adapter changes in the first of these modules that it changes; they are stored as one."""
    path = next(path for path in paths if path in adapter.adapter.modules)
    return delta_of(adapter, path, adapter.adapter.factors(path))


def _kind(architecture: Architecture, path: str, parameter: str) -> str:
    if parameter == "bias":
        return "biases"
    module = architecture.modules.get(path)
    return module.group if module and module.group in BY_GROUP else path.rpartition(".")[2] or parameter


def _products(stored: torch.Tensor, file: torch.Tensor, deltas: dict[int, torch.Tensor], count: int) -> dict[str, Any]:
    """The numbers of `Fitted`; `stored` is the base's and `file` the file's, each in its dtype, the deltas float32."""
    is_base = torch.equal(stored.to(file.dtype), file)
    digits = file.dtype if is_base else _digits(file)
    is_rounded = _is_coarser(digits, stored.dtype)
    size, noise, lost, is_finite = 0.0, 0.0, 0.0, True
    gram = torch.zeros(count + 2, count + 2, dtype=torch.float64)
    rows = torch.tensor([*deltas, count, count + 1])
    for weight, values, *changes in chunks(stored, file, *deltas.values()) if deltas or not is_base else ():
        start, room = weight.to(digits).float(), _spacing(values, digits)
        exact = weight.float() + sum(changes)
        right = _rounded(exact, digits) if changes else start
        held = values.float() - start
        if is_rounded and not deltas:  # however the base was rounded
            held = torch.where(held.abs() <= room, 0, held)
        stacked = torch.stack([*changes, right - start, held])
        gram[rows[:, None], rows] += (stacked @ stacked.T).double()
        size, noise, lost = size + _squares(weight.float()), noise + _squares(room) / 4, lost + _squares(right - exact)
    if not gram.isfinite().all():
        is_finite = not bool((stored.isfinite() & ~file.isfinite()).any())
        gram.zero_()
    return {
        "entries": file.numel(),
        "is_matrix": file.dim() > 1,
        "is_finite": is_finite,
        "size": size,
        "noise": noise,
        "lost": lost,
        "gram": gram.numpy(),
        "dtype": digits,
    }


def _digits(values: torch.Tensor) -> torch.dtype:
    """The coarsest dtype that has all of these numbers, of theirs and those of two bytes."""
    if values.dtype != torch.float32:
        return values.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(piece.to(dtype).float(), piece) for (piece,) in chunks(values)):
            return dtype
    return values.dtype


def _is_coarser(one: torch.dtype, other: torch.dtype) -> bool:
    return one.is_floating_point and other.is_floating_point and torch.finfo(one).eps > torch.finfo(other).eps


def _squares(values: torch.Tensor) -> float:
    return float(values @ values)


def _spacing(values: torch.Tensor, digits: torch.dtype) -> torch.Tensor:
    return spacing(values.to(digits)) if digits.is_floating_point else torch.zeros(values.shape)


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to a dtype of floats, and to its largest number where it has none so large; float32."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.clamp(-largest, largest).to(dtype).float()
