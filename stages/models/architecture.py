"""What is to be known of a model's architecture, written down once by `base`.

Whatever comes after the training reads checkpoints/base/architecture.json, for importing one modeling file of
transformers takes longer than most merges.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from stages.errors import MistakeError, first_line
from stages.files import read_json, write_json
from stages.models.names import Piece, pieces_of, shapes_in, text_modules
from stages.settings.ranges import Layers, parse

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

FILE = "architecture.json"  # beside the weights
# What configs call the number of layers and of heads: first what is the decoder's own where an encoder has others, and
# last that of layers of several parts, of which num_hidden_layers counts the parts.
LAYERS = ("decoder_layers", "num_hidden_layers", "num_layers")
HEADS = ("decoder_attention_heads", "num_attention_heads")
OUTSIDE = -1  # the layer of a module that lies in none, such as an embedding
WHOLE = "layer"  # the kind of a layer itself, where it has parameters that are in none of its modules, as Doge's has

Kind = Literal["linear", "conv1d", "experts", "transposed_experts", "embedding", "norm", "other"]
MATRICES = ("linear", "conv1d")
STACKS = ("experts", "transposed_experts")
Group = Literal["attention", "mixer", "mlp", "experts", "router", "norms", "embeddings", ""]
GROUPS = {*get_args(Group)} - {""}
IN_MLP = ("mlp", "experts", "router")  # groups that `mlp` names
# Parts of the names of modules that make them one of the group, the first that does.
SHARED = {"shared_expert", "shared_experts", "shared_mlp"}
EXPERTS = {"experts", *SHARED}
OLD_NAMES = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}  # what experts once were, and PEFT renames
ROUTERS = {"router", "gate", "router_gate", "shared_expert_gate"}
MLPS = {"mlp", "mlps", "mlp_block", "feed_forward", "ff", "ffn", "block_sparse_moe"}
MLPS |= {"fc1", "fc2", "intermediate", "output"}  # of layers that have none of these around the matrices
MIXERS = {"mamba", "mixer", "temporal_block", "mlstm_layer", "conv"}  # Mamba, RG-LRU, mLSTM, short convolutions


@dataclass(frozen=True)
class Module:
    """A module with parameters of its own.

    Attributes:
        kind: `conv1d` is GPT-2's, whose weight is [in, out]; every other matrix is [out, in]. `experts` have several
            matrices in one parameter [experts, out, in]; `transposed_experts`, such as gpt-oss's, [experts, in, out].
        group: what `layers` of a stage calls it.
        parameters: shapes by name.
        unit_gain: whether a norm multiplies by 1 + its weight, as Gemma's do.
    """

    kind: Kind
    group: Group
    parameters: dict[str, list[int]]
    unit_gain: bool = False


@dataclass(frozen=True)
class Architecture:
    """A causal language model, without its weights.

    Attributes:
        model_type: such as `llama`.
        stack: dotted name of the list of decoder layers, such as `model.layers` or `transformer.h`.
        layers: how many there are.
        heads: how many each projection of queries is of, by its name: some layers have more than others.
        positions: the longest text, in tokens; None where there is no limit.
        modules: of the text model, by dotted name, in its order.
        tied: parameters that share the weight of another one, by name: such as `lm_head.weight`.
        pieces: where parameters and buffers are in the file that it holds by other names (see `stages.models.names`).
        copies: those of `tied` that the file holds all the same, equal to what they share.
    """

    model_type: str
    stack: str
    layers: int
    heads: dict[str, int]
    positions: int | None
    modules: dict[str, Module]
    tied: dict[str, str]
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Architecture:
        """That of a model's folder: as `base` wrote it down, else from its config, which imports transformers.

        Raises:
            MistakeError: what is written down is something else.
        """
        path = folder / FILE
        if not path.exists():
            model = empty_model(folder)
            return describe(model, pieces_of(model, shapes_in(folder)))
        content = read_json(path)
        try:
            modules = {name: Module(**module) for name, module in content["modules"].items()}
            return cls(**{each.name: content[each.name] for each in dataclasses.fields(cls)} | {"modules": modules})
        except (AttributeError, TypeError) as error:
            raise MistakeError(
                f"{path} tells of no architecture ({first_line(error)}); run `dvc repro`, which makes it again"
            ) from None

    def write(self, folder: Path) -> None:
        """Write it down for `of`."""
        write_json(folder / FILE, dataclasses.asdict(self))

    def place(self, path: str) -> tuple[int, str]:
        """Layer and kind of a module, such as `(3, "self_attn.q_proj")`; `(OUTSIDE, path)` where it is in no layer."""
        return place(path, self.stack)

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of modules that the layers have, such as `self_attn.q_proj`, in the model's order."""
        return list(dict.fromkeys(kind for layer, kind in map(self.place, self.modules) if layer != OUTSIDE))

    @cached_property
    def shared(self) -> dict[str, str]:
        """Modules in the layers that have their weights in common with another, each way, such as Zamba's attention."""
        pairs = [(one.rpartition(".")[0], other.rpartition(".")[0]) for one, other in self.tied.items()]
        inside = [pair for pair in pairs if self.place(pair[0])[0] != OUTSIDE]
        return dict(inside) | {other: one for one, other in inside}

    def is_matrix(self, path: str) -> bool:
        """Whether a module is a weight matrix that an adapter can be put beside."""
        return path in self.modules and self.modules[path].kind in MATRICES

    def is_transposed(self, path: str) -> bool:
        """Whether a module's weight is [in, out], as GPT-2 has it."""
        return path in self.modules and self.modules[path].kind == "conv1d"

    def is_stack(self, path: str) -> bool:
        """Whether a module has the matrices of several experts as one parameter."""
        return path in self.modules and self.modules[path].kind in STACKS

    def is_turned(self, path: str) -> bool:
        """Whether the matrices of a module, several or one, are [in, out]."""
        return path in self.modules and self.modules[path].kind in ("conv1d", "transposed_experts")

    def is_mistaken(self, path: str) -> bool:
        """Whether PEFT would take a matrix for one of the fused experts, by its name, and adapt all of them instead."""
        is_named_so = self.is_matrix(path) and path.rpartition(".")[2] in OLD_NAMES
        return is_named_so and any(module.kind in STACKS for module in self.modules.values())

    def lone_matrices(self, path: str) -> list[str]:
        """Names of the parameters of a module that are matrices of experts or of their router, and are in no Linear."""
        module = self.modules[path]
        if module.kind in STACKS:
            return [name for name, shape in module.parameters.items() if len(shape) == 3]
        is_router = module.kind == "other" and module.group == "router"
        return [name for name, shape in module.parameters.items() if is_router and name == "weight" and len(shape) == 2]

    def select(self, setting: Layers) -> list[str]:
        """Dotted names of the modules that a stage's `layers` names, in the model's order.

        Args:
            setting: a range, which means everything inside those layers; or for each of `attention` (linear attention
                too), `mixer` (what else mixes tokens, such as Mamba), `mlp` (experts and router among it), `experts`
                (shared ones among them), `router`, `norms`, `embeddings` (with the output layer) or a module's own
                name, such as `q_proj`, or that of shared experts, a range of its own.

        Raises:
            MistakeError: a name that no module has, or a layer that the model does not have; the sentence begins with
                the key below `stages.NAME`.
        """
        if not isinstance(setting, dict):
            chosen = set(parse(setting, self.layers))
            return [path for path in self.modules if self.place(path)[0] in chosen]
        found: set[str] = set()
        for group, text in setting.items():
            members = [path for path in self.modules if group in self._names(path)]
            if not members:
                groups = {name for path in self.modules for name in self._names(path)} & GROUPS
                names = {self.place(path)[1].rpartition(".")[2] for path in self.modules} - groups
                raise MistakeError(
                    f"layers names {group!r}, which no module of the model is called;"
                    f" write {', '.join(sorted(groups))} or one of {', '.join(sorted(names))}"
                )
            chosen = {OUTSIDE, *parse(text, self.layers)}
            found |= {path for path in members if self.place(path)[0] in chosen}
        return [path for path in self.modules if path in found]

    def _names(self, path: str) -> set[str]:
        """Groups and names that a module goes by in `layers`."""
        kind, group = self.place(path)[1], self.modules[path].group
        parts = kind.split(".")
        own = {kind, parts[-1], *SHARED.intersection(parts)} - GROUPS  # such as an attention's own experts
        return {group, "mlp" if group in IN_MLP else group, *own}


