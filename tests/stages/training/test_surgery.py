"""Protection: what a protected stage's inputs give does not change, whatever the gradient."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import train
from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS
from stages.models.layers import linear_modules, select
from stages.models.losses import pad
from stages.project.params import load_params
from stages.training.loop import Run
from stages.training.model import put_on
from stages.training.protection import BASES, Protection, input_bases, save_bases
from tests.conftest import make_base
from tests.stages.test_train import make_examples, make_stage, prepare


def matrices(model):
    return linear_modules(model, select(model, "all"))


def inputs_of(model, batch):
    """What comes into each weight matrix, by a hook of the test's own."""
    found, hooks = {}, []
    for name in linear_modules(model, select(model, "all")):
        hooks.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: args[0][batch.present.bool()].double()})
            )
        )
    with torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.present)
    for hook in hooks:
        hook.remove()
    return found


def test_the_bases_hold_the_energy_that_was_asked_for():
    make_base("gpt2")
    model, batch = AutoModelForCausalLM.from_pretrained(BASE), pad(make_examples(), 0)
    bases = input_bases(model, matrices(model), [batch, batch], 0.9)
    for name, rows in inputs_of(model, batch).items():
        basis = bases[name].double()
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-5)
        spectrum = torch.linalg.svdvals(rows).square()
        count = int((spectrum.cumsum(0) / spectrum.sum() < 0.9).sum()) + 1
        assert basis.shape[1] == count
        assert (rows @ basis).square().sum() / rows.square().sum() > 0.9 - 1e-6


def test_a_stage_to_which_protection_leaves_nothing_is_refused():
    make_base("llama-untied")
    model, batch = AutoModelForCausalLM.from_pretrained(BASE), pad(make_examples(), 0)
    (CHECKPOINTS / "first").mkdir(parents=True)
    save_bases(input_bases(model, matrices(model), [batch], 0.9), CHECKPOINTS / "first")
    wrapped = put_on(make_stage("ln"), model, torch.float32)
    with pytest.raises(MistakeError, match="protects first has nothing left to train, for norms, biases, experts"):
        Protection(wrapped, ["first"])


@pytest.mark.parametrize("architecture", ["llama-untied", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_protected_inputs_give_what_they_gave(method, architecture):
    make_base(architecture)
    model, batch = AutoModelForCausalLM.from_pretrained(BASE), pad(make_examples(1), 0)  # fewer tokens than directions
    (CHECKPOINTS / "first").mkdir()
    save_bases(input_bases(model, matrices(model), [batch], 0.99999), CHECKPOINTS / "first")
    inputs = inputs_of(model, batch)
    before = {name: model.get_submodule(name).weight.detach().double().clone() for name in inputs}

    def moved(protect):
        stage = make_stage(method, lr=0.05, steps=20, protect=protect)
        torch.manual_seed(0)
        wrapped = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32)
        run = Run(wrapped, stage, Accelerator())
        for step in range(8):
            run.step([make_examples()[2:]], step)
        merged = wrapped.merge_and_unload()
        found = {}
        for name, rows in inputs.items():
            change = merged.get_submodule(name).weight.detach().double() - before[name]
            answers = rows @ (change if architecture == "gpt2" else change.T)
            found[name] = float(answers.norm() / (rows.norm() * change.norm() + 1e-30)), float(change.norm())
        return found

    free, kept = moved([]), moved(["first"])
    trained = [name for name, (_, size) in free.items() if size > 0]
    assert trained and all(".1." in name or ".2." in name for name in trained)
    for name in trained:
        assert free[name][0] > 0.03 and kept[name][0] < 0.01, name
        assert kept[name][1] > 0.1 * free[name][1]


def test_a_stage_remembers_and_its_child_protects(project):
    text = Path("params.yaml").read_text()
    text = text.replace("rank: 4", "rank: 4\n    remember: 0.9").replace(
        "method: ln", "method: lora\n    protect: [sums]"
    )
    Path("params.yaml").write_text(text)
    prepare()
    train.main("sums")
    remembered = load_file(CHECKPOINTS / "sums" / BASES)
    assert remembered.keys() == set(matrices(AutoModelForCausalLM.from_pretrained(BASE)))
    train.main("words")
    learned = load_file(CHECKPOINTS / "words" / "adapter_model.safetensors")
    for name, down in learned.items():
        if ".lora_A." in name:
            basis = remembered[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")].float()
            assert down.norm() > 0.1 and (down @ basis).norm() < 1e-2 * down.norm(), name
            assert learned[name.replace("lora_A", "lora_B")].norm() > 0, name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method: ln": "method: lora\n    protect: [sums]"}, "stages.sums.remember is missing"),
        (
            {"method: ln": "method: ln\n    protect: [sums]", "rank: 4": "rank: 4\n    remember: 0.9"},
            "does not go with",
        ),
        ({"rank: 4": "rank: 4\n    protect: [words]"}, "is not one of its ancestors"),
    ],
)
def test_what_cannot_be_protected_is_refused(project, changes, sentence):
    text = Path("params.yaml").read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    Path("params.yaml").write_text(text)
    with pytest.raises(MistakeError, match=sentence):
        load_params()
