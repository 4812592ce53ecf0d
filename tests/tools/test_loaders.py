"""Who loads what is exported: each cell of the table in docs/export.md is what its loader does with a tiny model.

A loader that takes the model must give the logits of PEFT's model in memory, which has the adapter beside the base.
llama.cpp runs in an environment of its own, which uv makes. Of vLLM only the rules are here, as its source has them.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import merge
from stages.errors import MistakeError
from stages.files import BASE, MERGED, read_json, sha256, write_json
from stages.models.room import add_adapters, add_biases, add_neurons
from stages.models.source import BUNDLED, locate
from stages.settings.base import Base
from tests.conftest import ARCHITECTURES, MIXTURES, ROOT, make_stage, make_tokenizer
from tools.exporting import gguf, lora

IDS = list(range(40, 60))
ROOM = {"add_biases": lambda model, _: add_biases(model), "extra_neurons": add_neurons, "adapter_size": add_adapters}


@dataclass(frozen=True)
class Trained:
    """A method on layers of a base, which may have got room for it."""

    architecture: str
    method: str
    layers: Any = "all"
    room: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "`lora` on Llama, tied": Trained("llama-tied", "lora", settings={"rank": 4}),
    "`dora` on Qwen3, untied": Trained("qwen3", "dora", settings={"rank": 4}),
    "`full` on Qwen3: matrices and norms": Trained("qwen3", "full", "1-2"),
    "norms (`ln`) on Llama": Trained("llama-untied", "ln"),
    "embeddings (`full`) on Llama, tied before": Trained("llama-tied", "full", {"embeddings": "all"}),
    "embeddings (`full`) on Llama, untied": Trained("llama-untied", "full", {"embeddings": "all"}),
    "`bottleneck` on Llama": Trained("llama-untied", "bottleneck", room={"extra_neurons": 32}),
    "`bitfit` on GPT-2": Trained("gpt2", "bitfit"),
    "`bitfit` on Qwen2": Trained("qwen2", "bitfit"),
    "`bitfit` on Llama with `base.add_biases`": Trained("llama-untied", "bitfit", room={"add_biases": True}),
    "`bitfit` on Qwen3 with `base.add_biases`": Trained("qwen3", "bitfit", room={"add_biases": True}),
    "`houlsby` on Llama": Trained("llama-untied", "houlsby", room={"adapter_size": 8}),
    "`lora` on GPT-2": Trained("gpt2", "lora", settings={"rank": 4}),
    "`lora` on Mixtral, attention": Trained("mixtral", "lora", {"attention": "all"}, settings={"rank": 4}),
    "`lora` on Mixtral, experts too": Trained("mixtral", "lora", settings={"rank": 4}),
    "experts (`full`) of Qwen3-MoE": Trained("qwen3_moe", "full", {"experts": "all"}),
}
PUBLISHED = {
    "gpt2": {"n_ctx": 256},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
}  # in the configs of those on the hub
PROJECT = """\
seed: 0
threads: 1
base: {{model: model}}
datasets: {{d: {{source: file, path: d.jsonl, eval: 10}}}}
evaluate: {{max_new_tokens: 4}}
stages:
  d: {{parent: base, dataset: d, method: lora, lr: 1.0e-3, steps: 1}}
merge: {{weights: {{d: 1.0}}, dtype: float32, outputs: [{}]}}
"""


def make(row, tokenizer):
    """A base with a stage that is merged; the trained model's logits on IDS, float32 [tokens, words]."""
    config = (ARCHITECTURES | MIXTURES)[row.architecture]().config
    config.vocab_size = len(tokenizer)
    config.update(PUBLISHED.get(row.architecture, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for key, value in row.room.items():
        model = ROOM[key](model, value)
    model.save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    room = {"add_biases": False, "extra_neurons": 0, "adapter_size": 0} | row.room
    facts = {"name": "base", "model": "model", "revision": None, "room": room, "dtype": "float32", "layers": 4}
    write_json(BASE / "stage.json", facts | {"sha256": sha256([BASE / "model.safetensors"])})
    write_json(BASE / "generation_config.json", {"eos_token_id": [0], "do_sample": False, "pad_token_id": 0})
    wrapped = make_stage("d", model, row.method, row.layers, size=0.1, **row.settings)
    write_merge("model")
    return logits(wrapped)


def write_merge(output):
    Path("params.yaml").write_text(PROJECT.format(output))
    merge.main()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0]


def alike(found, truth):
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)
    return "yes"


def in_transformers(truth):
    needs_code = "auto_map" in read_json(MERGED / "config.json")
    model = AutoModelForCausalLM.from_pretrained(MERGED, dtype=torch.float32, trust_remote_code=needs_code)
    assert alike(logits(model), truth)
    return "with `trust_remote_code`" if needs_code else "yes"


def in_peft(truth, folder):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return alike(logits(PeftModel.from_pretrained(base, folder)), truth)


def no(mistake):
    """What a refusal says, without what to do then."""
    said = re.search(r"does not make a GGUF of this model \((.*)\); take", str(mistake))
    return f"no: {said[1].removeprefix('ERROR:hf-to-gguf:') if said else str(mistake).partition(';')[0]}"


