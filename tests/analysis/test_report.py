import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.changes.measured import COLUMNS, SPECTRUM
from analysis.changes.metrics import METRICS
from analysis.changes.tables import NO_STAGE
from analysis.telling import words
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
from analysis.telling.skills import changes, is_worse
from analysis.telling.text import NOTHING, in_layers, in_modules, number, percent, whole_percent
from stages.errors import MistakeError
from stages.files import rounded, write_json
from stages.project.params import load_params
from stages.weights.checkpoint import open_stages
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
    assert metrics["merged"]["frozen_check"] == 0
    assert metrics["sums"]["survival"] == pytest.approx(1, rel=1e-4)
    assert metrics["sums"]["retention"] == 0.5
    assert metrics["sums"]["accuracy"] == 0.8
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
    assert "The merge lost no skill" in text
    assert "No later stage lowered" in text
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
    assert "survival" not in json.loads(Path("reports/metrics.json").read_text())["prose"]


def test_a_skill_without_answers_is_told_by_its_loss(project):
    project.merge()
    project.evaluation()
    evaluation = json.loads(Path("reports/evaluation.json").read_text())
    for model, loss in {"base": 3.0, "sums": 1.0, "names": 1.0, "prose": 3.0, "merged": 2.0}.items():
        evaluation["matrix"][model]["sums"] = {"loss": loss}
    evaluation["retention"]["sums"] |= {"measure": "loss", "gain": -2.0, "retention": 0.5}
    Path("reports/evaluation.json").write_text(json.dumps(evaluation))
    project.report()
    assert "sums from a loss of 1.00 to 2.00" in headline(project)


@pytest.mark.parametrize(
    ("before", "after", "measure", "worse"),
    [
        (0.8, 0.6, "accuracy", True),
        (0.8, 0.75, "accuracy", False),
        (1.0, 1.1, "loss", True),
        (1.0, 1.04, "loss", False),
    ],
)
def test_worse_means_more_than_chance(before, after, measure, worse):
    assert is_worse(before, after, measure, questions=100) == worse


@pytest.mark.parametrize(
    ("before", "start", "measure", "at_stake"),
    [
        (0.0, 0.0, "accuracy", False),
        (0.02, 0.0, "accuracy", False),
        (0.8, 0.8, "accuracy", True),
        (1.0, 2.0, "loss", True),
        (2.0, 2.0, "loss", False),
    ],
)
def test_what_is_not_there_cannot_be_lost(project, before, start, measure, at_stake):
    cells = {"base": start, "sums": before, "merged": before}
    matrix = {model: {"sums": {"loss": 1.0} | {measure: value}} for model, value in cells.items()}
    project.params(weights=(1.0, 0.0, 0.0))
    (change,) = [
        c
        for c in changes(matrix | {"names": matrix["sums"]}, load_params(), {"sums": 100})
        if c.stage == "sums" and c.model == "merged"
    ]
    assert change.at_stake == at_stake and not change.worse


def test_a_skill_that_was_never_there_is_not_said_to_be_kept(project):
    project.merge()
    project.evaluation()
    content = json.loads(Path("reports/evaluation.json").read_text())
    content["matrix"] = {
        model: {skill: cell | {"accuracy": 0.0} for skill, cell in row.items()}
        for model, row in content["matrix"].items()
    }
    Path("reports/evaluation.json").write_text(json.dumps(content))
    text = headline(project)
    assert "lost no skill" not in text and "No later stage" not in text
    assert not any("after the merge" in card["text"] for card in words.cards(project.facts()))


def test_the_error_bar_counts_the_questions_with_an_answer(project):
    project.merge()
    project.evaluation(merged=0.7)  # which of 100 answers chance explains, and of 1000 it does not
    assert "lost no skill" in headline(project)
    write_json(Path("reports/data/sums.json"), {"sums": {"eval": 1000, "eval_answers": 100}})
    assert "lost no skill" in headline(project)
    write_json(Path("reports/data/sums.json"), {"sums": {"eval": 1000}})
    assert "lost part" in headline(project)


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
    assert "| sums | lora, layers 0-1, on base | sums (accuracy) | 10 % | 80 % | 80 % |" in text
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
            {model: dict.fromkeys(names, skill) for model in ["base", *names, "merged"]},
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


PROBLEMS = [
    "undo each",
    "takes away what",
    "than half",
    "model in full",
    "moved by more",
    "declared untouched",
    "one seed",
]


def test_a_clean_run_has_no_problem(project):
    assert not any(problem in sentences(project) for problem in PROBLEMS)


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
    pair = {"layer": 1, "module": "m", "first": "sums", "second": "names", "writes": 0, "writes_by_chance": 0}
    for reads, chance, is_told in ((0.8, 0.5, False), (0.8, 0.0, True), (0.9, 0.5, True)):
        pairs = pd.DataFrame([pair | {"reads": reads, "reads_by_chance": chance}])
        measured = dataclasses.replace(facts.measured, pairs=pairs)
        found = words.headline(dataclasses.replace(facts, measured=measured))
        assert any("start from one seed" in sentence.text for sentence in found) == is_told


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
    project.params(dtype="bfloat16")
    assert "Rounding to bfloat16 takes away what a stage changed: sums (" in sentences(project)


def test_a_stage_that_another_takes_back_is_told(project):
    project.plant("sums", "0-1", noise(0.01))
    project.plant("names", "0-1", lambda name, weights: -0.9 * noise(0.01)(name, weights))
    assert "sums and names (cosine -1.00)" in sentences(project)


def test_a_norm_blown_up_is_told(project):
    project.plant("prose", "3", lambda name, weights: weights * 0.4 * ("post_attention" in name))
    assert "is post_attention_layernorm of layer 3 in prose, by 40 %." in sentences(project)
    assert "1 norm moved by more than 10 % of the gain" in sentences(project)  # in the stage and in the merged file


def test_a_late_stage_whose_inputs_were_shifted_is_told(project):
    project.plant("prose", "3", noise(0.01))
    project.merge()
    project.evaluation()
    evaluation = json.loads(Path("reports/evaluation.json").read_text())
    evaluation["matrix"]["merged"]["prose"]["accuracy"] = 0.3
    Path("reports/evaluation.json").write_text(json.dumps(evaluation))
    assert "changed the layers before it, which it reads: prose (after sums, names)." in headline(project)


def test_a_stage_that_the_file_holds_little_of_is_told(project):
    text = Path("params.yaml").read_text().replace("method: task_arithmetic", "method: linear\n  participants: all")
    Path("params.yaml").write_text(text)
    assert "33 % of sums, 33 % of names, 33 % of prose" in sentences(project)
