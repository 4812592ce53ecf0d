"""Read one safetensors file tensor by tensor, into memory that is freed again.

The library's own reader maps the file, so every page that was read counts as memory of the process until the
file is closed: for a large base that is the base. It is used here for what it is best at, refusing files that
are truncated or hostile.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from stages.errors import MistakeError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIECE = 1 << 23  # numbers
REPRO = "delete it and run `dvc repro`"

Specification = tuple[list[int], str]  # shape, safetensors dtype


class TensorFile:
    """The header of a safetensors file, and its tensors when asked.

    Args:
        path: the file.
        fix: what to do with one that is not whole.

    Raises:
        MistakeError: it is missing, cut short, its header does not describe its bytes exactly, or a dtype is unknown.
    """

    def __init__(self, path: Path, fix: str = REPRO) -> None:
        try:
            with safe_open(path, framework="pt"):  # checks header, shapes, dtypes and offsets against the file
                pass
        except (SafetensorError, OSError) as error:
            raise MistakeError(f"{path} is not a whole safetensors file ({str(error).strip()}); {fix}") from None
        self.path = path
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._header = json.loads(file.read(length))
        self.metadata: dict[str, str] = self._header.pop("__metadata__", None) or {}
        self._start = 8 + length
        for name, entry in self._header.items():
            if entry["dtype"] not in DTYPES:
                raise MistakeError(
                    f"{path}: {name} is {entry['dtype']}, which is not read; save it as float or bfloat16"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def specification(self, name: str) -> Specification:
        """Shape and safetensors dtype (such as `BF16`) of one tensor, from the header alone."""
        entry = self._header[name]
        return entry["shape"], entry["dtype"]

    def read(self, name: str) -> torch.Tensor:
        """One tensor with the shape and dtype of the file."""
        shape, dtype = self.specification(name)
        return self._bytes(*self._header[name]["data_offsets"]).view(DTYPES[dtype]).reshape(shape)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor in one dimension and of its dtype, in pieces of at most PIECE numbers."""
        first, end = self._header[name]["data_offsets"]
        dtype = DTYPES[self._header[name]["dtype"]]
        step = PIECE * dtype.itemsize
        for start in range(first, end, step):
            yield self._bytes(start, min(start + step, end)).view(dtype)

    def _bytes(self, first: int, end: int) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(self.path, np.uint8, end - first, offset=self._start + first))


def size(specification: Specification) -> int:
    """Bytes that a tensor takes in a file."""
    shape, dtype = specification
    return math.prod(shape) * DTYPES[dtype].itemsize
