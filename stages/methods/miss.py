"""MiSS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.models.architecture import exactly
from stages.models.layers import plain_matrices
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import MissConfig
    from transformers import PreTrainedModel


class MiSS(Training):
    """One small matrix, repeated over blocks of the weight (arXiv 2409.15371).

    Like LoRA with half of its numbers.
    """

    method: Literal["miss"]
    rank: int = Field(default=16, gt=0)
    """Rows of the small matrix."""

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> MissConfig:
        """Adapt each weight matrix among `modules`."""
        from peft import MissConfig

        matrices = plain_matrices(self.method, model, modules)
        return MissConfig(task_type="CAUSAL_LM", r=self.rank, target_modules=exactly(matrices))
