"""Tables of docs/methods.md: what each method trains, how much that is, and which models it goes with."""

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.errors import MistakeError
from stages.methods import METHODS
from stages.methods.peft import Passthrough
from stages.models.room import add_adapters, add_biases, add_neurons
from stages.settings.stage import Training
from stages.training.model import put_on
from tools.pages.text import linked, paragraphs, table

MODELS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT-2"}
LAYER = {  # one layer of the default base
    "vocab_size": 128,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
EXAMPLES = {"peft": {"peft": {"peft_type": "LOHA"}}}  # keys that a method needs
VARIANTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {  # methods that are settings of another
    "rslora": (
        "lora",
        {"rslora": True},
        ["LoRA, scaled by 1/√rank (`rslora: true`)", "Ranks of 64 and more, which plain LoRA scales too low"],
    ),
    "pissa": (
        "lora",
        {"init": "pissa"},
        ["LoRA, from the largest directions (`init: pissa`)", "Quick first steps, further from the parent"],
    ),
    "olora": ("lora", {"init": "olora"}, ["LoRA, from the matrix's QR (`init: olora`)", "Like `pissa`"]),
}


def methods_table() -> str:
    """A row for each method and each variant."""
    heads = ["method", "trains", "numbers per layer", "what speaks for it", *MODELS.values()]
    return table(heads, [_row(*each) for each in _cases()])


def peft_types() -> str:
    """Which adapters `method: peft` takes, of those that have no method of their own, and which it refuses."""
    own = {_kind(put_on(_stage(name), _model("llama", name), torch.float32)) for name in _trained() if name != "peft"}
    kinds = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in own)
    taken = [kind for kind in kinds if _is_taken(kind)]
    refused = [kind for kind in kinds if kind not in taken]
    version = importlib.metadata.version("peft")
    return f"Of PEFT {version} it takes {', '.join(taken)}; it refuses {', '.join(refused)}."


def _trained() -> list[str]:
    """Methods that train, the one for a start first and the one for anything else last."""
    names = [name for name, method in METHODS.items() if issubclass(method, Training)]
    return sorted(names, key=lambda name: (name != "lora", name == "peft", name))


def _cases() -> Iterator[tuple[str, str, dict[str, Any], list[str]]]:
    """Name, method, keys, and the two texts of each row."""
    for name in _trained():
        yield name, name, {}, paragraphs(METHODS[name])[:2]
        for variant, (method, keys, texts) in VARIANTS.items():
            if method == name:
                yield variant, name, keys, texts


def _row(name: str, method: str, keys: dict[str, Any], texts: list[str]) -> list[str]:
    trains, advice = (linked(text.removesuffix(".")) for text in texts)
    found = [_numbers(method, keys, model) for model in MODELS]
    marks = ["–" if count is None else "yes" for count in found]
    return [f"`{name}`", trains, f"{found[0]:,}", advice, *marks]


def _numbers(method: str, keys: dict[str, Any], model: str) -> int | None:
    """How many numbers the method trains in one layer; None where it does not go with the model."""
    try:
        wrapped = put_on(_stage(method, **keys), _model(model, method), torch.float32)
    except MistakeError:
        return None
    return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def _stage(method: str, **keys: Any) -> Training:
    common = {"parent": "base", "dataset": "any", "method": method, "lr": 0.01, "steps": 100}
    stage = METHODS[method].model_validate(common | EXAMPLES.get(method, {}) | keys)
    assert isinstance(stage, Training)
    return stage


def _model(kind: str, method: str) -> PreTrainedModel:
    """A model of one layer, with the room that a method asks of the base."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **LAYER), trust_remote_code=False)
    if method == "bottleneck":
        return add_neurons(model, 64)
    if method == "houlsby":
        return add_adapters(model, 64)
    if method == "bitfit" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        return add_biases(model)
    return model


def _kind(model: PeftModel) -> str:
    return str(model.peft_config["default"].peft_type.value)  # type: ignore[union-attr]


def _is_taken(kind: str) -> bool:
    try:
        Passthrough(parent="base", dataset="any", method="peft", lr=0.01, steps=1, peft={"peft_type": kind}).try_out()
    except MistakeError:
        return False
    return True
