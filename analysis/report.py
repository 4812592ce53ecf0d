"""The report of what the training changed, in one HTML file: `python -m analysis.report`.

Reads params.yaml, checkpoints/, merged/ and what the other stages left in reports/. Writes reports/report.html,
evaluation.svg and layers.svg (two of its pictures), layers.json (for `dvc plots`) and metrics.json (for
`dvc metrics`). No times and no chance: a second run writes the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import figures
from analysis.deltas import Measured, cosines, frozen_check, measure, summarise, survival
from analysis.figures import percent
from analysis.skills import Cell, Change, changes, score
from stages import params
from stages.errors import run
from stages.files import CHECKPOINTS, REPORTS, read_json, write_json, write_text
from stages.layers import OUTSIDE, names_outside
from stages.merging.merged import Merged, open_merged
from stages.weights.checkpoint import open_stages

ROUNDING = 0.25  # rounding error, as a share of the change, from which a card warns
CONFLICT = -0.1  # cosine of two stages below which a card says that they undo each other
HALF = 0.5  # of a stage's gain; a merge that keeps less has lost the skill rather than some of it


@dataclass(frozen=True)
class Facts:
    """All that the report tells, before it is put into words and pictures.

    Attributes:
        settings: params.yaml.
        measured: weights, from `analysis.deltas.measure`.
        records: stage.json of the base and of every stage.
        matrix: of reports/evaluation.json: model, dataset, then accuracy and loss.
        retention: of the same file, by stage.
        questions: number of evaluation records by dataset.
        curves: loss curve of every stage.
        declared: layers that each stage may change; -1 is what lies outside of them, such as the embedding.
    """

    settings: params.Params
    measured: Measured
    records: dict[str, dict[str, Any]]
    matrix: dict[str, dict[str, Cell]]
    retention: dict[str, dict[str, Any]]
    questions: dict[str, int]
    curves: dict[str, list[dict[str, Any]]]
    declared: dict[str, list[int]]

    @property
    def merged_stages(self) -> list[str]:
        """Stages in the merge, in the order of params.yaml."""
        return [name for name in self.settings.stages if name in self.settings.merge.weights]

    @property
    def changed(self) -> list[Change]:
        """Skills before and after each later stage and the merge."""
        return changes(self.matrix, self.settings, self.questions)

    @property
    def gram(self) -> np.ndarray:
        """Inner products over the whole model."""
        count = len(self.measured.names)
        return sum(self.measured.grams.values(), np.zeros((count, count)))

    @property
    def whole(self) -> pd.DataFrame:
        """Metrics of each checkpoint over all that it changes, by name; one that changes nothing has none."""
        return summarise(self.measured.rows, ["stage"]).set_index("stage").reindex(self.measured.names)

    @property
    def frozen(self) -> pd.DataFrame:
        """The frozen check of every stage and of the merged file."""
        return frozen_check(self.measured, self.declared)


def main() -> None:
    """Measure, then write every file of the report."""
    settings = params.load()
    torch.set_num_threads(settings.threads)
    write(gather(settings))


def gather(settings: params.Params) -> Facts:
    """Read what the other stages left, and measure the weights."""
    base, stages = open_stages(list(settings.stages))
    listed = [stage for stage in stages if stage.name in settings.merge.weights]
    exact = Merged(base, listed, settings.merge)
    evaluation = read_json(REPORTS / "evaluation.json")
    records = {name: read_json(CHECKPOINTS / name / "stage.json") for name in ["base", *settings.stages]}
    return Facts(
        settings=settings,
        measured=measure(stages, exact, open_merged(base, listed, settings.merge)),
        records=records,
        matrix=evaluation["matrix"],
        retention=evaluation["retention"],
        questions={name: read_json(REPORTS / "data" / f"{name}.json")[name]["eval"] for name in settings.datasets},
        curves={name: read_json(REPORTS / "train" / f"{name}.curve.json") for name in settings.stages},
        declared={
            name: [*records[name]["layers"], *([OUTSIDE] if names_outside(stage.layers, base.skeleton) else [])]
            for name, stage in settings.stages.items()
        },
    )


def write(facts: Facts) -> None:
    """Write the page, two pictures, and the numbers for `dvc plots` and `dvc metrics`."""
    pictures = draw(facts)
    for name in ("evaluation", "layers"):
        write_text(REPORTS / f"{name}.svg", pictures[name])
    write_json(REPORTS / "layers.json", layer_rows(facts))
    write_json(REPORTS / "metrics.json", metrics(facts))
    write_text(REPORTS / "report.html", page(facts, pictures))


def headline(facts: Facts) -> list[str]:
    """At most five sentences of fact, for a reader who knows no mathematics."""
    sentences = [_learned(facts)]
    later = [change for change in facts.changed if change.model != "merged"]
    harmed = [change for change in later if change.worse]
    if harmed:
        told = "; ".join(f"{change.model} took {_went(change)}" for change in harmed)
        sentences.append(f"Later stages harmed earlier skills: {told}.")
    elif later:
        sentences.append("No later stage lowered an earlier skill by more than chance explains.")
    sentences += [_merge_sentence(facts), _rounding_sentence(facts)]
    bad = facts.frozen[facts.frozen["max_abs"] != 0]
    if len(bad):
        names = ", ".join(bad["checkpoint"])
        sentences.append(f"Something changed that was declared untouched: see the check of {names} in section 5.")
    else:
        sentences.append("Nothing outside the declared layers changed.")
    return sentences


def _learned(facts: Facts) -> str:
    told = []
    for name, stage in facts.settings.stages.items():
        measure_name = facts.retention[name]["measure"]
        before, after = (facts.matrix[model][stage.dataset][measure_name] for model in ("base", name))
        unit = "" if measure_name == "accuracy" else "a loss of "
        told.append(f"{name} went from {unit}{score(before, measure_name)} to {score(after, measure_name)}")
    return f"On the skill that it was trained on, {'; '.join(told)}."


def _went(change: Change) -> str:
    unit = "" if change.measure == "accuracy" else "a loss of "
    return (
        f"{change.dataset} from {unit}{score(change.before, change.measure)} to {score(change.after, change.measure)}"
    )


def _merge_sentence(facts: Facts) -> str:
    merge = [change for change in facts.changed if change.model == "merged"]
    lost = [change for change in merge if change.worse]
    if not lost:
        return f"The merge lost no skill by more than chance explains: {'; '.join(map(_went, merge))}."
    told = []
    for change in lost:
        kept = facts.retention[change.stage]["retention"]
        extent = "most of " if kept is not None and kept < HALF else ""
        told.append(f"{extent}{_went(change)}")
    return f"The merge lost part of what the stages had learned: {'; '.join(told)}."


def _rounding_sentence(facts: Facts) -> str:
    merged, dtype = facts.whole.loc["merged"], facts.settings.merge.dtype
    return (
        f"Storing the merged model as {dtype} rounds its weights: the rounding error is {percent(merged.floor_share)}"
        f" of the size of the whole change, and {percent(merged.unchanged)} of the trained numbers"
        " are stored as if they had not been trained."
    )


def guesses(facts: Facts) -> list[str]:
    """Explanations that fit the facts but were not measured; none where no skill was harmed."""
    if not any(change.worse for change in facts.changed):
        return []
    shared = [
        f"{first} and {second} (layers {_ranges(common)})"
        for place, first in enumerate(facts.merged_stages)
        for second in facts.merged_stages[place + 1 :]
        if (common := sorted(set(facts.records[first]["layers"]) & set(facts.records[second]["layers"])))
    ]
    overlap = f" Here {', '.join(shared)} also write to the same layers." if shared else ""
    return [
        "Stages on different layers are not independent: a layer reads what the layers before it wrote, so a"
        f" change early in the model shifts what every later layer was trained on.{overlap}"
        " Training again with more replay, smaller merge weights or other layers would show whether that is the cause."
    ]


def cards(facts: Facts) -> list[dict[str, Any]]:
    """Four numbers to see first; `warn` marks those that ask for a look."""
    merge = [change for change in facts.changed if change.model == "merged"]
    kept = sum(not change.worse for change in merge)
    share = facts.whole.loc["merged", "floor_share"]
    stages = len(facts.settings.stages)
    overlaps = cosines(facts.gram)[:stages, :stages][np.triu_indices(stages, 1)]
    overlaps = overlaps[np.isfinite(overlaps)]
    strongest = float(overlaps[np.abs(overlaps).argmax()]) if len(overlaps) else 0.0
    violations = int((facts.frozen["max_abs"] != 0).sum())
    meaning = "they undo each other" if strongest < CONFLICT else "0 is unrelated, −1 undoes, +1 is the same"
    return [
        {
            "number": f"{kept} of {len(merge)}",
            "text": "skills are not worse after the merge",
            "warn": kept < len(merge),
        },
        {
            "number": percent(share),
            "text": "is the size of the rounding error in the file, against the change",
            "warn": share > ROUNDING,
        },
        {
            "number": f"{strongest:+.2f}",
            "text": f"strongest overlap of two stages; {meaning}",
            "warn": strongest < CONFLICT,
        },
        {
            "number": violations,
            "text": "checkpoints changed what they declared untouched",
            "warn": violations > 0,
        },
    ]


def draw(facts: Facts) -> dict[str, str]:
    """All pictures, as SVG by name."""
    measured = facts.measured
    by_module = summarise(measured.rows[measured.rows["layer"] >= 0], ["stage", "layer", "module"])
    by_layer = summarise(measured.rows[measured.rows["layer"] >= 0], ["stage", "layer"])
    labels = {name: _label(facts, name) for name in facts.matrix}
    titles = [f"{name} · {labels[name]}" for name in measured.names]
    return {
        "evaluation": figures.evaluation_matrix(
            facts.matrix, labels, {name: stage.dataset for name, stage in facts.settings.stages.items()}, facts.changed
        ),
        "layers": figures.heat_maps(by_module, measured.names, titles, measured.modules, measured.layers),
        "floor": figures.floor_lines(by_layer[by_layer["stage"] == "merged"], measured.layers),
        "whose": figures.whose_change(layer_shares(facts), list(facts.settings.stages), measured.layers),
        "cosines": figures.cosine_maps(facts.gram, measured.grams, measured.names, measured.layers),
        "curves": figures.loss_curves({name: curve for name, curve in facts.curves.items() if curve}),
    }


def layer_shares(facts: Facts) -> pd.DataFrame:
    """`survival` of every layer: columns layer, stage, survival, share."""
    parts = [
        survival(gram, facts.measured.names, facts.merged_stages).assign(layer=layer)
        for layer, gram in sorted(facts.measured.grams.items())
        if layer >= 0 and gram[-1, -1] > 0
    ]
    empty = pd.DataFrame({"stage": ["unexplained"], "survival": [math.nan], "share": [0.0], "layer": [0]})
    return pd.concat(parts) if parts else empty


def layer_rows(facts: Facts) -> list[dict[str, Any]]:
    """Relative change and floor by checkpoint, layer and module, for `dvc plots`."""
    rows = facts.measured.rows
    table = summarise(rows[rows["layer"] >= 0], ["stage", "layer", "module"])
    return [
        {
            "stage": row.stage,
            "layer": int(row.layer),
            "module": row.module,
            "relative_change": _rounded(row.relative_change),
            "floor": _rounded(row.floor),
        }
        for row in table.itertuples()
    ]


def metrics(facts: Facts) -> dict[str, Any]:
    """Flat numbers by stage for `dvc metrics`; what has no value is left out."""
    kept = survival(facts.gram, facts.measured.names, facts.merged_stages).set_index("stage")
    result: dict[str, Any] = {}
    for name in facts.measured.names:
        row = facts.whole.loc[name]
        numbers = {"relative_change": row.relative_change, "rounding_floor": row.floor}
        if name == "merged":
            numbers["unexplained"] = kept.loc["unexplained", "share"]
        else:
            own = facts.matrix[name][facts.settings.stages[name].dataset]
            numbers |= {"survival": kept["survival"].get(name), **own, "retention": facts.retention[name]["retention"]}
        result[name] = {
            key: _rounded(value) for key, value in numbers.items() if value is not None and math.isfinite(value)
        }
    return result | {"frozen_check": _rounded(facts.frozen["max_abs"].max())}


def page(facts: Facts, pictures: dict[str, str]) -> str:
    """The HTML page, self-contained.

    Args:
        facts: what to tell.
        pictures: from `draw`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = percent
    return environment.get_template("report.html").render(
        base=facts.records["base"],
        settings=facts.settings,
        headline=headline(facts),
        guesses=guesses(facts),
        cards=cards(facts),
        pictures=pictures,
        skills=_skill_rows(facts),
        left=_left_rows(facts),
        unexplained=survival(facts.gram, facts.measured.names, facts.merged_stages).iloc[-1]["share"],
        frozen=list(facts.frozen.itertuples()),
        lineage=[facts.records[name] | {"ranges": _ranges(facts.records[name]["layers"])} for name in facts.curves],
    )


