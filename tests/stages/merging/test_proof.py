"""A merged file that is not the base and its changes is refused: each fault is planted, and leaves no file."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS
from stages.merge import write
from stages.merging.merged import Merged
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_stages
from stages.weights.single_file import SingleFile
from tests.conftest import make_base, make_stage

CHANGED, SAME = "model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"
PUT, PUT_PIECES, LAYOUT = SingleFile.put, SingleFile.put_pieces, Merged.layout


def drop(file, name, values):
    if name != f"{CHANGED}.weight":
        PUT(file, name, values)


def shift(file, name, values):
    PUT(file, name, values + (name == f"{CHANGED}.weight") * 0.5)


def drop_copy(file, name, pieces):
    if name != f"{SAME}.weight":
        PUT_PIECES(file, name, pieces)


def shift_copy(file, name, pieces):
    PUT_PIECES(file, name, [piece + (name == f"{SAME}.weight") for piece in pieces])


def narrower(merged):
    return LAYOUT(merged) | {f"{SAME}.weight": (LAYOUT(merged)[f"{SAME}.weight"][0], "F16")}


def without(merged):
    return {name: found for name, found in LAYOUT(merged).items() if name != f"{SAME}.weight"}


def without_module(merged):
    return {path: names for path, names in merged.base.modules.items() if path != CHANGED}


PLANTED = {
    "a changed tensor is dropped": (SingleFile, "put", drop, f"other numbers in {CHANGED}.weight than the merge"),
    "a changed tensor is another": (SingleFile, "put", shift, f"other numbers in {CHANGED}.weight than the merge"),
    "a copy is dropped": (SingleFile, "put_pieces", drop_copy, f"other numbers in {SAME}.weight than the base"),
    "a copy is another": (SingleFile, "put_pieces", shift_copy, f"other numbers in {SAME}.weight than the base"),
    "a dtype is another": (Merged, "layout", narrower, rf"{SAME}.weight as F16 .*, where the base makes it F32"),
    "a name is missing": (Merged, "layout", without, f"{SAME}.weight as missing, where the base makes it F32"),
    "a module has no place": (Merged, "modules", property(without_module), f"no place for {CHANGED}, which a stage"),
    "a change is lost": (Merged, "_sum", lambda _, name, weight, stages: weight, "nothing of what one changed in"),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fault", PLANTED)
def test_a_file_that_is_not_the_merge_is_refused(monkeypatch, fault, processes):
    make_base("llama-untied")
    make_stage("one", AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), "lora", "1")
    owner, name, planted, sentence = PLANTED[fault]
    monkeypatch.setattr(owner, name, planted)
    Path("merged").mkdir()
    merged = Merged(*open_stages(["one"]), Merge(weights={"one": 1.0}, dtype="float32"))
    with pytest.raises(MistakeError, match=rf"the merged file has {sentence}.*run `dvc repro` again"):
        write(merged, Path("merged"), {"format": "pt"}, processes)
    assert not list(Path("merged").glob("*.safetensors*"))


@pytest.mark.parametrize(
    ("size", "weights"), [(1e-9, {"one": 1.0}), (0.05, {"one": 0.0}), (0.05, {"one": 1.0, "two": -1.0})]
)
def test_a_change_that_rounding_or_the_weights_take_is_not_refused(size, weights):
    make_base("llama-untied", torch.bfloat16)
    make_stage("one", AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), "full", "1", size=size)
    shutil.copytree(CHECKPOINTS / "one", CHECKPOINTS / "two")
    Path("merged").mkdir()
    merge = Merge(weights=weights, rounding="nearest")
    write(Merged(*open_stages(list(weights)), merge), Path("merged"), {"format": "pt"})
    found, base = load_file("merged/model.safetensors"), load_file(BASE / "model.safetensors")
    assert all(torch.equal(found[name], base[name]) for name in base)
