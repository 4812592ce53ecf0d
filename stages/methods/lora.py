"""Low-rank adapters: LoRA (arXiv 2106.09685)."""

from typing import ClassVar, Literal

from stages.methods.low_rank import LowRank


class Lora(LowRank):
    """Two small factors beside every weight matrix, whose product is added to it."""

    protectable: ClassVar[bool] = True

    method: Literal["lora"]
