"""Files that PEFT, mergekit and Strata merged rightly pass, and each planted fault is told in its own sentence."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.files import BASE
from stages.merge import write
from stages.merging.merged import Merged
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_stages
from tests.conftest import ARCHITECTURES, make_base, make_stage
from tools import cli

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
METHODS = {
    "lora": {"bias": "all"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "full": {"modules_to_save": ["lm_head", "v_proj", "norm"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "experts": EXPERTS,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)


def adapt(name, size=0.05, **settings):
    """Save a PEFT adapter of the base whose numbers were moved at random."""
    torch.manual_seed(sum(map(ord, name)))
    config = {"r": 5, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]} | settings
    wrapped = get_peft_model(load(), LoraConfig(**config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    wrapped.save_pretrained(name)


def merge(*names, folder="merged", dtype=torch.float32, computed=torch.float32):
    """PEFT's own merge of adapters, one after the other."""
    model = load(computed)
    for name in names:
        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    model.to(dtype).save_pretrained(folder)


def edit(change, folder="merged"):
    """Write a model's file anew after a change of its tensors, given the base's as well."""
    path = Path(folder, "model.safetensors")
    tensors, base = load_file(path), load_file(BASE / "model.safetensors")
    save_file(change(tensors, base) or tensors, path, {"format": "pt"})


def verify(*words, file="merged"):
    """Exit code and findings of the command; whether with its table or as JSON is the same."""
    arguments = ["strata", "verify", file, "--base", str(BASE), *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        try:
            cli.main()
        except SystemExit as end:
            return str(end.code)
    return ""


def passes(capsys, *words, file="merged"):
    """The numbers of a file that has no finding."""
    assert verify(*words, "--json", file=file) == "", capsys.readouterr().out
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("method", "architecture", "dtype", "computed"),
    [
        ("lora", "qwen2", torch.bfloat16, torch.bfloat16),
        ("dora", "llama-tied", torch.float16, torch.float32),
        ("full", "llama-untied", torch.bfloat16, torch.float32),
        ("experts", "qwen3_moe", torch.bfloat16, torch.float32),
        ("embeddings", "llama-untied", torch.float32, torch.float32),
        ("patterns", "qwen3", torch.float32, torch.bfloat16),
    ],
)
def test_what_peft_merges_is_right(capsys, method, architecture, dtype, computed):
    make_base(architecture)
    adapt("tuned", **METHODS[method])
    merge("tuned", dtype=dtype, computed=computed)
    told = passes(capsys, "--adapter", "tuned")
    assert told["adapters"]["tuned"]["factor"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "full"])
def test_every_merge_of_peft_is_right(capsys, method, architecture, dtype):
    """In the dtype of the base, as most people merge; the base in several files, but for the one that is tied."""
    is_mixture = architecture in ("qwen3_moe", "mixtral")
    make_base(architecture, dtype, shards=architecture != "llama-tied")
    settings = METHODS[method] | (EXPERTS if is_mixture and method in ("lora", "rslora") else {})
    if is_mixture and method == "dora":
        settings |= {"target_modules": ["q_proj", "o_proj"]}
    if architecture != "llama-untied" and method == "full":
        settings |= {"target_modules": ["q_proj"], "modules_to_save": ["v_proj", "norm"]}
    adapt("tuned", **settings)
    adapt("other", target_modules=["q_proj", "k_proj"])
    merge("tuned", dtype=dtype, computed=dtype)
    passes(capsys, "--adapter", "tuned")
    if method != "dora":  # which is relative to what it stands on
        merge("tuned", "other", dtype=dtype, computed=dtype)
        told = passes(capsys, "--adapter", "tuned", "other")
        assert [each["factor"] for each in told["adapters"].values()] == pytest.approx([1, 1], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "full"])
