"""OFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.models.architecture import exactly
from stages.models.layers import plain_matrices
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import OFTConfig
    from transformers import PreTrainedModel


class OFT(Training):
    """Rotations of blocks of inputs (arXiv 2306.07280).

    Keeps the norms and angles of inputs; slow.
    """

    method: Literal["oft"]
    block_size: int = Field(default=32, gt=1)
    """Inputs that are rotated together."""

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> OFTConfig:
        """Rotate the inputs of each weight matrix among `modules`."""
        from peft import OFTConfig

        return OFTConfig(
            task_type="CAUSAL_LM",
            r=0,
            oft_block_size=self.block_size,
            use_cayley_neumann=False,  # the series is only nearly orthogonal
            target_modules=exactly(plain_matrices(self.method, model, modules)),
        )
