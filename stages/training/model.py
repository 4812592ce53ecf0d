"""The model that a stage trains: its parent, with the adapter of the stage's method on it."""

from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
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
            wrapped = get_peft_model(model, config)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise MistakeError(
            f"method {stage.method!r} is refused by PEFT ({first_line(error)}); change its keys, or choose another"
        ) from None
    stage.started(wrapped)
    for parameter in wrapped.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if stage.gradient_checkpointing:
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapped.train()