def describe(model: PreTrainedModel, pieces: dict[str, list[Piece]] | None = None) -> Architecture:
    """The architecture of a model in memory, or on the meta device, and of its file where `pieces` tells of one.

    Raises:
        MistakeError: its text model has no list of as many layers as its config says, or no layer as one module.
    """
    config, stack = text_config(model), layer_stack(model)
    _refuse_parts(model, stack)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules, texts = {}, text_modules(model)
    unit_gains: dict[type, bool] = {}  # by class of norm, of which a model has one or two for all of its layers
    for path, module in ((path, module) for path, module in model.named_modules() if module in texts):
        shapes = {name: list(p.shape) for name, p in module.named_parameters(recurse=False)}
        if shapes:
            if is_norm(module) and type(module) not in unit_gains:
                unit_gains[type(module)] = _has_unit_gain(module)
            group = _group(path, model, stack, ends)
            modules[path] = Module(kind_of(module), group, shapes, unit_gains.get(type(module), False))
    return Architecture(
        model_type=config.model_type,
        stack=stack,
        layers=depth(model),
        heads={path: _heads(model, path) for path in modules if path.endswith(".q_proj")},
        positions=getattr(config, "max_position_embeddings", None),
        modules=modules,
        tied=dict(model.all_tied_weights_keys),
        pieces=pieces or {},
    )


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder without its weights, from its config."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False)


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' class that loads a model of such a config: the text model, or where it has none the whole."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """What of a model's config is about the text: all of it, but for a model of images and text."""
    return model.config.get_text_config(decoder=True)


def layer_stack(model: PreTrainedModel) -> str:
    """Dotted name of the list of decoder layers, such as `model.layers` or `transformer.h`.

    Raises:
        MistakeError: the text model has no list of as many modules as its config says.
    """
    from torch import nn

    config, text = text_config(model), set(model.get_decoder().modules())
    lists = {n: module for n, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    counts = [getattr(config, key) for key in LAYERS if hasattr(config, key)]
    for count in counts:
        stacks = [name for name, module in lists.items() if len(module) == count]
        if stacks:
            return next((name for name in stacks if lists[name] in text), stacks[0])
    told = f"stack of {counts[0]} layers" if counts else "one stack of layers"
    raise MistakeError(
        f"params.yaml: base.model: {type(model).__name__} has no {told} to choose from; choose another model"
    )


def _heads(model: PreTrainedModel, path: str) -> int:
    """How many heads a projection of queries is of, by the size of one or the config's number; one if neither tells."""
    config, attention = text_config(model), model.get_submodule(path.rpartition(".")[0])
    queries: Any = model.get_submodule(path)
    rows, size = len(queries.weight), getattr(attention, "head_dim", None)
    if isinstance(size, int) and rows % size == 0:
        return rows // size
    return next((getattr(config, key) for key in HEADS if hasattr(config, key)), 1)