VLLM = "0.33.0"  # of which these are the rules
QKV = ("q_proj", "k_proj", "v_proj")
HELD = {  # by class of vllm/model_executor/models/registry.py: the modules that it gives biases, in the file of each
    "LlamaForCausalLM": (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
    "Qwen2ForCausalLM": QKV,
    "Qwen3ForCausalLM": QKV,
    "Qwen3MoeForCausalLM": QKV,
    "MixtralForCausalLM": (),
    "GPT2LMHeadModel": ("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"),
}
NO_LORA = {"GPT2LMHeadModel"}  # no SupportsLoRA among its classes


def names_in(path):
    with safe_open(path, "pt") as file:
        return set(file.keys())


def model_for_vllm():
    """Its classes take no notice of biases for which they have no place (AutoWeightsLoader in models/utils.py)."""
    (architecture,) = read_json(MERGED / "config.json")["architectures"]
    if architecture not in HELD:
        return f"no: it has no {architecture}"
    names = names_in(MERGED / "model.safetensors")
    assert names - {"lm_head.weight"} == names_in(BASE / "model.safetensors") - {"lm_head.weight"}
    owners = {name.split(".")[-2] for name in names if name.endswith(".bias")}
    lost = sorted(owners - set(HELD[architecture]))
    return f"no: it drops the biases of {', '.join(lost)}" if lost else "yes"


def lora_for_vllm():
    """`PEFTHelper` in vllm/lora/peft_helper.py, and `LoRAModel.from_local_checkpoint` in vllm/lora/lora_model.py."""
    architecture = read_json(BASE / "config.json")["architectures"][0]
    config = read_json(lora.FOLDER / "d/adapter_config.json")
    assert not config["use_dora"] and config["init_lora_weights"] is True and 0 < config["r"] <= 64
    unknown = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "lora_bias")
    assert not any(config.get(key) for key in unknown)
    if architecture not in HELD or architecture in NO_LORA:
        return f"no: none of {architecture}"
    told = ["modules_to_save"] * bool(config["modules_to_save"]) + ["bias"] * (config["bias"] != "none")
    if told:
        return f"no: {' and '.join(told)}"
    for name in names_in(lora.FOLDER / "d/adapter_model.safetensors"):
        assert re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+\.lora_[AB]\.weight", name)
    return "yes"


@cache
def documented():
    """The cells of the table in docs/export.md, by row and by column."""
    section = (ROOT / "docs/export.md").read_text().partition("## Who loads what")[2]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    )
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_the_table_has_these_rows():
    assert list(documented()) == list(ROWS)


def loaded_here(row):
    """What becomes of a row, by column: all but llama.cpp's."""
    truth = make(row, make_tokenizer())
    found = {"transformers, `export model`": in_transformers(truth), "vLLM, `export model`": model_for_vllm()}
    lora.main(64, merged=False)
    found |= {"PEFT, `export lora`": in_peft(truth, lora.FOLDER / "d"), "vLLM, `export lora`": lora_for_vllm()}
    try:
        write_merge("adapter")
        found["PEFT, `merged/adapter`"] = in_peft(truth, MERGED / "adapter")
    except MistakeError as mistake:
        found["PEFT, `merged/adapter`"] = no(mistake)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_transformers_peft_and_the_rules_of_vllm(name):
    found = loaded_here(ROWS[name])
    assert {column: documented()[name][column] for column in found} == found


LOAD = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = 1
asked = {"prompt": json.loads(sys.argv[2]), "temperature": 0, "n_predict": 1, "n_probs": 20}
told = xllamacpp.Server(params).handle_completions(asked)
first = told["choices"][0]["logprobs"]["content"][0]
print("\\n" + json.dumps({each["id"]: each["logprob"] for each in first["top_logprobs"]}))
"""
XLLAMACPP = ["--isolated", "--no-project", f"--exclude-newer={gguf.NEWEST}", "--with=xllamacpp==2026.10.11549"]


def in_llama_cpp(truth):
    """The 20 likeliest words after IDS have the logarithms of their probabilities that plain torch gives them."""
    try:
        gguf.main("tiny", "f32", None)
    except MistakeError as mistake:
        return no(mistake)
    path = str(gguf.FOLDER / "tiny-f32.gguf")
    command = ["uv", "run", *XLLAMACPP, f"--python={sys.executable}", "python", "-c", LOAD, path, json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    likeliest = {int(word): value for word, value in json.loads(done.stdout.splitlines()[-1]).items()}
    wanted = truth[-1].log_softmax(-1)
    assert likeliest.keys() == set(wanted.topk(len(likeliest)).indices.tolist())
    for word, value in likeliest.items():
        assert value == pytest.approx(float(wanted[word]), abs=0.02)  # its keys and values are in float16
    return "yes"


NOT_HERE = {"qwen2": "not tried"}  # the converter knows its tokenizer by Qwen's own vocabulary, and no other


@cache
def real_tokenizer():
    (name,) = BUNDLED
    source = locate(Base(model=name))
    del source["quantization_config"]
    return AutoTokenizer.from_pretrained(**source)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_llama_cpp(name):
    cell = documented()[name]["llama.cpp, `export gguf`"]
    if ROWS[name].architecture in NOT_HERE:
        assert cell == NOT_HERE[ROWS[name].architecture]
    else:
        assert cell == in_llama_cpp(make(ROWS[name], real_tokenizer()))
