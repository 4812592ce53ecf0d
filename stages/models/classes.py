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
    is_text = auto_class(model.config) is transformers.AutoModelForCausalLM
    has_experts = any(module.kind in STACKS for module in architecture.modules.values())
    if not is_text or has_experts or architecture.pieces or not all(hasattr(transformers, name) for name in names):
        raise MistakeError(
            f"a base of type {architecture.model_type} cannot be routed, for it has images, experts, code of its own or"
            " weights that are stored otherwise than they run; remove the router, and use the merge"
        )
    return names
