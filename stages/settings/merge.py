"""The section `merge` of params.yaml."""

import sys
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from stages.settings.section import Settings, mistake

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


LARGEST = sys.float_info.max  # a whole number may be larger
SHAPES = "a number, a list of numbers from the first layer to the last, or a list of filter and value"


def _values(setting: Any) -> list[Any]:
    """The values in a setting; raise a ValueError unless it has one of the shapes that mergekit gives a parameter."""
    parts = setting if isinstance(setting, list) else [setting]
    filtered = bool(parts) and all(
        isinstance(part, dict) and "value" in part and part.keys() <= {"filter", "value"} for part in parts
    )
    values = [part["value"] for part in parts] if filtered else parts
    flat = [value for item in values for value in (item if isinstance(item, list) and filtered else [item])]
    if not flat or not all(isinstance(value, int | float) and abs(value) <= LARGEST for value in flat):
        raise ValueError(SHAPES)
    return flat


def _check_parameter(setting: Any) -> Any:
    for part in setting.values() if isinstance(setting, dict) else [setting]:
        _values(part)
    return setting


def _check_number(setting: Any) -> Any:
    """Of a weight, for which `true` means nothing."""
    if any(isinstance(value, bool) for value in _values(setting)):
        raise ValueError(SHAPES)
    return setting


def _not_routed(output: Any) -> Any:
    if output == "routed":
        raise mistake(" is none of its outputs; a routed model is a name under routers, see docs/routing.md")
    return output


Setting = Annotated[Any, AfterValidator(_check_number)]
ByStage = Annotated[Any, AfterValidator(_check_parameter)]


class AdapterSettings(Settings):
    """The merge as one PEFT adapter."""

    rank: int | None = Field(default=None, gt=0)
    """Of the adapter; without it, what the merge has."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Largest relative error of a module's delta in the adapter; above it the merge fails."""


class Merge(Settings):
    """How the stages' deltas become one model: a method and its parameters, in mergekit's own words.

    A weight, a parameter and `depth_scaling` are each a number, a list that is interpolated from the first layer
    to the last, or a list of `filter` (part of a tensor's name) and `value`; a parameter may also have one for
    each stage.
    """

    method: str = "task_arithmetic"
    """Any of mergekit's, or of Strata's own; docs/merging.md compares them."""
    weights: dict[str, Setting] = Field(min_length=1)
    """The stages to merge, each with its weight. A stage brings its own delta and not its ancestors'."""
    parameters: dict[str, ByStage] = {}
    """The method's own, such as `density`; mergekit's defaults where nothing is said."""
    participants: Literal["touching", "all"] = "touching"
    """What is merged in a tensor: the stages that change it, or every stage, which methods that average feel."""
    space: Literal["full", "core"] = "full"
    """`core` merges low-rank stages in the small space that they span, and stays low-rank (arXiv 2509.17786)."""
    depth_scaling: Setting = 1.0
    """Multiplies the merged delta, such as `[0.5, 1.0]` over depth (LiNeS, arXiv 2410.17146)."""
    outputs: list[Annotated[Literal["model", "adapter", "delta"], BeforeValidator(_not_routed)]] = Field(
        default=["model"], min_length=1
    )
    """What is written to merged/: the model, one PEFT adapter, the delta alone in float32."""
    adapter: AdapterSettings = AdapterSettings()
    """Of the output `adapter`."""
    dtype: Dtype = "auto"
    """Of the model file; `auto` is that of the base's. Small changes are lost in 16 bits: the report tells how much."""
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    """Of what changed, to 16 bits: `stochastic` keeps changes too small for them; `nearest` is what other tools do."""
    seed: int = Field(default=0, ge=0)
    """Of methods that draw random numbers; each tensor has its own, from this seed and its name."""
