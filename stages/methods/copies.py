"""What training weights themselves has in common, be they all, the norms' or the biases: copies of modules."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import PrivateAttr

from stages.models.architecture import exactly
from stages.models.layers import parameters_of
from stages.settings.stage import Training

if TYPE_CHECKING:
    from pathlib import Path

    from peft import LNTuningConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

COPY = ".ln_tuning_layers.default."  # in the name of a parameter of a copy


class Copies(Training):
    """PEFT's LN-tuning, which puts a trained copy of a module in its place.

    A copy has with it all that is in the module, such as the projections of an attention with a parameter of its own;
    what of it the method does not name stays frozen and is not saved.
    """

    _trained: set[str] = PrivateAttr(default_factory=set)

    @abstractmethod
    def parameters(self, model: PreTrainedModel, modules: list[str]) -> list[str]:
        """Names of the parameters of `modules` that are trained.

        Raises:
            MistakeError: there are none; the sentence begins with the key below `stages.NAME`.
        """

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LNTuningConfig:
        """Copy each module that has a parameter to train, and is in no other such module."""
        from peft import LNTuningConfig

        self._trained = set(self.parameters(model, modules))
        paths = [path for path in modules if self._trained.intersection(parameters_of(model, [path]))]
        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=exactly(_outermost(paths)))

    def trained(self, config: PeftConfig, modules: list[str]) -> list[str]:
        """Those that have a parameter to train, in a module that is copied."""
        owners = {name.rpartition(".")[0] for name in self._trained}
        return [path for path in modules if path in owners]

    def started(self, model: PeftModel) -> None:
        """Freeze all of the copies that is not to be trained."""
        for name, parameter in model.named_parameters():
            if COPY in name:
                parameter.requires_grad_(name.removeprefix("base_model.model.").replace(COPY, ".") in self._trained)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Keep what is trained alone: the rest of a copy is the parent's."""
        from safetensors.torch import load_file, save_file

        super().save(model, folder)
        file = folder / "adapter_model.safetensors"
        tensors = {name.replace(COPY, ".ln_tuning_layers."): values for name, values in load_file(file).items()}
        names = {f"base_model.model.{name}" for name in self._trained}
        trained = {name: v for name, v in tensors.items() if name.replace(".ln_tuning_layers.", ".") in names}
        save_file(trained, file, {"format": "pt"})


def _outermost(paths: list[str]) -> list[str]:
    """Those of the modules that are in none of the others."""
    found = set(paths)
    return [path for path in paths if not any(path[:end] in found for end, sign in enumerate(path) if sign == ".")]
