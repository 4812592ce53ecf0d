"""BitFit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.errors import MistakeError
from stages.models.architecture import exactly
from stages.settings.stage import Training

if TYPE_CHECKING:
    from pathlib import Path

    from peft import LNTuningConfig, PeftModel
    from transformers import PreTrainedModel


class BitFit(Training):
    """Biases, by `base.add_biases` where there are none (arXiv 2106.10199).

    Tiny; gentle changes of tone or domain.

    Like `full` it is PEFT's LN-tuning, a trained copy of each module, of which the weight stays frozen and unsaved.
    """

    method: Literal["bitfit"]

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LNTuningConfig:
        """Copy each of `modules` that has a bias.

        Raises:
            MistakeError: none has.
        """
        from peft import LNTuningConfig

        biased = [path for path in modules if getattr(model.get_submodule(path), "bias", None) is not None]
        if not biased:
            raise MistakeError(
                f"method 'bitfit' trains biases, and {type(model).__name__} has none in these layers;"
                " write base.add_biases: true, or choose ln"
            )
        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=exactly(biased))

    def started(self, model: PeftModel) -> None:
        """Freeze all but the biases."""
        for name, parameter in model.named_parameters():
            if not name.endswith(".bias"):
                parameter.requires_grad_(False)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Keep the biases alone: the weights beside them are the parent's."""
        from safetensors.torch import load_file, save_file

        super().save(model, folder)
        file = folder / "adapter_model.safetensors"
        biases = {name: tensor for name, tensor in load_file(file).items() if name.endswith(".bias")}
        save_file(biases, file, {"format": "pt"})
