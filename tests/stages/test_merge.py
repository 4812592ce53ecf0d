"""The merge as a whole: files, participants, tied heads, provenance. Methods are in merging/."""

import json
from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.changes.deltas import measure
from stages import merge as merge_stage
from stages.errors import MistakeError
from stages.files import BASE, read_json, write_json
from stages.merge import write
from stages.merging.core_space import merge_in_core
from stages.merging.kernels import find_kernel
from stages.merging.merged import Merged
from stages.models.loading import load_model
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_model, open_stages
from tests.conftest import MIXTURES, make_base, make_outside, make_stage


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def merged(folder="merged", processes=1, **settings):
    merge = Merge(**settings)
    Path(folder).mkdir(exist_ok=True)
    write(Merged(*open_stages(list(merge.weights)), merge), Path(folder), {"format": "pt"}, processes)
    path = Path(folder, "model.safetensors")
    return load_file(path) if path.exists() else None


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen3", "gpt2"])
def test_a_chain_merged_with_weight_1_is_its_last_stage(architecture):
    make_base(architecture)
    first = make_stage("first", load_base(), "lora", "0-2").merge_and_unload()
    second = make_stage("second", first, "dora", "1-3", parent="first").merge_and_unload()
    truth = make_stage("third", second, "full", "2", parent="second").merge_and_unload().state_dict()

    weights = {"first": 1.0, "second": 1.0, "third": 1.0}
    found = merged(method="task_arithmetic", weights=weights, dtype="float32")

    assert set(found) == set(load_file(BASE / "model.safetensors"))
    for name, weight in found.items():
        assert torch.linalg.norm(weight - truth[name]) <= 1e-6 * torch.linalg.norm(truth[name]), name


@pytest.mark.parametrize("layer", [1, 3], ids=["merged", "untouched"])
def test_numbers_that_float16_does_not_have_are_refused(layer):
    make_base("llama-untied")
    make_stage("one", load_base(), "lora", "1")
    model = load_base()
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[0, 0] = 7e4
    model.save_pretrained(BASE)
    with pytest.raises(MistakeError, match=rf"merge.dtype is float16, .* model.layers.{layer}.mlp.up_proj.weight goes"):
        merged(weights={"one": 1.0}, dtype="float16")
    assert not Path("merged/model.safetensors").exists()
    found = merged(weights={"one": 1.0}, dtype="bfloat16")
    assert all(weight.isfinite().all() for weight in found.values())


def test_a_tensor_that_lies_in_no_module_is_carried_over():
    make_base("llama-untied")
    make_stage("one", load_base(), "lora", "1")
    scale = {"logit_scale": torch.tensor(2.5)}
    save_file(load_file(BASE / "model.safetensors") | scale, BASE / "model.safetensors", {"format": "pt"})
    assert torch.equal(merged(weights={"one": 1.0}, dtype="float32")["logit_scale"], scale["logit_scale"])
    checkpoint, stages = open_stages(["one"])
    exact = Merged(checkpoint, stages, Merge(weights={"one": 1.0}, dtype="float32"))
    assert measure(stages, exact, open_model("merged")).untouched_max == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_untouched_tensors_are_the_bases_bytes(dtype):
    make_base("llama-untied", getattr(torch, dtype))
    make_stage("one", load_base(), "lora", "1")
    before = load_file(BASE / "model.safetensors")

    found = merged(method="ties", weights={"one": 1.0}, dtype=dtype)

    for name, weight in found.items():
        same = torch.equal(weight, before[name]) and weight.dtype == before[name].dtype
        assert same == (not (".layers.1." in name and "_proj" in name)), name


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "tsv_m"])
def test_neither_order_nor_processes_nor_a_second_run_change_a_byte(method):
    make_base("llama-tied")
    for name in ("one", "two"):
        make_stage(name, load_base(), "lora", "0-1")
    settings = {"method": method, "dtype": "bfloat16", "outputs": ["model", "delta"]}
    if method == "dare_ties":
        settings["parameters"] = {"density": 0.5}
    merged("a", weights={"one": 1.0, "two": 0.5}, **settings)
    merged("b", weights={"one": 1.0, "two": 0.5}, **settings)
    merged("c", weights={"two": 0.5, "one": 1.0}, **settings)
    merged("d", weights={"one": 1.0, "two": 0.5}, processes=2, **settings)
    for file in ("model.safetensors", "delta.safetensors"):
        assert len({Path(folder, file).read_bytes() for folder in "abcd"}) == 1


