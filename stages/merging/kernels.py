"""One tensor's merge through mergekit's public kernels, with the random seed fixed for each tensor."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods import BasePolicy, MergeMethod, ParameterScope, get, merge_tensors, registered_methods
from pydantic import ValidationError

import stages.merging.methods  # noqa: F401  registers them beside mergekit's
from stages.errors import MistakeError, first_line
from stages.merging.method import Traits, traits_of
from stages.merging.parameters import resolve
from stages.merging.trim import trim
from stages.settings.merge import Merge
from stages.settings.section import nearest

Values = dict[str, Any]  # a parameter's value, or for a parameter per stage its values by stage

PART = 1 << 21  # entries of a delta that a kernel sees at once, where each entry is merged on its own


def seed_of(seed: int, name: str) -> int:
    """The seed of one tensor, whichever others there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Kernel:
    """A merge method with the settings of params.yaml, checked.

    Args:
        method: of mergekit's registry, ours among them.
        merge: the section of params.yaml.
        shared: settings that hold for all stages.
        by_stage: settings of single stages, `weight` always among them.
    """

    method: MergeMethod
    merge: Merge
    shared: dict[str, Any]
    by_stage: dict[str, dict[str, Any]]

    @property
    def traits(self) -> Traits:
        """What is known of the method."""
        return traits_of(self.method.spec.name)

    def participants(self, touching: list[str]) -> list[str]:
        """Stages that are merged in a tensor which only `touching` change, sorted.

        Where the method does not take so few, or with `participants: all`, every stage takes part, the others
        with the base's weights.
        """
        if self.merge.participants == "touching" and accepts(self.method, touching):
            return sorted(touching)
        return sorted(self.merge.weights)

    def values(self, name: str, depth: float, stages: list[str]) -> Values:
        """Each parameter of the method for one tensor: gradients interpolated, filters matched, defaults filled in.

        Args:
            name: of the tensor.
            depth: 0 in the first layer and outside the layers, 1 in the last, as in mergekit.
            stages: from `participants`.

        Raises:
            MistakeError: no filter matches and the parameter has no default.
        """
        values: Values = {}
        for parameter in self.method.spec.parameters:
            key = f"merge.parameters.{parameter.name}" if parameter.name != "weight" else "merge.weights"
            try:
                if parameter.scope == ParameterScope.SHARED:
                    values[parameter.name] = resolve(name, parameter, [self.shared], depth)
                else:
                    values[parameter.name] = {
                        stage: resolve(name, parameter, [self.by_stage[stage], self.shared], depth) for stage in stages
                    }
            except LookupError:
                raise MistakeError(
                    f"params.yaml: {key} has no value for {name}, for no filter matches; end the list with a value"
                    " that has no filter"
                ) from None
        return values

    def run(self, name: str, base: torch.Tensor, models: dict[str, torch.Tensor], values: Values) -> torch.Tensor:
        """Merge one tensor, in float32.

        Args:
            name: of the tensor; it seeds the random methods, so that neither the order of tensors nor which
                others exist changes the result.
            base: the base's weights, float32.
            models: by stage, the base plus that stage's own delta; a participant that is missing is the base.
            values: from `values`.

        Returns:
            The merged weights, float32. They round to the file's dtype once, later.

        Raises:
            MistakeError: the method refuses the values.
        """
        stages = self.participants(list(models))
        if self.traits.trims and not values["rescale"]:
            deltas, values = trim({stage: model - base for stage, model in models.items()}, values)
            return base + self._in_parts(name, deltas, values, stages)
        return self._run(name, base, models, values, stages)

    def _in_parts(self, name: str, deltas: dict[str, torch.Tensor], values: Values, stages: list[str]) -> torch.Tensor:
        """The merge of trimmed deltas, some rows at a time: what is left to do looks at each entry alone."""
        first = next(iter(deltas.values()))
        rows = max(1, PART * len(first) // max(1, first.numel()))
        split = {stage: delta.split(rows) for stage, delta in deltas.items()}
        parts = (dict(zip(split, part, strict=True)) for part in zip(*split.values(), strict=True))
        return torch.cat(
            [self._run(name, torch.zeros_like(part[next(iter(part))]), part, values, stages) for part in parts]
        )

    def _run(
        self, name: str, base: torch.Tensor, models: dict[str, torch.Tensor], values: Values, stages: list[str]
    ) -> torch.Tensor:
        torch.manual_seed(seed_of(self.merge.seed, name))
        ids, base_id = _inputs(self.method, stages)
        dtype = torch.float64 if self.traits.float64 else torch.float32
        try:
            with torch.no_grad():
                return merge_tensors(
                    [models.get(model, base).to(dtype) for model in ids],
                    self.method,
                    parameters=values,
                    ids=ids,
                    base_index=None if base_id is None else ids.index(base_id),
                    name=name,
                    out_dtype=torch.float32,
                )
        except (ValueError, RuntimeError) as error:
            raise MistakeError(
                f"params.yaml: merge.method {self.method.spec.name!r} cannot merge {name} ({first_line(error)});"
                " change merge.parameters or the method"
            ) from None


def find_kernel(merge: Merge) -> Kernel:
    """The method that `merge.method` names, with its settings checked.

    Raises:
        MistakeError: no such method, a parameter it does not have or lacks, a value it does not take, or a
            number of stages it does not take.
    """
    methods = {method.spec.name: method for method in registered_methods()}
    if merge.method not in methods:
        raise MistakeError(f"params.yaml: merge.method {merge.method!r} is not known; {nearest(merge.method, methods)}")
    method = methods[merge.method]
    shared: dict[str, Any] = {}
    by_stage: dict[str, dict[str, Any]] = {name: {} for name in merge.weights}
    for key, setting in merge.parameters.items():
        _check_known(key, method)
        if isinstance(setting, dict):
            for stage, own in setting.items():
                _check_stage(key, stage, method, merge)
                by_stage[stage][key] = _setting(f"merge.parameters.{key}.{stage}", key, own, method)
        else:
            shared[key] = _setting(f"merge.parameters.{key}", key, setting, method)
    if "weight" in _parameters(method):
        for stage, weight in merge.weights.items():
            by_stage[stage]["weight"] = _setting(f"merge.weights.{stage}", "weight", weight, method)
    elif any(weight != 1 for weight in merge.weights.values()):
        raise MistakeError(f"params.yaml: merge.weights are not used by method {merge.method!r}; set them all to 1.0")
    kernel = Kernel(method, merge, shared, by_stage)
    _check_required(kernel)
    return kernel


def parameters_of(name: str) -> set[str]:
    """Names of the parameters of the method `name`, which is registered."""
    return _parameters(get(name))


def accepts(method: MergeMethod, stages: list[str]) -> bool:
    """Whether a method takes so many stages."""
    try:
        method.validate_inputs(*_inputs(method, stages))
    except ValueError:
        return False
    return True


def _inputs(method: MergeMethod, stages: list[str]) -> tuple[list[str], str | None]:
    """Models that a method is given, and which of them is the base; some methods want none."""
    if method.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL):
        return ["base", *stages], "base"
    return stages, None


