"""Frozen weights divided among processes (FSDP, arXiv 2304.11277), for a model that one GPU does not hold.

What a stage trains is small beside the model, so every process keeps all of it, and optimizer, resuming and saving are
as they are with one. A frozen layer is put together when it is needed, and let go again.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stages.models.architecture import OUTSIDE, layer_stack, place

DIVIDED = (DistributedType.FSDP,)


def is_divided(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the frozen weights alone (FSDP)."""
    return accelerator.distributed_type in DIVIDED


def load_everywhere() -> None:
    """Have every process read the weights: with FSDP, transformers lets the first one alone do it unless it is told."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard(model: Any, accelerator: Accelerator) -> None:
    """Give each process its part of the frozen weights, on its device, and the whole adapter.

    One layer at a time goes to the device as a whole. Backward it has to do so in every process: a gradient goes down
    to the first trained layer even where the tokens of one process reach nothing that is trained, such as experts.

    Args:
        model: wrapped by PEFT, in main memory; its frozen weights are of one dtype.
        accelerator: with as many processes as parts.
    """
    adapter = {p for name, p in model.named_parameters() if p.requires_grad or model.base_model.prefix in name}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    stack = layer_stack(model)
    layers = model.get_submodule(stack)
    trained = {place(name, stack)[0] for name, p in model.named_parameters() if p.requires_grad} - {OUTSIDE}
    if trained:
        layers[min(trained)].register_forward_pre_hook(_with_gradient, with_kwargs=True)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    fully_shard(model, mesh=mesh, ignored_params=adapter)
    with torch.no_grad():
        for parameter in adapter:
            parameter.data = parameter.data.to(accelerator.device)


def _with_gradient(_: nn.Module, args: tuple[Any, ...], keys: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a layer's hidden states have a gradient, as a copy that the layer may write to."""
    hidden = args[0] if args else keys["hidden_states"]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_().clone()
    return ((hidden, *args[1:]), keys) if args else (args, keys | {"hidden_states": hidden})