@pytest.mark.parametrize("first", ["lora", "dora"])
def test_task_arithmetic_is_the_weighted_sum_in_float64(first):
    make_base("qwen2")
    make_stage("one", load_base(), first, "0-2")
    make_stage("two", load_base(), "lora", "1-3")
    base, stages = open_stages(["one", "two"])
    path = "model.layers.1.mlp.down_proj"
    truth = base.module(path)["weight"].double()
    for stage, weight in zip(stages, (0.5, -0.25), strict=True):
        truth = truth + weight * stage.delta(path)["weight"].double()

    found = merged(method="task_arithmetic", weights={"one": 0.5, "two": -0.25}, dtype="float32")

    assert torch.allclose(found[f"{path}.weight"].double(), truth, rtol=0, atol=1e-7)


def test_linear_averages_the_participants_alone_or_all_stages():
    make_base()
    make_stage("one", load_base(), "lora", "0-1")
    make_stage("two", load_base(), "lora", "1-2")
    base, (one, _) = open_stages(["one", "two"])
    path = "model.layers.0.mlp.up_proj"
    delta = one.delta(path)["weight"]
    for participants, share in (("touching", 1.0), ("all", 0.75)):
        found = merged(method="linear", weights={"one": 3.0, "two": 1.0}, participants=participants, dtype="float32")
        assert torch.allclose(found[f"{path}.weight"], base.stored(f"{path}.weight") + share * delta, atol=1e-6)


