import dataclasses
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.changes.measured import COLUMNS, SPECTRUM
from analysis.changes.metrics import METRICS
from analysis.changes.tables import NO_STAGE
from analysis.telling import words
from analysis.telling.answers import ANSWERS
from analysis.telling.figures import (
    ablation_map,
    behaviour_lines,
    cosine_maps,
    drift_lines,
    evaluation_matrix,
    floor_lines,
    head_maps,
    heat_maps,
    loss_curves,
    whose_change,
)
from analysis.telling.page import contents, render
from analysis.telling.skills import changes, guarded, judge
from analysis.telling.text import NOTHING, in_layers, in_modules, number, percent, whole_percent
from stages import evaluate
from stages.comparing import Scores
from stages.errors import MistakeError
from stages.files import rounded, write_json
from stages.project.params import load_params
from stages.weights.checkpoint import open_stages
from tests.analysis.conftest import STAGES
from tools import view

OUTPUTS = [
    "report.html",
    "report.md",
    "lineage.json",
    "deltas.parquet",
    "evaluation.svg",
    "layers.svg",
    "layers.json",
    "metrics.json",
]


def headline(project):
    return " ".join(sentence.text for sentence in words.headline(project.facts()))


@pytest.mark.slow
def test_a_second_run_writes_the_same_bytes(project):
    project.params(dtype="bfloat16")
    project.merge()
    project.evaluation()
    project.report()
    first = [(Path("reports") / name).read_bytes() for name in OUTPUTS]
    project.report()
    assert [(Path("reports") / name).read_bytes() for name in OUTPUTS] == first


def test_numbers_for_dvc_are_flat_and_finite(project):
    project.merge()
    project.evaluation(merged=0.45)
    project.report()
    metrics = json.loads(Path("reports/metrics.json").read_text())
    assert [*metrics] == [*STAGES, "merged"] and metrics["sums"] == {"kept": 0.5, "accuracy": 0.8}
    merged = metrics["merged"]
    assert [*merged] == ["change", "floor", "unexplained"] and merged["change"] > merged["floor"] >= 0
    rows = json.loads(Path("reports/layers.json").read_text())
    assert {row["layer"] for row in rows if row["stage"] == "names"} == {1, 2}
    assert all(row["relative_change"] > row["floor"] >= 0 for row in rows)
    for name in ("evaluation", "layers"):
        ElementTree.fromstring((Path("reports") / f"{name}.svg").read_text())


def test_headline_says_when_the_merge_lost_a_skill(project):
    project.merge()
    project.evaluation(merged=0.3)
    assert "The merge lost part of what the stages had learned: most of sums from 80 % to 30 %" in headline(project)


def test_headline_says_when_the_merge_lost_nothing(project):
    project.merge()
    project.evaluation(merged=0.78)
    text = headline(project)
    assert "The merge kept what was learned: sums from 80 % to 78 %; names from" in text
    assert "Later stages kept earlier skills: names took sums from 80 % to 80 %." in text
    assert words.guesses(project.facts()) == []


def test_headline_says_when_a_later_stage_harmed_an_earlier_skill(project):
    project.merge()
    project.evaluation(names_on_sums=0.5)
    assert "Later stages harmed earlier skills: names took sums from 80 % to 50 %." in headline(project)
    assert "names (layer 1)" in words.guesses(project.facts())[0]


def test_headline_says_when_a_frozen_layer_changed(project):
    project.train("prose", secretly=[2, 3])
    project.merge()
    project.evaluation()
    assert "Something changed that was declared untouched: see the check of prose" in headline(project)


def test_a_stage_left_out_of_the_merge_is_reported(project):
    project.params(weights=(1.0, 1.0, 0.0))
    project.merge()
    project.evaluation()
    project.report()
    assert "(not merged)" in Path("reports/report.html").read_text()
    assert "prose" not in project.facts().survivals.index


def test_a_skill_without_answers_is_told_by_its_loss(project):
    project.merge()
    project.evaluation()
    told = told_by(project, "sums", "loss", {"base": 3.0, "sums": 1.0, "names": 1.0, "prose": 3.0, "merged": 2.0})
    project.report()
    assert "sums went from a loss of 3.00 to 1.00" in told and "sums from a loss of 1.00 to 2.00" in told
    assert "loss 2.00" in Path("reports/evaluation.svg").read_text()


