"""The only reader of params.yaml: typed, validated, one clear sentence per mistake.

`python -m stages.params` checks the file and prints nothing but the number of stages when all is well.
"""

import difflib
import itertools
import re
from graphlib import CycleError, TopologicalSorter
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages import layers
from stages.errors import MistakeError, run
from stages.files import BASE, read_json
from stages.methods import METHODS
from stages.methods.bottleneck import Bottleneck, chosen_neurons
from stages.methods.stage import Settings, Stage, Training

PARAMS = Path("params.yaml")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED = {"base", "merged"}
PROTECTABLE = ["full", "lora"]  # methods whose change of a weight matrix can be kept off what others read

Dtype = Literal["float32", "bfloat16", "float16"]


class Base(Settings):
    """The model to start from.

    `add_biases` gives it biases of zero for `bitfit` to train, `extra_neurons` neurons of zero in every MLP for
    `bottleneck`, `adapter_size` adapters for `houlsby`; none changes what it computes.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    add_biases: bool = False
    extra_neurons: int = Field(default=0, ge=0)
    adapter_size: int = Field(default=0, ge=0)


class ReasoningGym(Settings):
    """Tasks that the reasoning-gym library generates and scores."""

    source: Literal["reasoning_gym"]
    task: str
    config: dict[str, Any] = {}
    train: int = Field(gt=0)
    eval: int = Field(gt=0)
    tune: int = Field(default=0, ge=0)


class LocalFile(Settings):
    """Records in a jsonl, csv or parquet file; `train: null` takes all that `eval` and `tune` leave.

    `sha256` pins the content, of which the path says nothing.
    """

    source: Literal["file"]
    path: str
    sha256: str | None = None
    train: int | None = Field(default=None, gt=0)
    eval: int = Field(gt=0)
    tune: int = Field(default=0, ge=0)


class Hub(Settings):
    """One split of a dataset on the Hugging Face hub, at a fixed revision.

    `stream` reads no more of it than the splits need, in place of downloading it and choosing from the whole.
    """

    source: Literal["hub"]
    id: str
    revision: str
    config: str | None = None
    split: str = "train"
    stream: bool = False
    train: int | None = Field(default=None, gt=0)
    eval: int = Field(gt=0)
    tune: int = Field(default=0, ge=0)


class Part(Settings):
    """What a dataset in a mix has beside its own keys: how often it is seen, relative to the other parts."""

    weight: float = Field(gt=0)


class ReasoningGymPart(ReasoningGym, Part):
    """Generated tasks in a mix."""


class LocalFilePart(LocalFile, Part):
    """A file in a mix."""


class HubPart(Hub, Part):
    """A dataset of the hub in a mix."""


class Mix(Settings):
    """Several datasets as one, each defined in full and weighted; its splits are theirs, one after the other."""

    source: Literal["mix"]
    parts: dict[str, ReasoningGymPart | LocalFilePart | HubPart]

    @property
    def tune(self) -> int:
        """Records in the tuning split."""
        return sum(part.tune for part in self.parts.values())

    def weights(self) -> dict[str, float]:
        """Each part's share of what is seen in training; together they are 1."""
        total = sum(part.weight for part in self.parts.values())
        return {name: part.weight / total for name, part in self.parts.items()}


Single = ReasoningGym | LocalFile | Hub
Dataset = Single | Mix
PARTS = {"reasoning_gym": ReasoningGymPart, "file": LocalFilePart, "hub": HubPart}
SOURCES: dict[str, type[Dataset]] = {"reasoning_gym": ReasoningGym, "file": LocalFile, "hub": Hub, "mix": Mix}


def _check_setting(setting: Any) -> Any:
    """Raise a ValueError unless it has one of the shapes that mergekit gives a parameter."""
    parts = setting if isinstance(setting, list) else [setting]
    filtered = bool(parts) and all(
        isinstance(part, dict) and "value" in part and part.keys() <= {"filter", "value"} for part in parts
    )
    values = [part["value"] for part in parts] if filtered else parts
    flat = [value for item in values for value in (item if isinstance(item, list) and filtered else [item])]
    if not flat or not all(isinstance(v, bool | int) or (isinstance(v, float) and isfinite(v)) for v in flat):
        raise ValueError("a number, a list of numbers from the first layer to the last, or a list of filter and value")
    return setting


def _check_parameter(setting: Any) -> Any:
    for part in setting.values() if isinstance(setting, dict) else [setting]:
        _check_setting(part)
    return setting


