"""A running routed model."""

from pathlib import Path
from typing import Any

import torch
import transformers

from stages.errors import MistakeError
from stages.models.architecture import auto_class, empty_model
from stages.routing.modeling_routed import routed


def names_of_classes(base: Path) -> tuple[str, str] | None:
    """The classes of a base's config and model in transformers; None where it has images or code of its own."""
    model = empty_model(base)
    names = type(model.config).__name__, type(model).__name__
    is_text = auto_class(model.config) is transformers.AutoModelForCausalLM
    return names if is_text and all(hasattr(transformers, name) for name in names) else None


def load_routed(folder: Path, base: Path, dtype: torch.dtype, place: torch.device | str = "cpu") -> Any:
    """A routed model in evaluation mode; no code of its folder is run, for it is Strata's own.

    Raises:
        MistakeError: it is not there.
    """
    if not (folder / "config.json").exists():
        raise MistakeError(f"{folder} holds no routed model; run `dvc repro route@{folder.name}`")
    names = names_of_classes(base)
    assert names is not None  # else `route` refuses it
    config_class, model_class = routed(*(getattr(transformers, name) for name in names))
    config = config_class.from_pretrained(folder)
    return model_class.from_pretrained(folder, config=config, dtype=dtype).to(place).eval()
