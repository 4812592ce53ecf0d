"""The whole pipeline under DVC, on a tiny model, in a repository of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.files import read_json, sha256
from tests.conftest import kill_once_saved
from tests.forked import Pipeline, commit, write_branched

pytestmark = pytest.mark.slow

STAGES = ["sums", "words", "side"]
DROPPED = r".*/|(checkpoints|data|merged)$"  # as docs/experiments.md says
MERGE = {"merge", "score_merged", "evaluate", "probe_merged", "measure", "rounding", "report"}


@pytest.fixture
def pipeline(project, monkeypatch):
    """The repository's files with the tiny project's params.yaml and inputs, committed."""
    write_branched(project)
    return Pipeline(monkeypatch)


def columns(*options):
    """Of the table that `dvc exp show` draws, in which those of the experiment's name and kind are one."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--csv", *options]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(told.splitlines()[0].split(",")) - {"rev", "typ", "parent"}


def test_run_change_and_go_back(pipeline):
    assert pipeline.repro() == {
        *("base", "data@sums", "data@words", "pick_data", "pick_checkpoints", "score_base", "probe_base"),
        *(f"{verb}@{name}" for verb in ("train", "score", "probe") for name in STAGES),
        *MERGE,
    }
    model = AutoModelForCausalLM.from_pretrained("merged")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert model(**tokenizer("1+1=", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()
    assert [path.name for path in Path("merged").glob("*.safetensors")] == ["model.safetensors"]
    first = {name: sha256([Path(name)]) for name in ("merged/model.safetensors", "reports/report.html")}
    matrix = read_json(Path("reports/evaluation.json"))["matrix"]
    assert list(matrix) == ["base", *STAGES, "merged"]
    assert matrix["sums"]["sums"]["loss"] < matrix["base"]["sums"]["loss"]
    commit(Path())
    status = subprocess.run([sys.executable, "-m", "dvc", "status"], capture_output=True, text=True, check=True).stdout
    assert "up to date" in status

    assert pipeline.experiment("-S", "merge.method=ties") == MERGE
    assert sha256([Path("merged/model.safetensors")]) != first["merged/model.safetensors"]
    assert pipeline.experiment("-S", "merge.method=task_arithmetic") == {"report"}  # which is not cached
    assert sha256([Path("merged/model.safetensors")]) == first["merged/model.safetensors"]
    assert pipeline.experiment("-S", "~merge.weights.side") == MERGE | {"pick_checkpoints"}
    metrics, shown = columns(), columns("--only-changed", "--drop", DROPPED)
    assert len([name for name in metrics if name.split(".")[0] in (*STAGES, "merged") and "/" not in name]) == 9
    assert {"merge.method", "merge.weights.side", "sums.kept", "merged.unexplained"} < shown and len(shown) <= 12
    ran = pipeline.experiment("-S", "merge.method=task_arithmetic", "-S", "stages.sums.lr=5e-3")
    changed = {"sums", "words"}  # the stage and its child, and not the branch beside them
    chain = {f"{verb}@{name}" for verb in ("train", "score", "probe") for name in changed}
    assert ran == chain | MERGE | {"pick_checkpoints"}

    pipeline.go_back()
    assert pipeline.repro() == set()
    assert {name: sha256([Path(name)]) for name in first} == first


def test_a_chain_merged_in_full_scores_as_its_last_stage(pipeline):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("    side: 0.5\n", ""))
    pipeline.repro("evaluate")
    matrix = read_json(Path("reports/evaluation.json"))["matrix"]
    for dataset, cell in matrix["merged"].items():
        assert cell == pytest.approx(matrix["words"][dataset], abs=1e-4)


def test_a_selection_comes_after_its_models_and_before_the_stage_that_trains_on_it(pipeline):
    selection = "selections:\n  hard:\n    dataset: words\n    parent: base\n    reference: sums\n    keep: 0.5\n"
    text = Path("params.yaml").read_text().replace("selections: {}\n", selection)
    Path("params.yaml").write_text(text.replace("parent: sums\n    dataset: words", "parent: sums\n    dataset: hard"))
    assert pipeline.repro("train@words") == {
        *("base", "data@words", "data@sums", "train@sums", "select@hard", "train@words")
    }
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("keep: 0.5", "keep: 0.6"))
    assert pipeline.repro("train@words") == {"select@hard", "train@words"}


def test_a_router_comes_and_goes_alone(pipeline):
    pipeline.repro("evaluate")
    before, text = sha256([Path("reports/evaluation.json")]), Path("params.yaml").read_text()

    Path("params.yaml").write_text(text.replace("routers: {}", "routers: {pick: {stages: [sums, words]}}"))
    assert pipeline.repro("evaluate") == {"route@pick", "score_routed@pick", "evaluate"}
    evaluation, answers = read_json(Path("reports/evaluation.json")), pd.read_parquet("reports/answers.parquet")
    assert list(evaluation["matrix"]) == ["base", *STAGES, "merged", "pick"]
    chosen = evaluation["routing"]["pick"]["chosen"]
    assert chosen == {"sums": {"sums": 10}, "words": {"words": 10}}
    for name, counts in chosen.items():  # each answers as the stage that is chosen does
        asked = answers[answers["dataset"] == name].sort_values("record").set_index("model")
        (choice,) = counts
        assert list(asked.loc["pick", "answer"]) == list(asked.loc[choice, "answer"])
        assert asked.loc["pick", "loss"].to_numpy() == pytest.approx(asked.loc[choice, "loss"].to_numpy(), rel=1e-3)

    Path("params.yaml").write_text(text)
    assert pipeline.repro("evaluate") == {"evaluate"}
    assert sha256([Path("reports/evaluation.json")]) == before


def test_killed_in_the_middle_repro_ends_with_the_same_bits(pipeline):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("steps: 25", "steps: 200"))
    weights = Path("checkpoints/sums/adapter_model.safetensors")
    pipeline.repro("train@sums")
    truth = sha256([weights])
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("checkpoints/sums")
    Path("dvc.lock").unlink()

    command = [sys.executable, "-m", "dvc", "repro", "train@sums"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_once_saved(process, 180)
    process.wait()
    assert not weights.exists()

    pipeline.repro("train@sums")
    assert sha256([weights]) == truth
