"""What is merged: a project folder with a base and three stages made at random, as Strata trains them."""

import math
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from stages.files import read_json, sha256, write_json
from stages.methods import METHODS
from stages.models.layers import linear_modules, select
from stages.project.params import load_params
from stages.settings.ranges import parse

STAGES: dict[str, dict[str, Any]] = {  # `span`: first and last layer as shares of the depth; `size`: ‖ΔW‖/‖W‖
    "first": {"method": "lora", "rank": 16, "span": (0.0, 0.6), "size": 0.003},
    "middle": {"method": "dora", "rank": 16, "span": (0.2, 0.8), "size": 0.005},
    "last": {"method": "lora", "rank": 32, "alpha": 16.0, "span": (0.4, 1.0), "size": 0.01},
}
SEVEN_BILLION = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
MODELS: dict[str, dict[str, Any] | None] = {  # None: made by `stages.base`; else a Llama of these dimensions
    "smollm2": None,
    "synthetic-1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": SEVEN_BILLION,
    "7b-one-layer": SEVEN_BILLION | {"vocab_size": 1000, "num_hidden_layers": 1},
}
SHARD_BYTES = 500_000_000


class Weights:
    """Tensors by name from all safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self.where = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.where[name].get_tensor(name)


def make_synthetic(folder: Path, model: str) -> None:
    """Write checkpoints/base with random weights in several files, one file in memory at a time."""
    config = LlamaConfig(
        **MODELS[model] or {}, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    base = folder / "checkpoints/base"
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and 2 * sum(shapes[other].numel() for other in [*shards[-1], name]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    torch.manual_seed(0)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _random(shapes[name]) for name in names}, base / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    write_json(base / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})
    record = {"name": "base", "model": model, "revision": None, "dtype": "bfloat16", "parameters": size // 2}
    hashed = sha256(sorted(base.glob("*.safetensors")))
    write_json(base / "stage.json", record | {"layers": config.num_hidden_layers, "sha256": hashed})


def _random(shape: torch.Size) -> torch.Tensor:
    return (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02).to(torch.bfloat16)


def make_stages(folder: Path, stages: dict[str, dict[str, Any]] = STAGES) -> None:
    """Write the adapters of the stages beside the base."""
    base = folder / "checkpoints/base"
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    for name, stage in stages.items():
        _make_stage(base, folder / "checkpoints" / name, stage, skeleton)


def _make_stage(base: Path, folder: Path, told: dict[str, Any], skeleton: PreTrainedModel) -> None:
    """Write one adapter with random factors, large enough for the change that it is told to make."""
    name, weights, keys = folder.name, Weights(base), _keys(told, skeleton.config.num_hidden_layers)
    numbers = parse(keys["layers"], skeleton.config.num_hidden_layers)
    chosen = select(skeleton, keys["layers"])
    stage = METHODS[keys["method"]](parent="base", dataset="d", lr=0.001, steps=1, **keys)
    config: Any = stage.adapter_config(skeleton, chosen)
    config.inference_mode = True
    torch.manual_seed(sum(map(ord, name)))
    state = {}
    for module in linear_modules(skeleton, chosen):
        weight = weights[f"{module}.weight"].float()
        a = torch.randn(config.r, weight.shape[1]) / math.sqrt(weight.shape[1])
        b = torch.randn(weight.shape[0], config.r)
        norm = torch.sqrt(((a @ a.T) * (b.T @ b)).sum()) * config.lora_alpha / config.r  # of the change, uncomputed
        key = f"base_model.model.{module}"
        state[f"{key}.lora_A.weight"] = a
        state[f"{key}.lora_B.weight"] = b * told["size"] * weight.norm() / norm
        if config.use_dora:
            rows = torch.linalg.vector_norm(weight, dim=1)
            state[f"{key}.lora_magnitude_vector"] = rows * (1 + 0.001 * torch.randn_like(rows))
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    record = {"name": name, "parent": "base", "dataset": "d", "method": keys["method"], "layers": numbers}
    facts = {"settings": {}, "trained_parameters": sum(tensor.numel() for tensor in state.values())}
    write_json(folder / "stage.json", record | facts | {"sha256": sha256([folder / "adapter_model.safetensors"])})


def write_params(
    folder: Path,
    method: str,
    parameters: dict[str, float],
    merged: list[str],
    stages: dict[str, dict[str, Any]] = STAGES,
) -> None:
    """Write params.yaml (JSON is YAML) with this merge of the stages, and the repository's base and threads."""
    repository = load_params(ROOT / "params.yaml")
    config = folder / "checkpoints/base/config.json"
    depth = read_json(config)["num_hidden_layers"] if config.exists() else 10
    name, dataset = next(iter(repository.datasets.items()))
    common = {"parent": "base", "dataset": name, "lr": 0.001, "steps": 1}
    weights = dict.fromkeys(merged, 1.0)
    content = {
        "seed": 0,
        "threads": repository.thread_count,
        "base": {"model": "bundled:smollm2-135m-instruct", "dtype": "bfloat16"},
        "datasets": {name: dataset.model_dump()},
        "stages": {stage: common | _keys(told, depth) for stage, told in stages.items()},
        "merge": {"method": method, "weights": weights, "parameters": parameters, "dtype": "bfloat16"},
        "selections": {},
        "routers": {},
        "warn": {},
        "evaluate": {},
    }
    write_json(folder / "params.yaml", content)


def _keys(told: dict[str, Any], depth: int) -> dict[str, Any]:
    """A stage's own keys in params.yaml."""
    first, last = (round(share * depth) for share in told["span"])
    keys = {key: value for key, value in told.items() if key not in ("span", "size")}
    return keys | {"layers": f"{first}-{last - 1}"}
