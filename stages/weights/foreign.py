"""Whether an adapter from elsewhere means here what it means to PEFT: its configuration by key, its tensors by name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stages.errors import MistakeError
from stages.files import BASE, read_json
from stages.models.architecture import Architecture
from stages.weights.adapter import FIX, PREFIX
from stages.weights.places import Places, parts_of, tensors_of_peft
from stages.weights.tensor_file import TensorFile

AGAIN = "copy the adapter again from where it is whole"
ELSEWHERE = "merge it where it was trained, and give the result as base.model"


def _words(text: str) -> list[str]:
    return text.split()


# Types whose every module is merged alone, from the tensors of the file and the base's weight.
TYPES = _words(
    "LORA ADALORA BOFT C3A DEFT DELORA FOURIERFT GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR MISS OFT OSF PEANUT "
    "PSOFT ROAD SHIRA SUPERTUNING VERA WAVEFT"
)
TAKEN = _words(
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_bias bias fan_in_fan_out "
    "target_modules target_parameters exclude_modules layers_to_transform layers_pattern modules_to_save ab_svd_init "
    "act_fn alpha apply_GS block_share block_size block_size_pattern boft_block_num boft_block_size "
    "boft_n_butterfly_factor cayley_neumann_eps coft config_A_B config_C config_D_E decompose_both decompose_factor "
    "decomposition_method delora_lambda depth effective_rank eps feedforward_modules gralora_k group_size hybrid_r "
    "init_r init_weights lambda_pattern mask_type mini_r n_frequency n_frequency_pattern num_cayley_neumann_terms "
    "oft_block_size para proportional_parameters psoft_alpha psoft_mag_a psoft_mag_b psoft_orth psoft_svd "
    "psoft_svd_lowrank_niter random_loc_seed random_seed scaling select_top sparsity target_svd_config "
    "use_cayley_neumann use_effective_conv2d use_idwt variant wavelet_family"
)
SCALES = _words("lora_alpha alpha alpha_pattern psoft_alpha scaling")  # which multiply what was learned
NO_EFFECT = _words(  # on the weights of an adapter that is trained: where it comes from, and how it was trained
    "auto_mapping base_model_name_or_path inference_mode peft_version revision runtime_config task_type beta1 beta2 "
    "boft_dropout corda_config d_initial deft_dropout deltaT eva_config gralora_dropout hira_dropout "
    "init_ia3_weights init_scale loftq_config lora_dropout lora_ga_config megatron_core miss_dropout module_dropout "
    "orth_reg_weight projection_prng_key psoft_dropout qalora_group_size rank_dropout rank_dropout_scale target_r "
    "tfinal tinit total_step velora_config vera_dropout"
)


class Refusal(NamedTuple):
    """Values of a key with which an adapter is refused.

    Attributes:
        values: in words.
        is_meant: whether a value is one of them.
        reason: why, and the way out; follows the key's value in a sentence.
    """

    values: str
    is_meant: Callable[[Any], bool]
    reason: str


def _changes_the_base(init: Any) -> bool:
    return str(init).lower() not in ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


REFUSED = {
    "init_lora_weights": Refusal(
        "`pissa`, `olora`, `corda`, `lora_ga`, `loftq`",
        _changes_the_base,
        "with which the adapter was trained on a base that the start had been taken off; save it anew with PEFT's"
        " save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes it a LoRA of the base itself",
    ),
    "ensure_weight_tying": Refusal(
        "`true`", bool, f"which changes the embedding and the output layer together; {ELSEWHERE}"
    ),
    "trainable_token_indices": Refusal("any", bool, f"which are rows and no whole weights; {ELSEWHERE}"),
    "layer_replication": Refusal("any", bool, f"which makes a model of more layers; {ELSEWHERE}"),
    "megatron_config": Refusal("any", bool, "which names modules of Megatron; save the adapter from transformers"),
    "use_qalora": Refusal("`true`", bool, "which adapts a quantised base; train the adapter on the base itself"),
    "alora_invocation_tokens": Refusal(
        "any", bool, "after which alone the adapter acts, so that no weights can hold it; use a plain LoRA"
    ),
    "arrow_config": Refusal("any", bool, "which chooses adapters by the input; import them one by one"),
    "kasa_config": Refusal("any", bool, f"which takes the smallest directions off the base; {ELSEWHERE}"),
    "monteclora_config": Refusal("any", bool, f"which draws the adapter at random; {ELSEWHERE}"),
    "use_bdlora": Refusal("any", bool, f"which makes blocks of the factors; {ELSEWHERE}"),
    "save_projection": Refusal(
        "`false`",
        lambda value: value is False,
        "so that the file lacks the projection; save the adapter anew with true",
    ),
    "save_precomputed_indices": Refusal(
        "`false`", lambda value: value is False, "so that the file lacks the indices; save the adapter anew with true"
    ),
}

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "modules_to_save", "default"}
ORIGINAL = ".original_module."  # the base's own weights, beside what was trained in their place
TEXT = "language_model"  # what a text model is called inside one of images and text


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, every key of which is known to mean here what it means to PEFT.

    Raises:
        MistakeError: it is no configuration of PEFT, or has a type, key or value that is refused.
    """
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise MistakeError(
            f"{path} has no peft_type, so it is not PEFT's; convert the adapter (MLX's lora_a and lora_b are PEFT's"
            " lora_A.weight and lora_B.weight transposed, lora_alpha is scale times rank)"
        )
    if (kind := config["peft_type"]) not in TYPES:
        raise MistakeError(
            f"{path}: peft_type is {kind!r}, whose modules cannot be merged one by one; {ELSEWHERE}, or use one of"
            f" {', '.join(TYPES)}"
        )
    for key, value in config.items():
        if key in REFUSED and REFUSED[key].is_meant(value):
            raise MistakeError(f"{path}: {key} is {value!r}, {REFUSED[key].reason}")
        if value and key not in {*TAKEN, *NO_EFFECT, *REFUSED}:
            raise MistakeError(
                f"{path}: {key} is no key of PEFT {importlib.metadata.version('peft')}; remove it if it says nothing of"
                " the weights"
            )
        for number in _numbers(value) if key in TAKEN else ():
            if not abs(number) <= sys.float_info.max:  # a whole number may be larger
                raise MistakeError(f"{path}: {key} has {number}, which is no finite number; correct it")
            if key in SCALES and number <= 0:
                raise MistakeError(
                    f"{path}: {key} has {number}, by which the adapter does nothing or the opposite of what it learned;"
                    " write the number that it was trained with (a negative weight in merge.weights takes it away)"
                )
    return config


