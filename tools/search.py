"""Search for a better merge: `strata search`.

Every trial merges in memory and scores the stages' own skills on the tuning splits, never on the eval splits that
the matrix is reported on. Writes search/trials.json for `dvc plots` and search/best.yaml to paste into params.yaml.
Killed at any instant, it goes on from its last finished trial and ends with the same result.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from ruamel.yaml import YAML
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.errors import MistakeError
from stages.files import CHECKPOINTS, DATA, REPORTS, read_json, sha256, write_json
from stages.merging.kernels import find_kernel, parameters_of
from stages.merging.merged import Merged
from stages.models.loading import Weights, compute_dtype, device, load_model, load_tokenizer, set_weights
from stages.models.losses import mean_loss
from stages.models.scoring import score
from stages.project.params import Params, load_params
from stages.records.lines import load_split
from stages.records.scorers import scorers_of
from stages.settings.merge import Merge
from stages.training.resume import resume_folder
from stages.weights.checkpoint import open_stages

SEARCH = Path("search")
MEAN = 0.1  # share of the mean in the objective: it decides between merges whose worst skill is the same

Skills = dict[str, float]  # by stage


def add_arguments(_: ArgumentParser) -> None:
    """Nothing to say: `search` of params.yaml has the settings."""


def main() -> None:
    """Run every trial and write the best merge that was found.

    Raises:
        MistakeError: there is nothing to search with, or no split to search on.
    """
    settings = load_params()
    torch.set_num_threads(settings.thread_count)
    for name in settings.merge.weights:
        dataset = settings.skills[name]
        if not settings.datasets[dataset].tuning:
            raise MistakeError(f"params.yaml: datasets.{dataset}.tune is 0; the search needs some records, such as 50")
    open_stages(list(settings.merge.weights))  # tells which is missing
    for name in settings.merge.weights:
        if not (split := DATA / settings.skills[name] / "tune.jsonl").exists():
            raise MistakeError(f"{split} is missing; run `dvc repro data@{settings.skills[name]}`")
    for method in settings.search.methods or []:
        find_kernel(settings.merge.model_copy(update={"method": method}))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with resume_folder(key(settings)) as work:
        trials = search(settings, Trials(settings).retention, work / "trials.json")
    best = max(trials, key=lambda trial: trial["objective"])
    write_json(SEARCH / "trials.json", [summary(trial, number) for number, trial in enumerate(trials)])
    SEARCH.mkdir(exist_ok=True)
    write_best(best, SEARCH / "best.yaml")
    print(f"best of {len(trials)} trials, retention on the tuning splits: {percent(best['retention'])}")
    print((SEARCH / "best.yaml").read_text())


def search(settings: Params, retention: Callable[[Merge], Skills], log: Path) -> list[dict[str, Any]]:
    """Ask the optimiser (Optuna's tree-structured Parzen estimator), try, tell, for every trial.

    The sampler is a function of its seed and of the values told, so a search that was killed is asked and told
    again what is in `log`, which costs nothing, and goes on as if it had not been.

    Args:
        settings: of params.yaml; the first trial is its own merge.
        retention: share of its gain that each stage keeps in a merge.
        log: where finished trials are kept.

    Returns:
        The settings, the retention of each stage and the objective of every trial.
    """
    sampler = optuna.samplers.TPESampler(seed=settings.merge.seed, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(start(settings))
    trials = read_json(log, list) if log.exists() else []
    done = len(trials)
    with tqdm(total=settings.search.trials, initial=done, desc="search", unit="trial", dynamic_ncols=True) as bar:
        for number in range(settings.search.trials):
            trial = study.ask()
            merge = suggest(trial, settings)
            if number >= done:
                kept = retention(merge)
                changed = merge.model_dump(include={"method", "weights", "parameters"})
                trials.append({"merge": changed, "retention": kept, "objective": objective(kept)})
                write_json(log, trials)
                bar.set_postfix(best=percent(max(trials, key=lambda trial: trial["objective"])["retention"]))
                bar.update()
            study.tell(trial, trials[number]["objective"])
    return trials


def start(settings: Params) -> dict[str, Any]:
    """The merge of params.yaml as far as the search can express it: where its weights are plain numbers."""
    low, high = settings.search.weights
    return {
        f"{name}/{group}": min(max(float(weight), low), high)
        for name, weight in sorted(settings.merge.weights.items())
        if isinstance(weight, int | float)
        for group in range(settings.search.groups)
    }


def suggest(trial: optuna.Trial, settings: Params) -> Merge:
    """The merge of params.yaml with what the search may change replaced."""
    merge, space = settings.merge, settings.search
    weights: dict[str, Any] = {}
    for name in sorted(merge.weights):
        values = [round(trial.suggest_float(f"{name}/{group}", *space.weights), 3) for group in range(space.groups)]
        weights[name] = values if space.groups > 1 else values[0]
    changes: dict[str, Any] = {"weights": weights}
    if space.methods:
        changes["method"] = trial.suggest_categorical("method", space.methods)
    method = changes.get("method", merge.method)
    if space.density and "density" in parameters_of(method):
        density = round(trial.suggest_float("density", *space.density), 3)
        changes["parameters"] = merge.parameters | {"density": density}
    return merge.model_copy(update=changes)


def objective(kept: Skills) -> float:
    """The worst-kept skill, with a little of the mean; a skill that is better than its own stage's counts as kept."""
    capped = [min(1.0, share) for share in kept.values()]
    return round((1 - MEAN) * min(capped) + MEAN * sum(capped) / len(capped), 6)


class Trials:
    """One model in memory that takes the weights of one merge after another.

    Args:
        settings: of params.yaml.

    Raises:
        MistakeError: a stage gained nothing on its tuning split, so there is nothing to keep.
    """

    def __init__(self, settings: Params) -> None:
        self._settings = settings
        self._base, self._stages = open_stages(sorted(settings.merge.weights))
        self._tokenizer = load_tokenizer()
        self._records = {name: load_split(settings.skills[name], "tune") for name in settings.merge.weights}
        self._before = self._score(load_model(self._base, compute_dtype(), device()))
        self._learned = {
            stage.name: self._score(load_model(stage, compute_dtype(), device()), [stage.name])[stage.name]
            for stage in self._stages
        }
        for name, learned in self._learned.items():
            if learned <= self._before[name]:
                raise MistakeError(
                    f"params.yaml: stages.{name} gained nothing on the tuning split of its dataset; train it longer or"
                    " leave it out of merge.weights"
                )
        self._model = load_model(Merged(self._base, self._stages, settings.merge), compute_dtype(), device())

    def retention(self, merge: Merge) -> Skills:
        """Share of its gain over the base that each stage's skill keeps in this merge."""
        merged: Weights = Merged(self._base, self._stages, merge)
        set_weights(self._model, merged, merged.changed())
        found = self._score(self._model)
        return {
            name: round((found[name] - self._before[name]) / (learned - self._before[name]), 4)
            for name, learned in self._learned.items()
        }

    def _score(self, model: PreTrainedModel, names: list[str] | None = None) -> Skills:
        """How good a model is at the stages' skills: the loss in nats per token with its sign changed, or the score."""
        by_loss = self._settings.search.measure == "loss"
        return {name: (self._by_loss if by_loss else self._by_score)(model, name) for name in names or self._records}

    def _by_loss(self, model: PreTrainedModel, name: str) -> float:
        return -mean_loss(model, self._tokenizer, self._records[name], self._settings.evaluate.batch_size)

    def _by_score(self, model: PreTrainedModel, name: str) -> float:
        records, dataset = self._records[name], self._settings.skills[name]
        chosen = read_json(REPORTS / "data" / f"{dataset}.json")[dataset]["scorers"]
        scorers = scorers_of(dataset, chosen, records)
        rows = score(model, self._tokenizer, records, scorers, self._settings.evaluate)
        scores = [row["score"] for row in rows if "score" in row]
        if not scores:
            raise MistakeError(
                f"params.yaml: search.measure is score, but dataset {dataset} has no answer that is scored; write loss"
            )
        return sum(scores) / len(scores)


def summary(trial: dict[str, Any], number: int) -> dict[str, Any]:
    """One point of the plot: the objective, and the retention of every stage."""
    return {"trial": number, "objective": trial["objective"], **trial["retention"]}


def write_best(best: dict[str, Any], path: Path) -> None:
    """Write the settings of a trial as they stand in params.yaml."""
    content = {"merge": {key: value for key, value in best["merge"].items() if value}}
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)


def percent(kept: Skills) -> str:
    """Retention of every stage, such as `sums 84 %`."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in kept.items())


def key(settings: Params) -> dict[str, Any]:
    """Everything that a trial's value depends on."""
    used = ["base", *sorted(settings.merge.weights)]
    return {
        "settings": settings.model_dump(include={"merge", "search", "evaluate", "threads"}),
        "checkpoints": [sha256([CHECKPOINTS / name / "stage.json"]) for name in used],
        "data": [sha256([DATA / settings.skills[name] / "tune.jsonl"]) for name in used[1:]],
        "code": sha256(sorted(Path("stages").rglob("*.py"))),
    }