@pytest.mark.parametrize(
    ("measure", "sentence"),
    [
        ("chrf", "sums went from chrF 10 to 80"),
        ("rouge_l", "sums went from ROUGE-L 10 to 80"),
        ("score", "sums went from a score of 0.10 to 0.80"),
    ],
)
def test_every_measure_has_its_words(project, measure, sentence):
    project.merge()
    project.evaluation()
    reached = {"base": 0.1, "sums": 0.8, "names": 0.8, "prose": 0.1, "merged": 0.4}
    told = told_by(project, "sums", measure, reached)
    project.report()
    assert sentence in told and "most of sums" in told
    assert Path("reports/report.md").read_text().count(sentence) == 1


def told_by(project, skill, measure, reached):
    """The headline once a skill is told by another measure, of which each model reached so much on every record."""
    settings, count = load_params(), 100
    path = Path("reports/evaluation.json")
    content = json.loads(path.read_text())
    spread = np.linspace(0.9, 1.1, count)
    scores = {model: Scores(measure, value * spread, np.ones(count)) for model, value in reached.items()}
    content["measures"][skill] = measure
    for model, value in scores.items():
        content["matrix"][model][skill] = {"loss": 1.0} | {measure: value.mean}
        content["intervals"][model][skill] = {measure: value.interval()}
    for stage, dataset in settings.skills.items():
        if dataset == skill:
            content["retention"][stage] = evaluate.retention(scores, stage) | {"dataset": skill}
    content["comparisons"] = [each for each in content["comparisons"] if each["dataset"] != skill]
    by_skill = dict.fromkeys(settings.skills.values(), scores)
    content["comparisons"] += [c for c in evaluate.comparisons(by_skill, settings) if c["dataset"] == skill]
    write_json(path, rounded(content))
    return headline(project)


def test_few_unlike_answers_say_nothing_and_many_do(project):
    project.merge()
    project.evaluation(questions=50, merged=0.74)
    text = headline(project)
    assert "lost part" not in text and "kept what was learned: sums" not in text
    assert "Unclear in the merge: sums from 80 % to 74 % (50 questions; to tell a difference of this size takes" in text
    assert "2 of 3" in words.cards(project.facts())[0]["number"]
    project.evaluation(questions=50, merged=0.56)
    assert "The merge lost part of what the stages had learned: sums from 80 % to 56 %" in headline(project)
    project.evaluation(questions=10)
    assert "Unclear in the merge: sums from 80 % to 80 % (10 questions)" in headline(project)


def test_more_questions_tell_what_few_do_not(project):
    project.merge()
    for questions, sentence in (
        (100, "Unclear in the merge: sums"),
        (1000, "kept what was learned: sums from 80 % to 76 %"),
    ):
        project.evaluation(merged=0.76, questions=questions)
        assert sentence in headline(project)


def compared(difference, low, high, measure="accuracy", before=0.8, clear=True):
    return {"difference": difference, "interval": [low, high], "measure": measure, "before": before, "clear": clear}


@pytest.mark.parametrize(
    ("each", "base", "verdict"),
    [
        (compared(-0.2, -0.3, -0.1), 0.0, "worse"),
        (compared(-0.2, -0.3, -0.1, clear=False), 0.0, "unclear"),  # the exact test does not agree
        (compared(-0.02, -0.07, 0.03, clear=False), 0.0, "kept"),
        (compared(-0.02, -0.07, 0.03, clear=False), 0.2, "unclear"),  # 0.06 are a tenth of what was learned
        (compared(-0.03, -0.05, -0.01), 0.0, "kept"),  # worse, but by less than a tenth
        (compared(0.1, 0.05, 0.15), 0.0, "kept"),
        (compared(0.3, 0.25, 0.35, "loss", 1.0), 3.0, "worse"),
        (compared(0.15, 0.1, 0.2, "loss", 1.0), 3.0, "kept"),
        (compared(0.15, -0.03, 0.25, "loss", 1.0, clear=False), 3.0, "unclear"),
        (compared(0.21, 0.19, 0.23, "loss", 4.60), 4.89, "worse"),  # most of what was learned is gone
        (compared(-0.5, -0.6, -0.4, "loss", 1.0), 3.0, "kept"),
        (compared(0.1, 0.08, 0.12, "loss", 1.0), None, "worse"),  # a guard, of which nothing was learned
        (compared(0.04, 0.03, 0.05, "loss", 1.0), None, "kept"),
        (compared(-0.05, -0.09, -0.01), None, "worse"),
        (compared(-0.02, -0.07, 0.03, clear=False), None, "kept"),
    ],
)
def test_kept_worse_and_unclear(each, base, verdict):
    assert judge(each, base) == verdict


