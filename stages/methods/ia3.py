"""IA3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.models.architecture import exactly
from stages.models.layers import all_in_modules
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import IA3Config
    from transformers import PreTrainedModel


class IA3(Training):
    """A factor for each output of every matrix, and each input of `down_proj` (arXiv 2205.05638).

    Style and format, not new skills; wants a high lr (0.01).
    """

    method: Literal["ia3"]

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> IA3Config:
        """Scale the weight matrices among `modules`; those that end an MLP by their inputs, as the paper does."""
        from peft import IA3Config

        matrices = all_in_modules(repr(self.method), model, modules)
        ends = [path for path in matrices if path.endswith(("down_proj", "mlp.c_proj", "fc2"))]
        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=exactly(matrices),
            feedforward_modules=exactly(ends) if ends else [],
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
