"""The section `evaluate` of params.yaml."""

from pydantic import Field

from stages.settings.section import Settings


class Evaluate(Settings):
    """Bounds of the evaluation."""

    batch_size: int = Field(default=64, gt=0)
    """Examples at once in memory."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Tokens of an answer at most; what is longer is cut before it is scored, and the report says how many were."""
