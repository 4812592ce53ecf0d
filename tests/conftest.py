"""Tiny random models and trained-looking stages, built in a temporary folder in the pipeline's own layout."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it; no test needs the network

import torch
from accelerate.state import AcceleratorState
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from stages.files import BASE, CHECKPOINTS, publish, sha256, write_json
from stages.methods import METHODS
from stages.models.layers import select
from stages.settings.ranges import numbers

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _llama(tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **COMMON))


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-tied": lambda: _llama(True),
    "llama-untied": lambda: _llama(False),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, head_dim=8, **COMMON)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    ),
}


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON | EXPERTS)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(head_dim=8, moe_intermediate_size=16, mlp_only_layers=[3], **COMMON | EXPERTS)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**COMMON | {"num_experts": 4, "num_experts_per_tok": 2})),
    # Its experts are [in, out], and square as those of the published models, so that no shape tells.
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(head_dim=8, **COMMON | EXPERTS | {"intermediate_size": 32})),
}


def pytest_configure(config: pytest.Config) -> None:
    """Tests know the numbers of the processor; none but those of `-m gpu` see a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own, away from the repository's outputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)  # it outlives an Accelerator, precision and all
    return tmp_path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte up to 127; token 0 ends the text."""
    vocabulary = {"<end>": 0} | {chr(i): i for i in range(1, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE as GPT-2 has it, whose merges are those of a text; `<end>` is its only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text] * 50, trainer)
    return tokenizer


def make_base(architecture: str = "llama-tied", dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
    """Save a random model as checkpoints/base, in several files if `shards`."""
    files, random_state = _base(architecture, dtype, shards)
    with publish(BASE) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    torch.set_rng_state(random_state)
    return BASE


@cache
def _base(architecture: str, dtype: torch.dtype, shards: bool) -> tuple[dict[str, bytes], torch.Tensor]:
    """The files of such a base by name, and the state that making them leaves the random numbers in."""
    torch.manual_seed(0)
    model = (ARCHITECTURES | MIXTURES)[architecture]().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # gains of exactly 1 and biases of 0 would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert name
    with TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
        make_tokenizer().save_pretrained(folder)
        record = {
            "name": "base",
            "model": "model",
            "revision": None,
            "room": {"add_biases": False, "extra_neurons": 0, "adapter_size": 0},
            "dtype": str(dtype).removeprefix("torch."),
            "layers": 4,
            "sha256": sha256(sorted(folder.glob("*.safetensors"))),
        }
        write_json(folder / "stage.json", record)
        return {path.name: path.read_bytes() for path in folder.iterdir()}, torch.get_rng_state()


def make_stage(
    name: str, model: PreTrainedModel, method: str, chosen: str, parent: str = "base", size: float = 0.05, **keys
) -> PeftModel:
    """Put a method on `model`, move its trained parameters at random, and save checkpoints/NAME.

    Returns:
        The wrapped model; its `merge_and_unload` is PEFT's own answer to what the stage's weights are.
    """
    stage = METHODS[method](parent=parent, dataset="d", method=method, lr=1e-3, steps=1, layers=chosen, **keys)
    torch.manual_seed(sum(map(ord, name)))
    model.requires_grad_()  # merge_and_unload leaves all frozen, as only what nobody trains is in a model as loaded
    wrapped = get_peft_model(model, stage.adapter_config(model, select(model, chosen)))
    stage.started(wrapped)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    with publish(CHECKPOINTS / name) as folder:
        stage.save(wrapped, folder)
        record = {
            "name": name,
            "parent": parent,
            "dataset": "d",
            "method": method,
            "layers": numbers(chosen, 4) if isinstance(chosen, str) else [],
            "settings": {},
            "trained_parameters": 1,
            "sha256": sha256([folder / "adapter_model.safetensors"]),
        }
        write_json(folder / "stage.json", record)
    return wrapped


def kill_once_saved(process: subprocess.Popen, seconds: float) -> None:
    """Kill a training process and all that it started, as soon as it has left a state to go on from."""
    deadline = time.monotonic() + seconds
    while not list(Path(".dvc/tmp/resume").glob("*/state.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    trainer = psutil.Process(process.pid)  # torchrun puts what it starts into sessions of their own
    for each in (trainer, *trainer.children(recursive=True)):
        each.kill()


def make_outside(name: str, model: PreTrainedModel, config: PeftConfig, size: float = 0.05) -> PeftModel:
    """Save an adapter of any PEFT config as checkpoints/NAME, on the base, its trained parameters moved at random."""
    torch.manual_seed(sum(map(ord, name)))
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    wrapped.save_pretrained(CHECKPOINTS / name)
    write_json(CHECKPOINTS / name / "stage.json", {"name": name, "parent": "base"})
    return wrapped


PARAMS = """\
seed: 0
threads: 1
launch: python
base:
  model: model
  dtype: float32
selections: {}
routers: {}
datasets:
  sums:
    source: file
    path: sums.jsonl
    train: 40
    eval: 10
  words:
    source: file
    path: words.jsonl
    eval: 10
stages:
  sums:
    parent: base
    dataset: sums
    method: lora
    layers: 0-1
    rank: 4
    lr: 1.0e-2
    steps: 25
    batch_size: 8
  words:
    parent: sums
    dataset: words
    method: ln
    layers: last 2
    lr: 1.0e-2
    steps: 4
    replay: 0.25
merge:
  method: task_arithmetic
  weights:
    sums: 1.0
    words: 1.0
  dtype: float32
evaluate:
  max_new_tokens: 4
warn:
  rounding: 0.25
"""


@pytest.fixture
def project(workspace: Path) -> Path:
    """A whole tiny project before its first run: params.yaml, a model folder, two datasets."""
    make_base("llama-untied")
    shutil.move(BASE, "model")
    Path("model/stage.json").unlink()
    Path("params.yaml").write_text(PARAMS)
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    words = [{"prompt": f"say {a}{b}:", "completion": f"{b}{a}"} for a in "abcdef" for b in "ghijkl"]
    for name, records in (("sums", sums), ("words", words)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return workspace
