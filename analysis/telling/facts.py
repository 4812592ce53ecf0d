"""Everything that the report tells, gathered from what the other stages of the pipeline left."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.changes.measured import MERGED, Measured
from analysis.changes.tables import cosine_by_chance, cosines, frozen_check, significant, summarise, survival
from analysis.telling.answers import ANSWERS
from analysis.telling.skills import Cell, Change, changes, guarded
from analysis.telling.text import in_layers, in_modules
from stages.files import BASE, PICKED, REPORTS, read_json
from stages.models.architecture import OUTSIDE, Architecture
from stages.project.params import Params


@dataclass(frozen=True)
class Facts:
    """All that the report tells, before it is put into words and pictures.

    Attributes:
        settings: params.yaml, with the dtype of the merged file where it leaves that to the base.
        measured: weights, from `analysis.measure`.
        records: stage.json of the base and of every stage, and the checkpoint's size in bytes.
        evaluation: content of reports/evaluation.json.
        scorers: how answers are scored and why, by dataset and part.
        curves: loss curve of every stage.
        spent: steps, tokens and the like, of reports/train, by stage.
        probe: what the running models do, from `gather_probe`.
        rounding: content of reports/rounding.json: what rounding costs the running model.
        answers: reports/answers.parquet: what every model says to every record of the evaluation splits.
        declared: layers that each stage may change, OUTSIDE for what lies in none, such as the embedding; an imported
            adapter declares none.
    """

    settings: Params
    measured: Measured
    records: dict[str, dict[str, Any]]
    evaluation: dict[str, Any]
    scorers: dict[str, dict[str, dict[str, str]]]
    curves: dict[str, list[dict[str, Any]]]
    spent: dict[str, dict[str, Any]]
    probe: dict[str, Any]
    rounding: dict[str, float]
    answers: pd.DataFrame
    declared: dict[str, list[int]]

    @cached_property
    def merged_stages(self) -> list[str]:
        """Stages in the merge, in the order of params.yaml."""
        return [name for name in self.settings.stages if name in self.settings.merge.weights]

    @property
    def matrix(self) -> dict[str, dict[str, Cell]]:
        """Model, dataset, then the loss and the dataset's own measure."""
        return self.evaluation["matrix"]

    @property
    def retention(self) -> dict[str, dict[str, Any]]:
        """What the merge kept of each stage's gain, by stage."""
        return self.evaluation["retention"]

    def trained(self, name: str) -> str:
        """What a stage was to change, such as `layers 0-3`; of an imported adapter, the layers that it does change."""
        stage = self.settings.stages[name]
        if stage.method == "import":
            return in_layers(self.records[name]["layers"])
        return in_modules(stage.layers, self.measured.layers)

    @cached_property
    def changed(self) -> list[Change]:
        """Skills before and after each later stage and the merge."""
        return changes(self.evaluation)

    @cached_property
    def guarded(self) -> list[Change]:
        """What the training did to the datasets that no stage learns."""
        return guarded(self.evaluation, self.settings.guards)

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products over the whole model."""
        count = len(self.measured.names)
        return sum(self.measured.grams.values(), np.zeros((count, count)))

    @cached_property
    def whole(self) -> pd.DataFrame:
        """Metrics of each checkpoint over all that it changes, by name; one that changes nothing has none."""
        table = summarise(self.measured.rows, ["stage"]).set_index("stage")
        return table.reindex(self.measured.names).astype(float)

    @cached_property
    def survivals(self) -> pd.DataFrame:
        """Survival and share of each merged stage over the whole model, by name; the last row is NO_STAGE."""
        return survival(self.gram, self.measured.names, self.merged_stages).set_index("stage")

    @cached_property
    def changing(self) -> list[str]:
        """Stages that change something, in the order of params.yaml."""
        return [name for name in self.settings.stages if np.isfinite(self.whole.loc[name, "max_abs"])]

    @cached_property
    def cosines(self) -> dict[tuple[str, str], float]:
        """Cosine of every two stages that change something."""
        angles, names = cosines(self.gram), self.measured.names
        pairs = itertools.combinations(self.changing, 2)
        return {(one, other): float(angles[names.index(one), names.index(other)]) for one, other in pairs}

    @cached_property
    def conflicts(self) -> dict[tuple[str, str], float]:
        """Those of them that point in opposite directions, by more than `warn.cosine` and than chance explains.

        The null is that of unrelated changes (`cosine_by_chance`), for all pairs together.
        """
        rows, limit = self.measured.rows, self.settings.warn.cosine
        opposed = {pair: angle for pair, angle in self.cosines.items() if angle < limit}
        beyond = significant(len(self.cosines)) if opposed else 0.0
        return {pair: angle for pair, angle in opposed.items() if angle < -beyond * cosine_by_chance(rows, *pair)}

    @cached_property
    def has_file(self) -> bool:
        """Whether the merge wrote a model; an adapter or a delta rounds nothing, and holds only what changed."""
        return "model" in self.settings.merge.outputs

    @cached_property
    def moved_by_rounding(self) -> float:
        """How far rounding moves what the running model says, as a share of how far the merge does; NaN if unknown.

        It is unknown where the base has other digits than the file, for then all of it is rounded and not its change.
        """
        whole = self.rounding.get("training", 0.0)
        is_known = whole and self.records["base"]["dtype"] == self.settings.merge.dtype
        return self.rounding["rounding"] / whole if is_known else math.nan

    @cached_property
    def frozen(self) -> pd.DataFrame:
        """The frozen check of every stage that declares its layers, and of the merged file."""
        return frozen_check(self.measured, self.declared, self.has_file)


def gather(params: Params) -> Facts:
    """Read what the other stages left."""
    records, measured = read_json(PICKED / "checkpoints.json"), Measured.read(REPORTS / "measured")
    architecture = Architecture.of(BASE)
    trained = [name for name, stage in params.stages.items() if stage.method != "import"]
    return Facts(
        settings=params.model_copy(update={"merge": params.merge.model_copy(update={"dtype": measured.dtype})}),
        measured=measured,
        records=records,
        evaluation=read_json(REPORTS / "evaluation.json"),
        scorers={name: read_json(REPORTS / "data" / f"{name}.json")[name]["scorers"] for name in params.datasets},
        curves={name: read_json(REPORTS / "train" / f"{name}.curve.json", list) for name in params.stages},
        spent={name: read_json(REPORTS / "train" / f"{name}.json")[name] for name in params.stages},
        probe=gather_probe(params),
        rounding=read_json(REPORTS / "rounding.json"),
        answers=pd.read_parquet(ANSWERS),
        declared={name: [*records[name]["layers"], *_outside(architecture, params, name)] for name in trained},
    )


def gather_probe(params: Params) -> dict[str, Any]:
    """The base's probe, and below `checkpoints` those of the stages, in order, and of the merged model."""
    checkpoints = {name: read_json(REPORTS / "probe" / f"{name}.json") for name in [*params.stages, MERGED]}
    return read_json(REPORTS / "probe" / "base.json") | {"checkpoints": checkpoints}


def _outside(architecture: Architecture, params: Params, name: str) -> list[int]:
    """OUTSIDE, where a stage names modules that lie in no layer."""
    layers = {architecture.place(path)[0] for path in architecture.select(params.stages[name].layers)}
    return [OUTSIDE] if OUTSIDE in layers else []
