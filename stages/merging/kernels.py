"""One tensor's merge through mergekit's public kernels, with what mergekit leaves to chance made sure."""

import difflib
import hashlib

import torch
from mergekit.merge_methods import BasePolicy, MergeMethod, merge_tensors, registered_methods

from stages.errors import MistakeError
from stages.params import Merge

SETTABLE = {"weight", "density"}


def find_method(merge: Merge) -> MergeMethod:
    """The method that `merge.method` names, checked against the other keys of the section.

    Raises:
        MistakeError: no such method, a parameter it needs that params.yaml cannot set, a density it does not
            take, or a number of stages it does not take.
    """
    usable = {method.spec.name: method for method in registered_methods() if _is_usable(method)}
    method = usable.get(merge.method)
    if method is None:
        nearest = difflib.get_close_matches(merge.method, usable, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(sorted(usable))}"
        raise MistakeError(f"params.yaml: merge.method {merge.method!r} is not known; {fix}")
    if merge.density is not None and "density" not in _parameters(method):
        raise MistakeError(f"params.yaml: merge.density means nothing to method {merge.method!r}; remove the key")
    if "weight" not in _parameters(method) and set(merge.weights.values()) != {1.0}:
        raise MistakeError(f"params.yaml: merge.weights are not used by method {merge.method!r}; set them all to 1.0")
    try:
        method.validate_inputs(*_inputs(method, list(merge.weights)))
    except ValueError as error:
        raise MistakeError(
            f"params.yaml: merge.weights has {len(merge.weights)} stages, which method {merge.method!r}"
            f" does not take ({error}); add or remove stages"
        ) from None
    return method


def merge_tensor(
    method: MergeMethod, name: str, base: torch.Tensor, deltas: dict[str, torch.Tensor], merge: Merge
) -> torch.Tensor:
    """Merge the models base + delta of the stages that touch this tensor, in float32.

    Args:
        method: from `find_method`.
        name: of the tensor; it seeds the random methods, so that neither the order of tensors nor which
            others exist changes the result.
        base: the base's weights, float32.
        deltas: by stage, each of the base's shape, float32; at least one.
        merge: the section of params.yaml.

    Returns:
        The merged weights, float32. They round to the file's dtype once, later.
    """
    stages = sorted(deltas) if _accepts(method, list(deltas)) else sorted(merge.weights)
    models = {stage: base + deltas[stage] if stage in deltas else base for stage in stages} | {"base": base}
    ids, base_id = _inputs(method, stages)
    parameters = {"weight": {stage: merge.weights[stage] for stage in stages}}
    if merge.density is not None:
        parameters["density"] = dict.fromkeys(stages, merge.density)
    digest = hashlib.sha256(f"{merge.seed}/{name}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    with torch.no_grad():
        return merge_tensors(
            [models[model] for model in ids],
            method,
            parameters={key: value for key, value in parameters.items() if key in _parameters(method)},
            ids=ids,
            base_index=None if base_id is None else ids.index(base_id),
            name=name,
            out_dtype=torch.float32,
        )


def _inputs(method: MergeMethod, stages: list[str]) -> tuple[list[str], str | None]:
    """Models that the kernel is given, and which of them is the base; some methods want none."""
    if method.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL):
        return ["base", *stages], "base"
    return stages, None


def _accepts(method: MergeMethod, stages: list[str]) -> bool:
    """Whether the method takes this number of stages; where it does not, the untouched ones take part as well."""
    try:
        method.validate_inputs(*_inputs(method, stages))
    except ValueError:
        return False
    return True


def _parameters(method: MergeMethod) -> set[str]:
    return {parameter.name for parameter in method.spec.parameters}


def _is_usable(method: MergeMethod) -> bool:
    return all(parameter.name in SETTABLE for parameter in method.spec.parameters if parameter.required)