def _check_range(ends: list[float]) -> list[float]:
    if not ends[0] < ends[1]:
        raise ValueError("a lower and a higher number")
    return ends


Setting = Annotated[Any, AfterValidator(_check_setting)]
ByStage = Annotated[Any, AfterValidator(_check_parameter)]


class Selection(Settings):
    """A dataset of which only some tokens are learned: `python -m stages.select` says which.

    `keep` is the share of its learned tokens that stay: those with the largest loss under `parent`, which the stage
    that trains on the selection starts from, beside that under `reference`, which has learned what is worth it.
    """

    dataset: str
    parent: str
    reference: str
    keep: float = Field(gt=0, lt=1)


class AdapterSettings(Settings):
    """The merge as one PEFT adapter; `rank: null` takes what the merge has, `tolerance` is the error it may have."""

    rank: int | None = Field(default=None, gt=0)
    tolerance: float = Field(default=1e-4, gt=0)


class Merge(Settings):
    """How the stages' deltas become one model: a method and its parameters, in mergekit's own words.

    A weight, a parameter and `depth_scaling` are each a number, a list that is interpolated from the first layer
    to the last, or a list of `filter` (part of a tensor's name) and `value`; a parameter may also have one for
    each stage.
    """

    method: str = "task_arithmetic"
    weights: dict[str, Setting] = Field(min_length=1)
    parameters: dict[str, ByStage] = {}
    participants: Literal["touching", "all"] = "touching"
    space: Literal["full", "core"] = "full"
    depth_scaling: Setting = 1.0
    outputs: list[Literal["model", "adapter", "delta"]] = Field(default=["model"], min_length=1)
    adapter: AdapterSettings = AdapterSettings()
    dtype: Dtype = "bfloat16"
    seed: int = Field(default=0, ge=0)


Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_check_range)]


class Search(Settings):
    """What `python -m stages.search` may change of the merge, and how often it tries.

    `groups` is how many weights each stage gets over the depth of the model, `weights` and `density` are the ranges
    to search, `methods` those to choose from: what params.yaml says stays as it is where they are not given.
    """

    trials: int = Field(default=60, gt=0)
    groups: int = Field(default=1, gt=0)
    weights: Range = [0.0, 1.5]
    density: Range | None = None
    methods: list[str] | None = Field(default=None, min_length=1)
    measure: Literal["loss", "accuracy"] = "loss"


class Evaluate(Settings):
    """Bounds of the evaluation; answers longer than `max_new_tokens` are cut and count as wrong."""

    batch_size: int = Field(default=64, gt=0)
    max_new_tokens: int = Field(default=32, gt=0)


class Warn(Settings):
    """From when on the report's headline and cards warn.

    `rounding` is the rounding error of the merged file as a share of the change, `lost` the same of one stage, which
    is then lost. Below `cosine` two stages undo each other; above `same_start`, the overlap of what two stages read,
    they started from one seed: one task from two seeds has 0.37, two tasks from one seed 0.98. `norm` is how far a
    norm's gain moved, as a share of it, and `kept` how much of the weight that the merge was asked for the file holds.
    """

    rounding: float = Field(default=0.25, gt=0)
    lost: float = Field(default=0.9, gt=0)
    cosine: float = Field(default=-0.1, ge=-1, le=0)
    same_start: float = Field(default=0.7, gt=0, le=1)
    norm: float = Field(default=0.1, gt=0)
    kept: float = Field(default=0.5, gt=0, le=1)


class Params(BaseModel):
    """All of params.yaml.

    `launch` starts the training: `python`, or `accelerate launch …` or `torchrun …` for several processes.
    `prefix_cache` is how many GB on disk may hold what frozen layers made of a batch; 0 turns it off.
    """

    seed: int
    threads: int
    launch: str
    prefix_cache: float
    base: Base
    datasets: dict[str, Dataset]
    selections: dict[str, Selection]
    stages: dict[str, Stage]
    merge: Merge
    search: Search
    evaluate: Evaluate
    warn: Warn = Warn()

    @property
    def skills(self) -> dict[str, str]:
        """The dataset that shows each stage's skill, by stage."""
        return {name: self.selected_from(stage.dataset) for name, stage in self.stages.items()}

    def selected_from(self, name: str) -> str:
        """The dataset whose tokens a selection chooses from; a dataset is itself."""
        return self.selections[name].dataset if name in self.selections else name

    def ancestors(self, name: str) -> list[str]:
        """Stages between the base and stage `name`, the oldest first, `name` itself left out."""
        parent = self.stages[name].parent
        return [] if parent == "base" else [*self.ancestors(parent), parent]


