"""The models of a project, as `strata chat` and `strata serve` talk to them."""

from typing import Any

from stages.files import BASE, ROUTED
from stages.models.loading import compute_dtype, device, load_model
from stages.project.check import check_against_base
from stages.project.params import Params
from stages.routing.loading import load_routed
from stages.weights.checkpoint import open_model


def names_of(settings: Params) -> list[str]:
    """The base, the stages, the merged model and those that route.

    Raises:
        MistakeError: there is no base yet, or a stage does not go with it.
    """
    check_against_base(settings)
    open_model("base")
    return settings.models


def load(settings: Params, name: str) -> Any:
    """A running one of them, as it was scored.

    Raises:
        MistakeError: it is not made yet.
    """
    if name in settings.routers:
        return load_routed(ROUTED / name, BASE, compute_dtype(), device())
    return load_model(open_model(name), compute_dtype(), device())
