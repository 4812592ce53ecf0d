"""All that can be known of params.yaml before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.errors import MistakeError, placed
from stages.files import BASE, CHECKPOINTS, DATA, read_record
from stages.merging.kernels import find_kernel
from stages.models.architecture import Architecture, empty_model
from stages.models.classes import class_names
from stages.project.params import PARAMS, Params, load_params
from stages.project.references import check_depth
from stages.records.lines import Lines
from stages.records.rows import Checked
from stages.records.source import Single, Source
from stages.records.sources.hub import Hub
from stages.records.sources.mix import Mix
from stages.records.template import check_template
from stages.settings.merge import Merge
from stages.settings.stage import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIPELINE, LOCK = Path("dvc.yaml"), Path("dvc.lock")  # what DVC runs, and has results of
TRACKED = ("selections", "routers", "warn")  # sections with a default that dvc.yaml names all the same


def load_checked() -> Params:
    """Read params.yaml and check what needs libraries and files too, and would else be told after all training.

    Raises:
        MistakeError: for the first mistake found.
    """
    params = load_params()
    _check_merge(params.merge, "merge.method")
    for number, method in enumerate(params.search.methods or []):
        _check_merge(params.merge.model_copy(update={"method": method}), f"search.methods.{number}")
    for section in TRACKED:
        if PIPELINE.exists() and section not in params.model_fields_set:
            raise MistakeError(f"{PARAMS}: {section} is missing, and DVC asks for it; write {section}: {{}}")
    made = _made()
    for name in _to_make("datasets", params.datasets, DATA, made):
        _tried(params.datasets[name], f"{PARAMS}: datasets.{name}")
    for name in _to_make("stages", params.stages, CHECKPOINTS, made):
        with placed(f"{PARAMS}: stages.{name}."):
            params.stages[name].try_out()
    if record := _record_of_base(params):
        refuse_layers_outside(params, record["layers"])
    return params


def _record_of_base(params: Params) -> dict[str, Any]:
    """Of the base in checkpoints/, if that is the one that params.yaml names; else nothing."""
    record = read_record(BASE) if (BASE / "stage.json").exists() else {}
    room = params.base.model_dump(include={"add_biases", "extra_neurons", "adapter_size"})
    named = (params.base.model, params.base.revision, params.base.sha256, room)
    return record if named == tuple(record.get(key) for key in ("model", "revision", "pin", "room")) else {}


def check_against_base(params: Params) -> bool:
    """Hold the stages against the base in checkpoints/, if that is the one that params.yaml names.

    Returns:
        Whether it is.

    Raises:
        MistakeError: the base has no such layer, no module of such a name, or a method does not go with it.
    """
    record = _record_of_base(params)
    if not record:
        return False
    refuse_layers_outside(params, record["layers"])
    import stages.models.modeling_houlsby  # noqa: F401  makes its models known to transformers

    model = empty_model(BASE)
    refuse_misfits(params, model, Architecture.of(BASE))
    return True


def refuse_layers_outside(params: Params, num_layers: int) -> None:
    """Raise a MistakeError for a stage whose layers the model of `num_layers` layers does not have."""
    with placed(f"{PARAMS}: "):
        check_depth(params, num_layers)


def refuse_misfits(params: Params, model: PreTrainedModel, architecture: Architecture) -> None:
    """Raise a MistakeError for a stage or router that the model does not go with; weights are not read."""
    for name in params.routers:
        with placed(f"{PARAMS}: routers.{name}: "):
            class_names(model, architecture)
    for name, stage in params.stages.items():
        with placed(f"{PARAMS}: stages.{name}."):
            modules = architecture.select(stage.layers)
            if isinstance(stage, Training):
                config = stage.adapter_config(model, modules)
                adapted = stage.trained(config, modules)
                _refuse_idle(stage, architecture, adapted)
                if common := [path for path in adapted if path in architecture.shared]:
                    raise MistakeError(
                        f"layers names {common[0]}, which has its weights in common with"
                        f" {architecture.shared[common[0]]}, and a file has them once; name other modules in layers"
                    )


def _refuse_idle(stage: Training, architecture: Architecture, adapted: list[str]) -> None:
    """Raise a MistakeError for a group or name in a stage's `layers` of which its method would train nothing."""
    groups = stage.layers if isinstance(stage.layers, dict) else {}
    for group, text in groups.items():
        if not set(adapted).intersection(architecture.select({group: text})):
            raise MistakeError(
                f"layers names {group!r}, of which method {stage.method!r} has nothing to train in layers {text};"
                " leave it out, or choose full"
            )


def refuse_chats(params: Params) -> None:
    """Raise a MistakeError for a chat of a dataset that is there already and that the base's chat template refuses.

    One prompt with its completion is like another to a template: the first speaks for all, also before the dataset is
    made.
    """
    for name in params.datasets:
        for lines in map(Lines, sorted((DATA / name).glob("*.jsonl"))):
            for place, record in enumerate(lines):
                if "messages" in record or place == 0:
                    check_template(record, lines.where(place))
    for name in datasets_to_make(params):
        for records in _tried(params.datasets[name], f"{PARAMS}: datasets.{name}"):
            check_template(records[0], records.where(0))


def _check_merge(merge: Merge, key: str) -> None:
    try:
        find_kernel(merge)
    except MistakeError as error:
        raise MistakeError(str(error).replace("merge.method", key)) from None


def _made() -> dict[str, Any]:
    """What params.yaml was when DVC made what it has, by key, such as `datasets.sums`."""
    try:
        stages = YAML(typ="safe").load(LOCK)["stages"].values() if LOCK.exists() else []
    except (YAMLError, KeyError, TypeError):
        raise MistakeError(
            f"{LOCK} is broken, as where dvc was killed while it wrote it; run rm {LOCK}: what was done comes back from"
            " the cache"
        ) from None
    read = [stage.get("params", {}).get(str(PARAMS), {}) for stage in stages]
    return {key: value for section in read for key, value in section.items()}


def datasets_to_make(params: Params) -> list[str]:
    """Datasets that DVC has still to make, or to make anew since params.yaml says something else of them."""
    return list(_to_make("datasets", params.datasets, DATA, _made()))


def stages_to_make(params: Params) -> list[str]:
    """Stages that DVC has still to make, or to make anew since params.yaml says something else of them."""
    return list(_to_make("stages", params.stages, CHECKPOINTS, _made()))


def _to_make(section: str, settings: dict[str, Any], folder: Path, made: dict[str, Any]) -> Iterator[str]:
    """Names in a section of what DVC has still to make; what the rest was made from may be on another machine."""
    for name, each in settings.items():
        given = each.model_dump(exclude_unset=True)
        if made.get(f"{section}.{name}", given if (folder / name).is_dir() else None) != given:
            yield name


def _tried(dataset: Source, where: str) -> list[Checked]:
    """Records of a dataset, or of each part of a mix; the hub is not asked, where that would download them."""
    if isinstance(dataset, Mix):
        return [each for name, part in dataset.parts.items() for each in _tried(part, f"{where}.parts.{name}")]
    if isinstance(dataset, Single) and not isinstance(dataset, Hub):
        return [dataset.model_copy(update={"train": 1, "eval": 1, "tune": 0}).records("", where)]
    return []
