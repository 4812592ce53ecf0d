"""Clean runs have no warning: tiny models trained, merged and reported by the real stages, in twenty ways."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from analysis import measure, probe, rounding
from analysis.telling import words
from analysis.telling.facts import Facts, gather
from stages import base, data, evaluate, merge, pick, score, train
from stages.project.params import load_params

pytestmark = pytest.mark.slow

WELL = ("Storing the merged model as", "Nothing outside the declared layers changed.")

Stages = dict[str, dict[str, Any]]


def stage(method: str, layers: str, **more: Any) -> dict[str, Any]:
    """A stage on the base that learns sums, unless it says otherwise."""
    keys = {"parent": "base", "dataset": "sums", "method": method, "layers": layers, "lr": 0.01, "steps": 15}
    return keys | {"batch_size": 8} | more


# What is trained, the dtype of the base, and four merges of it.
PROJECTS: dict[str, tuple[str, Stages, list[dict[str, Any]]]] = {
    "a chain of low rank": (
        "float32",
        {
            "first": stage("lora", "0-1", rank=4),
            "second": stage("dora", "1-2", parent="first", dataset="words", replay=0.25, rank=4),
        },
        [
            {"method": "task_arithmetic", "dtype": "bfloat16"},
            {"method": "ties", "parameters": {"density": 0.2}, "dtype": "float32"},
            {"method": "dare_linear", "parameters": {"density": 0.2}, "dtype": "float16"},
            {"method": "sce", "dtype": "bfloat16", "participants": "all"},
        ],
    ),
    "low ranks side by side on the same layers": (
        "bfloat16",
        {
            "first": stage("lora", "all", rank=1),
            "second": stage("lora", "all", rank=16, dataset="words"),
            "third": stage("lora", "all", rank=4, dataset="words"),
        },
        [
            {"method": "linear", "dtype": "float32"},
            {"method": "ties", "parameters": {"density": 0.1}, "dtype": "bfloat16"},
            {"method": "knots", "dtype": "float16", "space": "core"},
            {"method": "breadcrumbs", "parameters": {"density": 0.5, "gamma": 0.1}, "dtype": "float32"},
        ],
    ),
    "all weights, and norms alone": (
        "bfloat16",
        {
            "first": stage("full", "0-1", lr=2e-3),
            "second": stage("full", "all", lr=2e-3, dataset="words"),
            "third": stage("ln", "all", lr=0.05),
        },
        [
            {"method": "model_stock", "dtype": "bfloat16"},
            {"method": "della", "parameters": {"density": 0.5}, "dtype": "float32"},
            {"method": "iso_c", "dtype": "float16"},
            {"method": "task_arithmetic", "dtype": "bfloat16", "depth_scaling": 0.3},
        ],
    ),
    "vectors, masks, products and rotations": (
        "float32",
        {
            "first": stage("ia3", "0-2"),
            "second": stage("shira", "1-3", rank=4, lr=1e-3),
            "third": stage("lokr", "all", dataset="words", rank=4, lr=2e-3),
            "fourth": stage("oft", "2-3", dataset="words", block_size=8, lr=1e-3),
        },
        [
            {"method": "karcher", "dtype": "bfloat16"},
            {"method": "multislerp", "dtype": "float32"},
            {"method": "dare_ties", "parameters": {"density": 0.5}, "dtype": "bfloat16"},
            {"method": "tsv_m", "dtype": "float16"},
        ],
    ),
    "small changes of a base with more digits than the file": (
        "float32",
        {
            "first": stage("lora", "0-2", rank=4, lr=1e-4, steps=5),
            "second": stage("full", "1-3", dataset="words", lr=1e-5, steps=5),
            "third": stage("dora", "1-3", parent="first", dataset="words", rank=4, lr=1e-4, steps=5),
        },
        [
            {"method": "task_arithmetic", "dtype": "bfloat16"},
            {"method": "ties", "parameters": {"density": 0.6}, "dtype": "bfloat16"},
            {"method": "ram", "dtype": "float16"},
            {"method": "svc", "dtype": "bfloat16"},
        ],
    ),
}


def train_all(stages: Stages, dtype: str) -> None:
    """Everything that comes before the merge."""
    params = {
        "seed": 0,
        "threads": 1,
        "launch": "python",
        "base": {"model": "model", "dtype": dtype},
        "selections": {},
        "routers": {},
        "datasets": {name: {"source": "file", "path": f"{name}.jsonl", "eval": 16} for name in ("sums", "words")},
        "stages": stages,
        "merge": {"weights": dict.fromkeys(stages, 1.0)},
        "evaluate": {"max_new_tokens": 4},
        "warn": {},
    }
    Path("params.yaml").write_text(json.dumps(params))
    base.main()
    for name in params["datasets"]:
        data.main(name)
    pick.main("data")
    for name in stages:
        AcceleratorState._reset_state(reset_partial_state=True)  # as a process of its own would find it
        train.main(name)
    pick.main("checkpoints")
    for name in ("base", *stages):
        score.main(name)
        probe.main(name)


def merge_and_gather(settings: dict[str, Any]) -> Facts:
    """What the report tells of a merge of the stages that were trained."""
    params = json.loads(Path("params.yaml").read_text())
    params["merge"] = settings | {"weights": params["merge"]["weights"]}
    Path("params.yaml").write_text(json.dumps(params))
    merge.main()
    score.main("merged")
    evaluate.main()
    probe.main("merged")
    measure.main()
    rounding.main()
    return gather(load_params())


@pytest.mark.parametrize("name", PROJECTS)
def test_a_clean_run_has_no_warning(name, project):
    dtype, stages, merges = PROJECTS[name]
    train_all(stages, dtype)
    for settings in merges:
        facts = merge_and_gather(settings)
        told = [sentence.text for sentence in words.headline(facts) if sentence.section > 1]
        assert told and all(text.startswith(WELL) for text in told), (settings, told)
        # What a merge that averages loses of a skill is measured, and no false alarm.
        assert not [card for card in words.cards(facts) if card["warn"] and "skills" not in card["text"]], settings


def test_there_are_twenty_and_no_two_are_the_same():
    runs = [(dtype, stages, merge) for dtype, stages, merges in PROJECTS.values() for merge in merges]
    assert len({json.dumps(run) for run in runs}) == 20