@pytest.mark.parametrize(
    ("before", "start", "at_stake"), [(0, 0, False), (0.02, 0, False), (0.8, 0.8, False), (0.8, 0, True)]
)
def test_what_is_not_there_cannot_be_lost(project, before, start, at_stake):
    project.evaluation(merged=before, reached={("base", "sums"): start, ("sums", "sums"): before})
    evaluation = json.loads(Path("reports/evaluation.json").read_text())
    (change,) = [c for c in changes(evaluation) if c.stage == "sums" and c.model == "merged"]
    assert change.at_stake == at_stake and not change.worse


def test_a_skill_that_was_never_there_is_not_said_to_be_kept(project):
    project.merge()
    models = ("base", *STAGES, "merged")
    project.evaluation(0.0, 0.0, {(model, skill): 0.0 for model in models for skill in STAGES})
    text = headline(project)
    assert not any(word in text for word in ("kept", "lost", "Unclear", "harmed"))
    assert not any("in the merge" in card["text"] for card in words.cards(project.facts()))


def test_a_gain_that_chance_explains_is_said_to_be_unclear(project):
    project.merge()
    project.evaluation(merged=0.13, names_on_sums=0.13, reached={("sums", "sums"): 0.13})
    assert "sums went from 10 % to 13 % (unclear with 100 questions);" in headline(project)


def test_what_a_router_chose_and_weighs_is_told(project):
    project.merge()
    project.evaluation()
    with Path("params.yaml").open("a") as file:
        file.write("routers: {pick: {stages: [sums, prose]}}\n")
    content = json.loads(Path("reports/evaluation.json").read_text())
    for part in ("matrix", "intervals"):
        content[part]["pick"] = content[part]["merged"]
    weighed = {
        "sums": {"low_rank": 3e6, "whole": 0, "error": 0.001},
        "prose": {"low_rank": 0, "whole": 9e6, "error": 0.02},
    }
    chosen = {"sums": {"sums": 98, "base": 2}, "prose": {"prose": 100}}
    routing = {"threshold": 0.62, "tuning": {"prompts": 40, "right": 39}, "choices": weighed, "chosen": chosen}
    write_json(Path("reports/evaluation.json"), content | {"routing": {"pick": routing}})
    project.report()

    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", Path("reports/report.html").read_text()))
    assert "What pick chose" in text and "questions of base sums prose sums 2 98 prose 100" in text
    assert "Of 40 prompts that it was not trained on, neutral ones among them, it chooses rightly for 39;" in text
    assert "within 2.0 % of the stage's own effect" in text
    assert "Its file has 12.0 MB beside" in text and "of which 9.0 are whole matrices, where what prose" in text


@pytest.mark.parametrize("declared", [True, False])
def test_an_embedding_may_change_where_the_stage_names_it(project, declared):
    project.train("prose", secretly={"embeddings": "all", "mlp": "3"})
    if declared:
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text(text.replace("layers: '3'", "layers: {embeddings: all, mlp: 3}"))
    project.merge()
    project.evaluation()
    assert ("Something changed that was declared untouched" in headline(project)) != declared


