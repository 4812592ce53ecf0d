"""Frozen weights in four bits while a stage trains (QLoRA, arXiv 2305.14314), through bitsandbytes.

The model in memory is smaller, and slightly off. What is saved is the adapter, as always, and every later stage and the
merge add it to the parent's exact weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stages.errors import MistakeError
from stages.models.architecture import OUTSIDE, layer_stack, place
from stages.settings.stage import Training

BLOCK = 64  # numbers that share a scale


def in_4bit(stage: Training) -> bool:
    """Whether the frozen matrices are held in four bits, as some methods can."""
    return getattr(stage, "load_in_4bit", False)


def quantize(model: Any, dtype: torch.dtype, device: torch.device | str) -> None:
    """Move every frozen weight matrix [out, in] of the layers to `device`, in NF4 with BLOCK numbers to one scale.

    Those whose inputs are no multiple of BLOCK stay as and where they are, and so does all else. One matrix at a time
    is on the device in full, for the model may not fit on it.

    Args:
        model: a causal language model wrapped by PEFT, in main memory.
        dtype: what is computed in.
        device: that it trains on.

    Raises:
        MistakeError: bitsandbytes is not installed; the sentence begins with the key below `stages.NAME`.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise MistakeError("load_in_4bit needs bitsandbytes; run uv sync --extra four-bit") from None
    stack = layer_stack(model)
    for path, module in list(model.named_modules()):
        is_adapter = any(part.startswith("lora_") for part in path.split("."))
        if type(module) is not nn.Linear or is_adapter or place(path, stack)[0] == OUTSIDE:
            continue
        if module.in_features % BLOCK:  # bitsandbytes 0.50.2 reads such rows back with the scales of others, on a CPU
            continue
        smaller = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        smaller.weight, smaller.bias = weight, module.bias
        smaller.support_avx512bf16_for_cpu = False  # it repacks weights in evaluation, and has no gradient from then on
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, smaller.to(device))
