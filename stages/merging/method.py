"""What a merge method is: a function of one tensor in several versions, registered with mergekit, and its traits."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mergekit.merge_methods as mergekit
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethod, PerInputValues, TensorGroup
from torch import Tensor

CONTRACT = InputContract(base=BasePolicy.REQUIRED, min_non_base=1)


@dataclass(frozen=True)
class Traits:
    """What Strata can make use of in a method.

    Attributes:
        is_sum: the merge is base + Σ cᵢΔᵢ; of `linear` where its weights sum to 1.
        is_directed: it tells outputs from inputs, and is given every matrix as [out, in], however it is stored.
        rotation_free: rotating all inputs rotates the result, so that low-rank deltas can be merged in their small
            core with the same result.
        trims: it keeps the entries of largest magnitude, which `trim` finds without mergekit's full sort.
        float64: it needs double precision.
        ranges: smallest and largest value of parameters whose range mergekit does not check.
    """

    is_sum: bool = False
    is_directed: bool = False
    rotation_free: bool = False
    trims: bool = False
    float64: bool = False
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


SHARE = (0.0, 1.0)

MERGEKITS = {  # those of which there is something to know
    "linear": Traits(is_sum=True),
    "task_arithmetic": Traits(is_sum=True, ranges={"density": SHARE}),
    "ties": Traits(trims=True, ranges={"density": SHARE}),
    "breadcrumbs": Traits(trims=True, ranges={"density": SHARE, "gamma": SHARE}),
    "breadcrumbs_ties": Traits(trims=True, ranges={"density": SHARE, "gamma": SHARE}),
    "dare_linear": Traits(ranges={"density": SHARE}),
    "dare_ties": Traits(ranges={"density": SHARE}),
    "della": Traits(ranges={"density": SHARE, "epsilon": SHARE}),
    "della_linear": Traits(ranges={"density": SHARE, "epsilon": SHARE}),
    "sce": Traits(ranges={"select_topk": SHARE}),
    "ram": Traits(ranges={"epsilon": SHARE}),
    "ramplus_tl": Traits(ranges={"epsilon": SHARE}),
    # It keeps the entries with the largest KL divergence of softmaxes that hardly differ. In float32 that is below the
    # rounding of the softmaxes: 5e-9 comes out as -8e-8, and what is kept is left to chance.
    "arcee_fusion": Traits(float64=True),
}
OURS: dict[str, Traits] = {}  # filled by `merge_method`


def traits_of(name: str) -> Traits:
    """What is known of the method `name`, mergekit's or ours."""
    return OURS.get(name) or MERGEKITS.get(name, Traits())


def merge_method(paper: str, rotation_free: bool = False) -> Callable[[Callable[..., Tensor]], MergeMethod]:
    """Make a function a merge method of the function's name; its signature says which parameters it has.

    Args:
        paper: address of the paper.
        rotation_free: see `Traits`.
    """

    def decorate(function: Callable[..., Tensor]) -> MergeMethod:
        name = function.__name__
        method = mergekit.merge_method(function, name=name, reference_url=paper, contract=CONTRACT)
        mergekit.register(method)
        OURS[name] = Traits(is_directed=True, rotation_free=rotation_free)
        return method

    return decorate


def weighted_deltas(group: TensorGroup, weight: PerInputValues[float]) -> list[Tensor]:
    """Each stage's weight times what it changed: model − base, float32, of the base's shape."""
    base = group.base.tensor.float()
    return [weight[entry.id] * (entry.tensor.float() - base) for entry in group.non_base]


def onto_base(group: TensorGroup, delta: Tensor) -> Tensor:
    """The base plus the merged delta, any shape of as many elements, in the base's shape and dtype."""
    base = group.base.tensor
    return (base.float() + delta.reshape(base.shape)).to(base.dtype)
