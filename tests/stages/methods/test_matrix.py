"""Every method on every architecture: it learns, is saved, and the rest of the pipeline sees what was trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, publish, write_json
from stages.merging.merged import Merged
from stages.methods import METHODS
from stages.models.architecture import layer_stack, place
from stages.models.layers import mlp_width
from stages.models.loading import load_model
from stages.models.room import add_adapters, add_biases, add_neurons
from stages.settings.merge import Merge
from stages.settings.stage import Training
from stages.training.loop import Run
from stages.training.model import put_on, refuse_moved, refuse_unsaved, sums_of_frozen
from stages.weights.checkpoint import open_stages
from tests.conftest import make_base
from tests.stages.test_train import make_examples

MODELS = ["llama-tied", "qwen2", "qwen3", "gpt2"]
NO_LINEAR = "are no Linear modules"
NO_BIAS = "has none in these layers"
NO_CLASS = "has no class with adapters"


@dataclass(frozen=True)
class Row:
    """A tiny stage of one method.

    Attributes:
        keys: its settings; 20 steps with an lr of 0.01 must lower the loss, unless they say otherwise.
        method: where the row has not its name.
        room: gives the base what the method needs of it.
        refused: models that it does not go with, and part of the sentence that says so.
        converted: it is saved as a plain LoRA, and so comes back equal up to rounding.
        moves_base: it starts by taking something off the base, so PEFT's own merge is no truth to compare with.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    room: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    converted: bool = False
    moves_base: bool = False


ROWS = {
    "lora": Row({"rank": 4}),
    "rslora": Row({"rank": 4, "rslora": True}, "lora"),
    "pissa": Row({"rank": 4, "init": "pissa"}, "lora", converted=True, moves_base=True),
    "olora": Row({"rank": 4, "init": "olora"}, "lora", refused={"gpt2": NO_LINEAR}, converted=True, moves_base=True),
    "dora": Row({"rank": 4}),
    "ia3": Row({"lr": 0.1}),
    "lokr": Row({"rank": 4, "lr": 0.05}, refused={"gpt2": NO_LINEAR}),
    "oft": Row({"block_size": 8}, refused={"gpt2": NO_LINEAR}),
    "miss": Row({"rank": 4}, refused={"gpt2": NO_LINEAR}),
    "shira": Row({"rank": 4}, refused={"gpt2": NO_LINEAR}),
    "adalora": Row({"rank": 4, "lr": 0.05}, converted=True),
    "bitfit": Row({"lr": 0.05}, refused={"llama-tied": NO_BIAS, "qwen3": NO_BIAS}),
    "ln": Row({"lr": 0.05}),
    "full": Row(),
    "vera": Row({"rank": 64, "lr": 0.1}),
    "bottleneck": Row({"neurons": "4-11"}, room=lambda model: add_neurons(model, 12)),
    "houlsby": Row(room=lambda model: add_adapters(model, 12), refused={"gpt2": NO_CLASS}),
    "peft": Row({"peft": {"peft_type": "LOHA", "r": 4}}, refused={"gpt2": NO_LINEAR}),
}


def make(name, chosen="1-2"):
    method = ROWS[name].method or name
    keys = {"parent": "base", "dataset": "d", "method": method, "lr": 0.01, "steps": 20, "layers": chosen}
    return METHODS[method](**keys | ROWS[name].keys)


def fresh():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def publish_stage(stage, model):
    with publish(CHECKPOINTS / "one") as folder:
        stage.save(model, folder)
        refuse_unsaved(stage, model, folder)
        write_json(folder / "stage.json", {"name": "one", "parent": "base"})


def make_room(row):
    if row.room:
        row.room(fresh()).save_pretrained(BASE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ROWS)
