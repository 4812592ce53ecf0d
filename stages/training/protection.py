"""Weight changes kept off the inputs that earlier stages remember."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from stages.errors import MistakeError
from stages.files import CHECKPOINTS
from stages.models.loading import load_tokenizer
from stages.models.losses import Batch, pad
from stages.training.batches import Source
from stages.weights.checkpoint import open_base

BASES = "inputs.safetensors"  # beside the adapter: an orthonormal basis [in, q] of the inputs of each weight matrix
PREFIX = "base_model.model."
REMEMBERED_BATCHES = 16


def remember_inputs(
    model: PeftModel, energy: float, sources: list[Source], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """A basis of what the stage's own examples put into each weight matrix, for later stages to protect."""
    filler = load_tokenizer().pad_token_id
    shown = [source.batch(step) for source in sources if not source.replayed for step in range(REMEMBERED_BATCHES)]
    batches = (pad(examples, filler, accelerator.device) for examples in shown)
    architecture = open_base().architecture
    matrices = [path for path in architecture.select("all") if architecture.is_matrix(path)]
    with accelerator.autocast():
        return input_bases(model, matrices, batches, energy)


@torch.no_grad()
def input_bases(model: Any, matrices: list[str], batches: Iterable[Batch], energy: float) -> dict[str, torch.Tensor]:
    """An orthonormal basis of what comes into each weight matrix, float32 [in, q], by module name.

    Args:
        model: a causal language model, or one wrapped by PEFT.
        matrices: names of the modules in the unwrapped model.
        batches: what it is run on.
        energy: q is the smallest number of directions that hold this share of the inputs' squared norm.
    """
    model.eval()
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    sums: dict[str, torch.Tensor] = {}
    present: list[torch.Tensor] = []

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs[present[0]].float()
        sums[name] = sums.get(name, 0) + rows.T @ rows

    hooks = [
        inner.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in matrices
    ]
    try:
        for batch in batches:
            present[:] = [batch.present.bool()]
            model(input_ids=batch.ids, attention_mask=batch.present, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _basis(total, energy) for name, total in sums.items()}


def save_bases(bases: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the bases beside the adapter; half precision, for they are read back and made orthonormal again."""
    save_file({name: basis.half().contiguous() for name, basis in bases.items()}, folder / BASES)


@dataclass(frozen=True)
class _Kept:
    """One trained parameter, what its change is counted from, and the inputs that must not feel it."""

    parameter: nn.Parameter
    start: torch.Tensor
    basis: torch.Tensor | None  # [in, q]; None: it may not change at all
    transposed: bool

    @torch.no_grad()
    def project(self) -> None:
        change = self.parameter - self.start
        if self.basis is None:
            change.zero_()
        else:
            rows = change.T if self.transposed else change  # [out, in]
            rows -= rows @ self.basis @ self.basis.T
        self.parameter.copy_(self.start + change)


class Protection:
    """Keeps the weight changes of a stage orthogonal to the inputs that earlier stages remember.

    Of a LoRA it projects A, which reads the inputs; B is free. Norms and biases act on every input, so they stay.

    Args:
        model: the wrapped model, before its first step.
        stages: names of the protected stages, which remember their inputs.

    Raises:
        MistakeError: nothing is left to train.
    """

    def __init__(self, model: Any, stages: list[str]) -> None:
        remembered = [load_file(CHECKPOINTS / stage / BASES) for stage in stages]
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and ".lora_B." not in name]
        self._kept = [_keep(model, name.removeprefix(PREFIX), parameter, remembered) for name, parameter in trained]
        if all(kept.basis is None for kept in self._kept):
            raise MistakeError(
                f"params.yaml: a stage that protects {', '.join(stages)} has nothing left to train, for norms, biases,"
                " experts and routers act on every input; name weight matrices in layers, or use replay in place of"
                " protect"
            )
        self()

    def __call__(self) -> None:
        """Take out of every change so far what answers to the protected inputs."""
        for kept in self._kept:
            kept.project()


def _keep(model: Any, name: str, parameter: nn.Parameter, remembered: list[dict[str, torch.Tensor]]) -> _Kept:
    is_lora = ".lora_A." in name
    owner = name.rpartition(".")[0]
    path = name.partition(".lora_A.")[0] if is_lora else owner.replace(".ln_tuning_layers.default", "")
    bases = [bases[path].float() for bases in remembered if path in bases]
    basis = torch.linalg.qr(torch.cat(bases, 1)).Q.to(parameter.device) if bases and parameter.dim() == 2 else None
    if is_lora:  # B·A is the change, so all of A counts, its random start too
        return _Kept(parameter, torch.zeros_like(parameter), basis, transposed=False)
    is_conv = isinstance(model.get_submodule(f"{PREFIX}{owner}"), Conv1D)
    return _Kept(parameter, parameter.detach().clone(), basis, transposed=is_conv)


def _basis(total: torch.Tensor, energy: float) -> torch.Tensor:
    """Leading eigenvectors of the inputs' second moments [in, in], enough of them to hold `energy` of its trace."""
    values, vectors = torch.linalg.eigh(total.double())
    held = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    return vectors.flip(1)[:, : int((held < energy).sum()) + 1].float()
