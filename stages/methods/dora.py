"""DoRA."""

from typing import ClassVar, Literal

from stages.methods.low_rank import LowRank


class Dora(LowRank):
    """LoRA, and the size of every output row (arXiv 2402.09353).

    Often better than LoRA at low rank; slower.

    W' = m·V/‖V‖ with V = W + (alpha/rank)·B·A and one trained magnitude m per output row.
    """

    use_dora: ClassVar[bool] = True

    method: Literal["dora"]
