"""Virtual checkpoints: the weights of base, stage or merged model, computed module by module when asked.

Nothing but the base and the adapters is on disk. A stage's effective weights are its parent's with its
adapter applied, in float32 whatever the files hold; its delta is the difference of the two.
"""

from __future__ import annotations

import copy
import re
import warnings
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, read_json

Tensors = dict[str, torch.Tensor]

# PEFT says this of every norm in LN-tuning, and norms are what LN-tuning is for.
warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)


class Checkpoint:
    """A model's weights in one or several safetensors files of one folder.

    Args:
        folder: holds config.json and *.safetensors.
        name: what reports call it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118
        if not self._where:
            raise MistakeError(f"{folder} holds no .safetensors file; run `dvc repro`")

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: every module with its name and shape, no memory."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder))

    @cached_property
    def modules(self) -> dict[str, list[str]]:
        """Names of the parameters stored under each module, such as `{"lm_head": ["weight"]}`."""
        modules: dict[str, list[str]] = {}
        for name in sorted(self._where):
            module, _, parameter = name.rpartition(".")
            modules.setdefault(module, []).append(parameter)
        return modules

    def stored(self, name: str) -> torch.Tensor:
        """One tensor as the file holds it.

        Raises:
            KeyError: no tensor of that name.
        """
        return self._where[name].get_tensor(name)

    def specification(self, name: str) -> tuple[list[int], str]:
        """Shape and safetensors dtype (such as `BF16`) of one tensor, read from the header alone."""
        view = self._where[name].get_slice(name)
        return view.get_shape(), view.get_dtype()

    def module(self, path: str) -> Tensors:
        """Parameters stored under module `path`, in float32."""
        return {parameter: self.stored(f"{path}.{parameter}").float() for parameter in self.modules[path]}

    def changed(self) -> list[str]:
        """Modules that differ from the file's: none here, a stage's lineage in a virtual checkpoint."""
        return []


class VirtualCheckpoint:
    """A stage: its parent's weights with its own adapter applied.

    Args:
        name: the stage's.
        parent: what it was trained on.
        folder: its PEFT adapter.

    The last module is kept, so that a chain, or several stages with one parent, compute it once.
    """

    def __init__(self, name: str, parent: Checkpoint | VirtualCheckpoint, folder: Path) -> None:
        self.name, self.parent, self.folder = name, parent, folder
        self.base: Checkpoint = parent.base if isinstance(parent, VirtualCheckpoint) else parent
        self.adapter = Adapter(folder, self.base)
        self._last: tuple[str, Tensors] = ("", {})

    def module(self, path: str) -> Tensors:
        """Effective parameters of module `path`, in float32."""
        if self._last[0] != path:
            weights = self.parent.module(path)
            self._last = (
                path,
                self.adapter.apply(path, weights) if path in self.adapter.modules else weights,
            )
        return self._last[1]

    def delta(self, path: str) -> Tensors:
        """What this stage itself changed in module `path`: effective minus the parent's, in float32."""
        if path not in self.adapter.modules:
            return {parameter: torch.zeros_like(weight) for parameter, weight in self.parent.module(path).items()}
        before = self.parent.module(path)
        return {parameter: weight - before[parameter] for parameter, weight in self.module(path).items()}

    def changed(self) -> list[str]:
        """Modules that this stage or one of its ancestors adapts."""
        return sorted({*self.parent.changed(), *self.adapter.modules})


class Adapter:
    """A PEFT adapter, merged into one module at a time.

    Each module is rebuilt alone in an otherwise empty tree, the adapter is injected there and PEFT itself
    merges it. The result is bit-identical to `merge_and_unload` on the whole model, without the model.
    """

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        self.base = base
        self.config = PeftConfig.from_pretrained(str(folder))
        self.config.inference_mode = True
        self.config.task_type = None
        self._file = safe_open(folder / "adapter_model.safetensors", framework="pt")
        self._keys = {key.removeprefix("base_model.model."): key for key in self._file.keys()}  # noqa: SIM118
        targets = re.compile(self.config.target_modules)
        self.modules = {name for name, _ in base.skeleton.named_modules() if targets.fullmatch(name)}

    @torch.no_grad()
    def apply(self, path: str, weights: Tensors) -> Tensors:
        """Parameters of module `path` after the merge, given those before it; dtype and shapes are kept."""
        tree = nn.Module()
        module = copy.deepcopy(self.base.skeleton.get_submodule(path))
        module.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
        *parents, last = path.split(".")
        leaf = tree
        for part in parents:
            leaf.add_module(part, nn.Module())
            leaf = leaf.get_submodule(part)
        leaf.add_module(last, module)
        inject_adapter_in_model(self.config, tree)
        state = {name: self._file.get_tensor(key) for name, key in self._keys.items() if name.startswith(f"{path}.")}
        set_peft_model_state_dict(tree, state)
        layer = tree.get_submodule(path)
        assert isinstance(layer, BaseTunerLayer)
        layer.merge()
        merged = layer.get_base_layer()
        return {name: getattr(merged, name).detach() for name in weights}


def open_checkpoint(name: str, opened: dict[str, Checkpoint | VirtualCheckpoint]) -> Checkpoint | VirtualCheckpoint:
    """The base or a stage by name, with its lineage; what is in `opened` already is shared, not read again."""
    if name not in opened:
        if name == "base":
            opened[name] = Checkpoint(BASE, name)
        else:
            record = CHECKPOINTS / name / "stage.json"
            if not record.exists():
                raise MistakeError(f"checkpoints/{name} holds no trained stage; run `dvc repro train@{name}`")
            parent = read_json(record)["parent"]
            opened[name] = VirtualCheckpoint(name, open_checkpoint(parent, opened), CHECKPOINTS / name)
    return opened[name]


def open_stages(names: list[str]) -> tuple[Checkpoint, list[VirtualCheckpoint]]:
    """The base, and the stages of these names; common ancestors are opened once."""
    opened: dict[str, Checkpoint | VirtualCheckpoint] = {}
    base = open_checkpoint("base", opened)
    stages = [open_checkpoint(name, opened) for name in names]
    assert isinstance(base, Checkpoint)
    return base, [stage for stage in stages if isinstance(stage, VirtualCheckpoint)]