def test_the_log_of_actions_tells_who_did_what(project):
    project.merge()
    project.evaluation(merged=0.3, names_on_sums=0.5)
    project.report()
    log = {entry["stage"]: entry for entry in json.loads(Path("reports/lineage.json").read_text())}
    assert list(log) == ["sums", "names", "prose"]
    sums = log["sums"]
    assert sums["given"]["parent"] == "base"
    assert sums["trained"]["layers"] == "layers 0-1" and sums["changed"]["layers"] == "0-1"
    assert sums["changed"]["tensors"] == 2 * 7  # every matrix of two layers
    assert sums["gained"] == {"skill": "sums", "measure": "accuracy", "before": 0.1, "after": 0.8}
    later, merged = sums["since"]
    assert (later["by"], later["tensors"], later["before"], later["after"]) == ("names", 7, 0.8, 0.5)
    assert merged["survival"] == pytest.approx(1, rel=1e-4) and (merged["before"], merged["after"]) == (0.8, 0.3)
    page = Path("reports/report.html").read_text()
    assert "names writes to 7 of its tensors" in page and "sums went 80 % → 30 %" in page


def test_the_short_report_and_the_table_of_all_numbers(project):
    project.merge()
    project.evaluation()
    project.report()
    text = Path("reports/report.md").read_text()
    assert len(text.splitlines()) <= 60
    assert "| sums | lora, layers 0-1, on base | sums (accuracy) | 10 % | 80 % | 80 % | 100 % (9" in text
    table = pd.read_parquet("reports/deltas.parquet")
    row = table[(table.stage == "sums") & (table.layer == 0) & (table.module == "self_attn.q_proj")]
    _, (sums,) = open_stages(["sums"])
    path = "model.layers.0.self_attn.q_proj"
    truth = sums.delta(path)["weight"].double().norm() / sums.parent.module(path)["weight"].double().norm()
    assert float(row[row.metric == "relative_change"].value.iloc[0]) == pytest.approx(float(truth), rel=1e-6)
    tensors, matrices, heads = 9, 7, 4  # of the one layer that the stage trains
    count = len(METRICS) * tensors + len(SPECTRUM) * matrices + 2 * heads
    assert len(table[table.stage == "prose"]) == count


def test_view_prints_the_headline(project, capsys, monkeypatch):
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    with pytest.raises(MistakeError, match="run `dvc repro`"):
        view.main()
    project.merge()
    project.evaluation()
    project.report()
    view.main()
    text = capsys.readouterr().out
    assert text.startswith("- On the skill that it was trained on") and "open reports/report.html" in text


@pytest.mark.slow
def test_a_page_of_sixty_layers_and_six_stages_is_small():
    names, modules = [f"stage{number}" for number in range(6)], [f"self_attn.part{number}" for number in range(9)]
    keys = [(name, layer, module) for name in [*names, "merged"] for layer in range(60) for module in modules]
    cells = pd.DataFrame(keys, columns=["stage", "layer", "module"])
    cells["relative_change"] = np.random.default_rng(0).uniform(1e-3, 1e-2, len(cells))
    cells["floor"] = 1e-3
    grams = {layer: np.eye(7) + 0.1 for layer in range(60)}
    shares = cells[["layer", "stage"]].drop_duplicates().replace("merged", NO_STAGE).assign(share=1 / 7)
    drift = {part: [0.1] * 60 for part in ("mean", "low", "high")}
    found = {"on": {"drift": drift}, "off": {"drift": drift}, "trained": [1], "lens": [0.1] * 60}
    found["written"] = {"self_attn": [1.0] * 60, "mlp": [1.0] * 60}
    probe = {"checkpoints": dict.fromkeys([*names, "merged"], found), "base": found}
    probe["floor"] = {"drift": [0.01] * 60, "lens": [0.01] * 60}
    heads = pd.DataFrame([(layer, head, 0.1, 0.1) for layer in range(60) for head in range(32)])
    heads.columns = ["layer", "head", "qk", "ov"]
    curve = [{"step": step, "loss": 1 / step} for step in range(1, 1000)]
    skill = {"accuracy": 0.5, "loss": 1.0}
    rows = [
        {"stage": stage, "layers": layers, "dataset": name, "loss": 1.0, "without": 1.5}
        for stage in names
        for layers in ([1, 2], [3, 4], [5, 6])
        for name in names
    ]
    pictures = [
        heat_maps(cells, [*names, "merged"], [*names, "merged"], modules, 60),
        cosine_maps(sum(grams.values()), grams, [*names, "merged"], 60, paired=6),
        whose_change(shares, names, 60),
        floor_lines(cells[cells["stage"] == "merged"].drop_duplicates("layer"), 60),
        drift_lines(probe, 60),
        behaviour_lines(probe, 60),
        head_maps(heads, [[0.1] * 32] * 60),
        loss_curves(dict.fromkeys(names, curve)),
        ablation_map(rows, {name: name for name in names}),
        evaluation_matrix(
            {
                "matrix": {model: dict.fromkeys(names, skill) for model in ["base", *names, "merged"]},
                "intervals": {
                    model: {name: {"accuracy": [0.4, 0.6]} for name in names} for model in ["base", *names, "merged"]
                },
                "measures": dict.fromkeys(names, "accuracy"),
            },
            dict.fromkeys(["base", *names, "merged"], "lora, layers 0-59, on base"),
            {name: name for name in names},
            [],
        ),
    ]
    assert sum(map(len, pictures)) < 1_950_000  # 2 MB with the words


