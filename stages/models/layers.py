"""The modules of a model that a stage's `layers` name."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from stages.errors import MistakeError
from stages.models.architecture import MATRICES, Architecture, describe, is_norm, kind_of
from stages.settings.ranges import Layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def select(model: PreTrainedModel, setting: Layers) -> list[str]:
    """Dotted names of the modules with parameters that a stage's `layers` names (see `Architecture.select`)."""
    return describe(model).select(setting)


def mlp_width(config: PretrainedConfig) -> int | None:
    """Neurons of an MLP, the added ones with them; None if the architecture has no setting for it."""
    if hasattr(config, "n_inner"):
        return config.n_inner or 4 * config.n_embd
    return getattr(config, "intermediate_size", None)


def linear_modules(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Those of `modules` that are weight matrices (Linear and GPT-2's Conv1D); a warning tells what else has matrices.

    Raises:
        MistakeError: the embedding is among `modules`, and so was named; the sentence begins with the key below
            `stages.NAME`.
    """
    for path in modules:
        if model.get_submodule(path) is model.get_input_embeddings():
            raise MistakeError(
                f"layers names {path}, which is no matrix that an adapter goes beside; name the output layer alone, by"
                " lm_head: all, or choose full"
            )
    matrices = [path for path in modules if kind_of(model.get_submodule(path)) in MATRICES]
    if left := _left_out(describe(model), modules, matrices):
        warnings.warn(
            f"{', '.join(left)} of {type(model).__name__} stays as it is, for adapters go beside a Linear alone;"
            " method full trains it",
            stacklevel=2,
        )
    return matrices


def _left_out(architecture: Architecture, modules: list[str], matrices: list[str]) -> list[str]:
    """Kinds of `modules` that have matrices, are none of `matrices` and hold none, such as the experts of DBRX."""
    adapted, left = set(matrices), list[str]()
    for path in modules:
        shapes = architecture.modules[path].parameters.values()
        has_matrix = any(len(shape) > 1 and min(shape) > 1 for shape in shapes)
        is_known = path in adapted or architecture.lone_matrices(path)
        if has_matrix and not is_known and not any(other.startswith(f"{path}.") for other in matrices):
            left.append(architecture.place(path)[1])
    return list(dict.fromkeys(left))


def lone_matrices(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Names of the parameters of `modules` that are matrices of experts or of their router, and are in no Linear."""
    architecture = describe(model)
    return [f"{path}.{name}" for path in modules for name in architecture.lone_matrices(path)]


def all_in_modules(method: str, model: PreTrainedModel, modules: list[str]) -> list[str]:
    """The weight matrices among `modules`, none of which is a parameter of experts or of their router.

    Args:
        method: as a sentence calls it.
        model: the base or the parent.
        modules: those in the stage's layers.

    Raises:
        MistakeError: some are; the sentence begins with the key below `stages.NAME`.
    """
    matrices = linear_modules(model, modules)
    if lone := lone_matrices(model, modules):
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in matrices))
        ranges = ", ".join(f"{name}: all" for name in names)
        others = f"name the others, such as layers: {{{ranges}}}, " if names else ""
        raise MistakeError(
            f"method {method} does not go beside experts and routers of {type(model).__name__}, whose {lone[0]} is in"
            f" no Linear; {others}or choose lora without dropout, init and load_in_4bit, or full"
        )
    return matrices


def norm_modules(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Those of `modules` that are normalisations."""
    return [path for path in modules if is_norm(model.get_submodule(path))]


def parameters_of(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Names of the parameters that `modules` have themselves, except what their authors do not train by gradients."""
    found = {path: model.get_submodule(path).named_parameters(recurse=False) for path in modules}
    return [f"{path}.{name}" for path, own in found.items() for name, weights in own if weights.requires_grad]


def plain_matrices(method: str, model: PreTrainedModel, modules: list[str]) -> list[str]:
    """The weight matrices among `modules`, where all are Linear.

    Raises:
        MistakeError: they are GPT-2's Conv1D, which PEFT does not adapt by this method, or parameters of experts; the
            sentence begins with the key below `stages.NAME`.
    """
    matrices = all_in_modules(repr(method), model, modules)
    if any(kind_of(model.get_submodule(path)) != "linear" for path in matrices):
        raise MistakeError(
            f"method {method!r} (or its init or load_in_4bit) does not go with"
            f" {type(model).__name__}, whose weights are no Linear modules; choose lora, dora, ia3, adalora, bitfit, ln"
            " or full"
        )
    return matrices


def beside(method: str, model: PreTrainedModel, matrices: list[str]) -> list[str]:
    """The weight matrices themselves, where PEFT puts a LoRA beside all of them.

    Raises:
        MistakeError: it does not beside those that the kernels of Mamba read themselves; the sentence begins with the
            key below `stages.NAME`.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    names, refused = list(dict.fromkeys(path.rpartition(".")[2] for path in matrices)), []
    for name in names:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, name)
        except ValueError:
            refused.append(name)
    if refused:
        others = ", ".join(f"{name}: all" for name in names if name not in refused)
        raise MistakeError(
            f"method {method!r} does not go beside {' and '.join(refused)} of {type(model).__name__}, whose kernels"
            f" read the weight themselves; name the others, such as layers: {{{others}}}, or choose full"
        )
    return matrices
