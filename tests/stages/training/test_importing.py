"""Adapters that were trained elsewhere: PEFT's own merge is the truth."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages import train
from stages.errors import MistakeError
from stages.files import ADAPTER, BASE, read_json, sha256
from stages.training.launch import TORCHRUN
from stages.weights.checkpoint import open_stages
from tests.conftest import PARAMS, make_base, make_outside
from tests.stages.training.test_loop import run_train

CONFIGS = {
    "rank and alpha patterns": LoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"],
        r=4,
        lora_alpha=7,
        rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 3},
        alpha_pattern={"q_proj": 3, r"^model.layers.2.mlp.up_proj": 11},
    ),
    "rsLoRA on some layers": LoraConfig(
        target_modules=["q_proj", "down_proj"],
        r=4,
        use_rslora=True,
        layers_to_transform=[1, 3],
        layers_pattern="layers",
    ),
    "DoRA": LoraConfig(target_modules=["o_proj", "down_proj"], r=3, use_dora=True, exclude_modules=".*layers.0.*"),
    "modules to save": LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head", "norm"]),
    "all linear": LoraConfig(target_modules="all-linear", r=2, lora_bias=False),
    "embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def content(folder):
    return sha256(folder / file for file in ADAPTER)


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def imported(keys: str = "") -> None:
    """A project whose stage `sums` is the adapter in outside/, pinned, and train it."""
    for dataset in ("sums", "words"):
        Path("data", dataset).mkdir(parents=True, exist_ok=True)
    Path("data/sums/train.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    start, end = PARAMS.index("    method: lora"), PARAMS.index("  words:\n    parent")
    keys = keys or f"    path: outside\n    sha256: {content(Path('outside'))}\n"
    Path("params.yaml").write_text(PARAMS[:start] + "    method: import\n" + keys + PARAMS[end:])
    train.main("sums")


@pytest.fixture
def outside(workspace):
    """A function that trains an adapter of some config, elsewhere."""

    def make(config, architecture="llama-untied"):
        make_base(architecture)
        make_outside("elsewhere", load_base(), config)
        shutil.move("checkpoints/elsewhere", "outside")

    return make


@pytest.mark.parametrize("config", CONFIGS)
def test_an_imported_adapter_is_pefts_merge_bit_for_bit(outside, config):
    outside(CONFIGS[config])
    truth = PeftModel.from_pretrained(load_base(), "outside").merge_and_unload().state_dict()

    imported()

    _, (stage,) = open_stages(["sums"])
    found = {f"{path}.{name}": w for path in stage.base.modules for name, w in stage.module(path).items()}
    assert found.keys() == truth.keys()
    for name, weight in found.items():
        assert torch.equal(weight, truth[name]), name
    assert any(not torch.equal(found[name], weight) for name, weight in load_base().state_dict().items())


def test_conv1d_is_transposed_whatever_the_config_says(outside):
    outside(LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=False), "gpt2")
    truth = PeftModel.from_pretrained(load_base(), "outside").merge_and_unload().state_dict()
    imported()
    _, (stage,) = open_stages(["sums"])
    weight = stage.module("transformer.h.1.mlp.c_fc")["weight"]
    assert torch.equal(weight, truth["transformer.h.1.mlp.c_fc.weight"])


def test_its_record_tells_where_it_comes_from_and_its_layers(outside):
    outside(CONFIGS["rsLoRA on some layers"])
    imported()
    record = read_json(Path("checkpoints/sums/stage.json"))
    assert record["layers"] == [1, 3]
    assert record["settings"]["path"] == "outside" and record["sha256"] == content(Path("outside"))
    tensors = load_file("outside/adapter_model.safetensors")
    assert record["trained_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert json.loads(Path("reports/train/sums.curve.json").read_text()) == []
    assert record["dataset_sha256"] == {"sums": sha256([Path("data/sums/train.jsonl")])}
    assert list(record["lineage"]) == ["base"]


# Leaves a file for each process that publishes the adapter.
COUNTED = """
import os, sys
from pathlib import Path
from stages import train
def counted(*args):
    Path(f"published{os.environ['RANK']}").touch()
    return original(*args)
original, train.import_adapter = train.import_adapter, counted
train.main(sys.argv[1])
"""


@pytest.mark.slow
def test_of_several_processes_one_publishes(outside):
    outside(CONFIGS["DoRA"])
    imported()
    Path("counted.py").write_text(COUNTED)
    done = run_train("sums", *TORCHRUN, "2", "counted.py")
    assert done.wait() == 0, done.stderr.read()
    assert list(Path().glob("published*")) == [Path("published0")]


def test_a_changed_adapter_is_never_taken_for_the_old_one(outside):
    outside(CONFIGS["DoRA"])
    imported()
    old = content(Path("outside"))
    tensors = load_file("outside/adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, "outside/adapter_model.safetensors")
    new = content(Path("outside"))
    with pytest.raises(MistakeError, match=rf"stages.sums.sha256 is not that of outside; .* write {new}"):
        imported(f"    path: outside\n    sha256: {old}\n")


def rewrite(change):
    path = "outside/adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("spoil", "keys", "sentence"),
    [
        (lambda: None, "    path: nowhere\n", "stages.sums.path 'nowhere' holds no adapter_config.json"),
        (lambda: None, "    path: outside\n", "stages.sums.sha256 is missing; it pins what is merged, so add sha256: "),
        (lambda: None, "    lr: 1.0\n", "stages.sums.lr is not a known key"),
        (lambda: None, "    dora: true\n", "stages.sums.dora is not a known key"),
        (lambda: None, "    sha256: x\n", "stages.sums.path or id is needed, one of them"),
        (lambda: None, "    id: some/adapter\n", "stages.sums.revision is missing"),
        (
            lambda: rewrite(lambda tensors: {name.replace("layers.3", "layers.9"): t for name, t in tensors.items()}),
            "",
            "belongs to no module of the base; use an adapter that was trained on this base",
        ),
        (
            lambda: rewrite(lambda tensors: {name: t[:, :7].contiguous() for name, t in tensors.items()}),
            "",
            "which does not fit model.layers.",
        ),
        (
            lambda: Path("outside/adapter_model.safetensors").write_bytes(b"12345678"),
            "",
            "outside/adapter_model.safetensors is not a whole safetensors file",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(outside, spoil, keys, sentence):
    outside(LoraConfig(target_modules=["q_proj"], r=8))
    spoil()
    with pytest.raises(MistakeError) as mistake:
        imported(keys)
    assert sentence in str(mistake.value)
    assert not Path("checkpoints/sums").exists()
