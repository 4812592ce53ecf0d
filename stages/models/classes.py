"""transformers' own classes of a base, of which a routed model is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.errors import MistakeError
from stages.models.architecture import STACKS, Architecture, auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def class_names(model: PreTrainedModel, architecture: Architecture) -> tuple[str, str]:
    """Names of a base's config and model in transformers.

    Raises:
        MistakeError: no routed model can be made of it; the sentence begins with `a base`.
    """
    import transformers

    names = type(model.config).__name__, type(model).__name__
    reasons = {
        "reads images": auto_class(model.config) is not transformers.AutoModelForCausalLM,
        "has experts": any(module.kind in STACKS for module in architecture.modules.values()),
        "has code of its own": not all(hasattr(transformers, name) for name in names),
        "has other weights in its file than it runs with": bool(architecture.pieces),
    }
    if reason := next((text for text, applies in reasons.items() if applies), None):
        raise MistakeError(
            f"a base of type {architecture.model_type} cannot be routed, for it {reason}; remove the router, and use"
            " the merge"
        )
    return names
