"""Write one safetensors file tensor by tensor, with one tensor in memory at a time.

The format (huggingface.co/docs/safetensors) puts every shape and offset before the data, and the library's
own `save_file` therefore wants all tensors at once. Shapes and dtypes of a merge are known beforehand, so
the header is written first and the tensors follow in its order.
"""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch

SIZES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Specification = tuple[list[int], str]  # shape, safetensors dtype


def order(specifications: dict[str, Specification]) -> list[str]:
    """Tensor names in the order of the file: widest dtype first, so that every tensor is aligned, then by name."""
    return sorted(specifications, key=lambda name: (-SIZES[specifications[name][1]], name))


def write_single_file(
    path: Path,
    specifications: dict[str, Specification],
    tensor: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """Write `path` in one step: a failure or a kill leaves nothing under that name.

    Args:
        path: the .safetensors file.
        specifications: shape and dtype of each tensor.
        tensor: called once for each name, in the order of `order`.
        metadata: the file's `__metadata__`.

    Raises:
        ValueError: a tensor's shape or size differs from its specification.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order(specifications):
        shape, dtype = specifications[name]
        end = offset + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order(specifications):
            shape, dtype = specifications[name]
            values = tensor(name).contiguous()
            data = values.reshape(-1).view(torch.uint8).numpy()
            if list(values.shape) != shape or data.nbytes != math.prod(shape) * SIZES[dtype]:
                raise ValueError(f"{name} is {list(values.shape)} {values.dtype}, expected {shape} {dtype}")
            file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
