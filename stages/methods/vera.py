"""VeRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.models.architecture import exactly
from stages.models.layers import all_in_modules
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import VeraConfig
    from transformers import PreTrainedModel


class VeRA(Training):
    """Factors for the rows and the rank of one random pair, which all matrices share (arXiv 2310.11454).

    Tiny; wants a high lr (0.01).

    W' = W + diag(b)·B·diag(d)·A. Every stage has a pair of its own, kept in its checkpoint.
    """

    method: Literal["vera"]
    rank: int = Field(default=256, gt=0)
    """Directions of the random pair."""

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> VeraConfig:
        """Adapt each weight matrix among `modules`; the stage's seed chooses the random pair."""
        import torch
        from peft import VeraConfig

        return VeraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            projection_prng_key=int(torch.initial_seed() % 2**31),
            target_modules=exactly(all_in_modules(repr(self.method), model, modules)),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
