"""LoKr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.models.architecture import exactly
from stages.models.layers import plain_matrices
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import LoKrConfig
    from transformers import PreTrainedModel


class LoKr(Training):
    """A Kronecker product of a small matrix and a low-rank one (arXiv 2309.14859).

    Fewer numbers than LoRA at the same reach.
    """

    method: Literal["lokr"]
    rank: int = Field(default=8, gt=0)
    """Of the larger factor."""
    alpha: float | None = Field(default=None, gt=0)
    """The change is scaled by alpha/rank; the rank unless it is given."""

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LoKrConfig:
        """Adapt each weight matrix among `modules`; alpha is the rank unless it is given."""
        from peft import LoKrConfig

        alpha = self.rank if self.alpha is None else self.alpha
        return LoKrConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            alpha=alpha,  # type: ignore[arg-type]
            target_modules=exactly(plain_matrices(self.method, model, modules)),
        )
