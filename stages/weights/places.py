"""What PEFT makes of an adapter's configuration on the base: the names and shapes of its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.errors import MistakeError, first_line
from stages.files import ADAPTER, BASE, read_json
from stages.models.architecture import empty_model, text_config
from stages.weights.adapter import FIX, PREFIX
from stages.weights.tensor_file import TensorFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Part(NamedTuple):
    """What an adapter may have been trained on.

    Attributes:
        model: the base, or its text model alone; without weights.
        names: those of its modules on the base, by the first parts of their own; what has none has the same there.
    """

    model: PreTrainedModel
    names: dict[str, str]


class Places(NamedTuple):
    """Tensors of an adapter.

    Attributes:
        saved: names of those that PEFT would save.
        shapes: of all that it would load, by name.
        names: of the same on the base.
    """

    saved: set[str]
    shapes: dict[str, list[int]]
    names: dict[str, str]


def parts_of(base: Path) -> Iterator[Part]:
    """A base, and of one of images and text also its text model: the decoder, and that with an output layer."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    import stages.models.modeling_houlsby  # noqa: F401  makes its models known to transformers

    yield Part(empty_model(base), {})
    whole = empty_model(base)
    config, (decoder, head) = text_config(whole), _ends(whole)
    if config is whole.config:
        return
    yield Part(whole.get_decoder(), {"": decoder})
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            text = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        yield Part(text, dict(zip(_ends(text), (decoder, head), strict=True)))


def _ends(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the decoder and of the output layer."""
    paths = {module: path for path, module in model.named_modules()}
    return paths[model.get_decoder()], paths[model.get_output_embeddings()]


def tensors_of_peft(folder: Path, config: dict[str, Any], part: Part | None = None) -> Places:
    """What PEFT would save and load for an adapter's configuration on the base, or on a part of it.

    Raises:
        MistakeError: PEFT refuses it.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    model, names = part or next(parts_of(BASE))
    if config["peft_type"] == "SHIRA":
        model.to_empty(device="cpu")  # its mask cannot be drawn on the meta device
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = PeftConfig.from_pretrained(str(folder))
            wrapped = get_peft_model(model, adapter, low_cpu_mem_usage=True)
            saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except Exception as error:  # PEFT raises what it likes for what it cannot do
        raise MistakeError(
            f"{folder / 'adapter_config.json'} is refused by PEFT on this base ({first_line(error)}); correct it, or"
            f" {FIX}"
        ) from None
    kept = {name: weight for name, weight in wrapped.state_dict().items() if ".default" not in name}
    shapes = {name: list(weight.shape) for name, weight in {**kept, **saved}.items()}
    return Places(set(saved), shapes, {name: _on_base(name, names) for name in shapes})


def _on_base(name: str, names: dict[str, str]) -> str:
    """A tensor's name where its module has its name on the base."""
    path = name.removeprefix(PREFIX)
    for own, other in names.items():
        if path != name and f"{path}.".startswith(own and f"{own}."):
            return f"{PREFIX}{other}.{path.removeprefix(own).removeprefix('.')}"
    return name


def misplaced(folder: Path) -> list[str]:
    """Tensors of an adapter for the base that PEFT, opening it, has no place for, and those that it would miss.

    Raises:
        MistakeError: PEFT refuses the adapter.
    """
    file = TensorFile(folder / ADAPTER[1])
    wanted, known, _ = tensors_of_peft(folder, read_json(folder / ADAPTER[0]))
    return [name for name in file if known.get(name) != file.specification(name)[0]] + sorted(wanted - set(file))