def noise(size):
    def change(name, weights):
        torch.manual_seed(len(name))
        return size * torch.randn_like(weights) if weights.dim() == 2 else torch.zeros_like(weights)

    return change


def sentences(project):
    project.merge()
    project.evaluation()
    facts = project.facts()
    found = words.headline(facts)
    assert len(found) <= 5
    page = render("report.html", contents(facts, PICTURES))
    assert all(f'<h2 id="s{sentence.section}">' in page for sentence in found)
    return " ".join(sentence.text for sentence in found)


PICTURES = dict.fromkeys(["evaluation", "layers", "floor", "whose", "cosines", "drift", "behaviour", "curves"], "")


def test_numbers_in_files_and_in_words():
    assert rounded({"a": [1.23456789, math.nan, math.inf], "b": "x", "c": 3}) == {
        "a": [1.23457, None, None],
        "b": "x",
        "c": 3,
    }
    assert percent(None) == percent(math.nan) == number(None, ".3f") == number(math.nan, "d") == NOTHING
    assert percent(0.00137) == "0.14 %" and whole_percent(0.784) == "78 %" and number(1.5, ".2f") == "1.50"
    assert in_layers([0, 1, 2, 5]) == "layers 0-2, 5" and in_layers([3]) == "layer 3"
    assert in_layers([]) == "outside the layers"


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("last 2", "layers 4-5"),
        (3, "layer 3"),
        ({"attention": "0-3", "mlp": "2-5"}, "attention in layers 0-3, mlp in layers 2-5"),
        ({"q_proj": "all", "v_proj": "0-5", "norms": 0}, "q_proj and v_proj in layers 0-5, norms in layer 0"),
        ({"embeddings": "all", "mlp": "last 1"}, "embeddings, mlp in layer 5"),
    ],
)
def test_layers_of_every_form_read_well(layers, text):
    assert in_modules(layers, 6) == text


def test_a_conflict_is_told(project):
    project.plant("sums", "0-1", noise(0.01))
    project.plant("names", "0-1", lambda name, weights: -noise(0.01)(name, weights))
    assert "opposite directions: sums and names (cosine -1.00)" in sentences(project)


def test_stages_that_start_from_one_seed_are_told(project):
    project.stages |= {"sums": ("base", "lora", "0-1"), "names": ("base", "lora", "0-1")}
    project.params()
    for name in ("sums", "names"):
        torch.manual_seed(0)
        project.train(name)
    assert "start from one seed, so that agreement between them says nothing" in sentences(project)
    assert "sums and names (overlap 0.9" in sentences(project)


def test_a_narrow_overlap_is_compared_with_chance(project):
    project.merge()
    project.evaluation()
    facts = project.facts()
    pair = {"layer": 1, "module": "m", "first": "sums", "second": "names"}
    for reads, chance, spread, is_told in (
        (0.8, 0.5, 0.01, False),
        (0.8, 0.0, 0.01, True),
        (0.9, 0.5, 0.01, True),
        (0.9, 0.5, 0.15, False),  # 2.7 standard deviations
    ):
        pairs = pd.DataFrame([pair | {"reads": reads, "reads_by_chance": chance, "reads_spread": spread}])
        measured = dataclasses.replace(facts.measured, pairs=pairs)
        found = words.headline(dataclasses.replace(facts, measured=measured))
        assert any("start from one seed" in sentence.text for sentence in found) == is_told