def _refuse_parts(model: PreTrainedModel, stack: str) -> None:
    """Raise a MistakeError for a model, such as XLM, whose attentions are in one list and its MLPs in another."""
    first = next(model.get_submodule(stack).children())
    if type(first).__name__.lower().endswith("attention"):
        raise MistakeError(
            f"params.yaml: base.model: {type(model).__name__} has its attentions alone in {stack} and the rest of its"
            " layers in other lists, so that none can be trained as a whole; choose another model"
        )


def depth(model: PreTrainedModel) -> int:
    """How many decoder layers it has; their list may be longer or shorter than `num_hidden_layers`.

    Raises:
        MistakeError: as `layer_stack`.
    """
    return len(model.get_submodule(layer_stack(model)))  # type: ignore[arg-type]


def place(path: str, stack: str) -> tuple[int, str]:
    """Layer and kind of a module, such as `(3, "self_attn.q_proj")`; outside the stack `(OUTSIDE, path)`.

    Args:
        path: dotted name of the module; that of a layer itself is of the kind WHOLE.
        stack: dotted name of the list of layers, from `layer_stack`.
    """
    found = re.fullmatch(rf"{re.escape(stack)}\.(\d+)(?:\.(.+))?", path)
    return (int(found[1]), found[2] or WHOLE) if found else (OUTSIDE, path)


