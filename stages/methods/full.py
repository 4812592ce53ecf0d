"""Training the weights themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from stages.methods.copies import Copies
from stages.models.layers import parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Copies):
    """Every weight, bias and norm of the layers.

    Much data, or few layers; large checkpoints.
    """

    protectable: ClassVar[bool] = True

    method: Literal["full"]

    def parameters(self, model: PreTrainedModel, modules: list[str]) -> list[str]:
        """All of `modules`."""
        return parameters_of(model, modules)
