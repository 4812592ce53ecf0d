"""Settings at a tensor, against mergekit's own resolver (whose import is too slow for the pipeline)."""

import itertools
from typing import Annotated

import pytest
from mergekit.config import evaluate_setting
from mergekit.merge_methods.base import MISSING, ParameterScope, ParameterSpec
from mergekit.parameter_resolver import resolve_parameter
from pydantic import Field, TypeAdapter, ValidationError

from stages.merging.parameters import evaluate, resolve
from stages.settings.merge import ByStage

NAMES = ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
DEPTHS = [0.0, 0.1, 1 / 3, 0.5, 0.999, 1.0]
TYPES = [float, int, bool, Annotated[float, Field(ge=0, le=1)]]

SCALARS = [0, 1, -2, 0.3, 1.0, 1e-5, 2.5e3, True, False]
LISTS = [
    [0.5],
    [0, 1],
    [0.2, 0.9, 0.4],
    [1, 2, 3, 5],
    [1e-4, 1.0],
    [True, False],
    [False, True, True],
    [0, True],
    [0, 0.5],
]
FILTERS = [
    [{"filter": "mlp", "value": 0.7}, {"value": 1.0}],
    [{"filter": "mlp", "value": 0.7}],
    [{"filter": "*", "value": 0.2}, {"value": 1.0}],
    [{"filter": None, "value": [0.0, 1.0]}],
    [{"value": 0.1}, {"filter": "mlp", "value": 0.9}],
    [{"filter": "up_proj", "value": [0.1, 0.5]}, {"filter": "mlp", "value": 1.0}, {"value": [1, 0]}],
    [{"filter": "self_attn", "value": True}, {"value": [False, True]}],
    [{"filter": "layers.3.", "value": 2}, {"filter": "lm_head", "value": [3, 4]}],
    [{"filter": "nowhere", "value": 1.0}],
]
SETTINGS = [*SCALARS, *LISTS, *FILTERS]


def as_mergekit_reads(setting):
    """mergekit's configuration turns filters into objects of its own."""
    from mergekit.config import ParameterSetting

    filtered = isinstance(setting, list) and isinstance(setting[0], dict)
    return TypeAdapter(ParameterSetting).validate_python(setting) if filtered else setting


def outcome(compute):
    """What comes out, with its type: 1 is not True; or that the value is refused, or missing."""
    try:
        value = compute()
    except (ValidationError, LookupError, RuntimeError) as error:
        return "missing" if isinstance(error, LookupError | RuntimeError) else "refused"
    return type(value), value


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_setting_has_the_value_that_mergekit_gives_it(setting, kind):
    validate = TypeAdapter(kind).validate_python
    TypeAdapter(ByStage).validate_python(setting)  # all of these may stand in params.yaml
    theirs = as_mergekit_reads(setting)
    for name, depth in itertools.product(NAMES, DEPTHS):
        found = outcome(lambda: evaluate(name, setting, depth, validate))  # noqa: B023  called at once
        wanted = outcome(lambda: evaluate_setting(name, theirs, depth, validate=validate))  # noqa: B023
        assert found == wanted, f"{name} at {depth}"


@pytest.mark.parametrize("own", [None, *SETTINGS[:: len(SETTINGS) // 12], *FILTERS], ids=str)
@pytest.mark.parametrize("shared", [None, 0.4, [0.0, 1.0], FILTERS[1], FILTERS[-1]], ids=str)
@pytest.mark.parametrize("default", [MISSING, 0.25], ids=["required", "default"])
def test_the_stages_setting_goes_before_the_shared_one_and_both_before_the_default(own, shared, default):
    parameter = ParameterSpec("density", float, ParameterScope.NON_BASE, default=default)
    settings = [{} if setting is None else {"density": setting, "other": 3} for setting in (own, shared)]
    theirs = [{key: as_mergekit_reads(value) for key, value in each.items()} for each in settings]
    for name, depth in itertools.product(NAMES, DEPTHS):
        found = outcome(lambda: resolve(name, parameter, settings, depth))  # noqa: B023
        wanted = outcome(lambda: resolve_parameter(parameter, theirs, tensor_name=name, t=depth))  # noqa: B023
        assert found == wanted, f"{name} at {depth}"