def test_depth_scaling_grows_with_the_layer_and_filters_pick_modules():
    make_base()
    make_stage("one", load_base(), "lora", "all")
    base, (one,) = open_stages(["one"])
    found = merged(method="ties", weights={"one": 1.0}, depth_scaling=[0.25, 1.0], dtype="float32")
    for layer, share in enumerate((0.25, 0.5, 0.75, 1.0)):
        path = f"model.layers.{layer}.mlp.up_proj"
        truth = base.stored(f"{path}.weight") + share * one.delta(path)["weight"]
        assert torch.allclose(found[f"{path}.weight"], truth, atol=1e-6)

    weights = {"one": [{"filter": "up_proj", "value": 0.0}, {"value": [1.0, 0.0]}]}
    found = merged(method="task_arithmetic", weights=weights, dtype="float32")
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], base.stored("model.layers.0.mlp.up_proj.weight"))
    path = "model.layers.1.mlp.down_proj"
    truth = base.stored(f"{path}.weight") + 2 / 3 * one.delta(path)["weight"]
    assert torch.allclose(found[f"{path}.weight"], truth, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_a_stage_that_trains_only_the_embedding_leaves_the_old_head(architecture, dora):
    make_base(architecture)
    before = load_base()
    embedding = next(name for name, module in before.named_modules() if module is before.get_input_embeddings())
    make_outside("one", before, LoraConfig(target_modules=[embedding], r=2, use_dora=dora))

    found = merged(weights={"one": 1.0}, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)

    assert torch.equal(found["lm_head.weight"], load_base().lm_head.weight)
    assert not torch.equal(found[f"{embedding}.weight"], found["lm_head.weight"])
    truth = PeftModel.from_pretrained(load_base(), "checkpoints/one")
    ids = torch.arange(5)[None]
    assert torch.allclose(model(ids).logits, truth(ids).logits, atol=1e-5)


def test_a_stage_that_trains_only_the_tied_head_unties_it():
    make_base("llama-tied")
    make_outside("one", load_base(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2))

    found = merged(weights={"one": 1.0}, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)

    assert torch.equal(found["model.embed_tokens.weight"], load_base().get_input_embeddings().weight)
    truth = PeftModel.from_pretrained(load_base(), "checkpoints/one")
    ids = torch.arange(5)[None]
    assert torch.allclose(model(ids).logits, truth(ids).logits, atol=1e-5)
    assert not torch.allclose(model(ids).logits, load_base()(ids).logits, atol=1e-2)


def test_outputs_can_be_had_one_by_one():
    make_base()
    make_stage("one", load_base(), "lora", "0-1", rank=4, size=0.01)
    make_stage("two", load_base(), "dora", "1-2", rank=4, size=0.01)
    settings = {"weights": {"one": 1.0, "two": 1.0}, "dtype": "float32"}
    model = merged("model", outputs=["model"], **settings)
    merged("delta", outputs=["delta"], **settings)
    merged("adapter", outputs=["adapter"], **settings)
    assert sorted(path.name for path in Path("delta").iterdir()) == ["delta.safetensors"]
    assert sorted(path.name for path in Path("adapter").iterdir()) == ["adapter"]

    base = load_base().state_dict()
    delta = load_file("delta/delta.safetensors")
    loaded = PeftModel.from_pretrained(load_base(), "adapter/adapter").merge_and_unload().state_dict()
    assert delta.keys() == {name for name in base if "_proj" in name and ".3." not in name}
    for name, change in delta.items():
        assert torch.equal(change, model[name] - base[name])
        assert torch.linalg.norm(loaded[name] - model[name]) <= 1e-4 * torch.linalg.norm(change), name


def test_whole_modules_are_saved_where_a_stage_trained_every_weight():
    make_base("gpt2")
    make_stage("one", load_base(), "lora", "0-1")
    make_stage("two", load_base(), "full", "1-2")
    settings = {"weights": {"one": 1.0, "two": 1.0}, "dtype": "float32"}
    model = merged(outputs=["model", "adapter"], **settings)

    loaded = PeftModel.from_pretrained(load_base(), "merged/adapter").merge_and_unload().state_dict()

    for name, weight in model.items():
        assert torch.allclose(loaded[name], weight, atol=1e-6), name


@pytest.mark.parametrize("second", ["lora", "dora", "full"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_are_part_of_the_adapter(architecture, second):
    make_base(architecture)
    make_stage("one", load_base(), "lora", {"mlp": "0-1", "attention": "1"}, rank=3)
    layers = {"attention": "1-2"} if second == "dora" else {"experts": "1-2", "router": "2", "norms": "1"}
    keys = {"rank": 2, "size": 0.01} if second == "dora" else {}
    make_stage("two", load_base(), second, layers, **keys)
    model = merged(outputs=["model", "adapter"], weights={"one": 0.5, "two": 1.0}, dtype="float32")

    loaded = PeftModel.from_pretrained(load_base(), "merged/adapter").merge_and_unload().state_dict()
    written = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).state_dict()

    assert model.keys() == load_file(BASE / "model.safetensors").keys()
    for name, weight in written.items():
        assert torch.allclose(loaded[name], weight, atol=1e-6), name


LAYERS_OF_EXPERTS = {"experts": "1-2"}
DENSE = [{"method": "tsv_m"}, {"method": "iso_c"}, {"method": "iso_cts"}, {"method": "svc"}, {"method": "knots"}]
DENSE += [{"method": "ties", "parameters": {"density": 0.4}}, {"method": "sce", "parameters": {"select_topk": 0.5}}]


def matrices(base, path, weights):
    """Matrices of single experts as [out, in] and their biases, by parameter and number."""
    turn = base.architecture.modules[path].kind == "transposed_experts"
    parts = [(f"{name}.{n}", part) for name, values in weights.items() for n, part in enumerate(values)]
    return {name: part.mT if turn and part.dim() == 2 else part for name, part in parts}


@pytest.mark.parametrize("kinds", [("full", "full"), ("lora", "lora"), ("full", "lora")])
@pytest.mark.parametrize("settings", DENSE, ids=lambda settings: settings["method"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_an_expert_is_merged_as_a_matrix_of_its_own(architecture, settings, kinds):
    make_base(architecture)
    for name, kind in zip(("one", "two"), kinds, strict=True):
        make_stage(name, load_base(), kind, LAYERS_OF_EXPERTS, **({"rank": 3} if kind == "lora" else {}))
    base, stages = open_stages(["one", "two"])
    path = "model.layers.1.mlp.experts"
    merge = Merge(weights={"one": 1.0, "two": 1.0}, **settings)

    found = matrices(base, path, Merged(base, stages, merge).module(path))

    before = matrices(base, path, base.module(path))
    models = [matrices(base, path, stage.module(path)) for stage in stages]
    for name, weight in before.items():
        own = [model[name] for model in models if not torch.equal(model[name], weight)]
        parameters = {"weight": 1.0} if settings["method"] != "sce" else {}
        parameters |= merge.parameters
        inputs = [weight, *own]
        truth = merge_tensors(inputs, settings["method"], base_index=0, parameters=parameters) if own else weight
        size = torch.linalg.norm(truth - weight)
        assert torch.linalg.norm(found[name] - truth) <= 1e-4 * size + 1e-6, name
        assert size > 1e-2 or weight.dim() == 1  # one stage alone has no variance, by which sce chooses


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("method", ["iso_cts", "svc", "knots"])
def test_a_method_that_tells_outputs_from_inputs_is_given_conv1d_as_out_by_in(method, kind):
    make_base("gpt2")
    for name in ("one", "two"):
        make_stage(name, load_base(), kind, "1", **({"rank": 3} if kind == "lora" else {}))
    base, stages = open_stages(["one", "two"])
    path = "transformer.h.1.mlp.c_fc"
    merge = Merged(base, stages, Merge(method=method, weights={"one": 1.0, "two": 1.0}))

    weight, *models = (each.module(path)["weight"].T.contiguous() for each in (base, *stages))
    truth = merge_tensors([weight, *models], method, base_index=0, parameters={"weight": 1.0})

    found, room = merge.module(path)["weight"], 1e-4 * torch.linalg.norm(truth - weight)
    assert torch.linalg.norm(found.T - truth) <= room
    if (factors := merge.factors(path)) is not None:
        assert torch.linalg.norm(weight + (factors[0] @ factors[1]).T - truth) <= room
    assert (factors is None) == (kind == "full" or method == "knots")


def test_a_stage_counts_for_an_expert_only_if_it_changes_it():
    make_base("qwen3_moe")
    for name in ("one", "two"):
        make_stage(name, load_base(), "full", LAYERS_OF_EXPERTS)
    path, parameter = "model.layers.1.mlp.experts", "down_proj"
    file = Path("checkpoints/two/adapter_model.safetensors")
    base, _ = open_stages(["one"])
    tensors = load_file(file)
    (key,) = (key for key in tensors if ".1." in key and key.endswith(parameter))
    tensors[key][0] = base.module(path)[parameter][0]  # this expert it leaves as it is
    save_file(tensors, file)

    base, (one, two) = open_stages(["one", "two"])
    merge = Merge(method="linear", weights={"one": 3.0, "two": 1.0}, dtype="float32")
    found, weight = Merged(base, [one, two], merge).module(path)[parameter], base.module(path)[parameter]

    assert torch.allclose(found[0], one.module(path)[parameter][0], atol=1e-6)
    assert torch.allclose(
        found[1], (3 * one.module(path)[parameter][1] + two.module(path)[parameter][1]) / 4, atol=1e-6
    )
    assert not torch.allclose(found[0], weight[0], atol=1e-3)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_core_space_is_that_of_each_expert(architecture):
    make_base(architecture)
    wrapped = [make_stage(name, load_base(), "lora", LAYERS_OF_EXPERTS, rank=2) for name in ("one", "two")]
    base, stages = open_stages(["one", "two"])
    path, parameter = "model.layers.1.mlp.experts", "down_proj"
    settings = {"method": "ties", "parameters": {"density": 0.4}, "weights": {"one": 1.0, "two": 1.0}}
    found, full = (
        Merged(base, stages, Merge(space=space, **settings)).module(path)[parameter] - base.module(path)[parameter]
        for space in ("core", "full")
    )

    pefts = [model.base_model.model.get_submodule(path) for model in wrapped]
    layers = [layer if layer.parameter_name == parameter else layer.base_layer for layer in pefts]
    factors = [layer.get_delta_factors("default") for layer in layers]

    def ties(cores):
        inputs = [torch.zeros_like(cores["a"]), *cores.values()]
        return merge_tensors(inputs, "ties", base_index=0, parameters={"weight": 1.0, "density": 0.4})

    for number, delta in enumerate(found):
        own = {
            name: (left[number] * scale, right[number])
            for name, (left, right, scale) in zip("ab", factors, strict=True)
        }
        with torch.no_grad():
            assert torch.allclose(delta, torch.matmul(*merge_in_core(own, ties)), atol=1e-6)
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4
    assert not torch.allclose(found, full, atol=1e-3)


def test_an_adapter_that_misses_the_merge_is_refused_and_nothing_is_written(workspace):
    make_base()
    for name in ("one", "two"):
        make_stage(name, load_base(), "lora", "0-1", rank=2)
    with pytest.raises(MistakeError, match=r"merge.adapter.tolerance is 0.0001, but the adapter misses"):
        merged(
            method="ties",
            parameters={"density": 0.3},
            weights={"one": 1.0, "two": 1.0},
            outputs=["adapter"],
        )


def test_an_adapter_leaves_out_modules_whose_stages_have_no_weight():
    make_base()
    make_stage("one", load_base(), "dora", "0-1", rank=2, size=0.01)
    weights = {"one": [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]}
    merged(weights=weights, outputs=["adapter"])
    keys = load_file("merged/adapter/adapter_model.safetensors")
    assert keys and not any("mlp" in key for key in keys)


def test_a_merge_in_core_space_is_one_adapter_exactly():
    make_base("gpt2")
    for name in ("one", "two"):
        make_stage(name, load_base(), "lora", "0-1", rank=3)
    settings = {"method": "ties", "parameters": {"density": 0.5}, "weights": {"one": 1.0, "two": 1.0}}
    core = merged(space="core", outputs=["model", "adapter"], dtype="float32", **settings)
    full = merged("full", dtype="float32", **settings)

    loaded = PeftModel.from_pretrained(load_base(), "merged/adapter").merge_and_unload().state_dict()

    for name, weight in core.items():
        assert torch.allclose(loaded[name], weight, atol=1e-5), name
    assert any((core[name] - full[name]).abs().max() > 1e-3 for name in core)


def test_provenance_has_no_time_and_reads_back(workspace):
    make_base()
    make_stage("one", load_base(), "lora", "0")
    merge = Merge(weights={"one": 1.0}, outputs=["model", "delta", "adapter"])
    metadata = {"format": "pt", "strata": json.dumps({"a": 1})}
    write(Merged(*open_stages(["one"]), merge), workspace, metadata)
    for name in ("model.safetensors", "delta.safetensors", "adapter/adapter_model.safetensors"):
        with safe_open(workspace / name, "pt") as file:
            assert file.metadata() == metadata


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "tie"}, "merge.method 'tie' is not known; did you mean ties?"),
        ({"method": "linear", "parameters": {"density": 0.5}}, "merge.parameters.density means nothing to method"),
        ({"method": "ties", "parameters": {"densty": 0.5}}, "did you mean density?"),
        ({"method": "ties", "parameters": {"density": 1.5}}, "density is 1.5; it should be between 0 and 1"),
        ({"method": "ties", "parameters": {"density": {"one": [0.5, 2]}}}, "density.one is 2; it should be between"),
        ({"method": "ties", "parameters": {"normalize": 2.5}}, "normalize is 2.5; it should be a valid boolean"),
        (
            {"method": "ties", "parameters": {"density": {"on": 0.5}}},
            "density.on names no merged stage; did you mean one?",
        ),
        ({"method": "ties", "parameters": {"normalize": {"one": True}}}, "is one setting for all stages"),
        ({"method": "ties", "parameters": {"weight": 1.0}}, "weights go under merge.weights"),
        ({"method": "slerp"}, "merge.parameters.t is missing; method 'slerp' needs it"),
        ({"method": "nuslerp"}, "merge.weights has 1 stages, which method 'nuslerp' does not take"),
        (
            {"method": "slerp", "parameters": {"t": 0.5}, "weights": {"one": 1.0, "two": 1.0}},
            "merge.weights has 2 stages, which method 'slerp' does not take",
        ),
        ({"method": "karcher", "weights": {"one": 0.5}}, "set them all to 1.0"),
    ],
)
def test_settings_that_a_method_cannot_take_are_refused(settings, sentence):
    with pytest.raises(MistakeError) as mistake:
        find_kernel(Merge(**({"weights": {"one": 1.0}} | settings)))
    assert str(mistake.value).startswith("params.yaml: merge.") and sentence in str(mistake.value)


