"""A PEFT adapter, applied to one module at a time.

LoRA, DoRA, VeRA and replaced weights have a few lines of algebra here, bit-identical to PEFT's `merge_and_unload`
(tests prove it); every other kind is merged by PEFT itself, on a module rebuilt alone in an empty tree.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.errors import MistakeError
from stages.weights.tensor_file import TensorFile

Tensors = dict[str, torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]

PREFIX = "base_model.model."
LORA = {
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
}
VERA = {"vera_lambda_b", "vera_lambda_d"}
SHARED = ("base_model.vera_A", "base_model.vera_B")  # VeRA's random factors, one pair for all modules
FIX = "use an adapter that was trained on this base"

# PEFT says this of every norm in LN-tuning, and norms are what LN-tuning is for.
warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)


class Adapter:
    """What one stage's folder does to the modules of a model.

    Args:
        folder: adapter_config.json and adapter_model.safetensors, in PEFT's format.
        skeleton: the model it belongs to, on the meta device.

    Attributes:
        modules: names of the modules that it adapts.

    Raises:
        MistakeError: a tensor of the adapter fits no module of the model.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel) -> None:
        self.skeleton = skeleton
        self.config = PeftConfig.from_pretrained(str(folder))
        self._file = TensorFile(folder / "adapter_model.safetensors")
        self._own = {path: module for path, module in skeleton.named_modules() if module._parameters}
        self._keys: dict[str, dict[str, str]] = {}  # by module, then by the rest of the name
        for key in (key for key in self._file if key not in SHARED):
            path, part = self._place(key)
            self._keys.setdefault(path, {})[part] = key
        self.modules = set(self._keys)
        for path in self.modules:
            self._check_shapes(path)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(
            math.prod(self._file.specification(key)[0]) for parts in self._keys.values() for key in parts.values()
        )

    def is_low_rank(self, path: str) -> bool:
        """Whether the delta of module `path` has low-rank factors: plain LoRA, rsLoRA and VeRA have them."""
        parts = set(self._keys[path])
        return parts == VERA or (isinstance(self.config, LoraConfig) and parts == {"lora_A.weight", "lora_B.weight"})

    def factors(self, path: str) -> Factors | None:
        """The delta of module `path` as left [rows, r] @ right [r, columns], float32; None if it is not low-rank."""
        if not self.is_low_rank(path):
            return None
        if VERA & set(self._keys[path]):
            up, down = self._vera(path)
        else:
            down, up = self._read(path, "lora_A.weight"), self._read(path, "lora_B.weight") * self._scaling(path)
        return (down.T, up.T) if self._is_transposed(path) else (up, down)

    def rank(self, path: str) -> int | None:
        """Rank of the LoRA, DoRA or VeRA of a weight matrix, None for every other adapter."""
        if VERA & set(self._keys[path]):
            return self._file.specification(SHARED[0])[0][0]
        key = self._keys[path].get("lora_A.weight")
        return self._file.specification(key)[0][0] if key and isinstance(self.config, LoraConfig) else None

    @torch.no_grad()
    def apply(self, path: str, weights: Tensors) -> Tensors:
        """Parameters of module `path` after the merge, given those before it; dtype and shapes are kept."""
        parts = {part.removeprefix("ln_tuning_layers."): part for part in self._keys[path]}
        if parts.keys() <= {"weight", "bias"}:
            return weights | {name: self._read(path, part) for name, part in parts.items()}
        if isinstance(self.config, LoraConfig) and parts.keys() <= LORA:
            return weights | self._lora(path, weights)
        if parts.keys() == VERA:
            up, down = self._vera(path)
            return weights | {"weight": weights["weight"] + ((up @ down).T if self._is_transposed(path) else up @ down)}
        return self._merge_by_peft(path, weights)

    def _lora(self, path: str, weights: Tensors) -> Tensors:
        """W + s·B·A, and for DoRA (arXiv 2402.09353) its rows scaled to the norms of the magnitude vector."""
        transpose = self._is_transposed(path)
        if "lora_embedding_A" in self._keys[path]:
            delta = (self._read(path, "lora_embedding_B") @ self._read(path, "lora_embedding_A")).T
            transpose = True
        else:
            delta = self._read(path, "lora_B.weight") @ self._read(path, "lora_A.weight")
            delta = delta.T if transpose else delta
        merged = weights["weight"] + delta.mul_(self._scaling(path))
        for part in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
            if part in self._keys[path]:
                rows = merged.T if transpose else merged
                factor = (self._read(path, part) / torch.linalg.norm(rows, dim=1)).view(-1, 1)
                merged.mul_(factor.T if transpose else factor)
        if "lora_B.bias" in self._keys[path]:
            return {"weight": merged, "bias": weights["bias"] + self._read(path, "lora_B.bias") * self._scaling(path)}
        return {"weight": merged}

    def _vera(self, path: str) -> Factors:
        """diag(b)·B [out, r] and diag(d)·A [r, in] (arXiv 2310.11454): of the shared pair, what fits the weight."""
        rows, columns = self._own[path].weight.shape[:: -1 if self._is_transposed(path) else 1]
        down, up = (self._file.read(key).float() for key in SHARED)
        scales = (self._read(path, part)[:, None] for part in ("vera_lambda_b", "vera_lambda_d"))
        return next(scales) * up[:rows], next(scales) * down[:, :columns]

    def _merge_by_peft(self, path: str, weights: Tensors) -> Tensors:
        """Inject the adapter into a tree that holds this module alone, and let PEFT merge it."""
        tree = nn.Module()
        module = copy.deepcopy(self.skeleton.get_submodule(path))
        module.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
        *parents, last = path.split(".")
        leaf = tree
        for part in parents:
            leaf.add_module(part, nn.Module())
            leaf = leaf.get_submodule(part)
        leaf.add_module(last, module)
        config = copy.copy(self.config)
        config.inference_mode, config.task_type, config.target_modules = True, None, re.escape(path)
        inject_adapter_in_model(config, tree)
        set_peft_model_state_dict(tree, {f"{path}.{part}": self._read(path, part) for part in self._keys[path]})
        layer = tree.get_submodule(path)
        assert isinstance(layer, BaseTunerLayer)
        layer.merge()
        merged = layer.get_base_layer()
        return {name: getattr(merged, name).detach() for name in weights}

    def _place(self, key: str) -> tuple[str, str]:
        """Module that a tensor of the file belongs to, and the rest of its name."""
        name = path = key.removeprefix(PREFIX)
        while path := path.rpartition(".")[0]:
            if path in self._own:
                return path, name.removeprefix(f"{path}.")
        raise MistakeError(f"{self._file.path}: {key} belongs to no module of the base; {FIX}")

    def _check_shapes(self, path: str) -> None:
        """Compare what the file says of its tensors with the module they belong to."""
        found = {part: self._file.specification(key)[0] for part, key in self._keys[path].items()}
        for name, weight in self._own[path].named_parameters(recurse=False):
            shape = list(weight.shape)
            wanted = {name: shape, f"ln_tuning_layers.{name}": shape}
            if name == "weight" and len(shape) == 2:
                rows, columns = shape[::-1] if self._is_transposed(path) else shape
                wanted |= {"lora_A.weight": [..., columns], "lora_B.weight": [rows, ...]}
                wanted |= {"vera_lambda_b": [rows]}
                wanted |= {"lora_embedding_A": [..., rows], "lora_embedding_B": [columns, ...]}
            for part in found.keys() & wanted.keys():
                if any(want not in (..., have) for have, want in zip(found[part], wanted[part], strict=True)):
                    raise MistakeError(
                        f"{self._file.path}: {self._keys[path][part]} is {found[part]}, which does not fit"
                        f" {path}.{name} of {shape}; {FIX}"
                    )

    def _read(self, path: str, part: str) -> torch.Tensor:
        return self._file.read(self._keys[path][part]).float()

    def _is_transposed(self, path: str) -> bool:
        """Whether the weight is [in, out]; what the module is decides, as it does in PEFT, and not the config."""
        return isinstance(self._own[path], Conv1D)

    def _scaling(self, path: str) -> float:
        """alpha/r, or alpha/√r for rsLoRA (arXiv 2312.03732); r is what the file holds."""
        part = "lora_embedding_A" if "lora_embedding_A" in self._keys[path] else "lora_A.weight"
        rank = self._file.specification(self._keys[path][part])[0][0]
        patterns = self.config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), path), self.config.lora_alpha)
        return alpha / (rank**0.5 if self.config.use_rslora else rank)
