"""Which layers a stage trains: ranges as a user writes them, and the modules they name in a model."""

import re
from typing import TYPE_CHECKING

from stages.errors import MistakeError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

OUTSIDE = -1  # the layer of a module that belongs to none, such as an embedding
RANGES = re.compile(r"all|last [1-9]\d*|\d+(-\d+)?(, ?\d+(-\d+)?)*")


def parse(text: str, num_layers: int) -> list[int]:
    """Layer numbers that `text` names, sorted.

    Args:
        text: `all`, `5`, `0-3`, `0-3,20-24` (both ends included) or `last 6`.
        num_layers: how many layers the model has.

    Raises:
        MistakeError: the text is no layer range or names a layer the model does not have.
    """
    if not RANGES.fullmatch(text):
        raise MistakeError(f"{text!r} is no layer range; write all, 0-3, 0-3,20-24 or last 6")
    if text == "all":
        return list(range(num_layers))
    if text.startswith("last "):
        first, last = num_layers - int(text.removeprefix("last ")), num_layers - 1
        ranges = [(first, last)]
    else:
        ends = [part.strip().split("-") for part in text.split(",")]
        ranges = [(int(end[0]), int(end[-1])) for end in ends]
    for first, last in ranges:
        if first > last:
            raise MistakeError(f"{text!r} runs backwards; write the smaller layer first")
        if first < 0 or last >= num_layers:
            raise MistakeError(f"{text!r} is outside the model, which has layers 0-{num_layers - 1}; stay within them")
    return sorted({layer for first, last in ranges for layer in range(first, last + 1)})


def layer_stack(model: "PreTrainedModel") -> str:
    """Dotted name of the list of decoder layers, such as `model.layers` or `transformer.h`.

    Raises:
        MistakeError: the model has no list of `config.num_hidden_layers` modules.
    """
    from torch import nn

    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name
    raise MistakeError(f"params.yaml: base.model: {type(model).__name__} has no stack of {count} layers to choose from")


def place(path: str, stack: str) -> tuple[int, str]:
    """Layer and kind of a module, such as `(3, "self_attn.q_proj")`; outside the stack `(-1, path)`.

    Args:
        path: dotted name of the module.
        stack: dotted name of the list of layers, from `layer_stack`.
    """
    found = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", path)
    return (int(found[1]), found[2]) if found else (OUTSIDE, path)


def linear_modules(model: "PreTrainedModel", layers: list[int]) -> list[str]:
    """Dotted names of the weight matrices (Linear and GPT-2's Conv1D) inside `layers`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in _inside(model, layers) if isinstance(module, nn.Linear | Conv1D)]


def norm_modules(model: "PreTrainedModel", layers: list[int]) -> list[str]:
    """Dotted names of the normalisations inside `layers`, Qwen3's query and key norms among them."""
    return [name for name, module in _inside(model, layers) if "Norm" in type(module).__name__]


def parameter_modules(model: "PreTrainedModel", layers: list[int]) -> list[str]:
    """Dotted names of every module inside `layers` that holds parameters of its own."""
    return [name for name, module in _inside(model, layers) if any(True for _ in module.parameters(recurse=False))]


def _inside(model: "PreTrainedModel", layers: list[int]) -> list[tuple[str, "nn.Module"]]:
    stack = layer_stack(model)
    prefixes = tuple(f"{stack}.{layer}." for layer in layers)
    return [(name, module) for name, module in model.named_modules() if name.startswith(prefixes)]


def exactly(modules: list[str]) -> str:
    """Regular expression that matches exactly these module names.

    PEFT's `layers_to_transform` fails for many adapter types; a regex in `target_modules` works for all.

    Raises:
        MistakeError: there are none.
    """
    if not modules:
        raise MistakeError("params.yaml: a stage's method finds nothing to train in its layers; choose another method")
    return "|".join(re.escape(name) for name in modules)
