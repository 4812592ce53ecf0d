"""What PEFT makes of an adapter's configuration on the base: the names and shapes of its tensors."""

import warnings
from pathlib import Path
from typing import Any

from stages.errors import MistakeError, first_line
from stages.files import BASE
from stages.models.architecture import empty_model
from stages.weights.adapter import FIX


def tensors_of_peft(folder: Path, config: dict[str, Any], base: Path = BASE) -> tuple[set[str], dict[str, list[int]]]:
    """Names that PEFT would save for an adapter's configuration on the base, and shapes of all that it would load.

    Raises:
        MistakeError: PEFT refuses it.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    import stages.models.modeling_houlsby  # noqa: F401  makes its models known to transformers

    model = empty_model(base)
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
    return set(saved), {name: list(weight.shape) for name, weight in {**kept, **saved}.items()}
