"""The only reader of params.yaml: typed, validated, one clear sentence for a mistake."""

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.errors import MistakeError, first_line, placed
from stages.methods import METHODS
from stages.project.references import check_references
from stages.project.sentences import sentence
from stages.records.source import Single, Source
from stages.records.sources import SOURCES
from stages.settings.base import Base
from stages.settings.evaluate import Evaluate
from stages.settings.gate import Gate
from stages.settings.merge import Merge
from stages.settings.router import Router
from stages.settings.search import Search
from stages.settings.section import Name, Settings, mistake
from stages.settings.selection import Selection
from stages.settings.warn import Warn

PARAMS = Path("params.yaml")

if TYPE_CHECKING:
    from stages.records.source import Source as AnyDataset
    from stages.settings.stage import Stage as AnyStage
else:  # one of the classes that are found in their folders, by the key that names it
    AnyDataset = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="source")]  # noqa: UP007
    AnyStage = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007


class Params(Settings):
    """All of params.yaml."""

    seed: int = Field(ge=0)
    """Every stage and dataset draws from a seed of its own, derived from this one and its name."""
    threads: Literal["auto"] | int
    """Of torch. `auto` takes the machine's cores; a number gives the same bits on machines with more or fewer."""
    launch: str = "python"
    """How training is started: `python`, `torchrun` (for a stage with several `processes`), or a command of your own
    such as `accelerate launch --config_file fsdp.yaml`. No result depends on it, so changing it runs nothing again."""
    prefix_cache: float = Field(default=2.0, ge=0)
    """GB on disk for what the frozen layers below the first trained one make of a batch; 0 turns the cache off."""
    track: Literal["tensorboard", "trackio"] | None = None
    """What logs the loss, rate and gradient norm of each step besides, in the folder `tracked`. Its extra installs it:
    `uv sync --extra tensorboard`. No result depends on it."""
    base: Base
    """The model to start from."""
    datasets: dict[Name, AnyDataset] = Field(min_length=1)
    """What is learned, by name."""
    selections: dict[Name, Selection] = {}
    """Datasets of which only the tokens worth it are learned, by name."""
    stages: dict[Name, AnyStage] = Field(min_length=1)
    """The training, by name: one on top of another, or side by side."""
    merge: Merge
    """How the stages become one model."""
    routers: dict[Name, Router] = {}
    """Models that choose a stage for each prompt, by name; see docs/routing.md."""
    search: Search = Search()
    """The search for better merge weights, `strata search`."""
    evaluate: Evaluate
    """How every model is scored on every dataset."""
    warn: Warn = Warn()
    """When the report warns."""
    gate: Gate = Gate()
    """What the merged model must hold to, `strata gate`."""

    @field_validator("threads", mode="before")
    @classmethod
    def _positive(cls, threads: Any) -> Any:
        if threads != "auto" and (type(threads) is not int or threads < 1):
            raise ValueError("auto, or a number from 1")
        return threads

    @field_validator("datasets")
    @classmethod
    def _unweighted(cls, datasets: dict[str, Source]) -> dict[str, Source]:
        for name, dataset in datasets.items():
            if isinstance(dataset, Single) and dataset.weight is not None:
                raise mistake(f".{name}.weight is of use in a mix alone; remove it")
        return datasets

    def find(self, section: Literal["datasets", "selections", "stages", "routers"], name: str) -> Any:
        """What stands under a name in a section; a MistakeError lists those that are there."""
        known: dict[str, Any] = getattr(self, section)
        if name not in known:
            raise MistakeError(f"{PARAMS}: {section} has no {name!r}; it has {', '.join(known) or 'none'}")
        return known[name]

    @property
    def thread_count(self) -> int:
        """Threads that torch computes with."""
        if self.threads != "auto":
            return self.threads
        affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
        return len(affinity(0)) if affinity else os.cpu_count() or 1

    @property
    def tracker(self) -> str | None:
        """The tracker that is asked for, if it is installed.

        Raises:
            MistakeError: it is not.
        """
        if self.track and importlib.util.find_spec(self.track) is None:
            raise MistakeError(f"{PARAMS}: track needs {self.track}; run uv sync --extra {self.track}")
        return self.track

    @property
    def models(self) -> list[str]:
        """Names of all that is scored: the base, the stages, the merged model and those that route."""
        return ["base", *self.stages, "merged", *self.routers]

    @property
    def skills(self) -> dict[str, str]:
        """The dataset that shows each stage's skill, by stage."""
        return {name: self.selected_from(stage.dataset) for name, stage in self.stages.items()}

    @property
    def guards(self) -> list[str]:
        """Datasets that no stage learns, and none selects from: they show what the training does to all else."""
        return [name for name in self.datasets if name not in self.skills.values()]

    def selected_from(self, name: str) -> str:
        """The dataset whose tokens a selection chooses from; a dataset is itself."""
        return self.selections[name].dataset if name in self.selections else name

    def ancestors(self, name: str) -> list[str]:
        """Stages between the base and stage `name`, the oldest first, `name` itself left out."""
        parent = self.stages[name].parent
        return [] if parent == "base" else [*self.ancestors(parent), parent]

    def lineage(self, name: str) -> list[str]:
        """The ancestors of stage `name`, and it."""
        return [*self.ancestors(name), name]


def load_params(path: Path = PARAMS) -> Params:
    """Read and check the whole file.

    Raises:
        MistakeError: for the first mistake found.
    """
    content = _read(path)
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise MistakeError(f"{path}: {sentence(error, content)}") from None
    with placed(f"{path}: "):
        check_references(params)
    return params


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MistakeError(f"{path} is missing; run the command in the folder that holds it")
    try:
        content = YAML(typ="safe", pure=True).load(path)
        json.dumps(content, ensure_ascii=False, default=str, skipkeys=True).encode()  # no half character, no circle
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise MistakeError(f"{path}:{line} is not valid YAML ({problem}); correct that line") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # a date, number or tag that is none
        raise MistakeError(f"{path} holds a value that is none ({first_line(error)}); correct it") from None
    if not isinstance(content, dict):
        raise MistakeError(f"{path} holds no keys; start from the one in the repository")
    return content
