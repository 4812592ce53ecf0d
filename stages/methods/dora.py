"""DoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stages.errors import MistakeError
from stages.methods.low_rank import LowRank

if TYPE_CHECKING:
    from peft import PeftModel


class Dora(LowRank):
    """LoRA, and the size of every output row (arXiv 2402.09353).

    Often better than LoRA at low rank; slower.

    W' = m·V/‖V‖ with V = W + (alpha/rank)·B·A and one trained magnitude m per output row.
    """

    use_dora: ClassVar[bool] = True

    method: Literal["dora"]

    def started(self, model: PeftModel) -> None:
        """Refuse rows of zeros, which have no direction: ‖V‖ is 0 there.

        Raises:
            MistakeError: a matrix has some.
        """
        from peft.tuners.lora import LoraLayer

        from stages.weights.adapter import PREFIX

        super().started(model)
        layers: dict[str, Any] = {path: each for path, each in model.named_modules() if isinstance(each, LoraLayer)}
        for path, layer in layers.items():
            if not layer.lora_magnitude_vector["default"].weight.all():
                raise MistakeError(
                    f"method 'dora' divides by the size of each row, and {path.removeprefix(PREFIX)} has rows of zeros,"
                    " such as base.extra_neurons and base.adapter_size make; choose lora, or layers without this module"
                )
