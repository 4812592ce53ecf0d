"""Every model on every skill, in one matrix, and what is more than chance in it: `python -m stages.evaluate`.

Rows are the base, each stage, the merged model and those that route, as `stages.score` asked them. Tells also what
share of each stage's gain the merge keeps, how each skill fared under later stages and the merge, and what a routed
model chose. Writes reports/evaluation.json, and reports/answers.parquet with every answer of every model.
"""

from typing import Any

import numpy as np
import pandas as pd

from stages.comparing import Comparison, Scores, compare, retention_interval
from stages.errors import run
from stages.files import ANSWERS, REPORTS, read_json, rounded, write_json, write_table
from stages.project.params import Params, load_params
from stages.records.scorers import measure_of

Skill = dict[str, dict[str, Scores]]  # measure, then model


def main() -> None:
    """Write all answers, and the matrix with its comparisons."""
    params = load_params()
    answers = gather(params)
    write_table(REPORTS / "answers.parquet", answers)
    write_json(REPORTS / "evaluation.json", rounded(evaluation(answers, params)))


def gather(params: Params) -> pd.DataFrame:
    """The answers of all models, those to one record next to each other."""
    tables = [pd.read_parquet(ANSWERS / f"{model}.parquet") for model in params.models]
    for model, table in zip(params.models, tables, strict=True):
        table.insert(2, "model", model)
    places = [table.reset_index(names="place") for table in tables]  # every model was asked the same, in one order
    return pd.concat(places, ignore_index=True).sort_values("place", kind="stable").drop(columns="place")


def evaluation(answers: pd.DataFrame, params: Params) -> dict[str, Any]:
    """What is written to reports/evaluation.json.

    Returns:
        `matrix` and its `intervals`: by model and dataset, the loss in nats per token and, where answers are scored,
            the dataset's own measure.
        `measures`: by dataset, the one that is told of it.
        `questions`: by dataset, how many records it is the mean of.
        `retention`: by stage, see `retention`.
        `comparisons`: see `comparisons`.
        `routing`: by router, see `routing`.
    """
    models, skills = list(answers["model"].unique()), read_skills(answers)
    told = {name: measure_to_tell(skill) for name, skill in skills.items()}

    def cells(number: Any) -> dict[str, Any]:
        return {
            model: {
                name: {measure: number(scores[model]) for measure, scores in skill.items()}
                for name, skill in skills.items()
            }
            for model in models
        }

    by_skill = {name: skill[told[name]] for name, skill in skills.items()}
    return {
        "matrix": cells(lambda scores: scores.mean),
        "intervals": cells(lambda scores: scores.interval()),
        "measures": told,
        "questions": {name: int((scores["base"].weights > 0).sum()) for name, scores in by_skill.items()},
        "retention": {
            stage: retention(by_skill[name], stage) | {"dataset": name} for stage, name in params.skills.items()
        },
        "comparisons": comparisons(by_skill, params),
        "routing": {name: routing(answers, name) for name in params.routers},
    }


def routing(answers: pd.DataFrame, name: str) -> dict[str, Any]:
    """What `route` tells of a routed model, and how often it chose each stage, or the base, on each dataset."""
    rows = answers[answers["model"] == name]
    counts = {dataset: part["choice"].value_counts().to_dict() for dataset, part in rows.groupby("dataset", sort=False)}
    return read_json(ANSWERS / f"{name}.json") | {"chosen": counts}


def read_skills(answers: pd.DataFrame) -> dict[str, Skill]:
    """By dataset: the loss of every model, and the dataset's own measure where answers are scored."""
    skills: dict[str, Skill] = {}
    for (name, model), rows in answers.groupby(["dataset", "model"], sort=False):
        skill = skills.setdefault(str(name), {})
        found = [Scores("loss", rows["loss"].to_numpy(), rows["weight"].to_numpy())]
        if (measure := measure_of(rows["scorer"].dropna().unique())) != "loss":
            scored = rows["score"].to_numpy()
            found.append(Scores(measure, np.nan_to_num(scored), np.isfinite(scored).astype(float)))
        for scores in found:
            skill.setdefault(scores.measure, {})[str(model)] = scores
    return skills


def measure_to_tell(skill: Skill) -> str:
    """The dataset's own measure; the loss where no model moved the own one by more than chance, and one moved the loss.

    So a skill whose answers are right nowhere is told by what it did learn.
    """

    def moved(measure: str) -> bool:
        base, *others = skill[measure].values()
        return any(compare(base, other).is_clear for other in others)

    own = list(skill)[-1]
    return "loss" if own != "loss" and not moved(own) and moved("loss") else own


def retention(scores: dict[str, Scores], stage: str) -> dict[str, Any]:
    """What a stage gained on its own dataset over the base, and the share of it that the merged model keeps.

    `retention` is None where the stage gained nothing, its interval where the gain may be chance.
    """
    base, own, merged = (scores[model] for model in ("base", stage, "merged"))
    gain, kept = own.mean - base.mean, merged.mean - base.mean
    gained = gain < 0 if base.measure == "loss" else gain > 0
    clear = gained and compare(base, own).is_clear
    return {
        "measure": base.measure,
        "gain": gain,
        "merged_gain": kept,
        "retention": kept / gain if gained else None,
        "interval": retention_interval(base, own, merged) if clear else None,
    }


def comparisons(by_skill: dict[str, dict[str, Scores]], params: Params) -> list[dict[str, Any]]:
    """Each skill learned earlier under each later stage, each merged skill under the merge, and each against the base;
    and what no stage learns under every model, against the base.

    Returns:
        `model` and what it is held `against`, the `dataset`, its `measure`, `before` and `after`, the `difference`, its
        `interval`, `p` of the exact test where answers are right or wrong, whether it is `clear`ly more than chance,
        and how many questions are `needed` for a difference of this size.
    """
    later = [
        (name, stage.parent, params.skills[earlier])
        for name, stage in params.stages.items()
        for earlier in params.ancestors(name)
        if params.skills[earlier] != params.skills[name]
    ]
    later += [("merged", name, params.skills[name]) for name in params.merge.weights]
    learned = [(name, "base", dataset) for name, dataset in params.skills.items()]
    learned += [(against, "base", dataset) for _, against, dataset in later]
    guards = [name for name in by_skill if name not in params.skills.values()]
    learned += [(model, "base", guard) for guard in guards for model in [*params.stages, "merged", *params.routers]]
    return [
        {"model": model, "against": against, "dataset": dataset}
        | _told(by_skill[dataset][against], by_skill[dataset][model])
        for model, against, dataset in dict.fromkeys([*later, *learned])
    ]


def _told(before: Scores, after: Scores) -> dict[str, Any]:
    found: Comparison = compare(before, after)
    return {
        "measure": before.measure,
        "before": before.mean,
        "after": after.mean,
        "difference": found.difference,
        "interval": found.interval,
        "p": found.p,
        "clear": found.is_clear,
        "needed": found.needed,
    }


if __name__ == "__main__":
    run(main)
