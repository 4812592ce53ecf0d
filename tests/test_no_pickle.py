"""No stage reads or writes pickle, which may hold code: the whole pipeline with all ways to it closed."""

import pickle
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from analysis import measure, probe, report, rounding
from stages import base, data, evaluate, merge, pick, score, train
from stages.errors import MistakeError

SUFFIXES = {".safetensors", ".json", ".jsonl", ".jinja", ".parquet", ".html", ".md", ".svg"}
WAYS = [(torch, "load"), (torch, "save"), *((pickle, name) for name in ("load", "loads", "dump", "dumps"))]
WAYS += [(pickle, name) for name in ("Unpickler", "_Unpickler", "Pickler", "_Pickler")]


@pytest.fixture
def closed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle")

    for module, name in WAYS:
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.slow
def test_the_whole_pipeline(project, closed):
    base.main()
    for name in ("sums", "words"):
        data.main(name)
    pick.main("data")
    for name in ("sums", "words"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main(name)
    pick.main("checkpoints")
    merge.main()
    for name in ("base", "sums", "words", "merged"):
        score.main(name)
        probe.main(name)
    evaluate.main()
    measure.main()
    rounding.main()
    report.main()
    outputs = [
        path for top in ("checkpoints", "data", "picked", "merged", "reports") for path in Path(top).rglob("*.*")
    ]
    assert {path.suffix for path in outputs} <= SUFFIXES


def test_a_base_in_pickle_is_refused(project, closed):
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    with pytest.raises(MistakeError, match=r"base.model 'model' has its weights in .bin files, which may hold code; "):
        base.main()
