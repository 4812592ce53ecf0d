"""Models with an adapter behind every attention and every MLP (Houlsby et al., arXiv 1902.00751).

An adapter adds U·gelu(D·x + d) + u to what the attention or the MLP gives; with U and u of zero it changes nothing.
`stages.base` copies this file beside the weights, so that plain transformers loads them with `trust_remote_code=True`:
it imports nothing of Strata.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class Adapter(nn.Module):
    """Two small matrices on a hidden state of `width` numbers, through `size` of them."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state with the adapter's part added, of the same shape."""
        return hidden + self.up(nn.functional.gelu(self.down(hidden)))


class Houlsby:
    """Gives a model, of which it is a base class before the model's own, adapters of `config.adapter_size`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the model's own
        for layer in self.model.layers:  # type: ignore[attr-defined]
            for part in (layer.self_attn, layer.mlp):
                part.adapter = Adapter(config.hidden_size, config.adapter_size)
                part.register_forward_hook(_adapt)


def _adapt(part: Any, _: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # attention gives its weights too
        return part.adapter(output[0]), *output[1:]
    return part.adapter(output)


class HoulsbyLlamaConfig(LlamaConfig):
    """Llama's, with `adapter_size`."""

    model_type = "houlsby_llama"
    adapter_size: int = 0


class HoulsbyQwen2Config(Qwen2Config):
    """Qwen2's, with `adapter_size`."""

    model_type = "houlsby_qwen2"
    adapter_size: int = 0


class HoulsbyQwen3Config(Qwen3Config):
    """Qwen3's, with `adapter_size`."""

    model_type = "houlsby_qwen3"
    adapter_size: int = 0


class HoulsbyLlamaForCausalLM(Houlsby, LlamaForCausalLM):
    """Llama with adapters."""

    config_class = HoulsbyLlamaConfig


class HoulsbyQwen2ForCausalLM(Houlsby, Qwen2ForCausalLM):
    """Qwen2 with adapters."""

    config_class = HoulsbyQwen2Config


class HoulsbyQwen3ForCausalLM(Houlsby, Qwen3ForCausalLM):
    """Qwen3 with adapters."""

    config_class = HoulsbyQwen3Config


MODELS: dict[str, Any] = {  # by the model type without adapters
    model.config_class.model_type.removeprefix("houlsby_"): model
    for model in (HoulsbyLlamaForCausalLM, HoulsbyQwen2ForCausalLM, HoulsbyQwen3ForCausalLM)
}
for _model in MODELS.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
