"""Whether the names in params.yaml name something, and whether its settings go together."""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from stages.errors import MistakeError, placed
from stages.records.sources.mix import Mix
from stages.settings.ranges import numbers
from stages.settings.section import nearest
from stages.settings.stage import Training

if TYPE_CHECKING:
    from stages.project.params import Params
    from stages.settings.selection import Selection

TAKEN = {"base": "the model that all stages go back to", "merged": "the merged model"}


def check_references(params: Params) -> None:
    """Raise a MistakeError for the first name that names nothing, or stands for two things."""
    _check_names(params)
    for name, stage in params.stages.items():
        _one_of(stage.parent, ["base", *params.stages], f"stages.{name}.parent", "a stage")
        _one_of(stage.dataset, [*params.datasets, *params.selections], f"stages.{name}.dataset", "a dataset")
        if getattr(params.datasets[params.selected_from(stage.dataset)], "train", None) == 0:
            raise MistakeError(
                f"stages.{name}.dataset names {stage.dataset!r}, a guard, of which nothing is to be learned; give its"
                " train some records, or remove train"
            )
    for name, selection in params.selections.items():
        _check_selection(params, name, selection)
    _refuse_circle(params)
    for name in params.merge.weights:
        _one_of(name, params.stages, f"merge.weights.{name}", "a stage")
    for name in params.routers:
        _check_router(params, name)
    for name, stage in params.stages.items():
        if isinstance(stage, Training):
            _check_earlier(params, name, stage)
        _check_method(params, name, None)


def check_depth(params: Params, num_layers: int) -> None:
    """Raise a MistakeError for a stage whose layers the model of `num_layers` layers does not have."""
    for name, stage in params.stages.items():
        with placed(f"stages.{name}.layers: "):
            numbers(stage.layers, num_layers)
        _check_method(params, name, num_layers)


def _check_method(params: Params, name: str, num_layers: int | None) -> None:
    with placed(f"stages.{name}."):
        params.stages[name].check(name, params.base, dict(params.stages), num_layers)


def _check_names(params: Params) -> None:
    """Names become files and rows, so one must not stand for two things, on no file system."""
    models = [*(f"stages.{name}" for name in params.stages), *(f"routers.{name}" for name in params.routers)]
    for place in models:
        if taken := TAKEN.get(place.rpartition(".")[2].lower()):
            raise MistakeError(f"{place} has a name that stands for {taken}; choose another")
    mixes = {name: dataset for name, dataset in params.datasets.items() if isinstance(dataset, Mix)}
    for places in (
        models,
        [*(f"datasets.{name}" for name in params.datasets), *(f"selections.{name}" for name in params.selections)],
        *([f"datasets.{name}.parts.{part}" for part in mix.parts] for name, mix in mixes.items()),
    ):
        _refuse_twins(places)


def _refuse_twins(places: list[str]) -> None:
    """Raise a MistakeError for a name, the end of its place, that differs from an earlier one in case at most."""
    seen: dict[str, str] = {}
    for place in places:
        name = place.rpartition(".")[2].lower()
        if name in seen:
            raise MistakeError(f"{place} has the name of {seen[name]}; choose another")
        seen[name] = place


def _check_selection(params: Params, name: str, selection: Selection) -> None:
    where = f"selections.{name}"
    _one_of(selection.dataset, params.datasets, f"{where}.dataset", "a dataset")
    _one_of(selection.parent, ["base", *params.stages], f"{where}.parent", "a stage")
    _one_of(selection.reference, ["base", *params.stages], f"{where}.reference", "a stage")
    if selection.parent == selection.reference:
        raise MistakeError(f"{where}.reference is its parent too, so that no token stands out; name another stage")


def _check_router(params: Params, name: str) -> None:
    """A router tells its stages apart by the prompts of their datasets."""
    datasets, stages = dict[str, str](), params.routers[name].stages
    for stage in stages:
        _one_of(stage, params.stages, f"routers.{name}.stages", "a stage")
        other = datasets.setdefault(params.skills[stage], stage)
        if other != stage or stages.count(stage) > 1:
            raise MistakeError(
                f"routers.{name}.stages names {stage!r}, whose prompts are those of {other!r}; name one of them, once"
            )


def _check_earlier(params: Params, name: str, stage: Training) -> None:
    """What a stage does with its ancestors: protect them, replay their datasets."""
    ancestors = params.ancestors(name)
    for other in stage.protect:
        _one_of(other, ancestors, f"stages.{name}.protect", "one of its ancestors")
        if not getattr(params.stages[other], "remember", 0):
            raise MistakeError(f"stages.{other}.remember is missing; protecting it needs, say, 0.99")
    if stage.protect and not stage.protectable:
        raise MistakeError(
            f"stages.{name}.protect does not go with method {stage.method!r}; choose a method whose change can be"
            " projected: full or lora"
        )
    dataset = params.datasets[params.selected_from(stage.dataset)]
    if stage.is_tuned and not dataset.tuning:
        raise MistakeError(
            f"stages.{name} looks for its best step, but tune is 0 in its dataset {stage.dataset!r}; give the tuning"
            " split some records, such as 50"
        )
    if stage.replay and not ancestors:
        raise MistakeError(f"stages.{name}.replay has nothing to replay, for its parent is base; remove the key")
    if stage.replay and all(params.stages[other].dataset == stage.dataset for other in ancestors):
        raise MistakeError(
            f"stages.{name}.replay has nothing to replay, for its ancestors learn the same dataset; remove the key"
        )


def _one_of(name: str, known: Iterable[str], where: str, what: str) -> None:
    if name not in known:
        raise MistakeError(f"{where} names {name!r}, which is not {what}; {nearest(name, known, 'known are')}")


def _refuse_circle(params: Params) -> None:
    """A stage needs its parent and maybe a selection, which needs the two models that choose for it."""
    needs = {f"stages.{name}": [f"stages.{stage.parent}"] for name, stage in params.stages.items()}
    for name, stage in params.stages.items():
        if stage.dataset in params.selections:
            needs[f"stages.{name}"].append(f"selections.{stage.dataset}")
    for name, selection in params.selections.items():
        needs[f"selections.{name}"] = [f"stages.{selection.parent}", f"stages.{selection.reference}"]
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        raise MistakeError(
            f"{circle[0]} closes a circle ({' → '.join(circle)}); let one of them start from base"
        ) from None