def _check_known(key: str, method: MergeMethod) -> None:
    known = _parameters(method) - {"weight"}
    if key == "weight":
        raise MistakeError("params.yaml: merge.parameters.weight is not a known key; weights go under merge.weights")
    if key not in known:
        raise MistakeError(
            f"params.yaml: merge.parameters.{key} means nothing to method {method.spec.name!r}; {nearest(key, known)}"
        )


def _check_stage(key: str, stage: str, method: MergeMethod, merge: Merge) -> None:
    if _parameters(method, ParameterScope.SHARED) & {key}:
        raise MistakeError(
            f"params.yaml: merge.parameters.{key} of method {method.spec.name!r} is one setting for all stages;"
            " write it without their names"
        )
    if stage not in merge.weights:
        raise MistakeError(
            f"params.yaml: merge.parameters.{key}.{stage} names no merged stage; {nearest(stage, merge.weights)}"
        )


def _check_required(kernel: Kernel) -> None:
    merge, method = kernel.merge, kernel.method
    for parameter in method.spec.parameters:
        given = [parameter.name in kernel.shared or parameter.name in own for own in kernel.by_stage.values()]
        if parameter.required and not all(given):
            raise MistakeError(
                f"params.yaml: merge.parameters.{parameter.name} is missing; method {merge.method!r} needs it"
            )
    try:
        method.validate_inputs(*_inputs(method, sorted(merge.weights)))
    except ValueError as error:
        raise MistakeError(
            f"params.yaml: merge.weights has {len(merge.weights)} stages, which method {merge.method!r}"
            f" does not take ({error}); add or remove stages"
        ) from None


def _setting(where: str, key: str, setting: Any, method: MergeMethod) -> Any:
    """A setting, every value in it checked."""
    parameter = next(parameter for parameter in method.spec.parameters if parameter.name == key)
    for value in _scalars(setting):
        try:
            number = parameter.validate(value)
        except ValidationError as error:
            wish = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise MistakeError(f"params.yaml: {where} is {value!r}; it should be {wish}") from None
        low, high = traits_of(method.spec.name).ranges.get(key, (float("-inf"), float("inf")))
        if isinstance(number, float) and not low <= number <= high:
            raise MistakeError(f"params.yaml: {where} is {value!r}; it should be between {low:g} and {high:g}")
    return setting


def _scalars(setting: Any) -> Iterator[Any]:
    if isinstance(setting, list):
        for part in setting:
            yield from _scalars(part["value"] if isinstance(part, dict) else part)
    else:
        yield setting


def _parameters(method: MergeMethod, scope: ParameterScope | None = None) -> set[str]:
    return {parameter.name for parameter in method.spec.parameters if scope in (None, parameter.scope)}
