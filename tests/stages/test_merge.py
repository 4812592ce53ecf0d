"""The merge against plain algebra and against mergekit run on whole checkpoints."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.errors import MistakeError
from stages.files import BASE
from stages.merge import merge_into
from stages.merging.kernels import find_method, merge_tensor
from stages.params import Merge
from stages.weights.checkpoint import open_stages
from tests.conftest import make_base, make_stage


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def merged(path, **settings):
    merge = Merge(**settings)
    base, stages = open_stages(list(merge.weights))
    merge_into(path, base, stages, merge, {"format": "pt"})
    return load_file(path)


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen3", "gpt2"])
def test_a_chain_merged_with_weight_1_is_its_last_stage(workspace, architecture):
    make_base(architecture)
    first = make_stage("first", load_base(), "lora", "0-2").merge_and_unload()
    second = make_stage("second", first, "dora", "1-3", parent="first").merge_and_unload()
    truth = make_stage("third", second, "full", "2", parent="second").merge_and_unload().state_dict()

    weights = {"first": 1.0, "second": 1.0, "third": 1.0}
    found = merged(workspace / "m.safetensors", method="task_arithmetic", weights=weights, dtype="float32")

    assert set(found) == set(load_file(BASE / "model.safetensors"))
    for name, weight in found.items():
        assert torch.linalg.norm(weight - truth[name]) <= 1e-6 * torch.linalg.norm(truth[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_untouched_tensors_are_the_bases_bytes(workspace, dtype):
    make_base("llama-untied", getattr(torch, dtype))
    make_stage("one", load_base(), "lora", "1")
    before = load_file(BASE / "model.safetensors")

    found = merged(workspace / "m.safetensors", method="ties", weights={"one": 1.0}, dtype=dtype)

    for name, weight in found.items():
        same = torch.equal(weight, before[name]) and weight.dtype == before[name].dtype
        assert same == (not (".layers.1." in name and "_proj" in name)), name


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_kernels_equal_mergekit_on_whole_checkpoints(workspace, method):
    """mergekit's own command on materialised float32 models; all stages touch all tensors compared."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    make_base("llama-untied")
    density = None if method in ("linear", "task_arithmetic") else (0.5 if method == "ties" else 1.0)
    weights = {"one": 0.7, "two": 0.4}
    for name in weights:
        model = make_stage(name, load_base(), "lora", "all").merge_and_unload()
        model.save_pretrained(workspace / f"full-{name}")
    parameters = {name: {"weight": weights[name]} | ({"density": density} if density else {}) for name in weights}
    config = {
        "merge_method": method,
        "models": [{"model": str(workspace / f"full-{n}"), "parameters": parameters[n]} for n in weights],
        "dtype": "float32",
    }
    if method != "linear":
        config["base_model"] = str(BASE.resolve())
    run_merge(
        MergeConfiguration.model_validate(config),
        str(workspace / "theirs"),
        MergeOptions(copy_tokenizer=False, quiet=True, device="cpu"),
    )
    theirs = load_file(workspace / "theirs" / "model.safetensors")

    found = merged(workspace / "m.safetensors", method=method, weights=weights, density=density, dtype="float32")

    compared = [name for name in found if "_proj" in name]
    assert len(compared) == 28
    for name in compared:
        # mergekit subtracts the base from a stored model: float32 rounding of the weight, not of the delta.
        assert torch.allclose(found[name], theirs[name], rtol=0, atol=1e-6), name


def test_random_methods_do_not_depend_on_order_or_on_other_tensors(workspace):
    make_base("llama-tied")
    make_stage("one", load_base(), "lora", "0-1")
    make_stage("two", load_base(), "lora", "0-1")
    settings = {"method": "dare_ties", "density": 0.5, "dtype": "float32"}
    merged(workspace / "a.safetensors", weights={"one": 1.0, "two": 0.5}, **settings)
    merged(workspace / "b.safetensors", weights={"two": 0.5, "one": 1.0}, **settings)
    assert (workspace / "a.safetensors").read_bytes() == (workspace / "b.safetensors").read_bytes()

    merge = Merge(weights={"one": 1.0}, **settings)
    base, deltas = torch.randn(8, 8), {"one": torch.randn(8, 8)}
    draws = [merge_tensor(find_method(merge), name, base, deltas, merge) for name in ("x", "y", "x")]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_task_arithmetic_is_the_weighted_sum_in_float64(workspace):
    make_base("qwen2")
    for name, chosen in (("one", "0-2"), ("two", "1-3")):
        make_stage(name, load_base(), "lora", chosen)
    base, stages = open_stages(["one", "two"])
    path = "model.layers.1.mlp.down_proj"
    truth = base.module(path)["weight"].double()
    for stage, weight in zip(stages, (0.5, -0.25), strict=True):
        truth = truth + weight * stage.delta(path)["weight"].double()

    found = merged(
        workspace / "m.safetensors", method="task_arithmetic", weights={"one": 0.5, "two": -0.25}, dtype="float32"
    )

    assert torch.allclose(found[f"{path}.weight"].double(), truth, rtol=0, atol=1e-7)


def test_provenance_has_no_time_and_reads_back(workspace):
    make_base()
    make_stage("one", load_base(), "lora", "0")
    merge = Merge(weights={"one": 1.0}, dtype="float32")
    base, stages = open_stages(["one"])
    merge_into(workspace / "m.safetensors", base, stages, merge, {"format": "pt", "strata": json.dumps({"a": 1})})
    with safe_open(workspace / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["strata"]) == {"a": 1}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "tie"}, "did you mean ties"),
        ({"method": "linear", "density": 0.5}, "merge.density means nothing to method 'linear'"),
        ({"method": "nuslerp"}, "merge.weights has 1 stages, which method 'nuslerp' does not take"),
        ({"method": "karcher", "weights": {"one": 0.5}}, "set them all to 1.0"),
    ],
)
def test_settings_that_a_method_cannot_take_are_refused(settings, sentence):
    with pytest.raises(MistakeError) as mistake:
        find_method(Merge(**({"weights": {"one": 1.0}} | settings)))
    assert sentence in str(mistake.value)


def test_every_method_that_weights_and_density_can_drive_merges_mixed_stages(workspace):
    from mergekit.merge_methods import registered_methods

    make_base()
    for name, chosen in itertools.zip_longest(("one", "two"), ("0-2", "1-3")):
        make_stage(name, load_base(), "lora", chosen)
    base = load_file(BASE / "model.safetensors")
    tried = []
    for method in registered_methods():
        merge = Merge(method=method.spec.name, weights={"one": 1.0, "two": 1.0}, dtype="float32")
        try:
            find_method(merge)
        except MistakeError:
            continue
        found = merged(workspace / "m.safetensors", **merge.model_dump())
        tried.append(method.spec.name)
        assert any(not torch.equal(found[name], base[name]) for name in base), method.spec.name
    assert {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce", "karcher"} <= set(tried)


def test_a_stage_that_is_not_finite_is_refused_and_leaves_no_file(workspace):
    make_base()
    make_stage("bad", load_base(), "lora", "0", size=float("inf"))
    with pytest.raises(MistakeError, match=r"bad is not finite"):
        merged(workspace / "m.safetensors", weights={"bad": 1.0})
    assert not (workspace / "m.safetensors").exists()
