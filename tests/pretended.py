"""A device that is not there: its tensors have their values in main memory, and refuse to meet those not on it.

What it stands for is a GPU, which would refuse them too, and which takes its place where one is to be seen. It goes by
the name `meta`, the only one whose gradients a build of torch for the processor computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("meta")
BETWEEN = {aten.copy_, aten._to_copy, aten.to}  # what takes values from one device to another
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}  # by indices that may be elsewhere


class Pretended(torch.Tensor):
    """A tensor that says it is on the device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Pretended":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` puts its numbers onto a device without an operation."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.tensor or torch.device(kwargs.get("device") or "cpu") != DEVICE:
            return function(*args, **kwargs)
        return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)


@contextmanager
def device() -> Iterator[torch.device]:
    """Within the block the device is there."""
    if DEVICE.type == "cuda":
        yield DEVICE
        return
    with _Literals(), _Operations():
        yield DEVICE


def _compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation in main memory, if all that it gets is on one device; its results are there too."""
    if operation is aten._fused_sdp_choice.default:
        return 0  # attention by plain products, for the fused ones are the processor's
    if operation is aten._has_compatible_shallow_copy_type.default:
        return False  # a module that is moved gets new parameters
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in given if isinstance(each, Pretended)]
    judged = args[:1] if operation in INDEXED else given
    apart = [
        each for each in judged if isinstance(each, torch.Tensor) and not isinstance(each, Pretended) and each.dim()
    ]
    if there and apart and operation.overloadpacket not in BETWEEN:
        raise RuntimeError(f"{operation} was given tensors on the device and tensors of {apart[0].shape} that are not")
    asked = kwargs.get("device")
    asked = next((each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.device)), None)
    is_there = bool(there) if asked is None else asked == DEVICE
    if operation is aten.copy_.default:
        is_there = isinstance(args[0], Pretended)
    owners = {id(each.held): each for each in there}
    args, kwargs = tree_map(_in_memory, (args, kwargs))
    found = operation(*args, **kwargs)

    def wrapped(each: Any) -> Any:
        if not isinstance(each, torch.Tensor) or not is_there:
            return each
        return owners[id(each)] if id(each) in owners else Pretended(each)

    return tree_map(wrapped, found)


def _in_memory(each: Any) -> Any:
    if isinstance(each, Pretended):
        return each.held
    return torch.device("cpu") if isinstance(each, torch.device) else each