def _skill_rows(facts: Facts) -> list[dict[str, Any]]:
    rows = []
    for name in facts.settings.stages:
        kept = facts.retention[name]
        values = [facts.matrix[model][kept["dataset"]][kept["measure"]] for model in ("base", name, "merged")]
        scores = [score(value, kept["measure"]) for value in values]
        rows.append({"stage": name, "scores": scores, **kept, "merged": name in facts.settings.merge.weights})
    return rows


def _left_rows(facts: Facts) -> list[dict[str, Any]]:
    kept = survival(facts.gram, facts.measured.names, facts.merged_stages).set_index("stage")["survival"]
    weights = facts.settings.merge.weights
    return [
        {
            "stage": name,
            **facts.whole.loc[name].to_dict(),
            "weight": weights.get(name),
            "survival": kept.get(name) if name in weights else None,
        }
        for name in facts.measured.names
    ]


def _label(facts: Facts, name: str) -> str:
    if name == "merged":
        return f"{facts.settings.merge.method}, {facts.settings.merge.dtype}"
    if name == "base":
        return "before training"
    record = facts.records[name]
    return f"{record['method']}, layers {_ranges(record['layers'])}, on {record['parent']}"


def _ranges(layers: list[int]) -> str:
    """Sorted layer numbers as `0-3, 8`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


if __name__ == "__main__":
    run(main)