def test_task_arithmetic_of_mergekit_is_right(capsys, tmp_path, method, dtype):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    make_base("llama-untied")
    weights = {"one": 0.7, "two": 0.6}
    adapt("one", **METHODS[method])
    adapt("two", target_modules=["q_proj", "o_proj"])
    for name in weights:
        merge(name, folder=f"full-{name}")
    models = [{"model": str(tmp_path / f"full-{name}"), "parameters": {"weight": w}} for name, w in weights.items()]
    config = {"merge_method": "task_arithmetic", "models": models, "base_model": str(BASE.resolve()), "dtype": dtype}
    options = MergeOptions(copy_tokenizer=False, quiet=True, device="cpu")
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "merged"), options)
    told = passes(capsys, "--adapter", "one", "two")
    assert [each["factor"] for each in told["adapters"].values()] == pytest.approx([0.7, 0.6], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen3_moe", "gpt2"])
def test_a_merge_of_strata_is_right(capsys, architecture, dtype):
    """A chain of three, whose stages each add their own change, and one beside it."""
    make_base(architecture)
    first = make_stage("first", load(), "lora", "0-2").merge_and_unload()
    method = "lora" if architecture == "qwen3_moe" else "dora"
    second = make_stage("second", first, method, "1-3", parent="first").merge_and_unload()
    make_stage("third", second, "full", "3", parent="second")
    make_stage("beside", load(), "ln", "0-3")
    weights = {"first": 1.0, "second": 0.8, "third": 1.0, "beside": 0.5}
    Path("merged").mkdir()
    settings = Merge(method="task_arithmetic", weights=weights, dtype=dtype)
    write(Merged(*open_stages(list(weights)), settings), Path("merged"), {"format": "pt"})
    told = passes(capsys, "--adapter", *(str(BASE.parent / name) for name in weights))
    factors = [each["factor"] for each in told["adapters"].values()]
    assert factors == pytest.approx(list(weights.values()), abs=0.03)


def rewrite(key, value):
    """Merge an adapter whose configuration says something else."""
    shutil.copytree("one", "wrong/one")
    path = Path("wrong/one/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    merge("wrong/one")


def as_base(*parts):
    """Tensors with one of these in their names become the base's."""

    def change(tensors, base):
        tensors.update({name: base[name].to(t.dtype) for name, t in tensors.items() if any(p in name for p in parts)})

    return lambda: edit(change)


def scaled(factor, part=""):
    def change(tensors, base):
        tensors.update({n: (base[n] + factor * (t - base[n])).contiguous() for n, t in tensors.items() if part in n})

    return lambda: edit(change)


def holed(tensors, base):
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan


def cut():
    path = Path("merged/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])


def unmerged():
    state = PeftModel.from_pretrained(load(), "one").base_model.model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, "merged/model.safetensors")


def of_another():
    torch.manual_seed(9)
    ARCHITECTURES["llama-untied"]().save_pretrained(BASE)


def rename(tensors, base):
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


NOTHING = "nothing of one is in merged: all 39 tensors that were compared are those of checkpoints/base; save what"
FAULTS = {  # settings of the adapter, what is done to its right merge, and the sentence
    "nothing": ({}, lambda: shutil.copytree(BASE, "merged", dirs_exist_ok=True), NOTHING),
    "experts": (EXPERTS, as_base("experts"), "one is left out of experts, and is in merged elsewhere by 1.00"),
    "embeddings": (
        METHODS["embeddings"],
        as_base("embed"),
        "one is left out of embed_tokens, and is in merged elsewhere",
    ),
    "modules_to_save": (METHODS["full"], as_base("lm_head"), "one is left out of lm_head (of modules_to_save), and is"),
    "biases": (METHODS["lora"], as_base("bias"), "one is left out of biases, and is in merged elsewhere by 1.00"),
    "a shard": (
        {},
        as_base("layers.2", "layers.3"),
        "one is left out of layers 2-3, and is in merged elsewhere by 1.00",
    ),
    "rsLoRA as LoRA": (
        METHODS["rslora"] | {"r": 8},
        lambda: rewrite("use_rslora", False),
        "one is in merged by 0.35, as where its alpha/√r (use_rslora) is read as alpha/r;",
    ),
    "LoRA as rsLoRA": (
        {"r": 9},
        lambda: rewrite("use_rslora", True),
        "one is in merged by 3.00, as where its alpha/r is read as alpha/√r (use_rslora);",
    ),
    "unscaled": (
        {},
        lambda: rewrite("lora_alpha", 5),
        "one is in merged by 0.42, as where its scale, alpha/r, is left out;",
    ),
    "patterns": (
        {"alpha_pattern": {"q_proj": 24}},
        lambda: rewrite("alpha_pattern", {}),
        "one is in merged by 0.50 to 1.00, as where its rank_pattern and alpha_pattern are not read;",
    ),
    "twice": ({}, lambda: merge("one", "one"), "one is in merged by 2.00, as where it is applied twice;"),
    "uneven": ({}, scaled(0.6, "down_proj"), "one is in merged by 1.00 in q_proj, and by 0.60 elsewhere;"),
    "too little": (
        {},
        scaled(0.7),
        "one is in merged by 0.70, and the least is 0.90; merge it again, or give --expect 0.69",
    ),
    "too much": (
        {},
        scaled(30.0),
        "one is in merged by 30.00, more than once; merge it again, or give --expect 29.99 if that is its weight",
    ),
    "taken away": (
        {},
        scaled(-1.0),
        "one is in merged by -1.00, and the least is 0.90; merge it again, or give --expect -1.01",
    ),
    "another base": (
        {},
        of_another,
        "either checkpoints/base is not what merged was made of, or a training of all of it",
    ),
    "another training": (
        {},
        lambda: edit(lambda tensors, _: tensors["lm_head.weight"].mul_(1.01)[:0].sum() or None),
        "no adapter given changes lm_head.weight, and merged differs there by 1.00 % of its size;",
    ),
    "not a number": ({}, lambda: edit(holed), "numbers that are not finite in model.layers.1.mlp.down_proj.weight;"),
    "cut short": ({}, cut, "merged/model.safetensors is not a whole safetensors file"),
    "a missing tensor": (
        {},
        lambda: edit(lambda tensors, _: tensors.pop("model.norm.weight")[:0].sum() or None),
        "merged lacks model.norm.weight, which checkpoints/base has; write it again whole",
    ),
    "a tensor more": (
        {},
        lambda: edit(lambda tensors, _: tensors | {"model.layers.4.mlp.up_proj.weight": torch.ones(3)}),
        "merged has model.layers.4.mlp.up_proj.weight, which checkpoints/base has not;",
    ),
    "fewer words": (
        {},
        lambda: edit(lambda tensors, _: tensors | {"lm_head.weight": torch.ones(100, 32)}),
        "merged has lm_head.weight, as [100, 32], and not [128, 32] as checkpoints/base;",
    ),
    "whole numbers": (
        {},
        lambda: edit(lambda tensors, _: tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}),
        "merged has lm_head.weight, in I8, and not F32 as checkpoints/base; name the base that is like it",
    ),
    "a prefix": ({}, lambda: edit(rename), "merged has base_model.model. before the names of its tensors, under which"),
    "not merged": (
        {},
        unmerged,
        "merged has an adapter beside its weights, as model.layers.0.mlp.down_proj.base_layer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told(capsys, fault):
    settings, plant, sentence = FAULTS[fault]
    make_base({"experts": "qwen3_moe", "biases": "qwen2"}.get(fault, "llama-untied"))
    adapt("one", **settings)
    merge("one")
    plant()
    ended = verify("--adapter", "one")
    told = capsys.readouterr().out.splitlines()
    assert ended == "error: merged has 1 finding", told
    assert told[0].startswith("- ") and sentence in told[0], told[0]


def test_one_of_several_that_is_missing_is_told_also_where_both_change_the_same(capsys):
    make_base("llama-untied", torch.bfloat16)
    adapt("one")
    adapt("two", target_modules=["q_proj"])
    merge("one", dtype=torch.bfloat16)
    assert verify("--adapter", "one", "two") == "error: merged has 1 finding"
    assert "- nothing of two is in merged; merge it too" in capsys.readouterr().out
    merge("one", "two", dtype=torch.bfloat16)
    assert verify("--adapter", "one") == "error: merged has 1 finding"
    assert "of what changed in 4 tensors, such as model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_takes_is_told_and_float32_keeps(capsys, dtype):
    make_base("llama-untied", dtype)
    adapt("one", size=2e-5 if dtype == torch.bfloat16 else 2e-6)
    merge("one", dtype=dtype)
    assert verify("--adapter", "one") == "error: merged has 1 finding"
    told = capsys.readouterr().out
    assert f"for {dtype} is too coarse: a right merge would have 0.".replace("torch.", "") in told
    merge("one")
    passes(capsys, "--adapter", "one")


def test_a_routed_model_is_told(capsys):
    make_base("llama-untied")
    adapt("one")
    merge("one")
    added = {"router.weight": torch.zeros(2, 32), "model.layers.0.mlp.up_proj.changes.1.down": torch.zeros(1, 32)}
    edit(lambda tensors, _: tensors | added)
    assert verify("--adapter", "one") == "error: merged has 1 finding"
    assert "- merged is a routed model, which keeps the base and each change apart;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rounding", "sentence"),
    [
        ("nearest", r"rounded to bfloat16, and nothing else; rounding takes [\d.]+ % of one"),
        ("stochastic", r"1\.00 × one, rounded to bfloat16 stochastically, which takes nothing of them and scatters"),
    ],
)
def test_how_a_file_was_rounded_is_told(capsys, rounding, sentence):
    make_base("llama-untied", torch.bfloat16)
    make_stage("one", load(), "lora", "1-2", size=1e-4)
    Path("merged").mkdir()
    settings = Merge(weights={"one": 1.0}, dtype="bfloat16", rounding=rounding)
    write(Merged(*open_stages(["one"]), settings), Path("merged"), {"format": "pt"})
    assert verify("--adapter", str(BASE.parent / "one"), "--expect", "0.5") == ""
    assert re.search(sentence, capsys.readouterr().out)


@pytest.mark.parametrize(("factor", "expected"), [(0.7, "0.6"), (30.0, "29.99"), (-1.0, "-1.01")])
def test_a_weight_that_is_meant_passes_where_it_is_expected(capsys, factor, expected):
    make_base("llama-untied")
    adapt("one")
    merge("one")
    scaled(factor)()
    told = passes(capsys, "--adapter", "one", "--expect", expected)
    assert told["adapters"]["one"]["modules"]["q_proj"]["factor"] == pytest.approx(factor, abs=1e-4)


def test_a_head_that_the_file_ties_to_the_embedding_is_told(capsys):
    make_base("llama-tied")
    adapt("one", target_modules=["q_proj", "lm_head"])
    merge("one")
    assert verify("--adapter", "one") == "error: merged has 1 finding"
    told = capsys.readouterr().out
    assert "merged has one weight for model.embed_tokens and lm_head, so that one, which changes lm_head alone" in told


def test_a_head_of_its_own_is_compared_though_the_base_ties_it(capsys):
    make_base("llama-tied")
    adapt("one", target_modules=["q_proj"], modules_to_save=["lm_head"])
    merge("one")
    own = load_file("one/adapter_model.safetensors")["base_model.model.lm_head.weight"]
    embedding = load_file(BASE / "model.safetensors")["model.embed_tokens.weight"]
    right = {"lm_head.weight": own, "model.embed_tokens.weight": embedding}
    edit(lambda tensors, _: tensors | right)
    passes(capsys, "--adapter", "one")
    edit(lambda tensors, _: tensors | {"lm_head.weight": embedding})
    assert verify("--adapter", "one") == "error: merged has 1 finding"
    assert "- one is left out of lm_head (of modules_to_save)" in capsys.readouterr().out
    edit(lambda tensors, _: tensors | {"lm_head.weight": embedding[:100].clone()})
    assert verify("--adapter", "one") == "error: merged has 1 finding"
    assert "- merged has lm_head.weight, as [100, 32], and not [128, 32] as checkpoints/base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "base", "adapter", "sentence"),
    [
        ("nowhere", BASE, "one", "nowhere is not there; name a .safetensors file, or the folder of a model"),
        ("merged", "nowhere", "one", "nowhere is no model with config.json and model.safetensors or its index"),
        ("merged", "one", "one", "one is no model with config.json and model.safetensors or its index"),
        ("merged", BASE, "nowhere", "nowhere is no PEFT adapter, for it has no adapter_config.json"),
        ("merged", BASE, BASE, "checkpoints/base is no PEFT adapter, for it has no adapter_config.json"),
        ("merged", BASE, "broken", "broken/adapter_model.safetensors is not a whole safetensors file"),
        (
            "merged",
            BASE,
            "foreign",
            "foreign/adapter_model.safetensors: base_model.model.model.layers.7.x belongs to no",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(file, base, adapter, sentence):
    make_base("llama-untied")
    adapt("one")
    merge("one")
    shutil.copytree("one", "broken")
    Path("broken/adapter_model.safetensors").write_bytes(b"no")
    shutil.copytree("one", "foreign")
    tensors = load_file("one/adapter_model.safetensors")
    save_file(tensors | {"base_model.model.model.layers.7.x": torch.ones(1)}, "foreign/adapter_model.safetensors")
    ended = verify("--base", str(base), "--adapter", str(adapter), file=file)
    assert ended.startswith(f"error: {sentence}"), ended