def test_a_method(name, model):
    make_base(model)
    row, stage = ROWS[name], make(name)
    torch.manual_seed(3)
    if model in row.refused:
        with pytest.raises(MistakeError, match=row.refused[model]):
            make_room(row)
            put_on(stage, fresh(), torch.float32)
        return
    make_room(row)
    base = fresh()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        untouched = base(ids).logits
    wrapped = put_on(stage, copy.deepcopy(base), torch.float32)
    with torch.no_grad():
        assert torch.allclose(wrapped.eval()(ids).logits, untouched, rtol=0, atol=1e-5)  # it starts from its parent
    frozen = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    sums = sums_of_frozen(wrapped)
    run, examples = Run(wrapped.train(), stage, Accelerator()), make_examples(4)
    losses = [run.step([examples], step)["loss"] for step in range(stage.steps)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in wrapped.named_parameters() if name in frozen)

    refuse_moved(stage, wrapped, sums)
    publish_stage(stage, wrapped)
    with torch.no_grad():
        truth = wrapped.eval()(ids).logits
        again = PeftModel.from_pretrained(copy.deepcopy(base), CHECKPOINTS / "one").eval()(ids).logits
    assert torch.equal(again, truth) or (row.converted and torch.allclose(again, truth, atol=2e-5))

    checkpoint, (opened,) = open_stages(["one"])
    merged = Merged(checkpoint, [opened], Merge(weights={"one": 1.0}, dtype="float32"))
    inside = None if row.moves_base else copy.deepcopy(wrapped).merge_and_unload()
    plain = fresh()
    for path in checkpoint.modules:
        for parameter, weights in opened.module(path).items():
            getattr(plain.get_submodule(path), parameter).data.copy_(weights)
            original = getattr(base.get_submodule(path), parameter)
            if place(path, layer_stack(base))[0] not in (1, 2):
                assert torch.equal(weights, original), f"{path}.{parameter} is outside the chosen layers"
            if inside is not None:
                assert torch.allclose(weights, getattr(inside.get_submodule(path), parameter), rtol=0, atol=1e-6)
            assert torch.allclose(merged.module(path)[parameter], weights, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, truth, rtol=0, atol=5e-5)
        assert not torch.allclose(plain(ids).logits, untouched, rtol=0, atol=1e-3)


def test_every_method_has_its_row():
    trained = {name for name, method in METHODS.items() if issubclass(method, Training)}
    missing = sorted(trained - {row.method or name for name, row in ROWS.items()})
    assert not missing, f"add to ROWS in {__file__}, with its keys for a tiny model: {missing[0]!r}: Row()"


@pytest.mark.parametrize("model", ["llama-tied", "llama-untied", "qwen3"])
def test_added_biases_change_nothing_and_bitfit_trains_them(model):
    make_base(model)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        truth = fresh()(ids).logits
    biased = add_biases(fresh())
    with torch.no_grad():
        assert torch.equal(biased.eval()(ids).logits, truth)
    biased.save_pretrained(BASE)
    stage = make("bitfit", {"attention": "1-2"})
    run = Run(put_on(stage, fresh(), torch.float32), stage, Accelerator())
    losses = [run.step([make_examples(4)], step)["loss"] for step in range(stage.steps)]
    assert losses[-1] < losses[0]
    publish_stage(stage, run.model)
    _, (opened,) = open_stages(["one"])
    assert all(".self_attn." in path for path in opened.adapter.modules)
    with torch.no_grad():
        expected = run.model.eval()(ids).logits
        plain = fresh()
        for path in opened.changed():
            plain.get_submodule(path).bias.copy_(opened.module(path)["bias"])
        assert torch.allclose(plain(ids).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_added_neurons_change_nothing(model):
    make_base(model)
    ids = torch.arange(1, 20)[None]
    before = fresh()
    add_neurons(before, 5).save_pretrained(BASE)
    widened = fresh()
    with torch.no_grad():
        assert torch.allclose(widened.eval()(ids).logits, before.eval()(ids).logits, rtol=0, atol=1e-6)
    assert mlp_width(widened.config) == mlp_width(before.config) + 5
    assert widened.num_parameters() == before.num_parameters() + 4 * 5 * (65 if model == "gpt2" else 96)


def test_bottlenecks_of_two_stages_both_work_in_one_file():
    make_base("llama-tied")
    add_neurons(fresh(), 8).save_pretrained(BASE)
    ids = torch.arange(1, 20)[None]
    for name, layer, neurons in (("one", "1", "0-3"), ("two", "2", "4-7")):
        stage = make("bottleneck", layer).model_copy(update={"neurons": neurons})
        run = Run(put_on(stage, fresh(), torch.float32), stage, Accelerator())
        for step in range(5):
            run.step([make_examples(4)], step)
        with publish(CHECKPOINTS / name) as folder:
            stage.save(run.model, folder)
            write_json(folder / "stage.json", {"name": name, "parent": "base"})
    checkpoint, stages = open_stages(["one", "two"])
    merged = Merged(checkpoint, stages, Merge(weights={"one": 1.0, "two": 1.0}, dtype="float32"))
    model, first = load_model(merged, torch.float32), load_model(stages[0], torch.float32)
    up, down = (f"model.layers.1.mlp.{name}.weight" for name in ("up_proj", "down_proj"))
    for name in (up, down):
        assert torch.allclose(model.get_parameter(name), first.get_parameter(name), rtol=0, atol=1e-7)
    assert (model.get_parameter(up)[64:68] != 0).all() and (model.get_parameter(up)[68:] == 0).all()
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, fresh()(ids).logits, atol=1e-4)


