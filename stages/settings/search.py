"""The section `search` of params.yaml."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stages.settings.section import Settings


def _check_range(ends: list[float]) -> list[float]:
    if not ends[0] < ends[1]:
        raise ValueError("a lower and a higher number")
    return ends


Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_check_range)]


class Search(Settings):
    """What `strata search` may change of the merge, and how often it tries. All else stays as `merge` has it."""

    trials: int = Field(default=60, gt=0)
    """How many merges it tries."""
    groups: int = Field(default=1, gt=0)
    """Weights of each stage: 1, or one for each of so many parts of the model's depth."""
    weights: Range = [0.0, 1.5]
    """From what to what a weight goes."""
    density: Range | None = None
    """The same of a method's density; without it, density stays as it is."""
    methods: list[str] | None = Field(default=None, min_length=1)
    """Merge methods to choose from; without it, the method stays as it is."""
    measure: Literal["loss", "score"] = "loss"
    """What is compared on the tuning splits: the loss, which is quicker and finer, or what the answers score."""
