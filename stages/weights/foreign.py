"""Whether an adapter from elsewhere means here what it means to PEFT: its configuration by key, its tensors by name."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stages.errors import MistakeError
from stages.files import BASE, read_json
from stages.weights.adapter import FIX, PREFIX
from stages.weights.places import tensors_of_peft
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
    return str(init).lower() not in ("true", "false", "gaussian", "eva", "orthogonal", "mica")


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
    return config


def names_in_peft(file: TensorFile, config: dict[str, Any], base: Path = BASE) -> dict[str, str]:
    """PEFT's name for every tensor of an adapter's file, which are exactly those that PEFT would save.

    Wrappers of torch.compile, FSDP and multimodal models are left out of a name that has no place with them.

    Args:
        file: adapter_model.safetensors, beside its configuration.
        config: that configuration.
        base: folder of the model that it is for.

    Raises:
        MistakeError: PEFT refuses the configuration on this base, a tensor has no place or another shape, a place has
            no tensor, or a number is not finite.
    """
    wanted, known = tensors_of_peft(file.path.parent, config, base)
    keys = [key for key in file if ORIGINAL not in key]
    names = {key: next((name for name in _spellings(key) if name in known), key) for key in keys}
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
            f"{file.path} lacks {missing[0]}, one of {len(missing)} that its adapter_config.json asks for; save the"
            " adapter again as a whole"
        )
    if len(set(names.values())) < len(names):
        raise MistakeError(f"{file.path} has several tensors for one place; save the adapter again by PEFT")
    if any(key != name and TEXT in key for key, name in names.items()):
        _refuse_patterns_of_wrappers(file.path.parent, config)
    return names


def _spellings(key: str) -> list[str]:
    """Names that a tensor's name may stand for, itself first."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    text = [part for part in parts if part != TEXT]
    names = [PREFIX + ".".join(each).removeprefix(PREFIX) for each in (parts, text)]
    magnitudes = [name.removesuffix(".weight") for name in names]  # of DoRA, which some versions save as of a module
    return [key, ".".join(parts), *names, *magnitudes]


def _refuse_patterns_of_wrappers(folder: Path, config: dict[str, Any]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        if named := [pattern for pattern in config.get(key) or {} if TEXT in pattern]:
            raise MistakeError(
                f"{folder / 'adapter_config.json'}: {key} names {named[0]!r}, and the base's modules are not inside a"
                f" {TEXT}; remove that part of the name"
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
    return f"correct that file, or {FIX}"


def _vocabulary(base: Path) -> int:
    return read_json(base / "config.json").get("vocab_size", 0)
