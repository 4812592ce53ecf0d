"""Training the weights themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from stages.models.architecture import exactly
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import LNTuningConfig
    from transformers import PreTrainedModel


class Full(Training):
    """Every weight, bias and norm of the layers.

    Much data, or few layers; large checkpoints.
    """

    protectable: ClassVar[bool] = True

    method: Literal["full"]

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LNTuningConfig:
        """Train a copy of each of `modules`."""
        from peft import LNTuningConfig

        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=exactly(modules))
