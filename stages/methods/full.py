"""Training the weights themselves: all of a layer (`full`) or its normalisations alone (`ln`).

Both are PEFT's LN-tuning (arXiv 2312.11420), which keeps a trained copy of each module it is pointed
at and works for any module with weights, not for norms alone. So `full` is saved, loaded and merged
like every adapter, and exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.layers import exactly, norm_modules
from stages.methods.stage import Training

if TYPE_CHECKING:
    from peft import LNTuningConfig
    from transformers import PreTrainedModel


class Full(Training):
    """Every weight, bias and norm of the chosen layers."""

    method: Literal["full"]

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LNTuningConfig:
        """Train a copy of each of `modules`."""
        from peft import LNTuningConfig

        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=exactly(modules))


class LayerNorm(Training):
    """The gains (and biases) of the normalisations of the chosen layers."""

    method: Literal["ln"]

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LNTuningConfig:
        """Train a copy of each normalisation among `modules`."""
        from peft import LNTuningConfig

        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=exactly(norm_modules(model, modules)))
