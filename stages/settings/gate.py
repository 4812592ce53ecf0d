"""The section `gate` of params.yaml."""

from pydantic import Field

from stages.settings.section import Settings


class Gate(Settings):
    """What the merged model must hold to, for `strata gate` to let it pass."""

    lost: float = Field(default=0.1, ge=0)
    """Share of what the base scores on a guard, a dataset that no stage learns, that may be lost at most; for one that
    is told by its loss, by which the loss may rise."""
    kept: float = Field(default=0.8, ge=0, le=1)
    """Share of what each merged stage gained on its own dataset that must be there at least."""
