"""All that can be known of params.yaml before anything is trained."""

from typing import Any

from stages.errors import MistakeError
from stages.files import BASE, read_json
from stages.merging.kernels import find_kernel
from stages.models.architecture import FILE, Architecture
from stages.project.params import PARAMS, Params, load_params
from stages.project.references import check_depth
from stages.settings.merge import Merge

TRACKED = ("selections", "warn")  # sections with a default that dvc.yaml names all the same


def load_checked() -> Params:
    """Read params.yaml and check the merges too, which takes torch and would else be told after all training.

    Raises:
        MistakeError: for the first mistake found.
    """
    params = load_params()
    _check_merge(params.merge, "merge.method")
    for number, method in enumerate(params.search.methods or []):
        _check_merge(params.merge.model_copy(update={"method": method}), f"search.methods.{number}")
    for section in TRACKED:
        if section not in params.model_fields_set:
            raise MistakeError(f"{PARAMS}: {section} is missing, and DVC asks for it; write {section}: {{}}")
    return params


def check_against_base(params: Params) -> None:
    """Hold the stages' layers against the base in checkpoints/, if that is the one that params.yaml names.

    Raises:
        MistakeError: the base has no such layer, or no module of such a name.
    """
    path = BASE / "stage.json"
    record: dict[str, Any] = read_json(path) if path.exists() else {}
    named = (params.base.model, params.base.revision, params.base.sha256)
    if named == (record.get("model"), record.get("revision"), record.get("pin")):
        refuse_layers_outside(params, record["layers"])
        if (BASE / FILE).exists():
            refuse_unknown_modules(params, Architecture.of(BASE))


def refuse_layers_outside(params: Params, num_layers: int) -> None:
    """Raise a MistakeError for a stage whose layers the model of `num_layers` layers does not have."""
    try:
        check_depth(params, num_layers)
    except MistakeError as error:
        raise MistakeError(f"{PARAMS}: {error}") from None


def refuse_unknown_modules(params: Params, architecture: Architecture) -> None:
    """Raise a MistakeError for a stage whose layers name a module that the model does not have."""
    for name, stage in params.stages.items():
        try:
            architecture.select(stage.layers)
        except MistakeError as error:
            raise MistakeError(str(error).replace(f"{PARAMS}: ", f"{PARAMS}: stages.{name}.", 1)) from None


def _check_merge(merge: Merge, key: str) -> None:
    try:
        find_kernel(merge)
    except MistakeError as error:
        raise MistakeError(str(error).replace("merge.method", key)) from None