def load(path: Path = PARAMS) -> Params:
    """Read and check the whole file.

    Raises:
        MistakeError: for the first mistake found.
    """
    content = _read(path)
    _known_keys(
        content,
        list(Params.model_fields),
        path,
        "",
    )
    params = Params.model_construct(
        seed=_value(content, "seed", Annotated[int, Field(ge=0)], path),
        threads=_value(content, "threads", Annotated[int, Field(gt=0)], path),
        launch=_value({"launch": "python"} | content, "launch", str, path),
        prefix_cache=_value({"prefix_cache": 2.0} | content, "prefix_cache", Annotated[float, Field(ge=0)], path),
        base=_settings(content, "base", Base, path),
        datasets={
            name: _dataset(item, f"datasets.{name}", path) for name, item in _named(content, "datasets", path).items()
        },
        selections={
            name: _validate(item, f"selections.{name}", Selection, path)
            for name, item in (_named(content, "selections", path) if content.get("selections") else {}).items()
        },
        stages={
            name: _choose(item, f"stages.{name}", "method", METHODS, path)
            for name, item in _named(content, "stages", path).items()
        },
        merge=_settings(content, "merge", Merge, path),
        search=_settings({"search": {}} | content, "search", Search, path),
        evaluate=_settings(content, "evaluate", Evaluate, path),
        warn=_settings({"warn": {}} | content, "warn", Warn, path),
    )
    _check_references(params, path)
    if (BASE / "stage.json").exists():
        check_layers(params, read_json(BASE / "stage.json")["layers"], path)
    return params


def check_layers(params: Params, num_layers: int, path: Path = PARAMS) -> None:
    """Raise a MistakeError for a stage whose layers the model of `num_layers` layers does not have."""
    for name, stage in params.stages.items():
        try:
            layers.numbers(stage.layers, num_layers)
        except MistakeError as mistake:
            raise MistakeError(f"{path}: stages.{name}.layers: {mistake}") from None
    _check_neurons(params, num_layers, path)


def _check_neurons(params: Params, num_layers: int, path: Path) -> None:
    """Two stages that both give a new neuron its weights would only disturb each other."""
    taken: dict[tuple[int, int], str] = {}
    for name, stage in params.stages.items():
        if isinstance(stage, Bottleneck):
            neurons = chosen_neurons(stage.neurons, params.base.extra_neurons)
            for place in itertools.product(layers.numbers(stage.layers, num_layers), neurons):
                if place in taken:
                    raise MistakeError(
                        f"{path}: stages.{name}.neurons: stage {taken[place]} has some of {stage.neurons!r} too;"
                        " give each its own, such as 0-31 and 32-63, and raise base.extra_neurons if they are too few"
                    )
                taken[place] = name


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MistakeError(f"{path} is missing; run the command in the folder that holds it")
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise MistakeError(f"{path}:{line} is not valid YAML ({problem}); correct that line") from None
    if not isinstance(content, dict):
        raise MistakeError(f"{path} holds no keys; start from the one in the repository")
    return content


def _known_keys(content: dict[str, Any], known: list[str], path: Path, where: str) -> None:
    for key in content:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean {nearest[0]}?" if nearest else f"known keys are {', '.join(known)}"
            raise MistakeError(f"{path}: {where}{key} is not a known key; {fix}")


def _named(content: dict[str, Any], section: str, path: Path, where: str = "") -> dict[str, Any]:
    items = content.get(section)
    section = where + section
    if not isinstance(items, dict) or not items:
        raise MistakeError(f"{path}: {section} needs at least one name with its settings below it")
    for name in items:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise MistakeError(
                f"{path}: {section}.{name} is no usable name; start with a letter and use only letters, digits, - and _"
            )
        if section == "stages" and name in RESERVED:
            raise MistakeError(f"{path}: {section}.{name} is a reserved name; choose another")
    return items


def _dataset(item: Any, where: str, path: Path) -> Dataset:
    """Validate a dataset, and first its parts if it is a mix."""
    if isinstance(item, dict) and item.get("source") == "mix":
        parts = {
            name: _choose(part, f"{where}.parts.{name}", "source", PARTS, path)
            for name, part in _named(item, "parts", path, f"{where}.").items()
        }
        item = item | {"parts": parts}
    return _choose(item, where, "source", SOURCES, path)


