"""Write one safetensors file tensor by tensor, in any order and from several processes.

The format (huggingface.co/docs/safetensors) puts every shape and offset before the data, and the library's
own `save_file` therefore wants all tensors at once. Shapes and dtypes of a merge are known beforehand, so
the header is written first and each tensor goes to its place when it is ready.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stages.errors import MistakeError
from stages.weights.tensor_file import NAMES, Specification, size


class SingleFile:
    """A safetensors file being written; make it with `single_file`.

    Attributes:
        path: where it is until it is whole; it can be read there, with zeros for what is not written yet.
    """

    def __init__(
        self, path: Path, descriptor: int, specifications: dict[str, Specification], metadata: dict[str, str]
    ) -> None:
        self.path, self._descriptor, self._specifications = path, descriptor, specifications
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for name in order(specifications):
            shape, dtype = specifications[name]
            start, end = end, end + size(specifications[name])
            self._offsets[name] = start
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._start = 8 + len(text)
        _claim(descriptor, self._start + end)
        _write_at(descriptor, struct.pack("<Q", len(text)) + text, 0)

    def put(self, name: str, values: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: its shape or dtype differs from its specification.
        """
        if (list(values.shape), NAMES[values.dtype]) != tuple(self._specifications[name]):
            raise ValueError(f"{name} is {list(values.shape)} {values.dtype}, expected {self._specifications[name]}")
        self.put_pieces(name, [values])

    def put_pieces(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Write one tensor as the pieces that follow each other in memory, of its dtype."""
        offset = self._start + self._offsets[name]
        for piece in pieces:
            view = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
            while view:
                written = _write_at(self._descriptor, view, offset)
                view, offset = view[written:], offset + written


def _claim(descriptor: int, length: int) -> None:
    """Give a file its length in bytes, and their room on the disk where the system can promise it.

    A disk that is too small is then told before an hour of merging, not after.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, length)
    else:  # macOS, Windows
        os.ftruncate(descriptor, length)


def _write_at(descriptor: int, content: bytes | memoryview, offset: int) -> int:
    """Write bytes from `offset` on; returns how many were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows, where no other process shares the file's position
    return os.write(descriptor, content)


def order(specifications: dict[str, Specification]) -> list[str]:
    """Tensor names in the order of the file: widest dtype first, so that every tensor is aligned, then by name."""
    return sorted(specifications, key=lambda name: (-size(([], specifications[name][1])), name))


@contextmanager
def single_file(path: Path, specifications: dict[str, Specification], metadata: dict[str, str]) -> Iterator[SingleFile]:
    """Yield a file to put every tensor into; it gets its name when the block ends, and after an error never.

    Args:
        path: the .safetensors file.
        specifications: shape and dtype of each tensor.
        metadata: the file's `__metadata__`.

    Raises:
        MistakeError: it cannot be written, as on a full disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield SingleFile(temporary, file.fileno(), specifications, metadata)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        gigabytes = sum(map(size, specifications.values())) / 1e9
        raise MistakeError(
            f"{path} cannot be written ({error.strerror}); it needs {gigabytes:.2f} GB on a disk that is writable"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
