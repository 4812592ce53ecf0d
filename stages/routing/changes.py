"""What a stage with its ancestors makes of the base: as a PEFT adapter, and as the modules of a routed model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stages.errors import MistakeError
from stages.merging.adapter_output import AdapterOutput, Fit, as_dora
from stages.merging.merged import Merged
from stages.merging.writer import Writer, add_part, in_processes
from stages.weights.places import misplaced
from stages.weights.tensor_file import DTYPES


@dataclass
class Change:
    """The modules that are added to a base for one choice, see `stages.routing.modeling_routed`.

    Attributes:
        forms: by the module that is changed, the arguments of a LowRank; nothing where another module takes its place.
        tensors: of each such module, by name, in the dtype of the file.
    """

    forms: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def bytes(self, whole: bool) -> int:
        """Of its LowRanks, or of the modules that take the place of others."""
        parts = [self.tensors[path] for path, form in self.forms.items() if (not form) == whole]
        return sum(values.numel() * values.itemsize for part in parts for values in part.values())


def adapt(merged: Merged, processes: int) -> AdapterOutput:
    """All that a merge changes, as one adapter; whole modules where no LoRA or DoRA holds the change."""
    adapter, paths = AdapterOutput(), sorted({*merged.changed(), *merged.replaced})
    for part in in_processes(Writer(merged, {}), paths, processes):
        if part is not None:
            add_part(adapter, part)
    for path in [path for path, fit in adapter.fits.items() if not is_sound(merged, path, fit)]:
        adapter.replace(path, merged.module(path))
    return adapter


def is_sound(merged: Merged, path: str, fit: Fit) -> bool:
    """Whether a fit holds the change of a matrix, and no row of it is scaled by more than twice.

    A fit of a rank near the number of rows may rest on two large terms that cancel, which 16 bits do not bear.
    """
    gain = low_rank(fit, _weight(merged, path), None, None).get("gain", torch.zeros(1))
    return fit.error <= merged.merge.adapter.tolerance and bool(gain.abs().max() <= 1)


def _weight(merged: Merged, path: str) -> torch.Tensor:
    """The base's matrix, float32 [out, in]."""
    weight = merged.base.module(path)["weight"]
    return weight.T if merged.is_transposed(path) else weight


def save(merged: Merged, adapter: AdapterOutput, folder: Path, base: tuple[str, str | None], metadata: Any) -> None:
    """Write the adapter in PEFT's format.

    Raises:
        MistakeError: PEFT has no place for a tensor of it; the sentence begins with what the stage does.
    """
    folder.mkdir(parents=True)
    unsave_matrices(merged, adapter)
    transposed = any(map(merged.is_transposed, merged.changed()))
    adapter.save(folder, *base, transposed, metadata)
    if lost := misplaced(folder):
        raise MistakeError(f"changes {lost[0]}, whose module PEFT takes for another; leave that stage out")


def unsave_matrices(merged: Merged, adapter: AdapterOutput) -> None:
    """Adapt each matrix that is replaced as a whole by a LoRA of full rank: its change times the identity.

    PEFT opens no two adapters in one model where one has a LoRA beside a matrix and the other takes its place.
    """
    is_dora = any(fit.magnitude is not None for fit in adapter.fits.values())
    for path in [path for path in adapter.replaced if merged.base.architecture.is_matrix(path)]:
        if merged.base.architecture.is_mistaken(path):
            continue
        parameters, before = adapter.replaced.pop(path), merged.base.module(path)
        turn = torch.t if merged.is_transposed(path) else torch.clone
        base, target = turn(before["weight"]), turn(parameters["weight"])
        rows, columns = base.shape
        pair = (target - base, torch.eye(columns)) if columns <= rows else (torch.eye(rows), target - base)
        fit = Fit(pair[1], pair[0], None, 0.0)
        bias, old_bias = parameters.get("bias"), before.get("bias")
        is_old = bias is None or torch.equal(bias, before["bias"])
        whole = as_dora(fit, base, target) if is_dora else fit
        adapter.add_linear(path, whole, None if is_old else bias, old_bias if is_old else None)


def read_change(merged: Merged, adapter: AdapterOutput) -> Change:
    """The modules of a routed model that make the same of the base as an adapter of it."""
    change, dtype = Change(), DTYPES[merged.base.dtype]
    for path, fit in adapter.fits.items():
        old_bias = merged.base.module(path).get("bias")
        tensors = low_rank(fit, _weight(merged, path), old_bias, adapter.biases.get(path))
        sizes = {"rows": len(fit.B), "columns": fit.A.shape[1], "rank": len(fit.A)}
        change.forms[path] = sizes | {name: name in tensors for name in ("gain", "shift")}
        change.tensors[path] = {name: values.to(dtype) for name, values in tensors.items()}
    for path, parameters in adapter.replaced.items():
        change.forms[path] = {}
        change.tensors[path] = {name: merged.rounded(f"{path}.{name}", values) for name, values in parameters.items()}
    return change


def low_rank(
    fit: Fit, weight: torch.Tensor, old_bias: torch.Tensor | None, bias: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of a LowRank that makes of W·x + b what a LoRA or DoRA makes of it, float32.

    A DoRA gives s·(W + B·A)·x + b', where s = magnitude/‖W + B·A‖ row by row. Of the output y = W·x + b that is
    y + s·B·A·x + (s - 1)·y + b' - s·b.

    Args:
        fit: of the weight as [out, in].
        weight: the base's, W.
        old_bias: the base's, b.
        bias: b', if it is another.
    """
    scale = torch.ones(len(weight), dtype=torch.float64)
    if fit.magnitude is not None:
        scale = fit.magnitude / torch.linalg.vector_norm(weight.double() + fit.B.double() @ fit.A.double(), dim=1)
    tensors = {"down": fit.A.double(), "up": scale[:, None] * fit.B}
    if fit.magnitude is not None:
        tensors["gain"] = scale - 1
    if old_bias is not None:
        shift = (old_bias if bias is None else bias) - scale * old_bias
        if shift.any():
            tensors["shift"] = shift
    return {name: values.float() for name, values in tensors.items()}


def named(change: Change, number: int) -> dict[str, torch.Tensor]:
    """The tensors of a choice, by their names in the routed model."""
    return {
        f"{path}.changes.{number}.{name}": values
        for path, tensors in change.tensors.items()
        for name, values in tensors.items()
    }