def test_stages_that_had_two_seeds_are_not_said_to_start_from_one(project):
    project.stages |= {"sums": ("base", "lora", "0-1"), "names": ("base", "lora", "0-1")}
    project.params()
    for name, seed in (("sums", 1), ("names", 2)):
        torch.manual_seed(0)
        project.train(name)
        file = Path("checkpoints") / name / "stage.json"
        write_json(file, json.loads(file.read_text()) | {"seed": seed})
    assert "one seed" not in sentences(project)


def test_a_conflict_that_chance_explains_is_not_told(project):
    project.merge()
    project.evaluation()
    facts = project.facts()
    for entries, is_told in ((30, False), (3000, True)):
        row = {"layer": 0, "module": "m", "parameter": "bias", "entries": entries, "delta_squared": 1.0}
        rows = pd.DataFrame([{"stage": name} | row for name in ("sums", "names")], columns=COLUMNS)
        gram = np.array([[1.0, -0.2, 0, 0], [-0.2, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
        measured = dataclasses.replace(facts.measured, rows=rows.fillna(1.0), grams={0: gram})
        found = dataclasses.replace(facts, measured=measured).conflicts
        assert found == ({("sums", "names"): -0.2} if is_told else {})


def test_a_stage_lost_to_rounding_is_told(project):
    project.plant("sums", "0-1", noise(1e-6))
    project.params(dtype="bfloat16", rounding="nearest")
    assert "Rounding to bfloat16 takes away what a stage changed: sums (" in sentences(project)


def test_a_stage_that_another_takes_back_is_told(project):
    project.plant("sums", "0-1", noise(0.01))
    project.plant("names", "0-1", lambda name, weights: -0.9 * noise(0.01)(name, weights))
    assert "sums and names (cosine -1.00)" in sentences(project)


def test_a_norm_blown_up_is_told(project):
    project.plant("prose", "3", lambda name, weights: weights * 0.4 * ("post_attention" in name))
    assert "is post_attention_layernorm of layer 3 in prose, by 40 %." in sentences(project)
    assert "1 norm moved by more than 10 % of the gain" in sentences(project)  # in the stage and in the merged file


def test_norms_are_not_told_where_the_matrices_moved_further_or_they_alone_were_to_move(project):
    project.plant("prose", "3", lambda name, weights: weights * (0.4 if "norm" in name else 0.5))
    assert "moved by more" not in sentences(project)
    project.plant("prose", "3", lambda name, weights: weights * (0.4 if "norm" in name else 0.3))
    assert "2 norms moved by more than 10 % of the gain" in sentences(project)
    project.plant("prose", "3", lambda name, weights: weights * 0.4 * ("norm" in name))
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("method: full, layers: '3'", "method: ln, layers: '3'"))
    assert "moved by more" not in sentences(project)


def test_a_base_with_more_digits_than_the_file_loses_no_small_change(project):
    weights = load_file("checkpoints/base/model.safetensors")
    torch.manual_seed(1)
    finer = {name: (each.float() * (1 + 1e-3 * torch.rand(each.shape))) for name, each in weights.items()}
    save_file(finer, "checkpoints/base/model.safetensors", {"format": "pt"})
    project.plant("sums", "0-1", noise(1e-5))
    project.params(dtype="bfloat16")
    assert "takes away" not in sentences(project)


def test_what_is_within_the_noise_of_running_is_not_told(project):
    project.merge()
    project.evaluation()
    facts = project.facts()
    (merged,) = [row for row in contents(facts, PICTURES)["behaviour"] if row["name"] == "merged"]
    assert merged["early"] == 0.5 and merged["attention"]["moved_most"] == "layer 0, head 2"
    noisy = facts.probe | {"floor": facts.probe["floor"] | {"kl": 0.3, "attention": 0.3}}
    (merged,) = [
        row
        for row in contents(dataclasses.replace(facts, probe=noisy), PICTURES)["behaviour"]
        if row["name"] == "merged"
    ]
    assert merged["early"] is None and merged["attention"]["moved_most"] == NOTHING


def test_one_stage_alone_is_no_guess(project):
    project.params(weights=(1.0, 0.0, 0.0))
    project.merge()
    project.evaluation(merged=0.3)
    facts = project.facts()
    assert words.guesses(facts)
    rows = facts.measured.rows[facts.measured.rows["stage"].isin(["sums", "merged"])]
    alone = dataclasses.replace(facts, measured=dataclasses.replace(facts.measured, rows=rows))
    assert words.guesses(alone) == []


def test_a_late_stage_whose_inputs_were_shifted_is_told(project):
    project.plant("prose", "3", noise(0.01))
    project.merge()
    project.evaluation(reached={("merged", "prose"): 0.3})
    assert "changed the layers before it, which it reads: prose (after sums, names)." in headline(project)


def test_a_stage_that_the_file_holds_little_of_is_told(project):
    text = Path("params.yaml").read_text().replace("method: task_arithmetic", "method: linear\n  participants: all")
    Path("params.yaml").write_text(text)
    assert "33 % of sums, 33 % of names, 33 % of prose" in sentences(project)


def test_how_to_ask_is_told_where_it_is_not_as_one_asks_a_chat_model(project):
    project.merge()
    project.evaluation()
    page = render("report.html", contents(project.facts(), PICTURES))
    assert "In plain text, and not in the base's chat format" not in page
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("path: names.jsonl,", "path: names.jsonl, format: plain,"))
    page = render("report.html", contents(project.facts(), PICTURES))
    assert "In plain text, and not in the base's chat format, are asked: names." in page


def test_answers_that_are_not_whole_are_told(project):
    project.merge()
    project.evaluation()
    said = {"question": "q", "reference": "a", "base": ("b", 0.0), "merged": ("a", 1.0)}
    project.answers({"sums": [said] * 3, "names": [said] * 2})
    assert "cut answers short" not in (page := render("report.html", contents(project.facts(), PICTURES)))
    assert "longer than the model reads" not in page
    answers = pd.read_parquet(ANSWERS)
    answers.loc[(answers["dataset"] == "sums") & ((answers["model"] == "base") | (answers["record"] == 3)), "end"] = (
        "cut"
    )
    answers.loc[(answers["dataset"] == "names") & (answers["record"] == 1), "end"] = "unasked"
    answers.sort_values(["dataset", "model"]).to_parquet(ANSWERS)
    page = render("report.html", contents(project.facts(), PICTURES))
    assert "cut answers short, in sums: base 3, merged 1 of 3." in page
    assert "count as wrong, in names: base 1, merged 1 of 2." in page


def test_losses_are_told_apart():
    assert words._from_to(6.302, 6.298, "loss") == "from a loss of 6.302 to 6.298"
    assert words._from_to(6.3, 6.3, "loss") == "from a loss of 6.30 to 6.30"


def test_what_the_training_did_to_a_guard_is_told(project):
    project.merge()
    project.evaluation()
    facts = project.facts()
    before = {"model": "merged", "against": "base", "dataset": "general", "measure": "loss", "before": 2.0, "p": None}
    harmed = before | {"after": 2.6, "difference": 0.6, "interval": [0.5, 0.7], "clear": True, "needed": 5}
    for found, sentence in [
        (harmed, "The training harmed what no stage learns: general from a loss of 2.00 to 2.60."),
        (
            harmed | {"after": 2.01, "interval": [0.0, 0.02]},
            "The training left alone what no stage learns: general from",
        ),
        (harmed | {"interval": [-0.5, 1.7], "clear": False}, "Unclear of what no stage learns: general from a loss of"),
        (
            harmed | {"after": 1.5, "difference": -0.5, "interval": [-0.6, -0.4]},
            "The training improved what no stage learns: general from a loss of 2.00 to 1.50.",
        ),
    ]:
        evaluation = facts.evaluation | {"comparisons": [*facts.evaluation["comparisons"], found]}
        evaluation["questions"] = evaluation["questions"] | {"general": 50}
        told = guarded(evaluation, ["general"])
        (text,) = words.guards(told)
        assert text.startswith(sentence)
