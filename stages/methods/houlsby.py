"""Adapters behind attention and MLP, as in Houlsby et al., of a base that has room for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.errors import MistakeError
from stages.methods.copies import Copies
from stages.models.layers import parameters_of
from stages.settings.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.settings.base import Base


class HoulsbyStage(Copies):
    """Adapters behind attention and MLP, made by `base.adapter_size` (arXiv 1902.00751).

    The classic; the result needs `trust_remote_code`, so rather `bottleneck`.

    They are not linear in what they read, so they are no change of the old weights; but they are weights of the base,
    and what a stage changes of them is a delta like any other.
    """

    method: Literal["houlsby"]

    def check(self, name: str, base: Base, stages: dict[str, Stage], num_layers: int | None) -> None:
        """The base needs room for adapters."""
        _refuse_without(base.adapter_size)

    def parameters(self, model: PreTrainedModel, modules: list[str]) -> list[str]:
        """Those of the adapters' matrices among `modules`; the base must have them."""
        _refuse_without(getattr(model.config, "adapter_size", 0))
        return parameters_of(model, [path for path in modules if ".adapter." in path])


def _refuse_without(adapter_size: int) -> None:
    if not adapter_size:
        raise MistakeError("method 'houlsby' trains adapters that are added to the base; write base.adapter_size: 64")
