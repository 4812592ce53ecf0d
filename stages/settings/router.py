"""The section `routers` of params.yaml."""

from pydantic import Field

from stages.settings.section import Settings


class Router(Settings):
    """A model that gives each prompt the changes of one stage with its ancestors, or none (docs/routing.md)."""

    stages: list[str] = Field(min_length=1)
    """What it chooses among, each for prompts like those of its dataset; a stage comes with its ancestors."""
