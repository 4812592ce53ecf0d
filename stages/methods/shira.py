"""SHiRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.models.architecture import exactly
from stages.models.layers import plain_matrices
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import ShiraConfig
    from transformers import PreTrainedModel


class SHiRA(Training):
    """Single weights, chosen at random (arXiv 2406.13175).

    Changes few weights, so stages collide little in a merge.
    """

    method: Literal["shira"]
    rank: int = Field(default=16, gt=0)
    """As many weights are trained as a LoRA of this rank has."""

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> ShiraConfig:
        """Train a random few weights of each matrix among `modules`; the stage's seed chooses them."""
        import torch
        from peft import ShiraConfig

        matrices = plain_matrices(self.method, model, modules)
        seed = int(torch.initial_seed() % 2**31)
        return ShiraConfig(task_type="CAUSAL_LM", r=self.rank, random_seed=seed, target_modules=exactly(matrices))
