"""The search: its optimiser on a known function, its trials on tiny models."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages import base, data, train
from stages.errors import MistakeError
from stages.files import DATA
from stages.merging.merged import Merged
from stages.models.losses import mean_loss
from stages.project.params import load_params
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_stages
from tools import search


def settings(**changes):
    loaded = load_params()
    return loaded.model_copy(update={"search": loaded.search.model_copy(update=changes)})


def best_at(target):
    """Retention of 1 where both weights of both stages are `target`, falling with the distance."""

    def retention(merge):
        distance = {name: sum(abs(weight - target) for weight in weights) for name, weights in merge.weights.items()}
        return {name: 1 - value for name, value in distance.items()}

    return retention


@pytest.fixture
def searched(project):
    """The tiny project, trained, with tuning splits."""
    text = Path("params.yaml").read_text().replace("eval: 10\n", "eval: 10\n    tune: 6\n")
    text = text.replace("steps: 4\n    replay: 0.25", "steps: 40").replace("method: ln", "method: lora\n    rank: 4")
    Path("params.yaml").write_text(text.replace("evaluate:\n", "search: {trials: 4, groups: 2}\nevaluate:\n"))
    base.main()
    for name in ("sums", "words"):
        data.main(name)
    for name in ("sums", "words"):
        train.main(name)
    return project


def test_it_starts_from_the_merge_of_params_and_finds_a_better_one(project):
    trials = search.search(settings(trials=40, groups=2), best_at(0.3), project / "log.json")
    assert trials[0]["merge"]["weights"] == {"sums": [1.0, 1.0], "words": [1.0, 1.0]}
    found = [trial["objective"] for trial in trials]
    assert len(found) == 40 and max(found) > found[0] + 0.8


def test_a_killed_search_ends_as_if_it_had_not_been(project):
    chosen = settings(trials=25, groups=2, methods=["task_arithmetic", "ties"], density=[0.2, 1.0])
    whole = search.search(chosen, best_at(0.3), project / "whole.json")

    calls = []

    def dies_at_the_eighth(merge):
        calls.append(merge)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return best_at(0.3)(merge)

    with pytest.raises(KeyboardInterrupt):
        search.search(chosen, dies_at_the_eighth, project / "log.json")
    assert len(json.loads((project / "log.json").read_text())) == 7
    assert search.search(chosen, dies_at_the_eighth, project / "log.json") == whole
    assert len(calls) == 8 + 18


def test_density_is_asked_of_the_methods_that_have_one(project):
    chosen = settings(trials=20, methods=["linear", "ties"], density=[0.2, 0.4])
    trials = search.search(chosen, lambda merge: {"sums": 0.5, "words": 0.5}, project / "log.json")
    methods = {trial["merge"]["method"] for trial in trials}
    assert methods == {"linear", "ties"}
    for trial in trials:
        assert (trial["merge"]["method"] == "ties") == bool(trial["merge"]["parameters"])
        assert 0.2 <= trial["merge"]["parameters"].get("density", 0.3) <= 0.4


def test_a_skill_better_than_its_stages_own_pays_for_no_other():
    assert search.objective({"a": 1.0, "b": 0.5}) == search.objective({"a": 3.0, "b": 0.5})
    assert search.objective({"a": 0.6, "b": 0.6}) > search.objective({"a": 1.0, "b": 0.5})


def test_retention_is_1_for_a_stages_own_weights_and_0_for_the_bases(searched):
    """`words` stands on `sums`, so the sum of both deltas is the stage `words`."""
    trials = search.Trials(load_params())

    def kept(sums, words):
        return trials.retention(load_params().merge.model_copy(update={"weights": {"sums": sums, "words": words}}))

    assert kept(1.0, 1.0)["words"] == pytest.approx(1, abs=1e-3)
    assert kept(1.0, 0.0)["sums"] == pytest.approx(1, abs=1e-3)
    assert kept(0.0, 0.0) == pytest.approx({"sums": 0, "words": 0}, abs=1e-3)
    assert kept(0.5, 0.5)["sums"] != pytest.approx(1, abs=1e-2)


def test_it_can_compare_what_the_answers_score(searched, monkeypatch):
    text = Path("params.yaml").read_text().replace("eval: 10\n", "eval: 10\n    score: chrf\n")
    Path("params.yaml").write_text(text.replace("search: {", "search: {measure: score, "))
    for name in ("sums", "words"):
        data.main(name)

    def score(model, tokenizer, records, scorers, bounds):
        """Models as small as these have no answer right."""
        assert scorers == ["chrf"] * 6
        return [{"score": 1 / (1 + mean_loss(model, tokenizer, [record], 1))} for record in records]

    monkeypatch.setattr(search, "score", score)
    assert search.Trials(load_params()).retention(load_params().merge)["words"] == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(search, "score", lambda *_: [{"loss": 1.0}])
    with pytest.raises(
        MistakeError, match="measure is score, but dataset sums has no answer that is scored; write loss"
    ):
        search.Trials(load_params())


def test_the_eval_split_is_never_read_and_the_result_can_be_pasted(searched):
    for name in ("sums", "words"):
        (DATA / name / "eval.jsonl").unlink()
    search.main()

    points = json.loads(Path("search/trials.json").read_text())
    assert [point["trial"] for point in points] == [0, 1, 2, 3]
    best = max(points, key=lambda point: point["objective"])
    pasted = YAML(typ="safe").load(Path("search/best.yaml"))["merge"]
    merge = Merge(**(load_params().merge.model_dump() | pasted))
    trials = search.Trials(load_params())
    assert trials.retention(merge) == pytest.approx({name: best[name] for name in ("sums", "words")})
    Merged(*open_stages(["sums", "words"]), merge)


def test_a_dataset_without_a_tuning_split_is_refused(project):
    with pytest.raises(MistakeError, match=r"datasets.sums.tune is 0; the search needs some records"):
        search.main()


def test_a_split_that_went_away_is_told(searched):
    (DATA / "words" / "tune.jsonl").unlink()
    with pytest.raises(MistakeError, match=r"data/words/tune.jsonl is missing; run `dvc repro data@words`"):
        search.main()


def test_a_stage_that_gained_nothing_is_refused(searched, monkeypatch):
    monkeypatch.setattr(search, "mean_loss", lambda *_: 1.0)
    with pytest.raises(MistakeError, match=r"stages.sums gained nothing on the tuning split"):
        search.main()
