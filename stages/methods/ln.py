"""Training the normalisations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.methods.copies import Copies
from stages.models.layers import norm_modules, parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerNorm(Copies):
    """Gains (and biases) of the norms.

    Tiny; like `bitfit`, for models without biases.
    """

    method: Literal["ln"]

    def parameters(self, model: PreTrainedModel, modules: list[str]) -> list[str]:
        """Those of each normalisation among `modules`."""
        return parameters_of(model, norm_modules(model, modules))
