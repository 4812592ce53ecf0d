"""Training the normalisations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.models.architecture import exactly
from stages.models.layers import norm_modules
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import LNTuningConfig
    from transformers import PreTrainedModel


class LayerNorm(Training):
    """Gains (and biases) of the norms.

    Tiny; like `bitfit`, for models without biases.
    """

    method: Literal["ln"]

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LNTuningConfig:
        """Train a copy of each normalisation among `modules`."""
        from peft import LNTuningConfig

        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=exactly(norm_modules(model, modules)))
