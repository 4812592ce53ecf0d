"""What stage.json tells of a stage's origin, and what names its resumed state and its cached prefix.

DVC runs a stage again if a file of its parent changes: so whatever a stage may read of an ancestor is in the record of
every stage between them.
"""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig

from stages import train
from stages.files import ADAPTER, BASE, CHECKPOINTS, read_json, sha256, write_json
from stages.training.protection import BASES
from stages.training.resume import resume_folder
from tests.conftest import PARAMS, make_base, make_outside
from tests.stages.test_train import fresh, prepare, write

CHAIN = """\
  last:
    parent: words
    dataset: words
    method: lora
    layers: 0-1
    rank: 2
    lr: 1.0e-2
    steps: 3
    protect:
      - sums
"""


def train_chain():
    """stage.json of every stage, and its adapter."""
    for name in ("sums", "words", "last"):
        train.main(name)
    return {name: stage_of(name) for name in ("sums", "words", "last")}


def stage_of(name):
    return read_json(CHECKPOINTS / name / "stage.json"), sha256([CHECKPOINTS / name / "adapter_model.safetensors"])


@pytest.fixture
def chain(project):
    """Three stages on each other, of which the last protects the first."""
    write(("rank: 4", "rank: 4\n    remember: 0.9"), ("merge:\n", CHAIN + "merge:\n"), ("steps: 25", "steps: 3"))
    prepare()
    return train_chain()


def test_the_lineage_names_every_ancestor_the_base_first(chain):
    assert list(chain["last"][0]["lineage"]) == ["base", "sums", "words"]
    assert list(chain["sums"][0]["lineage"]) == ["base"]
    assert chain["last"][0]["lineage"].items() > chain["words"][0]["lineage"].items()
    first = chain["sums"][0]
    assert first["inputs_sha256"] == sha256([CHECKPOINTS / "sums" / BASES])
    assert "inputs_sha256" not in chain["words"][0]
    assert first["parent_sha256"] == read_json(BASE / "stage.json")["sha256"]


@pytest.mark.slow
def test_what_the_first_stage_remembers_is_told_by_the_record_of_the_second(chain):
    """DVC runs the third again only if something of the second is another."""
    write(("remember: 0.9", "remember: 0.5"))
    again = train_chain()
    assert again["words"][1] == chain["words"][1]
    assert again["words"][0]["lineage"] != chain["words"][0]["lineage"]
    assert again["last"][1] != chain["last"][1]
    assert train_chain() == again


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "stage.json"])
def test_whatever_changes_of_the_base_is_told_by_every_record(chain, file):
    path = BASE / file
    path.write_text(json.dumps(read_json(path) | {"a": 1}))
    for name, (record, _) in train_chain().items():
        assert record["lineage"]["base"] != chain[name][0]["lineage"]["base"]


@pytest.mark.slow
def test_data_of_an_imported_ancestor_is_told_by_every_record(project):
    """Nothing of an imported adapter depends on its data, but a later stage may replay it."""
    make_base("llama-untied")
    make_outside("elsewhere", fresh(), LoraConfig(target_modules=["q_proj"], r=2))
    shutil.move(CHECKPOINTS / "elsewhere", "outside")
    content = sha256(Path("outside") / file for file in ADAPTER)
    imported = {"parent": "base", "dataset": "sums", "method": "import", "path": "outside", "sha256": content}
    trained = PARAMS[PARAMS.index("  sums:\n    parent") : PARAMS.index("  words:\n    parent")]
    write(
        (trained, f"  sums: {json.dumps(imported)}\n"),
        ("    replay: 0.25\n", ""),
        ("merge:\n", CHAIN.replace("protect:\n      - sums", "replay: 0.25") + "merge:\n"),
    )
    prepare()
    before = train_chain()
    assert before["last"][0]["dataset_sha256"].keys() == {"words", "sums"}

    path = Path("data/sums/train.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    after = train_chain()
    for name in ("sums", "words"):
        assert after[name][0] != before[name][0] and after[name][1] == before[name][1]
    assert after["last"][1] != before["last"][1]


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_threads_is_recorded_as_it_came_out(project, monkeypatch, count):
    write(("threads: 1", "threads: auto"), ("steps: 25", "steps: 2"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
    prepare()
    train.main("sums")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert read_json(CHECKPOINTS / "sums" / "stage.json")["threads"] == threads == count


def change_weight(_):
    Path("data/both/mix.json").write_text('{"sums": 0.25, "words": 0.75}')


def change_tuning(_):
    path = Path("data/both/tune.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def change_dtype(_):
    write_json(BASE / "stage.json", read_json(BASE / "stage.json") | {"dtype": "bfloat16"})


def change_template(_):
    (BASE / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def change_device(monkeypatch):
    monkeypatch.setattr(train.Accelerator, "device", torch.device("meta"))


def change_version(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "transformers" else version(name))


CHANGES = {  # what changes, how, and whether the frozen layers may give other bits then
    "the weight of a part": (change_weight, False),
    "the tuning split": (change_tuning, False),
    "the chat template": (change_template, None),  # a part of the base, all of which has one hash
    "the dtype": (change_dtype, True),
    "the device": (change_device, True),
    "the version of transformers": (change_version, True),
    "the threads": (lambda _: write(("threads: 1", "threads: 2")), True),
    "a setting": (lambda _: write(("lr: 1.0e-2", "lr: 2.0e-2")), False),
    "the processes": (lambda _: write(("rank: 4", "rank: 4\n    processes: 2")), False),
    "the seed": (lambda _: write(("seed: 0", "seed: 1")), False),
}


class StopError(Exception):
    pass


@pytest.fixture
def keys(project, monkeypatch):
    """A function that begins to train, and returns what the resumed state and the cached prefix are named by."""
    part = {"source": "file", "eval": 5, "tune": 3, "weight": 1.0}
    mixed = {"source": "mix", "parts": {name: part | {"path": f"{name}.jsonl"} for name in ("sums", "words")}}
    write(
        ("stages:\n", f"  both: {json.dumps(mixed)}\nstages:\n"),
        ("dataset: sums\n    method", "dataset: both\n    method"),
        ("rank: 4", "rank: 4\n    keep: best"),
    )
    prepare()
    told = []

    def tell(key, accelerator):
        told.append(json.dumps(key, sort_keys=True, default=str))
        return resume_folder(key, accelerator)

    def stop(model, key, limit):
        told.append(json.dumps(key, sort_keys=True, default=str))
        raise StopError

    monkeypatch.setattr(train, "resume_folder", tell)
    monkeypatch.setattr(train, "Prefix", stop)
    for refuses in ("check_processes", "launch"):
        monkeypatch.setattr(train, refuses, lambda *_: None)

    def begin():
        AcceleratorState._reset_state(reset_partial_state=True)
        told.clear()
        with pytest.raises(StopError):
            train.main("sums")
        torch.set_num_threads(1)
        return tuple(told)

    return begin


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_stage_left_is_never_taken_and_what_may_be_shared_is(keys, monkeypatch, change):
    act, is_of_the_frozen_layers = CHANGES[change]
    before = keys()
    assert keys() == before
    act(monkeypatch)
    state, prefix = keys()
    assert state != before[0]
    if is_of_the_frozen_layers is not None:
        assert (prefix != before[1]) == is_of_the_frozen_layers
