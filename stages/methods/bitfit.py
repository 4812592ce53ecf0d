"""BitFit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.errors import MistakeError
from stages.methods.copies import Copies
from stages.models.layers import parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BitFit(Copies):
    """Biases, by `base.add_biases` where there are none (arXiv 2106.10199).

    Tiny; gentle changes of tone or domain.
    """

    method: Literal["bitfit"]

    def parameters(self, model: PreTrainedModel, modules: list[str]) -> list[str]:
        """The biases of each of `modules` that has any, those of fused experts (`down_proj_bias`) with them."""
        biases = [name for name in parameters_of(model, modules) if name.endswith((".bias", "_bias"))]
        if not biases:
            raise MistakeError(
                f"method 'bitfit' trains biases, and {type(model).__name__} has none in these layers;"
                " write base.add_biases: true, or choose ln"
            )
        return biases
