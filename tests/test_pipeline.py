"""The whole pipeline under DVC, on a tiny model, in a repository of its own."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.files import read_json, sha256
from tests.conftest import PARAMS, ROOT, kill_once_saved

# A branch beside the chain, so that there is something that must not run again.
BRANCH = """\
  side:
    parent: base
    dataset: words
    method: dora
    layers: 1-2
    rank: 2
    lr: 1.0e-3
    steps: 3
merge:
"""


def dvc(*words, check=True):
    done = subprocess.run(["dvc", *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout + done.stderr


def ran(output):
    return set(re.findall(r"Running stage '([^']+)'", output))


@pytest.fixture
def clone(project):
    """The repository's files with the tiny project's params.yaml and inputs, committed."""
    for name in ("stages", "analysis", ".dvc", "dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache")
            shutil.copytree(source, project / name, ignore=ignored)
        else:
            shutil.copy(source, project / name)
    text = PARAMS.replace("merge:\n", BRANCH).replace("    words: 1.0\n", "    words: 1.0\n    side: 0.5\n")
    Path("params.yaml").write_text(text)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *who, *words], check=True)
    return project


def test_run_change_and_go_back(clone):
    everything = {
        *("base", "data@sums", "data@words", "train@sums", "train@words", "train@side"),
        *("pick@sums", "pick@words", "pick@side", "merge", "score", "evaluate", "probe", "report"),
    }
    after_merge = {"merge", "evaluate", "probe", "report"}
    assert ran(dvc("repro")) == everything

    model = AutoModelForCausalLM.from_pretrained("merged")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert model(**tokenizer("1+1=", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()
    assert [path.name for path in Path("merged").glob("*.safetensors")] == ["model.safetensors"]
    first = {name: sha256([Path(name)]) for name in ("merged/model.safetensors", "reports/report.html")}
    matrix = read_json(Path("reports/evaluation.json"))["matrix"]
    assert set(matrix) == {"base", "sums", "words", "side", "merged"}
    assert matrix["sums"]["sums"]["loss"] < matrix["base"]["sums"]["loss"]

    assert ran(dvc("repro")) == set()
    assert ran(dvc("exp", "run", "-S", "merge.method=ties")) == after_merge
    assert sha256([Path("merged/model.safetensors")]) != first["merged/model.safetensors"]
    assert ran(dvc("exp", "run", "-S", "~merge.weights.side")) == after_merge
    output = dvc("exp", "run", "-S", "merge.method=task_arithmetic", "-S", "stages.sums.lr=5e-3")
    changed = {"sums", "words"}  # the stage and its child, and not the branch beside them
    assert ran(output) == {f"{step}@{name}" for step in ("train", "pick") for name in changed} | after_merge | {"score"}

    subprocess.run(["git", "reset", "-q", "--hard"], check=True)
    dvc("checkout", "--force")
    assert ran(dvc("repro")) <= {"report"}  # all else comes from the cache
    assert {name: sha256([Path(name)]) for name in first} == first


def test_a_chain_merged_in_full_scores_as_its_last_stage(clone):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("    side: 0.5\n", ""))
    dvc("repro")
    matrix = read_json(Path("reports/evaluation.json"))["matrix"]
    for dataset, cell in matrix["merged"].items():
        assert cell == pytest.approx(matrix["words"][dataset], abs=1e-4)


def test_a_selection_comes_after_its_models_and_before_the_stage_that_trains_on_it(clone):
    selection = "selections:\n  hard:\n    dataset: words\n    parent: base\n    reference: sums\n    keep: 0.5\n"
    text = Path("params.yaml").read_text().replace("selections: {}\n", selection)
    Path("params.yaml").write_text(text.replace("parent: sums\n    dataset: words", "parent: sums\n    dataset: hard"))
    told = dvc("repro", "train@words")
    data, tutor, chosen, trained = (
        told.index(f"'{name}'") for name in ("data@words", "train@sums", "select@hard", "train@words")
    )
    assert max(data, tutor) < chosen < trained
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("keep: 0.5", "keep: 0.6"))
    assert ran(dvc("repro", "train@words")) == {"select@hard", "train@words"}


def test_killed_in_the_middle_repro_ends_with_the_same_bits(clone):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("steps: 25", "steps: 200"))
    weights = Path("checkpoints/sums/adapter_model.safetensors")
    dvc("repro", "train@sums")
    truth = sha256([weights])
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("checkpoints/sums")
    Path("dvc.lock").unlink()

    process = subprocess.Popen(["dvc", "repro", "train@sums"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_once_saved(process, 180)
    process.wait()
    assert not weights.exists()

    dvc("repro", "train@sums")
    assert sha256([weights]) == truth
