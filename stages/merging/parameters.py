"""A setting of `merge` at one tensor: filters matched, lists interpolated over depth, defaults filled in.

The rules are those of mergekit 0.1.5 (`mergekit.parameter_resolver`, against which the tests compare). Importing them
would bring transformers' models along, which take longer than most merges.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mergekit.merge_methods.base import ParameterSpec


def evaluate(name: str, setting: Any, depth: float, validate: Callable[[Any], Any]) -> Any:
    """The value of a setting for one tensor; None where no filter matches.

    Args:
        name: of the tensor.
        setting: a value, a list of values from the first layer to the last, or a list of `filter` and `value`.
        depth: 0 in the first layer and outside the layers, 1 in the last.
        validate: turns a value into one of the parameter's type.
    """
    if not isinstance(setting, list):
        return validate(setting)
    if isinstance(setting[0], dict):
        matching = (part["value"] for part in setting if part.get("filter") in (None, "*") or part["filter"] in name)
        return next((evaluate(name, value, depth, validate) for value in matching), None)
    values = [validate(value) for value in setting]
    place = depth * (len(values) - 1)
    low = int(place)
    if any(isinstance(value, bool) for value in values):
        return values[low]
    high, share = min(len(values) - 1, low + 1), place - low
    return validate((1 - share) * values[low] + share * values[high])


def resolve(name: str, parameter: ParameterSpec, settings: Iterable[Mapping[str, Any]], depth: float) -> Any:
    """The value of a method's parameter for one tensor: of the first settings that have one, else its default.

    Raises:
        LookupError: nothing says it, and there is no default.
    """
    for each in settings:
        if parameter.name in each:
            value = evaluate(name, each[parameter.name], depth, parameter.validate)
            if value is not None:
                return value
    if parameter.required:
        raise LookupError(parameter.name)
    return parameter.validate(parameter.default)
