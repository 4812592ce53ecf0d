"""LoRA."""

from typing import ClassVar, Literal

from stages.methods.low_rank import LowRank


class Lora(LowRank):
    """B·A of a small rank beside every matrix (arXiv 2106.09685).

    The first choice: sturdy, cheap, and merges exactly.
    """

    protectable: ClassVar[bool] = True

    method: Literal["lora"]