def _choose(item: Any, where: str, key: str, classes: dict[str, Any], path: Path) -> Any:
    """Validate `item` with the class that its own `key` names."""
    if not isinstance(item, dict):
        raise MistakeError(f"{path}: {where} needs its settings below it, {key} first")
    choice = item.get(key)
    if choice is None:
        raise MistakeError(f"{path}: {where}.{key} is missing; choose one of {', '.join(sorted(classes))}")
    if choice not in classes:
        nearest = difflib.get_close_matches(str(choice), classes, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(sorted(classes))}"
        raise MistakeError(f"{path}: {where}.{key} {choice!r} is not known; {fix}")
    return _validate(item, where, classes[choice], path)


def _settings(content: dict[str, Any], section: str, cls: type[Settings], path: Path) -> Any:
    item = content.get(section)
    if not isinstance(item, dict):
        raise MistakeError(f"{path}: {section} is missing; give it its settings as keys below it")
    return _validate(item, section, cls, path)


def _validate(item: dict[str, Any], where: str, cls: type[Settings], path: Path) -> Any:
    _known_keys(item, list(cls.model_fields), path, f"{where}.")
    try:
        return cls.model_validate(item)
    except ValidationError as error:
        raise MistakeError(_sentence(error, where, path)) from None


def _value(content: dict[str, Any], key: str, kind: Any, path: Path) -> Any:
    if key not in content:
        raise MistakeError(f"{path}: {key} is missing; add it")
    try:
        return TypeAdapter(kind).validate_python(content[key], strict=True)
    except ValidationError as error:
        raise MistakeError(_sentence(error, key, path)) from None


def _sentence(error: ValidationError, where: str, path: Path) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join([where, *map(str, first["loc"])])
    if first["type"] == "missing":
        return f"{path}: {key} is missing; add it"
    wish = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ").removeprefix("a valid ")
    return f"{path}: {key} is {first['input']!r}; it should be {wish}"


def _check_references(params: Params, path: Path) -> None:
    for name, stage in params.stages.items():
        _one_of(stage.parent, ["base", *params.stages], f"stages.{name}.parent", "a stage", path)
        _one_of(stage.dataset, [*params.datasets, *params.selections], f"stages.{name}.dataset", "a dataset", path)
    for name, selection in params.selections.items():
        _check_selection(params, name, selection, path)
    _refuse_circle(params, path)
    for name in params.merge.weights:
        _one_of(name, list(params.stages), f"merge.weights.{name}", "a stage", path)
    for name, stage in params.stages.items():
        if isinstance(stage, Training):
            _check_protection(params, name, stage, path)
        if isinstance(stage, Training) and stage.replay and not params.ancestors(name):
            raise MistakeError(
                f"{path}: stages.{name}.replay has nothing to replay, for its parent is base; remove the key"
            )


def _check_selection(params: Params, name: str, selection: Selection, path: Path) -> None:
    where = f"selections.{name}"
    if name in params.datasets:
        raise MistakeError(f"{path}: {where} has the name of a dataset; choose another")
    _one_of(selection.dataset, list(params.datasets), f"{where}.dataset", "a dataset", path)
    _one_of(selection.parent, ["base", *params.stages], f"{where}.parent", "a stage", path)
    _one_of(selection.reference, ["base", *params.stages], f"{where}.reference", "a stage", path)


def _check_protection(params: Params, name: str, stage: Training, path: Path) -> None:
    for other in stage.protect:
        _one_of(other, params.ancestors(name), f"stages.{name}.protect", "one of its ancestors", path)
        if not getattr(params.stages[other], "remember", 0):
            raise MistakeError(f"{path}: stages.{other}.remember is missing; protecting it needs, say, 0.99")
    if stage.protect and stage.method not in PROTECTABLE:
        raise MistakeError(
            f"{path}: stages.{name}.protect does not go with method {stage.method!r}; choose {' or '.join(PROTECTABLE)}"
        )


def _one_of(name: str, known: list[str], where: str, what: str, path: Path) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        raise MistakeError(f"{path}: {where} names {name!r}, which is not {what}; {fix}")


def _refuse_circle(params: Params, path: Path) -> None:
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
            f"{path}: {circle[0]} closes a circle ({' → '.join(circle)}); let one of them start from base"
        ) from None


def main() -> None:
    """Check params.yaml and say so."""
    from stages.merging.kernels import find_kernel

    params = load()
    find_kernel(params.merge)
    print(f"{PARAMS}: {len(params.stages)} stages, {len(params.merge.weights)} of them merged; no mistakes")


if __name__ == "__main__":
    run(main)
