"""A running routed model."""

from pathlib import Path
from typing import Any

import torch
import transformers

from stages.errors import MistakeError
from stages.models.architecture import Architecture, empty_model
from stages.models.classes import class_names
from stages.routing.modeling_routed import routed


def load_routed(folder: Path, base: Path, dtype: torch.dtype, place: torch.device | str = "cpu") -> Any:
    """A routed model in evaluation mode; no code of its folder is run, for it is Strata's own.

    Raises:
        MistakeError: it is not there, or of a base that cannot be routed.
    """
    if not (folder / "config.json").exists():
        raise MistakeError(f"{folder} holds no routed model; run `dvc repro route@{folder.name}`")
    names = class_names(empty_model(base), Architecture.of(base))
    config_class, model_class = routed(*(getattr(transformers, name) for name in names))
    config = config_class.from_pretrained(folder, trust_remote_code=False)
    model = model_class.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
    return model.to(place).eval()
