"""Low-rank adapters that also train the size of every output row: DoRA (arXiv 2402.09353)."""

from typing import ClassVar, Literal

from stages.methods.low_rank import LowRank


class Dora(LowRank):
    """W' = m·V/‖V‖ with V = W + (alpha/rank)·B·A and one trained magnitude m per output row."""

    use_dora: ClassVar[bool] = True

    method: Literal["dora"]
