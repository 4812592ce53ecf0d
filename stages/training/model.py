"""The model that a stage trains: its parent, with the adapter of the stage's method on it."""

import re
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import nn
from transformers import PreTrainedModel

from stages.errors import MistakeError, first_line, placed
from stages.files import CHECKPOINTS
from stages.models.layers import select
from stages.models.loading import load_model, set_weights
from stages.settings.stage import Training
from stages.training.quantize import in_4bit, quantize
from stages.training.shard import is_divided, load_everywhere, shard
from stages.weights.checkpoint import open_checkpoint


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

    def forward(self, *args: Any, **keys: Any) -> Any:
        """The output of what is trained."""
        return self._seen(*args, **keys)
