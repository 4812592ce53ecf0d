"""A PEFT adapter, applied to one module at a time.

LoRA, DoRA, VeRA and replaced weights have a few lines of algebra here, bit-identical to PEFT's `merge_and_unload`
(tests prove it); every other kind is merged by PEFT itself, on a module rebuilt alone in an empty tree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.errors import MistakeError
from stages.files import read_json
from stages.models.architecture import Architecture
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
BIAS = "base_layer.bias"  # trained beside an adapter, with `bias` of PEFT's configuration
BIASES = {BIAS, "lora_B.bias"}
SHARED = ("base_model.vera_A", "base_model.vera_B")  # VeRA's random factors, one pair for all modules
FIX = "use an adapter that was trained on this base"


class Adapter:
    """What one stage's folder does to the modules of a model.

    Args:
        folder: adapter_config.json and adapter_model.safetensors, in PEFT's format.
        architecture: of the model it belongs to.

    Attributes:
        modules: names of the modules that it adapts.

    Raises:
        MistakeError: it is no adapter, or a tensor of it fits no module of the model.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder, self.architecture = folder, architecture
        self.config: dict[str, Any] = read_json(folder / "adapter_config.json")
        if not isinstance(self.config, dict) or "peft_type" not in self.config:
            raise MistakeError(
                f"{folder / 'adapter_config.json'} is none of PEFT's; delete {folder}, and run `dvc repro`"
            )
        self._is_lora = self.config["peft_type"] == "LORA"
        self._file = TensorFile(folder / "adapter_model.safetensors")
        self._targets = self._targeted()
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
        """Whether the delta of the weight of `path` has low-rank factors: plain LoRA, rsLoRA and VeRA have them."""
        parts = set(self._keys[path]) - BIASES
        return parts == VERA or (self._is_lora and parts == {"lora_A.weight", "lora_B.weight"})

    def has_bias(self, path: str) -> bool:
        """Whether it changes the bias of `path` beside its weight."""
        return bool(BIASES & self._keys[path].keys())

    def factors(self, path: str, parameter: str = "weight") -> Factors | None:
        """The delta of a parameter as left [rows, r] @ right [r, columns], float32; None if it is not low-rank.

        Of a stack of experts they are [experts, rows, r] and [experts, r, columns].
        """
        if parameter in self._targets.get(path, []):
            return self._factors_beside(path, parameter)
        if parameter != "weight" or not self.is_low_rank(path):
            return None
        if VERA & set(self._keys[path]):
            up, down = self._vera(path)
        else:
            down, up = self._read(path, "lora_A.weight"), self._read(path, "lora_B.weight") * self.scaling(path)
        return (down.T, up.T) if self._is_transposed(path) else (up, down)

    def _factors_beside(self, path: str, parameter: str) -> Factors:
        down, up = (self._read(path, f"{parameter}.lora_{side}.weight") for side in "AB")
        up *= self.scaling(path, parameter)
        experts, *matrix = self.architecture.modules[path].parameters[parameter]
        if len(matrix) == 1:
            return up, down
        down, up = down.reshape(experts, -1, down.shape[1]), up.reshape(len(up), -1, experts).permute(2, 0, 1)
        return (down.mT, up.mT) if self._has_transposed_experts(path) else (up, down)

    def rank(self, path: str) -> int | None:
        """Rank of the LoRA, DoRA or VeRA of a weight matrix, None for every other adapter."""
        if VERA & set(self._keys[path]):
            return self._file.specification(SHARED[0])[0][0]
        key = self._keys[path].get("lora_A.weight")
        return self._file.specification(key)[0][0] if key and self._is_lora else None

    @torch.no_grad()
    def apply(self, path: str, weights: Tensors) -> Tensors:
        """Parameters of module `path` after the merge, given those before it; dtype and shapes are kept."""
        parts = self._keys[path].keys()
        if self.config["peft_type"] == "LN_TUNING":  # beside a trained output layer PEFT saves the old one
            return weights | {name: self._read(path, name) for name in parts if not name.startswith("base_layer.")}
        if parts <= weights.keys():
            return weights | {name: self._read(path, name) for name in parts}
        if path in self._targets:
            changed = {name: self._parameter(path, name, weights[name]) for name in self._targets[path]}
            return weights | {name: self._read(path, name) for name in parts & weights.keys()} | changed
        if self._is_lora and parts <= LORA:
            return weights | self._lora(path, weights)
        if parts <= VERA | {BIAS} and parts >= VERA:
            return weights | self._vera_merged(path, weights)
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
        merged = weights["weight"] + delta.mul_(self.scaling(path))
        for part in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
            if part in self._keys[path]:
                rows = merged.T if transpose else merged
                factor = (self._read(path, part) / torch.linalg.norm(rows, dim=1)).view(-1, 1)
                merged.mul_(factor.T if transpose else factor)
        if "lora_B.bias" in self._keys[path]:
            return {"weight": merged, "bias": weights["bias"] + self._read(path, "lora_B.bias") * self.scaling(path)}
        return {"weight": merged}

    def _parameter(self, path: str, name: str, weight: torch.Tensor) -> torch.Tensor:
        """W + s·B·A, of a stack of matrices each with factors of its own, as PEFT's ParamWrapper has them.

        In A [experts·r, in] the rows of an expert follow each other, in B [out, r·experts] its columns are apart.
        """
        down, up = (self._read(path, f"{name}.lora_{side}.weight") for side in "AB")
        if (experts := _experts(weight.shape)) == 1:
            delta = up @ down
        else:
            down, up = down.reshape(experts, -1, down.shape[1]), up.reshape(len(up), -1, experts)
            shape = "eio" if self._has_transposed_experts(path) else "eoi"
            delta = torch.einsum(f"ore,eri->{shape}", up, down)
        return weight + delta.mul_(self.scaling(path, name))

    def _vera_merged(self, path: str, weights: Tensors) -> Tensors:
        up, down = self._vera(path)
        merged = {"weight": weights["weight"] + ((up @ down).T if self._is_transposed(path) else up @ down)}
        return merged | {"bias": self._read(path, BIAS)} if BIAS in self._keys[path] else merged

    def _vera(self, path: str) -> Factors:
        """diag(b)·B [out, r] and diag(d)·A [r, in] (arXiv 2310.11454): of the shared pair, what fits the weight."""
        rows, columns = self._shape(path)
        down, up = (self._file.read(key).float() for key in SHARED)
        scales = (self._read(path, part)[:, None] for part in ("vera_lambda_b", "vera_lambda_d"))
        return next(scales) * up[:rows], next(scales) * down[:, :columns]

    def _merge_by_peft(self, path: str, weights: Tensors) -> Tensors:
        """Inject the adapter into a tree that holds this module alone, and let PEFT merge it."""
        from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        tree, module = nn.Module(), self._empty(path)
        module.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
        *parents, last = path.split(".")
        leaf = tree
        for part in parents:
            leaf.add_module(part, nn.Module())
            leaf = leaf.get_submodule(part)
        leaf.add_module(last, module)
        config = PeftConfig.from_pretrained(str(self.folder))
        config.task_type, config.target_modules = None, re.escape(path)
        config.modules_to_save = None  # they are other modules
        inject_adapter_in_model(config, tree)
        set_peft_model_state_dict(tree, {f"{path}.{part}": self._read(path, part) for part in self._keys[path]})
        layer = tree.get_submodule(path)
        assert isinstance(layer, BaseTunerLayer)
        layer.merge()
        merged = layer.get_base_layer()
        return {name: getattr(merged, name).detach() for name in weights}

    def _empty(self, path: str) -> nn.Module:
        """Module `path` without its weights.

        Raises:
            MistakeError: it is of a kind that cannot be made alone.
        """
        from transformers.pytorch_utils import Conv1D

        module = self.architecture.modules[path]
        with torch.device("meta"):
            match module.kind, module.parameters.get("weight"):
                case "linear", [rows, columns]:
                    return nn.Linear(columns, rows, bias="bias" in module.parameters)
                case "conv1d", [columns, rows]:
                    return Conv1D(rows, columns)
                case "embedding", [rows, columns]:
                    return nn.Embedding(rows, columns)
        raise MistakeError(
            f"{self.folder}: an adapter of type {self.config['peft_type']} on {path} cannot be merged; use lora or full"
        )

    def _targeted(self) -> dict[str, list[str]]:
        """Parameters that the adapter is beside, and not beside their module, by module; suffixes name them."""
        found = {
            path: [name for name in module.parameters if self._is_target(f"{path}.{name}")]
            for path, module in self.architecture.modules.items()
            if module.kind != "linear"  # beside the weight or beside the module is the same
        }
        return {path: names for path, names in found.items() if names}

    def _is_target(self, name: str) -> bool:
        """Whether `target_parameters` names a parameter."""
        return f".{name}".endswith(tuple(f".{target}" for target in self.config.get("target_parameters") or []))

    def _place(self, key: str) -> tuple[str, str]:
        """Module that a tensor of the file belongs to, and the rest of its name."""
        # LN-tuning copies a module with all that is in it: what it holds has the name of what it takes the place of.
        name = path = key.removeprefix(PREFIX).replace(".ln_tuning_layers.", ".")
        while path := path.rpartition(".")[0]:
            if path in self.architecture.modules:
                return path, self._part(path, name.removeprefix(f"{path}."))
        raise MistakeError(f"{self._file.path}: {key} belongs to no module of the base; {FIX}")

    def _part(self, path: str, part: str) -> str:
        """What a tensor of a module is: `lora_A.weight`, or beside a parameter `gate_up_proj.lora_A.weight`.

        PEFT wraps a module anew for each of its parameters, the last one outermost.
        """
        targets, inner = self._targets.get(path, []), part.count("base_layer.")
        rest = part.replace("base_layer.", "") if targets else part
        return f"{targets[-1 - inner]}.{rest}" if rest.startswith("lora_") and inner < len(targets) else rest

    def _check_shapes(self, path: str) -> None:
        """Compare what the file says of its tensors with the module they belong to."""
        found = {part: self._file.specification(key)[0] for part, key in self._keys[path].items()}
        if "lora_B.bias" in found and "bias" not in self.architecture.modules[path].parameters:
            raise MistakeError(
                f"{self._file.path}: {self._keys[path]['lora_B.bias']} is for a bias, and {path} has none; give the"
                " base biases with base.add_biases, or use an adapter without lora_bias"
            )
        for name, shape in self.architecture.modules[path].parameters.items():
            wanted: dict[str, list[int | None]] = {name: [*shape]}
            if name == "weight" and len(shape) == 2:
                rows, columns = shape[::-1] if self._is_transposed(path) else shape
                wanted |= {"lora_A.weight": [None, columns], "lora_B.weight": [rows, None]}
                wanted |= {"vera_lambda_b": [rows]}
                wanted |= {"lora_embedding_A": [None, rows], "lora_embedding_B": [columns, None]}
            if name in self._targets.get(path, []):
                is_transposed = len(shape) == 3 and self._has_transposed_experts(path)
                rows, columns = shape[-2:][::-1] if is_transposed else shape[-2:]
                wanted |= {f"{name}.lora_A.weight": [None, columns], f"{name}.lora_B.weight": [rows, None]}
            for part in found.keys() & wanted.keys():
                if not _fits(found[part], wanted[part]):
                    raise MistakeError(
                        f"{self._file.path}: {self._keys[path][part]} is {found[part]}, which does not fit"
                        f" {path}.{name} of {shape}; {FIX}"
                    )

    def _read(self, path: str, part: str) -> torch.Tensor:
        return self._file.read(self._keys[path][part]).float()

    def _is_transposed(self, path: str) -> bool:
        """Whether the weight is [in, out]; what the module is decides, as it does in PEFT, and not the config."""
        return self.architecture.is_transposed(path)

    def _has_transposed_experts(self, path: str) -> bool:
        """Whether parameters of experts are [experts, in, out]."""
        return self.architecture.modules[path].kind == "transposed_experts"

    def _shape(self, path: str) -> list[int]:
        """[out, in] of a weight matrix."""
        shape = self.architecture.modules[path].parameters["weight"]
        return shape[::-1] if self._is_transposed(path) else shape

    def scaling(self, path: str, parameter: str = "") -> float:
        """alpha/r, or alpha/√r for rsLoRA (arXiv 2312.03732); r is what the file holds, for each expert."""
        target, experts = f"{path}.weight" if self._is_target(f"{path}.weight") else path, 1
        part = "lora_embedding_A" if "lora_embedding_A" in self._keys[path] else "lora_A.weight"
        if parameter:
            target, part = f"{path}.{parameter}", f"{parameter}.{part}"
            experts = _experts(self.architecture.modules[path].parameters[parameter])
        rank = self._file.specification(self._keys[path][part])[0][0] // experts
        alpha = self.config.get("lora_alpha", 8)  # PEFT's default
        if patterns := self.config.get("alpha_pattern"):
            from peft.utils.other import get_pattern_key

            alpha = patterns.get(get_pattern_key(list(patterns), target), alpha)
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _experts(shape: Sequence[int]) -> int:
    """How many matrices a parameter is."""
    return shape[0] if len(shape) == 3 else 1


def _fits(shape: list[int], wanted: list[int | None]) -> bool:
    """Whether a shape is the wanted one, in which None is any size."""
    return len(shape) == len(wanted) and all(want in (None, have) for have, want in zip(shape, wanted, strict=True))