def _numbers(value: Any) -> list[int | float]:
    """The numbers in a value of a configuration."""
    if isinstance(value, dict | list):
        return [number for each in (value.values() if isinstance(value, dict) else value) for number in _numbers(each)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def refuse_mistyped(path: Path, config: dict[str, Any]) -> None:
    """Raise a MistakeError for a value of another type than PEFT gives to its key, of those that say something.

    Of numbers it is not asked whether they are whole: PEFT itself takes `lora_alpha` otherwise too.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from pydantic import TypeAdapter, ValidationError

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    defaults = {each.name: each.default for each in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    for key in (key for key in TAKEN if key in types and key in config and config[key] != defaults[key]):
        is_pattern = dict in typing.get_args(types[key])  # AdaLoRA's has the directions that it kept
        wanted: Any = dict[str, float | list[bool]] | None if is_pattern else types[key]
        try:
            TypeAdapter(wanted).validate_python(_with_ones(config[key]), strict=True)
        except ValidationError as error:
            told = " or ".join(dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in error.errors()))
            raise MistakeError(
                f"{path}: {key} is {config[key]!r}, where PEFT has {told}; correct it, its default is {defaults[key]!r}"
            ) from None


def _with_ones(value: Any) -> Any:
    """A value with a 1, which is whole and not, for each of its numbers."""
    if isinstance(value, dict):
        return {key: _with_ones(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_ones(each) for each in value]
    return 1 if isinstance(value, int | float) and not isinstance(value, bool) else value


def names_in_peft(
    file: TensorFile, config: dict[str, Any], base: Path = BASE, architecture: Architecture | None = None
) -> dict[str, str]:
    """PEFT's name on the base for every tensor of an adapter's file, which are exactly those that PEFT would save.

    Wrappers of torch.compile, FSDP and multimodal models are left out of a name that has no place with them. Where the
    base is one of images and text, names may also be those of its text model alone.

    Args:
        file: adapter_model.safetensors, beside its configuration.
        config: that configuration.
        base: folder of the model that it is for.
        architecture: of that model; without it, what `base` of the pipeline left in the folder.

    Raises:
        MistakeError: a value is of another type than PEFT's, PEFT refuses the configuration on this base, a tensor has
            no place or another shape, a place has no tensor or is none of the text model's, or a number is not finite.
    """
    folder, keys = file.path.parent, [key for key in file if ORIGINAL not in key]
    refuse_mistyped(folder / "adapter_config.json", config)
    wanted, known, on_base = _places(folder, config, keys, base)
    names = {key: _known(key, known) for key in keys}
    for key, name in names.items():
        shape, _ = file.specification(key)
        if name not in known:
            raise MistakeError(f"{file.path}: {key} belongs to no module of the base; {_fix_of_name(key)}")
        if not math.prod(shape):
            raise MistakeError(
                f"{file.path}: {key} has no elements, as DeepSpeed leaves it where it was not gathered; save the"
                " adapter again from gathered weights"
            )
        if shape != known[name]:
            raise MistakeError(
                f"{file.path}: {key} is {shape}, which does not fit {name.removeprefix(PREFIX)} of {known[name]} that"
                f" adapter_config.json makes on this base; {_fix_of_shape(shape, known[name], base)}"
            )
        if not file.read(key).float().isfinite().all():
            raise MistakeError(f"{file.path}: {key} has numbers that are not finite; take an adapter that trained well")
    if missing := sorted(wanted - set(names.values())):
        raise MistakeError(
            f"{file.path} lacks {missing[0]}, one of {len(missing)} that its adapter_config.json asks for;"
            f" {_fix_of_room(base) or 'save the adapter again as a whole'}"
        )
    if len(set(names.values())) < len(names):
        raise MistakeError(f"{file.path} has several tensors for one place; save the adapter again by PEFT")
    names = {key: on_base[name] for key, name in names.items()}
    _refuse_other_patterns(folder, config, names)
    _refuse_beside_text(file.path, names, architecture or Architecture.of(base))
    return names


def _places(folder: Path, config: dict[str, Any], keys: list[str], base: Path) -> Places:
    """Those of the part of the base that has one for every tensor, else those of the base."""
    first: Places | MistakeError | None = None
    for part in parts_of(base):
        try:
            found: Places | MistakeError = tensors_of_peft(folder, config, part)
        except MistakeError as mistake:
            found = mistake
        if isinstance(found, Places) and all(_known(key, found.shapes) in found.shapes for key in keys):
            return found
        first = first or found
    if isinstance(first, Places):
        return first
    assert first is not None, "the base is a part of itself"
    raise first


def _known(key: str, known: dict[str, list[int]]) -> str:
    """A tensor's name as PEFT knows it; as the file has it where it does not."""
    return next((name for name in _spellings(key) if name in known), key)


def _spellings(key: str) -> list[str]:
    """Names that a tensor's name may stand for, itself first."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    text = [part for part in parts if part != TEXT]
    names = [PREFIX + ".".join(each).removeprefix(PREFIX) for each in (parts, text)]
    magnitudes = [name.removesuffix(".weight") for name in names]  # of DoRA, which some versions save as of a module
    return [key, ".".join(parts), *names, *magnitudes]


def _refuse_other_patterns(folder: Path, config: dict[str, Any], names: dict[str, str]) -> None:
    """Raise a MistakeError for a pattern that finds other modules by their names on the base than by those in the file.

    Args:
        folder: of the adapter.
        config: its configuration.
        names: of its tensors on the base, by those in the file.
    """
    for key, patterns in config.items():
        for pattern in patterns if key.endswith("_pattern") and isinstance(patterns, dict) else ():
            for own, name in names.items():
                if _fits(pattern, _spellings(own)[2]) != _fits(pattern, name):
                    raise MistakeError(
                        f"{folder / 'adapter_config.json'}: {key} names {pattern!r}, which does not mean the same where"
                        f" the base calls the module {name.removeprefix(PREFIX)}; write the end of its name alone, from"
                        " `layers.` on"
                    )


def _fits(pattern: str, name: str) -> bool:
    """Whether PEFT would find the module of a tensor by a pattern (its `get_pattern_key`)."""
    path = name.removeprefix(PREFIX)
    ends = (end for end, sign in enumerate(path) if sign == ".")
    return any(re.match(rf"(.*\.)?({pattern})$", path[:end]) for end in ends)


def _refuse_beside_text(path: Path, names: dict[str, str], architecture: Architecture) -> None:
    """Raise a MistakeError for a tensor of a module that is none of the text model's."""
    modules = architecture.modules.keys()
    for key, name in names.items():
        part = name.removeprefix(PREFIX).replace(".ln_tuning_layers.", ".")
        if part != name and not any(part[:end] in modules for end, sign in enumerate(part) if sign == "."):
            raise MistakeError(
                f"{path}: {key} is beside the text model, as a vision tower is, and Strata merges the text model alone;"
                f" train the adapter with exclude_modules that names what is beside it, or {ELSEWHERE}"
            )


def _fix_of_name(key: str) -> str:
    if re.search(r"\.(lora_down|lora_up|alpha)\b", key):
        return "rename kohya's lora_down to lora_A and lora_up to lora_B, and write its alpha as lora_alpha"
    if re.search(r"\.lora_[ab]\b", key):
        return "MLX's lora_a and lora_b are PEFT's lora_A.weight and lora_B.weight transposed, so convert it"
    if re.search(r"\.experts\.\d+\.", key):
        return (
            "transformers now has all experts of a layer as one, so load the adapter on this base by PEFT and save it"
        )
    return FIX


def _fix_of_shape(shape: list[int], wanted: list[int], base: Path) -> str:
    sizes = [pair for pair in zip(shape, wanted, strict=False) if pair[0] != pair[1]]
    if len(shape) == len(wanted) and len(sizes) == 1 and wanted[0] == _vocabulary(base):
        return "where tokens were added to its base, give that base with its embedding resized as base.model"
    return _fix_of_room(base) or f"correct that file, or {FIX}"


def _fix_of_room(base: Path) -> str:
    """What to do about an adapter of the base as it was before room was made in it; "" if none was."""
    room = read_json(base / "stage.json").get("room", {}) if (base / "stage.json").exists() else {}
    keys = " and ".join(f"base.{key}" for key, value in room.items() if value)
    return keys and f"it may be of the base without {keys}: leave that out of params.yaml, or train on what it makes"


def _vocabulary(base: Path) -> int:
    return read_json(base / "config.json").get("vocab_size", 0)