def test_what_mergekit_itself_refuses_is_one_sentence():
    make_base()
    make_stage("one", load_base(), "lora", "0")
    with pytest.raises(MistakeError, match=r"merge.method 'della' cannot merge .* \(Epsilon must be chosen"):
        merged(method="della", parameters={"density": 0.9, "epsilon": 0.2}, weights={"one": 1.0})


def test_filters_that_leave_a_tensor_without_a_weight_are_a_mistake():
    make_base()
    make_stage("one", load_base(), "lora", "0")
    with pytest.raises(MistakeError, match=r"merge.weights has no value for .*; end the list with a value"):
        merged(weights={"one": [{"filter": "mlp", "value": 1.0}]})


@pytest.mark.parametrize(("method", "processes"), [("lora", 1), ("lora", 2), ("full", 1)])
def test_a_stage_that_is_not_finite_is_refused_and_leaves_no_file(method, processes):
    make_base()
    make_stage("bad", load_base(), method, "0", size=float("inf"))
    with pytest.raises(MistakeError, match=r"bad is not finite"):
        merged(weights={"bad": 1.0}, processes=processes)
    assert not list(Path("merged").glob("*.safetensors*"))


def test_a_failed_merge_keeps_the_last_one(project, monkeypatch):
    make_base()
    make_stage("sums", load_base(), "lora", "0")
    make_stage("words", load_base(), "lora", "0", parent="sums")
    merge_stage.main()
    before = Path("merged/model.safetensors").read_bytes()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("task_arithmetic", "della\n  parameters: {density: 0.9, epsilon: 0.2}"))
    with pytest.raises(MistakeError, match="cannot merge"):
        merge_stage.main()
    assert Path("merged/model.safetensors").read_bytes() == before


