"""Every way to name a base model."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stages import base, merge
from stages.errors import MistakeError
from stages.files import BASE, read_json, write_json
from stages.merging.merged import Merged
from stages.models.loading import compute_dtype, load_model
from stages.models.room import add_adapters, add_neurons
from stages.models.source import locate
from stages.settings.base import Base
from stages.settings.merge import Merge
from stages.weights.checkpoint import Checkpoint, open_base, open_stages
from stages.weights.tensor_file import DTYPES
from tests.conftest import COMMON, PARAMS, make_base, make_stage, make_tokenizer
from tests.stages.models.test_every_architecture import TINY, build


def use(model, dtype="float32"):
    text = Path("params.yaml").read_text().replace("model: model", f"model: {model}")
    Path("params.yaml").write_text(text.replace("dtype: float32", f"dtype: {dtype}", 1))


def merge_one(layers="1", method="lora"):
    """A stage on the base, merged with all else left to the defaults."""
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    make_stage("one", plain, method, layers)
    Path("merged").mkdir()
    merge.write(Merged(*open_stages(["one"]), Merge(weights={"one": 1.0})), Path("merged"), {})
    return load_file("merged/model.safetensors")


def same(found, truth):
    return found.dtype == truth.dtype and torch.equal(found, truth)


@pytest.mark.parametrize("room", ["", "\n  extra_neurons: 64"], ids=["as it is", "with room"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_a_local_folder_keeps_its_weights_and_so_does_the_merge(project, stored, computed, room):
    AutoModelForCausalLM.from_pretrained("model", dtype=getattr(torch, stored)).save_pretrained("model")
    config = read_json(Path("model/config.json")) | {"of_the_base": [1]}
    config["torch_dtype"] = config.pop("dtype")  # as older ones have it
    write_json(Path("model/config.json"), config)
    use("model", computed + room)
    base.main()
    record = read_json(BASE / "stage.json")
    assert (record["layers"], record["dtype"]) == (4, computed)
    assert DTYPES[Checkpoint(BASE, "base").dtype] == getattr(torch, stored)
    before, after = load_file("model/model.safetensors"), load_file(BASE / "model.safetensors")
    assert set(before) == set(after)
    kept = {name for name in before if not room or ".mlp." not in name}
    assert all(same(after[name], before[name]) for name in kept)
    found = merge_one()
    assert found.keys() == before.keys()
    assert all(same(found[name], before[name]) == (".1." not in name or "norm" in name) for name in kept)
    assert {weights.dtype for weights in found.values()} == {getattr(torch, stored)}
    if not room:
        assert read_json(Path("merged/config.json")) == config


def test_a_file_with_the_head_alone_of_a_tied_pair_is_read(project):
    make_base("llama-tied")
    tensors = load_file(BASE / "model.safetensors")
    shutil.copy(BASE / "config.json", "model")
    shutil.rmtree(BASE)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    base.main()
    found = merge_one({"embed_tokens": "all"}, "full")
    assert same(found["lm_head.weight"], tensors["lm_head.weight"])
    assert not torch.equal(found["model.embed_tokens.weight"], tensors["lm_head.weight"])


def test_a_copy_of_a_tied_head_stays_in_the_file(project):
    make_base("llama-tied")
    tensors = load_file(BASE / "model.safetensors")
    shutil.copy(BASE / "config.json", "model")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, "model/model.safetensors", {"format": "pt"})
    shutil.rmtree(BASE)
    base.main()
    found = merge_one()
    assert found.keys() == (tensors | head).keys()
    assert all(same(found[name], head[name]) for name in head)
    shutil.rmtree("merged")
    shutil.rmtree("checkpoints/one")
    found = merge_one({"embed_tokens": "all"}, "full")
    loaded = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert found.keys() == (tensors | head).keys() and all(same(found[name], head[name]) for name in head)
    assert not torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)
    assert torch.equal(loaded.get_output_embeddings().weight, *head.values())


def test_a_sharded_folder_is_read(project):
    AutoModelForCausalLM.from_pretrained("model").save_pretrained("shards", max_shard_size="20KB")
    AutoTokenizer.from_pretrained("model").save_pretrained("shards")
    assert len(list(Path("shards").glob("*.safetensors"))) > 1
    (Path("shards") / "old.safetensors").write_bytes(b"no weights of the model")
    use("shards")
    base.main()
    truth, found = load_file("model/model.safetensors"), Checkpoint(BASE, "base")
    assert set(found.stored_names) == set(truth) and not (BASE / "old.safetensors").exists()
    assert all(torch.equal(found.stored(name), weights) for name, weights in truth.items())


TURNS = "{% for m in messages %}{{ m.content }}<over>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "config", "stops"),
    [
        (None, {"eos_token_id": 0}, [0]),
        (TURNS, {"eos_token_id": 0}, [0, 128]),  # a turn of the chat template ends with another token
        (TURNS, {"eos_token_id": [5, 0], "repetition_penalty": 1.5}, [0, 5, 128]),
        (None, {"eos_token_id": 0, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "length_penalty": 0.5}, [0]),
    ],
)
def test_the_generation_config_stops_at_all_that_ends_an_answer(project, template, config, stops):
    model = AutoModelForCausalLM.from_pretrained("model")
    model.resize_token_embeddings(129)
    model.save_pretrained("model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<over>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained("model")
    path = Path("model/generation_config.json")
    write_json(path, read_json(path) | config)
    base.main()
    found = read_json(BASE / "generation_config.json")
    assert found["eos_token_id"] == stops and found["do_sample"] is False
    assert found.get("repetition_penalty") == config.get("repetition_penalty") and "temperature" not in found


def test_layers_that_the_new_model_does_not_have_are_told_before_training(project):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("layers: 0-1", "layers: 0-30"))
    with pytest.raises(MistakeError, match=r"stages.sums.layers: '0-30' is outside the model"):
        base.main()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("bundled:gpt5", "is not bundled; use bundled:smollm2-135m-instruct"),
        ("nowhere.gguf", "is not a file; correct the path"),
        ("./nowhere", "is no folder and no hub id"),
        ("owner/name", "base.revision is missing"),
        ("broken", "does not load"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(project, model, sentence):
    Path("broken").mkdir()
    use(model)
    with pytest.raises(MistakeError) as mistake:
        base.main()
    assert sentence in str(mistake.value) and "\n" not in str(mistake.value)
    assert not BASE.exists()


@pytest.mark.parametrize(
    ("key", "config", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        ("quantization_config", {"quant_method": "torchao", "quant_type": {}}, "torchao"),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("text_config", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ],
)
def test_a_quantised_model_is_one_sentence(project, key, config, method):
    write_json(Path("model/config.json"), read_json(Path("model/config.json")) | {key: config})
    with pytest.raises(MistakeError, match=rf"^params.yaml: base.model 'model' is quantised \({method}\)"):
        base.main()
    assert not BASE.exists()


@pytest.mark.parametrize("kind", ["clip", "t5", "florence2"])  # the last reads by an encoder
def test_a_model_of_another_type_is_refused_by_its_name(project, kind):
    AutoConfig.for_model(kind).save_pretrained("model")
    with pytest.raises(
        MistakeError, match=f"^params.yaml: base.model 'model' is of type {kind}, of which transformers"
    ):
        base.main()
    assert not BASE.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("reformer", r"base.model 'model' makes no logits of tokens alone to be trained by \(no gradient comes"),
        ("prophetnet", r"base.model 'model' makes no logits .* \(its layers make \[2, 21, 32\] of \[2, 7\] tokens\)"),
        ("xlm", r"base.model: XLMWithLMHeadModel has its attentions alone in transformer.attentions and the rest of"),
        ("blt", r"base.model: BltForCausalLM has no one stack of layers to choose from; choose another model"),
        ("bert", r"base.model 'model' makes no logits .* \(each depends on the tokens that come after its own\)"),
        ("zamba", r"stages.sums.layers names model.layers.0.shared_transf.* weights in common with model.layers.2"),
    ],
)
def test_a_model_whose_layers_are_not_its_own_to_train_is_told_before_training(project, kind, sentence):
    build(kind, TINY | {"num_hidden_layers": 3, "is_decoder": kind != "bert"}).save_pretrained("model")
    with pytest.raises(MistakeError, match=f"^params.yaml: {sentence}"):
        base.main()
    assert not BASE.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "key"), [("opt", "layerdrop"), ("biogpt", "layerdrop"), ("bart", "decoder_layerdrop")]
)
def test_a_model_that_skips_layers_at_random_is_refused_until_it_does_not(project, kind, key):
    build(kind, TINY | {key: 0.05}).save_pretrained("model")
    with pytest.raises(
        MistakeError, match=r"skips whole layers at random while it is trained; write \w+: 0.0 in"
    ) as mistake:
        base.main()
    config = Path("model/config.json")
    write_json(config, read_json(config) | {key: 0.0})
    base.main()
    assert f"write {key}: 0.0 in its" in str(mistake.value)


def without(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.up_proj" not in name}


def adapted():
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained("model")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without, "lacks model.layers.2.mlp.up_proj.weight, one of 1 that a LlamaForCausalLM has"),
        (lambda tensors: tensors | {NORM: torch.ones(3)}, f"has {NORM} of [3], where its config.json makes it [32]"),
        (lambda tensors: tensors | {NORM: tensors[NORM] * torch.nan}, f"has numbers in {NORM} that are not finite"),
        (adapted, "has an adapter beside its weights; take it away, and import it as a stage"),
    ],
)
def test_a_model_that_its_files_do_not_give_whole_is_one_sentence(project, spoil, sentence):
    if spoil is adapted:
        adapted()
    else:
        save_file(spoil(load_file("model/model.safetensors")), "model/model.safetensors", {"format": "pt"})
    with pytest.raises(MistakeError) as mistake:
        base.main()
    assert str(mistake.value).startswith(f"params.yaml: base.model 'model' {sentence}")
    assert not BASE.exists()


def tiny(kind, **keys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "nemotron", "olmo2"])
def test_neurons_of_zero_change_nothing(kind):
    model, ids = tiny(kind), torch.arange(1, 20)[None]
    with torch.no_grad():
        truth = model(ids).logits
        found = add_neurons(model, 12)(ids).logits
    assert torch.allclose(found, truth, rtol=0, atol=1e-5 * float(truth.std()))


@pytest.mark.parametrize(
    ("kind", "keys", "reason"),
    [
        ("phi3", {}, "Phi3ForCausalLM keeps several matrices in one as model.layers.0.mlp.gate_up_proj.weight"),
        (
            "mixtral",
            {"num_local_experts": 2},
            "MixtralForCausalLM keeps several matrices in one as model.layers.0.mlp.ex",
        ),
        ("mamba", {"state_size": 8}, "MambaForCausalLM keeps several matrices in one as backbone.layers.0.mixer.in_pr"),
        ("bitnet", {}, "BitNetForCausalLM normalises its neurons in model.layers.0.mlp.ffn_sub_norm.weight"),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 16}, "Qwen3MoeForCausalLM has no MLPs of that width"),
    ],
)
def test_neurons_are_refused_where_zeros_would_be_none(kind, keys, reason):
    with pytest.raises(MistakeError, match=rf"^params.yaml: base.extra_neurons is 4, but {reason}"):
        add_neurons(tiny(kind, **keys), 4)


def test_a_token_for_padding_that_the_model_does_not_have_is_replaced(project):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained("model")
    base.main()
    assert AutoTokenizer.from_pretrained(BASE).pad_token_id == 0


def test_chats_that_a_new_base_refuses_are_told_with_their_line(project):
    chats = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"{i}"},
                           {"role": "assistant", "content": "a"}]} for i in range(3)]  # fmt: skip
    Path("data/chats").mkdir(parents=True)
    Path("data/chats/train.jsonl").write_text("\n" + "".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    )
    tokenizer.save_pretrained("model")
    text = (
        Path("params.yaml").read_text().replace("datasets:\n", "datasets:\n  chats: {source: file, path: c, eval: 1}\n")
    )
    Path("params.yaml").write_text(text)
    sentence = r"^data/chats/train.jsonl line 2 has a chat that the chat template of base.model refuses \(no system\)"
    with pytest.raises(MistakeError, match=sentence):
        base.main()


def test_a_template_that_refuses_a_prompt_and_its_completion_is_told_before_training(project):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer.save_pretrained("model")
    with pytest.raises(MistakeError, match=r" 1 has a chat that the chat template .* refuses \(no tools\)"):
        base.main()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("    source: ", "    format: plain\n    source: "))
    base.main()


def test_a_hub_id_is_passed_on_with_its_revision():
    found = locate(Base(model="owner/name", revision="abc"))
    assert found == {"pretrained_model_name_or_path": "owner/name", "revision": "abc"}


def test_a_path_below_the_home_folder_is_found(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    assert locate(Base(model="~/model")) == {"pretrained_model_name_or_path": str(project / "model")}
    with pytest.raises(MistakeError, match=r"base.model '~nobody/model' is no folder and no hub id"):
        locate(Base(model="~nobody/model"))


def test_weights_that_their_hash_pins(project):
    AutoModelForCausalLM.from_pretrained("model").save_pretrained("shards", max_shard_size="20KB")
    Path("small.gguf").write_bytes(b"weights")
    pinned = {
        "model": Path("model/model.safetensors").read_bytes(),
        "shards": b"".join(path.read_bytes() for path in sorted(Path("shards").glob("*.safetensors"))),
        "small.gguf": b"weights",
    }
    for model, content in pinned.items():
        expected = hashlib.sha256(content).hexdigest()
        assert locate(Base(model=model, sha256=expected)) == locate(Base(model=model))
        with pytest.raises(MistakeError) as mistake:
            locate(Base(model=model, sha256="abc"))
        assert str(mistake.value) == (
            f"params.yaml: base.sha256 is not that of the weights of {model!r}; if they were meant to change, write"
            f" {expected}"
        )
    use(f"model\n  sha256: {hashlib.sha256(pinned['shards']).hexdigest()}")
    with pytest.raises(MistakeError, match=r"base.sha256 is not that of the weights of 'model'"):
        base.main()


def test_a_hub_model_is_pinned_by_its_revision_alone():
    with pytest.raises(MistakeError, match=r"base.sha256 is of no use for 'owner/name', which its revision pins"):
        locate(Base(model="owner/name", revision="abc", sha256="abc"))


# What a user of the model runs, with no code of Strata to be found.
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 2)
with torch.no_grad():
    torch.save(model(torch.arange(1, 20)[None]).logits, "logits")
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen2", "qwen3"])
def test_adapters_change_nothing_and_their_code_goes_with_the_weights(workspace, architecture):
    make_base(architecture)
    before = AutoModelForCausalLM.from_pretrained(BASE).eval()
    BASE.rename("model")
    for dataset in ("sums", "words"):
        Path("data", dataset).mkdir(parents=True)
    Path("params.yaml").write_text(PARAMS.replace("dtype: float32", "dtype: float32\n  adapter_size: 12", 1))
    base.main()
    with torch.no_grad():
        truth = before(torch.arange(1, 20)[None]).logits
        ours = AutoModelForCausalLM.from_pretrained(BASE)
        assert torch.equal(ours.eval()(torch.arange(1, 20)[None]).logits, truth)
        for name, weights in ours.named_parameters():
            if ".adapter." in name:
                weights.add_(0.1)
        ours.save_pretrained(BASE)
        truth = ours(torch.arange(1, 20)[None]).logits
    assert ours.num_parameters() == before.num_parameters() + 4 * 2 * (2 * 32 * 12 + 32 + 12)
    environment = os.environ | {"HF_MODULES_CACHE": "modules"}
    command = [sys.executable, "-I", "-c", PLAIN, str(BASE)]
    subprocess.run([*command, "trusted"], env=environment, check=True)
    assert torch.allclose(torch.load("logits"), truth, rtol=0, atol=1e-6)
    distrusted = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert distrusted.returncode and "trust_remote_code" in distrusted.stderr  # and not a model without its adapters


def test_the_adapters_of_a_base_depend_on_no_seed(workspace):
    make_base()
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(add_adapters(AutoModelForCausalLM.from_pretrained(BASE), 8).state_dict())
    assert all(torch.equal(weights, made[1][name]) for name, weights in made[0].items())


def test_adapters_are_refused_where_there_is_no_class_with_them(workspace):
    make_base("gpt2")
    with pytest.raises(MistakeError, match=r"base.adapter_size is 8, but GPT2LMHeadModel has no class with adapters"):
        add_adapters(AutoModelForCausalLM.from_pretrained(BASE), 8)


@pytest.mark.slow
def test_the_default_is_a_real_model_from_a_gguf_file(project):
    use("bundled:smollm2-135m-instruct", "auto")
    base.main()
    record = read_json(BASE / "stage.json")
    assert (record["parameters"], record["layers"]) == (134_515_008, 30)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in text


def test_a_model_runs_in_the_dtype_that_the_base_stage_chose_whatever_its_files_hold():
    record = make_base(dtype=torch.bfloat16) / "stage.json"
    for dtype in ("float32", "bfloat16"):
        write_json(record, read_json(record) | {"dtype": dtype})
        assert str(load_model(open_base(), compute_dtype()).dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_were_quantised_without_a_mark_are_refused(project, dtype):
    path, name = Path("model/model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: (tensors[name] * 300).to(dtype)}, path, {"format": "pt"})
    with pytest.raises(MistakeError, match=rf"params.yaml: base.model 'model' has {name} in [IF]8\w*, as a quantised"):
        base.main()
