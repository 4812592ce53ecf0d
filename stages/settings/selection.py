"""The section `selections` of params.yaml."""

from pydantic import Field

from stages.settings.section import Settings


class Selection(Settings):
    """A dataset of which only the tokens worth it are learned (Rho-1, arXiv 2404.07965).

    Kept are those with the largest loss under `parent` beside that under `reference`.
    """

    dataset: str
    """The dataset whose splits it has."""
    parent: str
    """The model that the stage which trains on the selection starts from: `base` or a stage."""
    reference: str
    """A model that has learned what is worth it: `base` or a stage."""
    keep: float = Field(gt=0, lt=1)
    """Share of the learned tokens that stay."""
