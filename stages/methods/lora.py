"""Low-rank adapters: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stages.layers import exactly, linear_modules
from stages.methods.stage import Share, Training

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


class Lora(Training):
    """W' = W + (alpha/rank)·B·A, with A [rank, in] and B [out, rank] trained in float32."""

    use_dora: ClassVar[bool] = False

    method: Literal["lora"]
    rank: int = Field(default=16, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    dropout: Share = 0.0

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LoraConfig:
        """Adapt each weight matrix among `modules`; alpha is twice the rank unless it is given."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
            target_modules=exactly(linear_modules(model, modules)),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )


class Dora(Lora):
    """W' = m·V/‖V‖ with V = W + (alpha/rank)·B·A and one trained magnitude m per output row."""

    use_dora = True

    method: Literal["dora"]  # type: ignore[assignment]
