"""Every method on every architecture: it learns, is saved, and the rest of the pipeline sees what was trained."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages import train
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
from stages.weights.checkpoint import open_stages
from tests.conftest import ROOT, make_base
from tests.stages.test_train import make_examples

MODELS = ["llama-tied", "qwen2", "qwen3", "gpt2"]
CASES = {  # name: method, settings of a tiny stage
    "lora": ("lora", {"rank": 4}),
    "rslora": ("lora", {"rank": 4, "rslora": True}),
    "pissa": ("lora", {"rank": 4, "init": "pissa"}),
    "olora": ("lora", {"rank": 4, "init": "olora"}),
    "dora": ("dora", {"rank": 4}),
    "ia3": ("ia3", {"lr": 0.1}),
    "lokr": ("lokr", {"rank": 4, "lr": 0.05}),
    "oft": ("oft", {"block_size": 8}),
    "miss": ("miss", {"rank": 4}),
    "shira": ("shira", {"rank": 4}),
    "adalora": ("adalora", {"rank": 4, "lr": 0.05}),
    "bitfit": ("bitfit", {"lr": 0.05}),
    "ln": ("ln", {"lr": 0.05}),
    "full": ("full", {}),
    "vera": ("vera", {"rank": 64, "lr": 0.1}),
    "bottleneck": ("bottleneck", {"neurons": "4-11"}),
    "houlsby": ("houlsby", {}),
    "peft": ("peft", {"peft": {"peft_type": "LOHA", "r": 4}}),
}
CONVERTED = {"pissa", "olora", "adalora"}  # saved as a plain LoRA, and so equal up to rounding
ABOUT = {  # case: what is trained, what speaks for it
    "lora": ("B·A of a small rank beside every matrix", "the first choice: sturdy, cheap, and merges exactly"),
    "rslora": ("the same, scaled by 1/√rank (`rslora: true`)", "ranks of 64 and more, which plain LoRA scales too low"),
    "pissa": (
        "the same, from the largest directions (`init: pissa`)",
        "quick first steps, further from the parent",
    ),
    "olora": ("the same, from the matrix's QR (`init: olora`)", "like `pissa`"),
    "dora": ("LoRA, and the size of every output row", "often better than LoRA at low rank; slower"),
    "ia3": (
        "one factor for each output",
        "style and format, not new skills; wants a high lr (0.01)",
    ),
    "lokr": ("a Kronecker product of two small matrices", "fewer numbers than LoRA at the same reach"),
    "oft": ("rotations of blocks of inputs", "keeps norms and angles of inputs; slow"),
    "miss": ("one small matrix, repeated over the weight", "like LoRA with half of its numbers"),
    "shira": ("single weights, chosen at random", "changes few weights, so stages collide little in a merge"),
    "adalora": (
        "LoRA that drops its least useful directions",
        "finds which layers need rank; wants 100 steps and more",
    ),
    "bitfit": ("biases (`add_biases` where there are none)", "tiny; gentle changes of tone or domain"),
    "ln": ("gains of the norms", "tiny; like `bitfit`, for models without biases"),
    "full": ("every weight of the layers", "much data, or few layers; large checkpoints"),
    "vera": ("factors for rows and rank of one random pair", "tiny; wants a high lr (0.01)"),
    "bottleneck": (
        "new neurons (`base.extra_neurons: 64`)",
        "adds room and leaves the old weights alone; stages never collide",
    ),
    "houlsby": (
        "adapters behind attention and MLP (`base.adapter_size: 64`)",
        "the classic; the result needs `trust_remote_code`, so rather `bottleneck`",
    ),
    "peft": (
        "any other adapter of PEFT, here `peft: {peft_type: LOHA}`",
        "you know why; it is tried out on a tiny model first",
    ),
}
NO_LINEAR = "are no Linear modules"
NO_BIAS = "has none in these layers"
REFUSED = {(case, "gpt2"): NO_LINEAR for case in ("lokr", "oft", "miss", "shira", "olora", "peft")}
REFUSED[("houlsby", "gpt2")] = "has no class with adapters"
REFUSED |= {("bitfit", model): NO_BIAS for model in ("llama-tied", "qwen3")}


def make(case, chosen="1-2", steps=20):
    method, settings = CASES[case]
    keys = {"parent": "base", "dataset": "d", "method": method, "lr": 0.01, "steps": steps, "layers": chosen}
    return METHODS[method](**keys | settings)


def fresh():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def publish_stage(stage, model):
    with publish(CHECKPOINTS / "one") as folder:
        stage.save(model, folder)
        write_json(folder / "stage.json", {"name": "one", "parent": "base"})


def make_room(case):
    """What a method needs of the base."""
    if case == "bottleneck":
        add_neurons(fresh(), 12).save_pretrained(BASE)
    if case == "houlsby":
        add_adapters(fresh(), 12).save_pretrained(BASE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_a_method(case, model):
    make_base(model)
    stage = make(case)
    torch.manual_seed(3)
    if (case, model) in REFUSED:
        with pytest.raises(MistakeError, match=REFUSED[case, model]):
            make_room(case)
            train.put_on(stage, fresh(), torch.float32)
        return
    make_room(case)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        untouched = fresh()(ids).logits
    wrapped = train.put_on(stage, fresh(), torch.float32)
    with torch.no_grad():
        assert torch.allclose(wrapped.eval()(ids).logits, untouched, rtol=0, atol=1e-5)  # it starts from its parent
    frozen = {name: p.clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    run, examples = Run(wrapped.train(), stage, Accelerator()), make_examples(4)
    losses = [run.step([examples], step)["loss"] for step in range(stage.steps)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in wrapped.named_parameters() if name in frozen)

    publish_stage(stage, wrapped)
    with torch.no_grad():
        truth = wrapped.eval()(ids).logits
        again = PeftModel.from_pretrained(fresh(), CHECKPOINTS / "one").eval()(ids).logits
    assert torch.equal(again, truth) or (case in CONVERTED and torch.allclose(again, truth, atol=2e-5))

    checkpoint, (opened,) = open_stages(["one"])
    merged = Merged(checkpoint, [opened], Merge(weights={"one": 1.0}, dtype="float32"))
    inside = (
        copy.deepcopy(wrapped).merge_and_unload() if case not in ("pissa", "olora") else None
    )  # they moved the base
    plain, before = fresh(), fresh()
    for path in checkpoint.modules:
        for name, weights in opened.module(path).items():
            getattr(plain.get_submodule(path), name).data.copy_(weights)
            original = getattr(before.get_submodule(path), name)
            if place(path, layer_stack(before))[0] not in (1, 2):
                assert torch.equal(weights, original), f"{path}.{name} is outside the chosen layers"
            if inside is not None:
                assert torch.allclose(weights, getattr(inside.get_submodule(path), name), rtol=0, atol=1e-6)
            assert torch.allclose(merged.module(path)[name], weights, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, truth, rtol=0, atol=5e-5)
        assert not torch.allclose(plain(ids).logits, untouched, rtol=0, atol=1e-3)


def test_every_method_is_in_the_matrix():
    trained = {name for name, method in METHODS.items() if issubclass(method, Training)}
    assert trained == {method for method, _ in CASES.values()}


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
    run = Run(train.put_on(stage, fresh(), torch.float32), stage, Accelerator())
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
        run = Run(train.put_on(stage, fresh(), torch.float32), stage, Accelerator())
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
        train.put_on(make("bottleneck"), fresh(), torch.float32)
    add_neurons(fresh(), 8).save_pretrained(BASE)
    with pytest.raises(MistakeError, match="gives it 0-7"):
        train.put_on(make("bottleneck"), fresh(), torch.float32)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "it adds prompts"),
        ({"peft_type": "LORAX"}, "PEFT knows ADALORA"),
        ({"peft_type": "LOHA", "rank": 4}, "LOHA refuses its keys"),
        ({"peft_type": "LILY"}, "leaves no change of weights that can be merged"),
    ],
)
def test_what_cannot_be_merged_is_refused(keys, sentence):
    make_base("llama-tied")
    stage = METHODS["peft"](parent="base", dataset="d", method="peft", lr=0.01, steps=1, peft=keys)
    with pytest.raises(MistakeError, match=sentence):
        train.put_on(stage, fresh(), torch.float32)


def test_no_biases_can_be_added_where_the_architecture_knows_none():
    make_base("qwen2")
    with pytest.raises(MistakeError, match="has no setting for biases"):
        add_biases(fresh())


@pytest.mark.parametrize("model", ["llama-tied", "llama-untied"])
def test_the_embedding_can_be_trained(model):
    make_base(model)
    stage = make("full", {"embeddings": "all"})
    wrapped = train.put_on(stage, fresh(), torch.float32)
    run = Run(wrapped, stage, Accelerator())
    losses = [run.step([make_examples(4)], step)["loss"] for step in range(stage.steps)]
    assert losses[-1] < losses[0]
    publish_stage(stage, wrapped)
    _, (opened,) = open_stages(["one"])
    assert "model.embed_tokens" in opened.adapter.modules
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.allclose(load_model(opened, torch.float32)(ids).logits, wrapped.eval()(ids).logits, atol=2e-5)


def table():
    """What every method trains, on which models: the table of docs/methods.md."""
    size = {"vocab_size": 128, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 9, "num_key_value_heads": 3}  # one layer of the default base
    biases = {"attention_bias": True, "mlp_bias": True}
    heads = ["method", "trains", "numbers per layer", "what speaks for it", "Llama", "Qwen2", "Qwen3", "GPT-2"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|--:|" + "---|" * 5]
    for case, (method, settings) in CASES.items():
        given = {key: value for key, value in settings.items() if key in ("rslora", "init", "peft")}
        keys = {"parent": "base", "dataset": "d", "method": method, "lr": 0.01, "steps": 100}
        model = LlamaForCausalLM(LlamaConfig(**size | (biases if method == "bitfit" else {})))
        if method == "bottleneck":
            model = add_neurons(model, 64)
        if method == "houlsby":
            model = add_adapters(model, 64)
        wrapped = train.put_on(METHODS[method](**keys | given), model, torch.float32)
        count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        marks = ["–" if (case, model) in REFUSED else "yes" for model in MODELS]
        lines.append(f"| `{case}` | {ABOUT[case][0]} | {count:,} | {ABOUT[case][1]} | {' | '.join(marks)} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one():
    assert table() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