def adapter_config(**record):
    """The config of a merge written as an adapter, whose base is recorded as told."""
    write_json(BASE / "stage.json", read_json(BASE / "stage.json") | record)
    make_stage("one", load_base(), "lora", "0")
    Path("merged").mkdir()
    write(Merged(*open_stages(["one"]), Merge(weights={"one": 1.0}, outputs=["adapter"])), Path("merged"), {})
    return read_json(Path("merged/adapter/adapter_config.json"))


def test_an_adapter_names_the_hubs_model_and_its_commit(workspace):
    make_base()
    config = adapter_config(model="owner/name", revision="abc")
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc")


def test_an_adapter_of_a_base_with_room_does_not_name_the_hubs_model_which_has_none(workspace):
    make_base()
    config = adapter_config(model="owner/name", revision="abc", room={"add_biases": True})
    assert (config["base_model_name_or_path"], config["revision"]) == ("checkpoints/base", None)


def test_a_tokenizer_with_several_chat_templates_goes_along(workspace):
    make_base()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(BASE)
    make_stage("one", load_base(), "lora", "0")
    Path("merged").mkdir()
    write(Merged(*open_stages(["one"]), Merge(weights={"one": 1.0})), Path("merged"), {})
    assert set(AutoTokenizer.from_pretrained("merged").chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize("output", ["model", "adapter", "delta"])
def test_the_merged_model_is_opened_from_whatever_was_written(workspace, output):
    make_base("llama-untied")
    for name in ("one", "two"):
        make_stage(name, load_base(), "lora", "0-1" if name == "one" else "1-2")
    base, stages = open_stages(["one", "two"])
    exact = Merged(base, stages, Merge(weights={"one": 1.0, "two": 0.5}, outputs=[output], dtype="float32"))
    Path("merged").mkdir()
    write(exact, Path("merged"), {"format": "pt"})
    opened = open_model("merged")
    model, truth = (load_model(each, torch.float32) for each in (opened, exact))
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, truth(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(model(ids).logits, load_base()(ids).logits, rtol=0, atol=1e-3)
