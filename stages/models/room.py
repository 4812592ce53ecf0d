"""Room for methods that need it: biases, neurons and adapters that change nothing of what the base computes."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import stages.models.modeling_houlsby as houlsby
from stages.errors import MistakeError
from stages.models.layers import mlp_width, norm_modules


def add_biases(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with biases of zero wherever the architecture knows a flag for them.

    Raises:
        MistakeError: it knows none.
    """
    config = copy.deepcopy(model.config)
    flags = [flag for flag in ("attention_bias", "mlp_bias") if getattr(config, flag, None) is False]
    if not flags:
        raise MistakeError(
            f"params.yaml: base.add_biases is true, but {type(model).__name__} has no setting for biases;"
            " remove the key"
        )
    for flag in flags:
        setattr(config, flag, True)
    biased = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    missing, _ = biased.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for name in missing:
            if name.endswith(".bias"):
                biased.get_parameter(name).zero_()
    return biased


def add_neurons(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The same function with `count` more neurons in every MLP, all of whose weights are zero.

    Raises:
        MistakeError: the architecture has no setting for the width of its MLPs, or has them in a form in which rows of
            zeros at the end are no more neurons.
    """
    config, width = copy.deepcopy(model.config), mlp_width(model.config)
    told = f"params.yaml: base.extra_neurons is {count}, but {type(model).__name__}"
    if width is None:
        raise MistakeError(f"{told} has no setting for the width of its MLPs; remove the key")
    setattr(config, "n_inner" if hasattr(config, "n_inner") else "intermediate_size", width + count)
    config.extra_neurons = count
    widened = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    before = model.state_dict()
    with torch.no_grad():
        for name, weights in widened.state_dict().items():
            weights.zero_()[tuple(slice(size) for size in before[name].shape)] = before[name]
    if odd := next(_not_widened(model, widened, count), None):
        raise MistakeError(f"{told} {odd}; remove the key, or choose lora or full in place of bottleneck")
    return widened


def _not_widened(model: PreTrainedModel, widened: PreTrainedModel, count: int) -> Iterator[str]:
    """Reasons why a model with wider matrices does not compute the same, or is no wider."""
    before, norms = model.state_dict(), norm_modules(widened, [name for name, _ in widened.named_modules()])
    grown = {
        name: [new - old for new, old in zip(weights.shape, before[name].shape, strict=True) if new != old]
        for name, weights in widened.state_dict().items()
        if weights.shape != before[name].shape
    }
    if not grown:
        yield "has no MLPs of that width"
    for name, sizes in grown.items():
        if sizes != [count]:
            yield f"keeps several matrices in one as {name}"
        if name.rpartition(".")[0] in norms:
            yield f"normalises its neurons in {name}"
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        truth, found = (each.eval()(tokens).logits.float() for each in (model, widened))
    # Wider sums may be added in another order, which in bfloat16 is seen in the third digit.
    if not torch.allclose(found, truth, rtol=0, atol=0.05 * float(truth.std())):
        yield "does not compute the same with them"


def add_adapters(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """The same function with adapters of `size` neurons behind every attention and every MLP (`modeling_houlsby`).

    Their first matrix is normal with a standard deviation of 0.02, the same for every seed, their second one zero.

    Raises:
        MistakeError: there is no such class for the architecture.
    """
    kind = houlsby.MODELS.get(model.config.model_type)
    if kind is None:
        raise MistakeError(
            f"params.yaml: base.adapter_size is {size}, but {type(model).__name__} has no class with adapters; remove"
            f" the key, or take a model of one of the types {', '.join(houlsby.MODELS)}"
        )
    code = Path(houlsby.__file__).stem
    found = {"AutoConfig": f"{code}.{kind.config_class.__name__}", "AutoModelForCausalLM": f"{code}.{kind.__name__}"}
    told = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
    adapted = kind(kind.config_class(**told | {"adapter_size": size, "auto_map": found})).to(model.dtype)
    adapted.load_state_dict(model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if ".adapter." in name:
                weights.zero_()
                if name.endswith("down.weight"):
                    weights.normal_(std=0.02, generator=generator)
    return adapted