def exactly(modules: list[str]) -> str:
    """Regular expression that matches exactly these module names.

    PEFT's `layers_to_transform` fails for many adapter types; a regex in `target_modules` works for all.

    Raises:
        MistakeError: there are none; the sentence begins with the key below `stages.NAME`.
    """
    if not modules:
        raise MistakeError("method finds nothing to train in these layers; choose another method")
    return "|".join(re.escape(name) for name in modules)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, Qwen3's query and key norms among them.

    What has modules in it is none, for every class of RobertaPreLayerNorm has the word in its name.
    """
    return "Norm" in type(module).__name__ and not any(module.children())


def kind_of(module: nn.Module) -> Kind:
    """What kind of module it is."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear" if type(module).forward is nn.Linear.forward or _gives_a_product(module) else "other"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "Experts" in type(module).__name__ and any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return "transposed_experts" if getattr(module, "is_transposed", False) else "experts"
    return "norm" if is_norm(module) else "other"


def _gives_a_product(module: nn.Linear) -> bool:
    """Whether what is derived from Linear gives one tensor [tokens, out], and not the choices of a router."""
    import torch

    weights = {name: torch.empty_like(values, device="meta") for name, values in module.state_dict().items()}
    try:
        found = torch.func.functional_call(module, weights, torch.empty(1, 2, module.in_features, device="meta"))
    except Exception:  # it does more than a matrix does
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, 2, module.out_features)


def _group(path: str, model: nn.Module, stack: str, ends: list[nn.Module | None]) -> Group:
    """What `layers` calls a module; nothing where it is none of that, such as what scales a residual stream."""
    module, (layer, kind) = model.get_submodule(path), place(path, stack)
    if layer == OUTSIDE:
        return "embeddings" if any(module is end for end in ends) else ""
    if is_norm(module):
        return "norms"
    parts = [] if kind == WHOLE else kind.split(".")
    around = _part_of(model.get_submodule(f"{stack}.{layer}"), parts)
    if around in ("attention", "mixer"):
        return around
    if EXPERTS.intersection(parts) or "Experts" in type(module).__name__:
        return "experts"
    return "router" if ROUTERS.intersection(parts) else around


def _part_of(layer: nn.Module, parts: list[str]) -> Literal["attention", "mixer", "mlp", ""]:
    """What part of its layer a module is in, by the first name or class on the way to it that tells.

    The class goes first: Nemotron-H calls attention, Mamba and MLPs `mixer` alike.
    """
    for name in parts:
        layer = layer.get_submodule(name)
        told, called = type(layer).__name__.lower(), name.lower()
        if told.endswith("attention") or called.endswith(("attn", "att", "attention")):
            return "attention"
        if called.endswith("layernorm"):  # A.X K2's have small MLPs of their own
            return ""
        if called in MLPS or told.endswith(("mlp", "moe")):
            return "mlp"
        if called in MIXERS:
            return "mixer"
    return ""


def _has_unit_gain(norm: nn.Module) -> bool:
    """Whether a norm with a weight of zero still lets something through."""
    import copy

    import torch

    weight = getattr(norm, "weight", None)
    if weight is None:
        return False
    with torch.no_grad():
        silent = copy.deepcopy(norm).to_empty(device="cpu").float()
        for parameter in silent.parameters():
            parameter.zero_()
        try:
            return bool(silent(torch.ones(1, 1, len(weight)) + torch.arange(len(weight))).any())
        except Exception:  # gated norms take more than their input, and what is called a norm may be none
            return False