def test_a_bottleneck_needs_neurons_of_its_own():
    make_base("llama-tied")
    with pytest.raises(MistakeError, match=r"write base\.extra_neurons"):
        put_on(make("bottleneck"), fresh(), torch.float32)
    add_neurons(fresh(), 8).save_pretrained(BASE)
    with pytest.raises(MistakeError, match="gives it 0-7"):
        put_on(make("bottleneck"), fresh(), torch.float32)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "it adds prompts"),
        ({"peft_type": "LORAX"}, "PEFT knows ADALORA"),
        ({"peft_type": "LOHA", "rank": 4}, "peft.rank is not a known key of LOHA; known keys are .*, r,"),
        ({"peft_type": "LILY"}, "leaves no change of weights that can be merged"),
    ],
)
def test_what_cannot_be_merged_is_refused(keys, sentence):
    make_base("llama-tied")
    stage = METHODS["peft"](parent="base", dataset="d", method="peft", lr=0.01, steps=1, peft=keys)
    with pytest.raises(MistakeError, match=sentence):
        put_on(stage, fresh(), torch.float32)


def test_what_peft_refuses_is_one_sentence():
    make_base("llama-tied")
    stage = make("shira").model_copy(update={"rank": 1000})
    with pytest.raises(MistakeError, match=r"^method 'shira' is refused by PEFT \(.*\); change its keys, or"):
        put_on(stage, fresh(), torch.float32)


def test_new_neurons_and_adapters_in_one_base_are_trained_apart():
    make_base("llama-tied")
    add_adapters(add_neurons(fresh(), 12), 6).save_pretrained(BASE)
    before = fresh()
    wrapped = put_on(make("bottleneck"), fresh(), torch.float32)
    adapted = {name.partition(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name}
    assert {path.rpartition(".")[2] for path in adapted} == {"gate_proj", "up_proj", "down_proj"}
    run = Run(wrapped, make("bottleneck"), Accelerator())
    for step in range(5):
        run.step([make_examples(4)], step)
    merged = wrapped.merge_and_unload()
    for name, weights in merged.named_parameters():
        changed = (weights != before.get_parameter(name)).nonzero()
        if "up_proj" in name and (".1." in name or ".2." in name):
            assert set(changed[:, 0].tolist()) == set(range(68, 76))  # neurons 4 to 11 of those after the 64 old ones
        assert not ("adapter" in name and len(changed))


@pytest.mark.parametrize("room", [lambda model: add_neurons(model, 4), lambda model: add_adapters(model, 4)])
def test_rows_of_zeros_are_told_and_dora_goes_on_without_them(room):
    make_base("llama-tied")
    room(fresh()).save_pretrained(BASE)
    stage = make("dora")
    with pytest.raises(MistakeError, match=r"^method 'dora' divides by .*, and model\.layers\.1\..* has rows of zeros"):
        put_on(stage, fresh(), torch.float32)
    put_on(stage.model_copy(update={"layers": {"q_proj": "1-2"}}), fresh(), torch.float32)


def test_no_biases_can_be_added_where_the_architecture_knows_none():
    make_base("qwen2")
    with pytest.raises(MistakeError, match="has no setting for biases"):
        add_biases(fresh())


@pytest.mark.parametrize("model", ["llama-tied", "llama-untied"])
def test_the_embedding_can_be_trained(model):
    make_base(model)
    stage = make("full", {"embeddings": "all"})
    wrapped = put_on(stage, fresh(), torch.float32)
    run = Run(wrapped, stage, Accelerator())
    losses = [run.step([make_examples(4)], step)["loss"] for step in range(stage.steps)]
    assert losses[-1] < losses[0]
    publish_stage(stage, wrapped)
    _, (opened,) = open_stages(["one"])
    assert "model.embed_tokens" in opened.adapter.modules
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.allclose(load_model(opened, torch.float32)(ids).logits, wrapped.eval()(ids).logits, atol=2e-5)
