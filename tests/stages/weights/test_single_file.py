"""The file that is written tensor by tensor, on systems that lack a call: safetensors' own reader is the truth."""

import os

import pytest
import torch
from safetensors.torch import load_file

from stages.errors import MistakeError
from stages.weights.single_file import single_file

TENSORS = {
    "half": torch.arange(7, dtype=torch.float16),
    "whole": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "brain": torch.ones(2, 2, dtype=torch.bfloat16),
    "none": torch.zeros(0),
}
DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
SPECIFICATIONS = {name: (list(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("missing", [[], ["posix_fallocate"], ["pwrite"], ["posix_fallocate", "pwrite"]])
def test_what_was_put_in_is_read_back(workspace, monkeypatch, missing):
    """macOS has no posix_fallocate, Windows neither of them."""
    for call in missing:
        monkeypatch.delattr(os, call)
    path = workspace / "model.safetensors"
    with single_file(path, SPECIFICATIONS, {"a": "b"}) as file:
        whole = path.with_name("model.safetensors.tmp").stat().st_size
        for name in reversed(TENSORS):  # the order of the file is its own affair
            file.put(name, TENSORS[name])
    assert path.stat().st_size == whole  # the file had its length before the first tensor
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # of the header, for tensors to be aligned
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("call", ["posix_fallocate", "ftruncate"])
def test_a_disk_that_is_too_small_is_one_sentence(workspace, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    if call == "ftruncate":
        monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, call, full)
    path = workspace / "model.safetensors"
    with pytest.raises(MistakeError, match="cannot be written"), single_file(path, SPECIFICATIONS, {}):
        pass
    assert not list(workspace.glob("model*"))
