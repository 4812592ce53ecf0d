"""Adapters that were trained elsewhere: PEFT's own merge is the truth."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, IA3Config, LoraConfig, PeftModel, VeloraConfig, VeraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from stages import train
from stages.errors import MistakeError
from stages.files import ADAPTER, BASE, read_json, sha256, write_json
from stages.merge import write
from stages.merging.merged import Merged
from stages.settings.merge import Merge
from stages.training.launch import TORCHRUN
from stages.weights.checkpoint import open_stages
from stages.weights.foreign import NO_EFFECT, REFUSED, TAKEN, TYPES, refuse_mistyped
from tests.conftest import ARCHITECTURES, MIXTURES, PARAMS, make_base, make_outside, make_stage
from tests.stages.models.test_every_architecture import whole_that_runs
from tests.stages.training.test_loop import run_train
from tools import check

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
    "regex, Gaussian start": LoraConfig(target_modules=r".*layers\.[13].*_proj", init_lora_weights="gaussian"),
    "no start": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=None),
    "orthogonal start": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="orthogonal"),
    "MiCA": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="mica"),
    "VeLoRA": LoraConfig(target_modules=["q_proj"], r=2, velora_config=VeloraConfig()),
    "all biases": LoraConfig(target_modules=["q_proj", "o_proj"], r=2, bias="all"),
    "biases of its modules": LoraConfig(target_modules=["q_proj", "o_proj"], r=2, bias="lora_only"),
    "a bias of LoRA's own": LoraConfig(target_modules=["q_proj"], r=2, lora_bias=True),
    "weights of modules as parameters": LoraConfig(
        target_modules=["q_proj"],
        target_parameters=["mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"],
        r=3,
        rank_pattern={"up_proj.weight": 2},
        alpha_pattern={"mlp.up_proj.weight": 5},
    ),
    "weights of Conv1D as parameters": LoraConfig(target_modules=[], target_parameters=["c_fc.weight"], r=3),
    "VeRA and all biases": VeraConfig(target_modules=["q_proj", "o_proj"], r=2, bias="all"),
    "VeRA and biases of its modules": VeraConfig(target_modules=["q_proj"], r=2, bias="vera_only"),
    "embedding and DoRA": LoraConfig(target_modules=["embed_tokens"], r=2, use_dora=True),
}
PARAMETERS = {  # of mixtures of experts
    "experts alone": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"],
        "r": 3,
    },
    "one parameter, rsLoRA": {
        "target_parameters": ["experts.down_proj"],
        "target_modules": ["q_proj"],
        "use_rslora": True,
    },
    "router, patterns": {
        "target_modules": ["v_proj"],
        "target_parameters": ["gate.weight", "1.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj"],
        "r": 4,
        "rank_pattern": {"gate_up_proj": 2, "v_proj": 3},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 5, "gate.weight": 3, "router.weight": 3},
    },
}
BASES = {
    **dict.fromkeys((name for name in CONFIGS if "bias" in name), "qwen2"),  # it has some
    "weights of Conv1D as parameters": "gpt2",
}
KINDS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value in TYPES}
KEYS = {  # that a type of PEFT needs, or that make it small
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "WAVEFT": {"n_frequency": 20},
}
VALUES = [  # of keys, each for all types that have them
    {"r": 2, "oft_block_size": 0},
    {"r": 4, "init_r": 4},
    {"alpha": 3},
    {"scaling": 2.5},
    {"random_seed": 5},
    {"random_seed": 5, "mask_type": "random"},
    {"random_loc_seed": 5},
    {"n_frequency": 10},
    {"n_frequency_pattern": {"q_proj": 7}},
    {"exclude_modules": ["down_proj"]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"fan_in_fan_out": True},
    {"bias": "all"},
    {"init_weights": False},
    {"lora_alpha": 3, "use_rslora": True},
    {"boft_block_size": 0, "boft_block_num": 4},
    {"boft_n_butterfly_factor": 2},
    {"block_size_pattern": {"q_proj": 4}},
    {"decomposition_method": "relu"},
    {"decomposition_method": "qr", "para": True},
    {"delora_lambda": 3, "lambda_pattern": {"q_proj": 2}, "rank_pattern": {"q_proj": 2}},
    {"config_A_B": "vector", "config_C": "vector", "config_D_E": "constant"},
    {"gralora_k": 4, "hybrid_r": 4, "r": 8},
    {"apply_GS": True},
    {"feedforward_modules": []},
    {"use_effective_conv2d": True, "alpha_pattern": {"q_proj": 3}},
    {"decompose_both": True, "decompose_factor": 4},
    {"init_weights": "mini", "mini_r": 2, "r": 8},
    {"coft": True, "eps": 1e-3, "block_share": True},
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
    {"cayley_neumann_eps": 0.5, "use_cayley_neumann": True},
    {"effective_rank": 4, "target_svd_config": {"q_proj": 4}},
    {"depth": 2, "act_fn": "tanh"},
    {"ab_svd_init": "pissa_init", "psoft_alpha": 3, "psoft_mag_a": False, "psoft_mag_b": False, "psoft_orth": False},
    {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3},
    {"variant": "road_4", "group_size": 32},
    {"select_top": False, "sparsity": 0.5},
    {"use_idwt": False, "wavelet_family": "db4"},
]
ALWAYS = {"peft_type", "target_modules"}
BY_CONFIGS = {"lora_bias", "modules_to_save", "use_dora", "target_parameters"}
BY_SENTENCE = {"proportional_parameters"}  # PEFT's own merge of one module does not go with it


CONFIG, WEIGHTS = (Path("outside", file) for file in ADAPTER)


def content(folder):
    return sha256(folder / file for file in ADAPTER)


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def by_peft():
    return PeftModel.from_pretrained(load_base(), "outside").merge_and_unload().state_dict()


def assert_stage_is(truth):
    _, (stage,) = open_stages(["sums"])
    paths = [*stage.base.modules, *stage.base.tied]
    found = {f"{path}.{name}": weight for path in paths for name, weight in stage.module(path).items()}
    assert found.keys() == truth.keys()
    for name, weight in found.items():
        assert torch.equal(weight, truth[name]), name
    assert any(not torch.equal(found[name], weight) for name, weight in load_base().state_dict().items())


def imported(keys: str = "") -> None:
    """Train the stage `sums` of `write_project`."""
    write_project(keys)
    train.main("sums")


def write_project(keys: str = "") -> None:
    """A project whose stage `sums` is the adapter in outside/, pinned."""
    for dataset in ("sums", "words"):
        Path("data", dataset).mkdir(parents=True, exist_ok=True)
    Path("data/sums/train.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    start, end = PARAMS.index("    method: lora"), PARAMS.index("  words:\n    parent")
    keys = keys or f"    path: outside\n    sha256: {content(Path('outside'))}\n"
    Path("params.yaml").write_text(PARAMS[:start] + "    method: import\n" + keys + PARAMS[end:])


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
    outside(CONFIGS[config], BASES.get(config, "llama-untied"))
    truth = by_peft()
    imported()
    assert_stage_is(truth)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("config", PARAMETERS)
def test_an_imported_adapter_of_experts_is_pefts_merge_bit_for_bit(outside, config, architecture):
    router = "router" if architecture == "gpt_oss" else "gate"
    keys = {key: named(value, router) for key, value in PARAMETERS[config].items()}
    outside(LoraConfig(**keys), architecture)
    truth = by_peft()
    imported()
    assert_stage_is(truth)


def named(value, router):
    """A setting with the name that the model has for its router."""
    parts = value if isinstance(value, list) else []
    return [part.replace("gate.", f"{router}.") for part in parts] if parts else value


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_pefts_merge_bit_for_bit_whatever_its_keys_say(outside, kind):
    known = KINDS[kind].__dataclass_fields__.keys()
    for keys in [{}, *(each for each in VALUES if each.keys() <= known)]:
        shutil.rmtree("outside", ignore_errors=True)
        told = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]} | KEYS.get(kind, {}) | keys
        outside(KINDS[kind](**told))
        truth = by_peft()
        imported()
        assert_stage_is(truth)


@pytest.mark.parametrize("kind", TYPES)
def test_a_value_of_another_type_is_refused_by_its_key(kind):
    for key in KINDS[kind].__dataclass_fields__.keys() & set(TAKEN) - {"peft_type"}:
        with pytest.raises(MistakeError, match=rf"^outside/adapter_config.json: {key} is \[\[1\]\], where PEFT has "):
            refuse_mistyped(CONFIG, {"peft_type": kind, key: [[1]]})


def test_every_key_of_pefts_is_judged_once():
    judged = [*TAKEN, *NO_EFFECT, *REFUSED]
    assert len(judged) == len(set(judged)) and KINDS.keys() == set(TYPES)
    assert set().union(*(config.__dataclass_fields__ for config in KINDS.values())) == set(judged)
    tried = ALWAYS | BY_CONFIGS | BY_SENTENCE | {key for keys in [*VALUES, *KEYS.values()] for key in keys}
    assert set(TAKEN) <= tried


PREFIX = "base_model.model.model.layers."


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.", "_orig_mod.base_model."),
        (PREFIX, "base_model.model._orig_mod.model.layers."),
        (".self_attn.", "._fsdp_wrapped_module.self_attn."),
        (PREFIX, "base_model.model.model.language_model.layers."),
        (PREFIX, "base_model.model.language_model.model.layers."),
        (PREFIX, "model.layers."),
        (".lora_A.", ".lora_A.default."),
        (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
        (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"),
        ("norm.weight", "norm.modules_to_save.default.weight"),
    ],
)
def test_names_of_other_tools_and_versions_are_those_of_peft(outside, old, new):
    outside(LoraConfig(target_modules=["q_proj"], r=2, use_dora=True, modules_to_save=["model.norm"]))
    truth, before = by_peft(), content(Path("outside"))
    rewrite(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})
    assert all(old not in name.replace(new, "") for name in load_file(WEIGHTS)) and content(Path("outside")) != before
    imported()
    assert_stage_is(truth)


def load_whole():
    return AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)


def text_alone(model):
    """The text model of one of images and text, as a causal language model that shares its weights."""
    text = AutoModelForCausalLM.from_config(model.config.get_text_config())
    text.model, text.lm_head = model.model.language_model, model.lm_head
    return text


def put_back(model, part):
    """The weights of a part in the model that it is of."""
    model.model.language_model = getattr(part, "model", part)
    model.lm_head = getattr(part, "lm_head", model.lm_head)


PARTS = {  # of a model of images and text: those that an adapter is put on, each with a module to save
    "the whole": (lambda model: model, "lm_head"),
    "its decoder": (lambda model: model.model.language_model, "norm"),
    "its text model": (text_alone, "lm_head"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_a_text_model_is_taken_where_it_is_a_part_of_the_base(workspace, monkeypatch, part, dora):
    monkeypatch.setitem(ARCHITECTURES, "llava", lambda: whole_that_runs("llava"))
    make_base("llava")
    find, saved = PARTS[part]
    targets = r".*language_model.*(q_proj|up_proj)" if part == "the whole" else ["q_proj", "up_proj"]
    keys = {"modules_to_save": [saved], "alpha_pattern": {"layers.1.self_attn.q_proj": 5}, "use_dora": dora}
    make_outside("elsewhere", find(load_whole()), LoraConfig(target_modules=targets, r=2, **keys))
    shutil.move("checkpoints/elsewhere", "outside")
    model, before = load_whole(), load_whole().state_dict()
    merged = PeftModel.from_pretrained(find(model), "outside").merge_and_unload()
    if part != "the whole":
        put_back(model, merged)
    imported()
    _, (stage,) = open_stages(["sums"])
    paths = stage.base.architecture.modules
    found = {f"{path}.{name}": each for path in paths for name, each in stage.module(path).items()}
    assert all(torch.equal(found.get(name, weights), weights) for name, weights in model.state_dict().items())
    moved = {name for name, weights in model.state_dict().items() if not torch.equal(weights, before[name])}
    assert moved <= found.keys() and sum("q_proj" in name for name in moved) == stage.base.architecture.layers


@pytest.mark.parametrize(
    ("part", "keys", "sentence"),
    [
        ("the whole", {}, "q_proj.lora_A.weight is beside the text model, as a vision tower is, and Strata merges"),
        ("the whole", {"modules_to_save": ["multi_modal_projector"]}, "linear_1.bias is beside the text model, as"),
        ("its text model", {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 5}}, "does not mean the same where"),
    ],
)
def test_what_is_beside_the_text_model_is_refused_in_one_sentence(workspace, monkeypatch, part, keys, sentence):
    monkeypatch.setitem(ARCHITECTURES, "llava", lambda: whole_that_runs("llava"))
    make_base("llava")
    config = LoraConfig(target_modules=["q_proj"], r=2, **keys)
    make_outside("elsewhere", PARTS[part][0](load_whole()), config)
    shutil.move("checkpoints/elsewhere", "outside")
    with pytest.raises(MistakeError) as mistake:
        imported()
    assert sentence in str(mistake.value) and not Path("checkpoints/sums").exists()


def test_the_bases_own_weights_beside_trained_ones_are_left_out(outside):
    outside(LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    truth = by_peft()
    own = load_base().state_dict()["lm_head.weight"]
    rewrite(lambda tensors: tensors | {"base_model.model.lm_head.original_module.weight": own})
    imported()
    assert_stage_is(truth)


def test_a_key_that_is_left_out_is_pefts_default(outside):
    outside(LoraConfig(target_modules=["q_proj"], r=2))
    keys = ("peft_type", "r", "target_modules")
    write_json(CONFIG, {key: value for key, value in read_json(CONFIG).items() if key in keys})
    truth = by_peft()
    imported()
    assert_stage_is(truth)


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
    save_file(change(load_file(WEIGHTS)), WEIGHTS)


def renamed(old, new):
    return lambda: rewrite(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def changed(change):
    return lambda: rewrite(lambda tensors: {name: change(tensor).contiguous() for name, tensor in tensors.items()})


def configured(**keys):
    return lambda: write_json(CONFIG, read_json(CONFIG) | keys)


def pickled():
    WEIGHTS.rename("outside/adapter_model.bin")


@pytest.mark.parametrize("name", ["_orig_mod.base_model.vera_A", "base_model.vera_A.default"])
def test_the_random_factors_of_vera_have_names_of_other_tools_too(outside, name):
    outside(VeraConfig(target_modules=["q_proj"], r=2))
    truth = by_peft()
    rewrite(lambda tensors: {key.replace("base_model.vera_A", name): tensor for key, tensor in tensors.items()})
    imported()
    assert_stage_is(truth)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merged_adapter_is_imported_as_what_it_is(outside, method):
    """Where one bias has changed, PEFT has them all in the file."""
    outside(LoraConfig(target_modules=["q_proj"], r=2), "qwen2")
    biased = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, bias="lora_only")
    make_outside("biased", load_base(), biased)
    make_stage("other", load_base(), method, {"self_attn.k_proj": "1", "self_attn.q_proj": "2"}, rank=2)
    names = ["biased", "other"]
    Path("merged").mkdir()
    merge = Merge(weights=dict.fromkeys(names, 1.0), outputs=["model", "adapter"], dtype="float32")
    write(Merged(*open_stages(names), merge), Path("merged"), {"format": "pt"})
    shutil.rmtree("outside")
    shutil.move("merged/adapter", "outside")
    truth = by_peft()
    assert any(".base_layer.bias" in name for name in load_file(WEIGHTS))
    imported()
    assert_stage_is(truth)
    assert all(
        torch.allclose(truth[name], weight, atol=1e-5) for name, weight in load_file("merged/model.safetensors").items()
    )


@pytest.mark.parametrize(
    ("spoil", "keys", "sentence"),
    [
        (None, "    path: nowhere\n", "stages.sums.path 'nowhere' holds no adapter_config.json"),
        (None, "    path: outside\n", "stages.sums.sha256 is missing; it pins what is merged, so add sha256: "),
        (None, "    lr: 1.0\n", "stages.sums.lr is not a known key"),
        (None, "    dora: true\n", "stages.sums.dora is not a known key"),
        (None, "    sha256: x\n", "stages.sums.path or id is needed, one of them"),
        (None, "    id: some/adapter\n", "stages.sums.revision is missing"),
        (pickled, "    path: outside\n", "adapter_model.bin can hold code, so load it by PEFT and save it again"),
        (
            lambda: WEIGHTS.rename("outside/adapters.safetensors"),
            "    path: outside\n",
            "adapters.safetensors is MLX's, so convert it",
        ),
        (
            renamed("layers.3", "layers.9"),
            "",
            "belongs to no module of the base; use an adapter that was trained on this base",
        ),
        (
            renamed("self_attn.q_proj", "mlp.experts.0.w1"),
            "",
            "all experts of a layer as one, so load the adapter on this",
        ),
        (renamed("lora_A", "lora_down"), "", "rename kohya's lora_down to lora_A"),
        (renamed("lora_A.weight", "lora_a"), "", "MLX's lora_a and lora_b are PEFT's"),
        (changed(lambda tensor: tensor[:, :7]), "", "which does not fit model.layers."),
        (changed(lambda tensor: tensor[:0]), "", "has no elements, as DeepSpeed leaves it"),
        (changed(lambda tensor: tensor * torch.nan), "", "has numbers that are not finite"),
        (changed(lambda tensor: tensor.to(torch.float8_e4m3fn)), "", "is F8_E4M3, which is not read"),
        (
            lambda: rewrite(lambda tensors: {name: each for name, each in tensors.items() if "lora_A" in name}),
            "",
            "q_proj.lora_B.weight, one of 4 that its adapter_config.json asks for",
        ),
        (lambda: WEIGHTS.write_bytes(b"12345678"), "", "outside/adapter_model.safetensors is not a whole safetensors"),
        (lambda: os.truncate(WEIGHTS, 2000), "", "; copy the adapter again from where it is whole"),
        (lambda: CONFIG.write_text("{"), "", "outside/adapter_config.json is not valid JSON"),
        (lambda: CONFIG.write_text('{"fine_tune_type": "lora"}'), "", "has no peft_type, so it is not PEFT's"),
        (configured(peft_type="VBLORA"), "", "peft_type is 'VBLORA', whose modules cannot be merged one by one"),
        (configured(lora_alpha=1e300), "", "outside: the adapter makes numbers of model.layers."),
        (configured(new_key=1), "", "outside/adapter_config.json: new_key is no key of PEFT"),
        (configured(r=4), "", "q_proj.lora_A.weight of [4, 32] that adapter_config.json makes on this base"),
        (configured(r=0), "", "outside/adapter_config.json is refused by PEFT on this base (`r` should be a positive"),
        (configured(r=None), "", "r is None, where PEFT has a valid integer; correct it, its default is 8"),
        (
            configured(lora_alpha="8"),
            "",
            "outside/adapter_config.json: lora_alpha is '8', where PEFT has a valid integer",
        ),
        (
            configured(lora_alpha=0),
            "",
            "outside/adapter_config.json: lora_alpha has 0, by which the adapter does nothing",
        ),
        (configured(lora_alpha=-8.0), "", "lora_alpha has -8.0, by which the adapter does nothing or the opposite"),
        (configured(lora_alpha=math.nan), "", "lora_alpha has nan, which is no finite number; correct it"),
        (configured(lora_alpha=10**400), "", "which is no finite number; correct it"),
        (configured(alpha_pattern={"q_proj": 0}), "", "alpha_pattern has 0, by which the adapter does nothing"),
        (
            configured(rank_pattern={"q_proj": "4"}),
            "",
            "rank_pattern is {'q_proj': '4'}, where PEFT has a valid number",
        ),
        (configured(bias="lora"), "", "bias is 'lora', where PEFT has 'none', 'all' or 'lora_only'; correct it"),
        (configured(init_lora_weights="pissa_niter_4"), "", "init_lora_weights is 'pissa_niter_4', with which"),
        (configured(init_lora_weights="OLoRA"), "", "init_lora_weights is 'OLoRA', with which"),
        (configured(layer_replication=[[0, 4], [2, 4]]), "", "layer_replication is [[0, 4], [2, 4]], which makes"),
        (configured(save_projection=False), "", "save_projection is False, so that the file lacks the projection"),
        (
            lambda: (
                renamed(PREFIX, "base_model.model.model.language_model.layers.")(),
                configured(alpha_pattern={"language_model.layers.0.self_attn.q_proj": 3})(),
            ),
            "",
            "alpha_pattern names 'language_model.layers.0.self_attn.q_proj'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(outside, spoil, keys, sentence):
    outside(LoraConfig(target_modules=["q_proj"], r=8))
    if spoil:
        spoil()
    with pytest.raises(MistakeError) as mistake:
        imported(keys)
    assert sentence in str(mistake.value) and "\n" not in str(mistake.value)
    assert not Path("checkpoints/sums").exists()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (configured(init_lora_weights="pissa"), "init_lora_weights is 'pissa', with which"),
        (renamed("layers.3", "layers.9"), "layers.9.self_attn.q_proj.lora_A.weight belongs to no module of the base"),
        (changed(lambda tensor: tensor * torch.nan), "has numbers that are not finite"),
        (lambda: os.truncate(WEIGHTS, 2000), "is not a whole safetensors file"),
    ],
)
def test_check_tells_what_training_would(outside, spoil, sentence):
    outside(LoraConfig(target_modules=["q_proj"], r=8))
    spoil()
    write_project()
    with pytest.raises(MistakeError, match=re.escape(sentence)) as mistake:
        check.main()
    assert str(mistake.value).startswith("params.yaml: stages.sums.path: outside/adapter_")


@pytest.mark.parametrize(
    ("config", "tokens", "sentence"),
    [
        (
            LoraConfig(target_modules=["q_proj"], r=2, lora_bias=True),
            128,
            "has none; give the base biases",
        ),
        (LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]), 130, "resized as base.model"),
        (
            LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[3]),
            128,
            "trainable_token_indices is [3]",
        ),
        (VeraConfig(target_modules=["q_proj"], r=2, save_projection=False), 128, "save_projection is False"),
    ],
)
def test_what_this_base_cannot_hold_is_refused_in_one_sentence(workspace, config, tokens, sentence):
    make_base("llama-untied")
    model = load_base()
    model.resize_token_embeddings(tokens)
    make_outside("elsewhere", model, config)
    shutil.move("checkpoints/elsewhere", "outside")
    with pytest.raises(MistakeError) as mistake:
        imported()
    assert sentence in str(mistake.value)
    assert not Path("checkpoints/sums").exists()
