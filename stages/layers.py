"""Which layers a stage trains: ranges as a user writes them, and the modules they name in a model."""

import re
from typing import TYPE_CHECKING

from stages.errors import MistakeError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

OUTSIDE = -1  # the layer of a module that belongs to none, such as an embedding
RANGES = re.compile(r"all|last [1-9]\d*|\d+(-\d+)?(, ?\d+(-\d+)?)*")

Range = str | int | list[int]
Layers = Range | dict[str, Range]  # one range for all modules, or one for each group or name of modules


def parse(text: Range, num_layers: int) -> list[int]:
    """Layer numbers that `text` names, sorted.

    Args:
        text: `all`, `5`, `0-3`, `0-3,20-24` (both ends included), `last 6` or a list of numbers.
        num_layers: how many layers the model has.

    Raises:
        MistakeError: the text is no layer range or names a layer the model does not have.
    """
    if isinstance(text, list):
        text = ",".join(map(str, text))
    text = str(text)
    if not RANGES.fullmatch(text):
        raise MistakeError(f"{text!r} is no layer range; write all, 0-3, 0-3,20-24, [0, 3] or last 6")
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


def numbers(setting: Layers, num_layers: int) -> list[int]:
    """Every layer that a stage's `layers` names, whatever the modules; embeddings belong to none."""
    if not isinstance(setting, dict):
        return parse(setting, num_layers)
    if not setting:
        raise MistakeError("it names no modules; write a range, or groups of modules with their ranges")
    ranges = {group: parse(text, num_layers) for group, text in setting.items()}
    if setting.get("embeddings", "all") != "all":
        raise MistakeError("embeddings belong to no layer; write embeddings: all, or leave them out")
    return sorted({layer for group, found in ranges.items() if group != "embeddings" for layer in found})


def select(model: "PreTrainedModel", setting: Layers) -> list[str]:
    """Dotted names of the modules with parameters that a stage's `layers` names, in the model's order.

    Args:
        model: any causal language model.
        setting: a range, which means everything inside those layers; or for each of `attention`, `mlp`, `norms`,
            `embeddings` (with the output layer) or a module's own name, such as `q_proj`, a range of its own.

    Raises:
        MistakeError: a name that no module has.
    """
    stack, count = layer_stack(model), model.config.num_hidden_layers
    own = [(path, module) for path, module in model.named_modules() if module._parameters]
    if not isinstance(setting, dict):
        chosen = set(parse(setting, count))
        return [path for path, _ in own if place(path, stack)[0] in chosen]
    numbers(setting, count)
    found: set[str] = set()
    for group, text in setting.items():
        members = [path for path, module in own if group in _groups(model, path, module, stack)]
        if not members:
            names = {kind.rpartition(".")[2] for layer, kind in (place(path, stack) for path, _ in own)}
            raise MistakeError(
                f"params.yaml: layers names {group!r}, which no module of the model is called;"
                f" write attention, mlp, norms, embeddings or one of {', '.join(sorted(names))}"
            )
        chosen = {OUTSIDE, *parse(text, count)}
        found |= {path for path in members if place(path, stack)[0] in chosen}
    return [path for path, _ in own if path in found]


def mlp_width(config: "PretrainedConfig") -> int | None:
    """Neurons of an MLP, the added ones with them; None if the architecture has no setting for it."""
    if hasattr(config, "n_inner"):
        return config.n_inner or 4 * config.n_embd
    return getattr(config, "intermediate_size", None)


def names_outside(setting: Layers, model: "PreTrainedModel") -> bool:
    """Whether a stage's `layers` names modules that lie in no layer, such as the embedding."""
    stack = layer_stack(model)
    return isinstance(setting, dict) and any(place(path, stack)[0] == OUTSIDE for path in select(model, setting))


def _groups(model: "PreTrainedModel", path: str, module: "nn.Module", stack: str) -> set[str]:
    """Group and names that a module goes by in `layers`."""
    layer, kind = place(path, stack)
    names = {kind, kind.rpartition(".")[2]}
    if layer == OUTSIDE:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return names | ({"embeddings"} if any(module is end for end in ends) else set())
    if is_norm(module):
        return names | {"norms"}
    first = kind.partition(".")[0]
    return names | ({"attention"} if "attn" in first or "attention" in first else {"mlp"})


def is_norm(module: "nn.Module") -> bool:
    """Whether a module is a normalisation, Qwen3's query and key norms among them."""
    return "Norm" in type(module).__name__


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


def linear_modules(model: "PreTrainedModel", modules: list[str]) -> list[str]:
    """Those of `modules` that are weight matrices (Linear and GPT-2's Conv1D)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [path for path in modules if isinstance(model.get_submodule(path), nn.Linear | Conv1D)]


def norm_modules(model: "PreTrainedModel", modules: list[str]) -> list[str]:
    """Those of `modules` that are normalisations."""
    return [path for path in modules if is_norm(model.get_submodule(path))]


def exactly(modules: list[str]) -> str:
    """Regular expression that matches exactly these module names.

    PEFT's `layers_to_transform` fails for many adapter types; a regex in `target_modules` works for all.

    Raises:
        MistakeError: there are none.
    """
    if not modules:
        raise MistakeError("params.yaml: a stage's method finds nothing to train in its layers; choose another method")
    return "|".join(re.escape(name) for name in modules)
