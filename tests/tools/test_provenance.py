"""Provenance, read back from the file alone, by the command."""

import json
import subprocess
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from stages import merge
from stages.files import BASE, read_json
from tests.conftest import ROOT, make_base, make_stage


def provenance(*arguments):
    command = [sys.executable, "-m", "tools.cli", "provenance", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_file_tells_its_whole_lineage(project):
    make_base()
    for name, parent in (("sums", "base"), ("words", "sums")):
        make_stage(name, AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), "lora", "0", parent=parent)
    merge.main()
    path = project / "merged/model.safetensors"

    told = json.loads(provenance(path).stdout)

    assert told == read_json(project / "merged/lineage.json")
    assert [stage["name"] for stage in told["stages"]] == ["sums", "words"]
    for stage in told["stages"]:
        assert stage["sha256"] == read_json(project / "checkpoints" / stage["name"] / "stage.json")["sha256"]
        assert {"parent", "dataset", "method", "layers", "trained_parameters"} <= stage.keys()
    assert told["merge"]["weights"] == {"sums": 1.0, "words": 1.0}
    assert told["versions"]["mergekit"]


def test_a_file_of_somebody_else_is_told_apart(workspace):
    save_file({"a": torch.zeros(1)}, workspace / "x.safetensors")
    done = provenance(workspace / "x.safetensors")
    assert done.returncode == 1 and done.stderr.endswith("it was not written by Strata's merge\n")
    assert "the following arguments are required: file" in provenance().stderr
