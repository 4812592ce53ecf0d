"""The model that a stage trains: its parent, with the adapter of the stage's method on it."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from stages.errors import MistakeError, first_line, placed
from stages.files import ADAPTER, CHECKPOINTS
from stages.models.layers import select
from stages.models.loading import load_model, set_weights
from stages.settings.stage import Training
from stages.training.quantize import in_4bit, quantize
from stages.training.shard import is_divided, load_everywhere, shard
from stages.weights.checkpoint import open_checkpoint

PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def build(name: str, stage: Training, dtype: torch.dtype, accelerator: Accelerator) -> PeftModel:
    """The parent with the adapter of stage `name` on it, where it trains.

    Raises:
        MistakeError: the parent is not there, or the method does not go with it.
    """
    divided = is_divided(accelerator)
    if divided:
        load_everywhere()
    parent = load_parent(stage, dtype)
    with placed(f"params.yaml: stages.{name}."):
        model = put_on(stage, parent, dtype)
        if in_4bit(stage):
            quantize(model, dtype, accelerator.device)
    if divided:
        shard(model, accelerator)
        return model
    return model.to(accelerator.device)


def load_parent(stage: Training, dtype: torch.dtype) -> PreTrainedModel:
    """The model that the stage starts from in `dtype`, the modules of its `layers` in float32."""
    parent = open_checkpoint(stage.parent, {})
    model = load_model(parent, dtype)
    if dtype != torch.float32:
        chosen = select(model, stage.layers)
        for path in chosen:
            model.get_submodule(path).float()
        set_weights(model, parent, chosen)
    return model


def put_on(stage: Training, model: Any, dtype: torch.dtype) -> PeftModel:
    """Wrap the model in the stage's adapter, then cast the frozen weights to `dtype`.

    What is trained starts from the exact weights and stays float32: bfloat16 would round small steps away.

    Raises:
        MistakeError: the method does not go with the model; the sentence begins with the key below `stages.NAME`.
    """
    config = stage.adapter_config(model, select(model, stage.layers))
    model.name_or_path = str(CHECKPOINTS / stage.parent)  # what PEFT writes down as the base
    try:
        # PEFT takes names of experts for those of older transformers and would train other modules, in every layer.
        with patch("peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"):
            wanted = _wanted(model, config)
            wrapped = get_peft_model(model, config)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise MistakeError(
            f"method {stage.method!r} is refused by PEFT ({first_line(error)}); change its keys, or choose another"
        ) from None
    _refuse_others(stage, wrapped, wanted)
    stage.started(wrapped)
    for parameter in wrapped.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if stage.gradient_checkpointing:
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapped.train()


def _wanted(model: nn.Module, config: PeftConfig) -> set[str]:
    """Names of the modules, and of the parameters of no module, that a configuration names."""
    pattern = getattr(config, "target_modules", None)  # a list is one of no modules
    paths = {path for path, _ in model.named_modules() if isinstance(pattern, str) and re.fullmatch(pattern, path)}
    return paths | set(getattr(config, "target_parameters", None) or [])


def _refuse_others(stage: Training, wrapped: PeftModel, wanted: set[str]) -> None:
    """Raise a MistakeError unless an adapter is on exactly what the stage names, and trains nothing else.

    What a model reads of a module that has a copy in its place is the copy's from then on.
    """
    modules, parameters = wrapped.targeted_module_names, wrapped.targeted_parameter_names
    for path in modules:
        module = wrapped.get_base_model().get_submodule(path)
        if isinstance(module, LNTuningLayer):
            module.__class__ = _Copy
    trained = {name.removeprefix("base_model.model.") for name, p in wrapped.named_parameters() if p.requires_grad}
    owners = {*modules, *(name.rpartition(".")[0] for name in parameters)}
    outside = {name for name in trained if not any(name[:end] in owners for end in _dots(name))}
    if wrong := sorted(({*modules, *parameters} ^ wanted) | outside):
        raise MistakeError(
            f"method {stage.method!r} is not put by PEFT on exactly what layers names, but differs in {wrong[0]};"
            " choose another method"
        )


@torch.no_grad()
def sums_of_frozen(model: PeftModel) -> dict[str, int]:
    """Of each frozen parameter the sum of its bit patterns, which tells whether it was changed, by name."""
    return {
        name: int(p.view(PATTERNS[p.element_size()]).sum(dtype=torch.int64))
        for name, p in model.named_parameters()
        if not p.requires_grad
    }


def refuse_moved(stage: Training, model: PeftModel, before: dict[str, int]) -> None:
    """Raise a MistakeError if a frozen parameter changed; the sentence begins with the key below `stages.NAME`.

    Args:
        stage: its settings.
        model: after the training.
        before: `sums_of_frozen` of it before that, or nothing where they are not known.
    """
    after = sums_of_frozen(model) if before else {}
    if moved := [name for name, found in before.items() if after.get(name) != found]:
        raise MistakeError(
            f"method {stage.method!r} changed {moved[0]}, which layers does not name; choose another method, and report"
            " it"
        )


def refuse_unsaved(stage: Training, model: PeftModel, folder: Path) -> None:
    """Raise a MistakeError if an adapter's file lacks something that was trained, or has a number that is not finite.

    The sentence begins with the key below `stages.NAME`.
    """
    saved = load_file(folder / ADAPTER[1])
    for name, values in saved.items():
        if not values.isfinite().all():
            raise MistakeError(f"lr {stage.lr} made numbers of {name} infinite; lower it")
    for name in (name for name, parameter in model.named_parameters() if parameter.requires_grad):
        key = name.replace(".default", "")
        is_saved = not saved.keys().isdisjoint([key, f"{key}.weight", key.removesuffix(".weight")])
        if not is_saved and ".lora_E." not in name:  # AdaLoRA's are saved within its lora_A
            raise MistakeError(
                f"method {stage.method!r} trained {name} and does not save it; choose another method, and report it"
            )


def _dots(name: str) -> list[int]:
    return [place for place, sign in enumerate(name) if sign == "."]


class _Copy(LNTuningLayer):
    """A copied module, of which a model may ask more than its output for `x`: an epsilon, a child, a weight."""

    @property
    def _seen(self) -> nn.Module:
        return self.base_layer if self.disable_adapters or self.merged else self.ln_tuning_layers["default"]

    @property
    def weight(self) -> Any:
        """What is trained, and not the frozen weight."""
        return self._seen.weight

    @property
    def bias(self) -> Any:
        """What is trained, and not the frozen bias."""
        return self._seen.bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "ln_tuning_layers"):
                raise
            return getattr(self._seen, name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = hasattr(type(self), name) or name in self.__dict__ or name in self._modules
        if is_own or not hasattr(self._seen, name):
            super().__setattr__(name, value)
        else:  # a state that a model keeps there, such as a recurrence's, and reads within the copy
            setattr(self._seen, name, value)

    def forward(self, *args: Any, **keys: Any) -> Any:
        """The output of what is trained."""
        return self._seen(*args, **keys)
