"""The merged model as a virtual checkpoint: base plus a combination of the stages' deltas, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import EllipsisType

import torch

from stages.errors import MistakeError
from stages.files import MERGED
from stages.merging.core_space import merge_in_core
from stages.merging.kernels import Values, find_kernel, seed_of
from stages.merging.parameters import evaluate
from stages.merging.rounding import round_stochastically
from stages.models.names import Piece, full_name
from stages.settings.merge import Merge
from stages.weights.adapter import Factors, Tensors
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint
from stages.weights.tensor_file import DTYPES, NAMES, Specification

# Fitting a DoRA alternates between row scales and a low-rank part, and may put a row of unusual size into the latter
# for good (1 of 168 matrices of the default pipeline did): directions to spare leave room for the others.
SPARE = 2

Place = int | EllipsisType  # of a matrix in its parameter: the number of an expert, or all of it


@dataclass(frozen=True)
class Change:
    """What one stage makes of a parameter, or of one expert's matrix in it.

    Attributes:
        factors: of its delta; None if it is not low-rank.
        alone: computes the parameter with this delta alone, float32.
    """

    factors: Factors | None
    alone: Callable[[], torch.Tensor]

    def at(self, place: Place) -> Change:
        """What it makes of a part of the parameter."""
        factors = (self.factors[0][place], self.factors[1][place]) if self.factors else None
        return Change(factors, lambda: self.alone()[place])

    def turned(self) -> Change:
        """The same of the transposed parameter."""
        return Change(_turned(self.factors), lambda: self.alone().mT)


class Merged:
    """What `merge` of params.yaml makes of a base and its stages; nothing is written.

    Args:
        base: the model that all stages go back to.
        stages: those of `merge.weights`, opened.
        merge: the section of params.yaml.

    Raises:
        MistakeError: the settings do not fit the method.
    """

    def __init__(self, base: Checkpoint, stages: list[VirtualCheckpoint], merge: Merge) -> None:
        self.name, self.base, self.merge = "merged", base, with_dtype(merge, base.dtype)
        self.stages = sorted(stages, key=lambda stage: stage.name)
        self._kernel = find_kernel(merge)

    @cached_property
    def modules(self) -> dict[str, list[str]]:
        """Parameters of each module: the base's, and those of tied modules that a stage unties or the file repeats."""
        tied = self.base.untied_by(self.adapted()) | {name.rpartition(".")[0] for name in self.base.copies}
        return {**self.base.modules, **{path: self.base.parameters(path) for path in sorted(tied)}}

    def adapted(self) -> set[str]:
        """Modules that a merged stage adapts."""
        return {path for stage in self.stages for path in stage.adapter.modules}

    def changed(self) -> list[str]:
        """Modules that may differ from the base's file."""
        return sorted(self.adapted() | self.base.untied_by(self.adapted()))

    @cached_property
    def _changed(self) -> set[str]:
        return set(self.changed())

    def names(self, paths: Iterable[str]) -> list[str]:
        """Full names of the parameters of some modules."""
        return [full_name(path, parameter) for path in paths for parameter in self.modules[path]]

    def pieces(self, name: str) -> list[Piece]:
        """Tensors of the file that a parameter is written as: those of the base, and a tied head as itself."""
        is_tied = name.rpartition(".")[0] in self.base.tied
        return [(self.base.copies.get(name, name), [])] if is_tied else self.base.pieces(name)

    def specification(self, name: str) -> Specification:
        """Shape and safetensors dtype of one parameter in the file.

        The dtype is `merge.dtype`; what the base holds in another dtype than most of its weights keeps that, and so
        does what is beside its text model.
        """
        shape, stored = self.base.specification(name)
        is_merged = stored == self.base.dtype and name not in self.base.beside
        return shape, NAMES[getattr(torch, self.merge.dtype)] if is_merged else stored

    def layout(self) -> dict[str, Specification]:
        """Shape and safetensors dtype of every tensor of the file, which has the names of the base's."""
        found: dict[str, Specification] = {}
        for name in self.names(self.modules):
            shape, dtype = self.specification(name)
            for piece, index in self.pieces(name):
                found[piece] = (list(self.base.file(piece).specification(piece)[0]) if index else shape, dtype)
        return found

    def stored(self, name: str) -> torch.Tensor:
        """One tensor as the file holds it: merged, then rounded once to its dtype."""
        path, _, parameter = name.rpartition(".")
        return self.rounded(name, self.module(path)[parameter])

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values of parameter `name` in the dtype of the file; they may be a piece, where no stage changes its module.

        What is still the base's goes to the nearest number of the dtype, whatever `merge.rounding` says of changes.

        Raises:
            MistakeError: float16 has no such numbers.
        """
        rounded = values.to(DTYPES[self.specification(name)[1]])
        if self.merge.rounding == "stochastic" and name.rpartition(".")[0] in self._changed:
            generator = torch.Generator().manual_seed(seed_of(self.merge.seed, f"{name} rounded"))
            drawn = round_stochastically(values, rounded.dtype, generator)
            rounded = torch.where(values == self.base.stored(name), rounded, drawn)
        if rounded.dtype == torch.float16 and (rounded.isinf() & values.isfinite()).any():
            raise MistakeError(
                f"params.yaml: merge.dtype is float16, which ends at 65504, and {name} goes beyond; write bfloat16"
            )
        return rounded

    def module(self, path: str) -> Tensors:
        """Merged parameters of module `path`, in float32; those that no stage changes are the base's.

        Raises:
            MistakeError: the merge of one of them is not finite.
        """
        return {name: self._parameter(path, name, weight) for name, weight in self.base.module(path).items()}

    def matrices(self, path: str, parameter: str) -> list[tuple[str, Place]]:
        """What is merged by itself of a parameter: each expert of a stack, else all of it; with names for them."""
        name = full_name(path, parameter)
        shape, _ = self.base.specification(name)
        if self.base.architecture.is_stack(path) and len(shape) > 1:
            return [(f"{name}.{number}", number) for number in range(shape[0])]
        return [(name, ...)]

    def factors(self, path: str) -> Factors | None:
        """The merged delta of the weight of `path` as left [rows, r] @ right [r, columns], if it has that form.

        A sum of low-rank deltas has it, and so has every merge in core space (arXiv 2509.17786).
        """
        changes = self._changes(path, "weight")
        if self._is_turned(path):
            changes = {stage: change.turned() for stage, change in changes.items()}
            return _turned(self._factors(f"{path}.weight", changes))
        return self._factors(f"{path}.weight", changes)

    def coefficients(self, name: str, touching: list[str]) -> dict[str, float] | None:
        """What each delta is multiplied with where the merge is base + Σ cᵢΔᵢ; None where it is not.

        So is task arithmetic (arXiv 2212.04089), and linear (arXiv 2203.05482) where its weights sum to 1.

        Args:
            name: of a parameter.
            touching: stages with a delta there that is not zero.
        """
        if not self._kernel.traits.is_sum:
            return None
        values, scale = self._values(name, touching), self._depth_scale(name)
        total = sum(values["weight"].values())
        if self.merge.method == "linear" and (total == 0 if values["normalize"] else total != 1):
            return None
        divisor = total if values["normalize"] and abs(total) >= 1e-8 else 1.0
        return {stage: scale * (values["weight"][stage] * values.get("lambda", 1.0) / divisor) for stage in touching}

    def is_low_rank(self, path: str) -> bool:
        """Whether `factors` has an answer for this module."""
        stages = [stage for stage in self.stages if path in stage.adapter.modules]
        keeps_rank = self._kernel.traits.is_sum or self._in_core
        return keeps_rank and all(stage.adapter.is_low_rank(path) for stage in stages)

    def rank(self, path: str) -> int | None:
        """Rank of an adapter that holds the merged weight matrix of `path`; None where it is saved as a whole.

        It is `merge.adapter.rank`, else the sum of the stages' ranks and a little more; whole are modules that are
        no weight matrices or that PEFT would take for others, and those of which a stage trained every weight.
        """
        if not self.base.architecture.is_matrix(path) or self.base.architecture.is_mistaken(path):
            return None
        ranks = [stage.adapter.rank(path) for stage in self.stages if path in stage.adapter.modules]
        total = sum(rank for rank in ranks if rank) + SPARE if ranks and all(ranks) else None
        return self.merge.adapter.rank or total

    @cached_property
    def replaced(self) -> dict[str, str]:
        """By module, the outermost around it that an adapter replaces as a whole, with all that is in it.

        PEFT takes a module with weights of its own, such as an attention with sinks, together with those inside.
        """
        wholes = [path for path in self.changed() if self.rank(path) is None]
        found = {
            path: next((whole for whole in wholes if f"{path}.".startswith(f"{whole}.")), "") for path in self.modules
        }
        return {path: whole for path, whole in found.items() if whole}

    def is_transposed(self, path: str) -> bool:
        """Whether the weight is [in, out], as GPT-2 has it."""
        return self.base.architecture.is_transposed(path)

    @property
    def _in_core(self) -> bool:
        return self.merge.space == "core" or self._kernel.traits.rotation_free

    def _parameter(self, path: str, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        changes = self._changes(path, parameter)
        if not changes:
            return weight
        merged = []
        for name, place in self.matrices(path, parameter):
            matrix, own = weight[place], {stage: change.at(place) for stage, change in changes.items()}
            if matrix.dim() == 2 and self._is_turned(path):
                turned = {stage: change.turned() for stage, change in own.items()}
                merged.append(self._matrix(name, matrix.mT, turned).mT)
            else:
                merged.append(self._matrix(name, matrix, own))
        whole = torch.stack(merged) if len(merged) > 1 else merged[0].view_as(weight)
        return self._finite(full_name(path, parameter), whole)

    def _is_turned(self, path: str) -> bool:
        """Whether matrices are to be transposed for the method."""
        return self._kernel.traits.is_directed and self.base.architecture.is_turned(path)

    def _changes(self, path: str, parameter: str) -> dict[str, Change]:
        """By stage, of those that adapt module `path`."""
        return {
            stage.name: Change(stage.adapter.factors(path, parameter), cache(partial(_alone, stage, path, parameter)))
            for stage in self.stages
            if path in stage.adapter.modules
        }

    def _matrix(self, name: str, weight: torch.Tensor, changes: dict[str, Change]) -> torch.Tensor:
        """The merge of what `matrices` gives."""
        if self._kernel.traits.is_sum and (merged := self._sum(name, weight, changes)) is not None:
            return merged
        if self._in_core and (factors := self._factors(name, changes)):
            return torch.addmm(weight, *factors)
        models = {stage: change.alone() for stage, change in changes.items()}
        models = {stage: model for stage, model in models.items() if not torch.equal(model, weight)}
        if not models:
            return weight
        values, scale = self._values(name, list(models)), self._depth_scale(name)
        merged = self._kernel.run(name, weight, models, values)
        return merged if scale == 1 else torch.lerp(weight, merged, scale)

    def _factors(self, name: str, changes: dict[str, Change]) -> Factors | None:
        """Those of the merged delta, if it has that form."""
        found = {stage: change.factors for stage, change in changes.items()}
        factors = {stage: pair for stage, pair in found.items() if pair is not None and pair[0].any()}
        if not factors or any(pair is None for pair in found.values()):
            return None
        coefficients = self.coefficients(name, list(factors))
        if coefficients is not None:
            lefts = [coefficients[stage] * left for stage, (left, _) in factors.items()]
            return torch.cat(lefts, 1), torch.cat([right for _, right in factors.values()])
        if self._in_core:
            values = self._values(name, list(factors))
            left, right = merge_in_core(factors, lambda cores: self._merge_cores(name, cores, values))
            return self._depth_scale(name) * left, right
        return None

    def _sum(self, name: str, weight: torch.Tensor, changes: dict[str, Change]) -> torch.Tensor | None:
        """Base + Σ cᵢΔᵢ, low-rank deltas straight from their factors; None where the method is no such sum."""
        deltas: dict[str, Factors | torch.Tensor] = {}
        for stage, change in changes.items():
            delta = change.factors or change.alone() - weight
            if (delta[0] if isinstance(delta, tuple) else delta).any():
                deltas[stage] = delta
        if not deltas:
            return weight
        coefficients = self.coefficients(name, list(deltas))
        if coefficients is None:
            return None
        merged = weight.clone()
        for stage, delta in deltas.items():
            if isinstance(delta, tuple):
                merged.addmm_(*delta, alpha=coefficients[stage])
            else:
                merged.add_(delta, alpha=coefficients[stage])
        return merged

    def _merge_cores(self, name: str, cores: dict[str, torch.Tensor], values: Values) -> torch.Tensor:
        return self._kernel.run(name, torch.zeros_like(next(iter(cores.values()))), cores, values)

    def _values(self, name: str, touching: list[str]) -> Values:
        return self._kernel.values(name, self._depth(name), self._kernel.participants(touching))

    def _depth(self, name: str) -> float:
        """mergekit's `t`: from 0 in the first layer to 1 in the last, and 0 outside the layers."""
        layer, _ = self.base.architecture.place(name.rpartition(".")[0])
        return max(0, layer) / max(1, self.base.architecture.layers - 1)

    def _depth_scale(self, name: str) -> float:
        return evaluate(name, self.merge.depth_scaling, self._depth(name), float)

    def _finite(self, name: str, merged: torch.Tensor) -> torch.Tensor:
        if not torch.linalg.vector_norm(merged).isfinite():
            listed = ", ".join(stage.name for stage in self.stages if name.rpartition(".")[0] in stage.adapter.modules)
            raise MistakeError(
                f"checkpoints: the merge of {name} from {listed} is not finite; train that stage again with a lower lr"
            )
        return merged


def _turned(factors: Factors | None) -> Factors | None:
    """Those of the transposed matrix."""
    return (factors[1].mT, factors[0].mT) if factors else None


def _alone(stage: VirtualCheckpoint, path: str, parameter: str) -> torch.Tensor:
    return stage.alone(path)[parameter]


def with_dtype(merge: Merge, stored: str) -> Merge:
    """The settings with the dtype of the base's file, in safetensors' words, in the place of `auto`."""
    if merge.dtype != "auto":
        return merge
    return merge.model_copy(update={"dtype": str(DTYPES[stored]).removeprefix("torch.")})


def open_merged(base: Checkpoint, stages: list[VirtualCheckpoint], merge: Merge) -> Checkpoint | Merged:
    """The merged model: its file, or where `merge.outputs` does not ask for one, the merge computed when asked."""
    if "model" in merge.outputs:
        return Checkpoint(MERGED, "merged", base)
    return Merged(base, stages, merge)
