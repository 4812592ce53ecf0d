"""The section `warn` of params.yaml."""

from pydantic import Field

from stages.settings.section import Settings


class Warn(Settings):
    """Thresholds at which the report warns."""

    rounding: float = Field(default=0.25, gt=0)
    """Share of the merged change that rounding takes away: above it a card warns."""
    lost: float = Field(default=0.9, gt=0)
    """The same of one stage's change: above it the headline says that rounding takes the stage away."""
    cosine: float = Field(default=-0.1, ge=-1, le=0)
    """Cosine of two stages' changes: below it they undo each other."""
    same_start: float = Field(default=0.7, gt=0, le=1)
    """How far two stages of unknown seeds read the same directions, from chance (0) to all of them (1): above it they
    started from one (measured on SmolLM2: same task, two seeds 0.37; two tasks, same seed 0.98)."""
    norm: float = Field(default=0.1, gt=0)
    """How far a norm's gain moved, as a share of it; only where the stage's weight matrices moved less."""
    kept: float = Field(default=0.5, gt=0, le=1)
    """Share of what the merge method gives a stage: below it the file holds too little of it."""
