"""Every method of mergekit, with its parameters, against mergekit's own command on whole float32 checkpoints."""

import hashlib
from pathlib import Path

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge, registered_methods
from mergekit.sparsify import magnitude, magnitude_outliers
from peft import LNTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.files import BASE
from stages.merge import write
from stages.merging import kernels
from stages.merging.merged import Merged
from stages.merging.method import MERGEKITS, OURS
from stages.merging.trim import trim
from stages.models.architecture import exactly
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_stages
from tests.conftest import make_base, make_outside, make_stage

SPARSE = {"density": {"first": 0.6, "second": [0.3, 0.7], "third": 0.5}, "lambda": 0.9}
# Number of stages, parameters, and the largest deviation allowed: 0 where the arithmetic is mergekit's own.
METHODS = {
    "linear": (3, {"normalize": True}, 2.5e-7),  # base + Σ cᵢΔᵢ here, Σ cᵢWᵢ there
    "slerp": (1, {"t": [0.2, 0.8]}, 0),
    "nuslerp": (2, {"nuslerp_row_wise": True, "nuslerp_flatten": False}, 0),
    "multislerp": (3, {"normalize_weights": False}, 0),
    "karcher": (3, {"max_iter": 5}, 0),
    "task_arithmetic": (3, {"lambda": 0.7, "normalize": True}, 2.5e-7),  # the sum is rounded in another order
    "ties": (3, SPARSE, 0),
    "dare_linear": (3, SPARSE, 0),
    "dare_ties": (3, SPARSE | {"rescale": False}, 0),
    "breadcrumbs": (3, SPARSE | {"gamma": 0.1}, 0),
    "breadcrumbs_ties": (3, SPARSE | {"gamma": {"first": 0.0, "second": 0.2, "third": 0.1}, "rescale": True}, 0),
    "della": (3, SPARSE | {"epsilon": 0.1}, 0),
    "della_linear": (3, SPARSE | {"epsilon": 0.1, "normalize": True}, 0),
    "sce": (3, {"select_topk": 0.5}, 0),
    "model_stock": (3, {"filter_wise": True}, 0),
    "nearswap": (1, {"t": 0.01}, 0),
    "arcee_fusion": (1, {}, 0),
    "ram": (3, {"epsilon": 0.01}, 0),
    "ramplus_tl": (3, {"r": 0.2, "alpha": 0.3}, 0),
    "passthrough": (1, {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 0.9}]}, 0),
}
WEIGHTS = {"first": 0.7, "second": [0.2, 0.5], "third": [{"filter": "self_attn", "value": 0.3}, {"value": 0.6}]}


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture
def whole_checkpoints(tmp_path, request):
    """Three stages that touch every tensor of the model, and the same models on disk for mergekit."""
    size = getattr(request, "param", 0.05)
    make_base("llama-untied")
    for name in WEIGHTS:
        model = load_base()
        modules = [
            path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
        ]
        moved = make_outside(name, model, LNTuningConfig(target_modules=exactly(modules)), size)
        moved.merge_and_unload().save_pretrained(tmp_path / f"full-{name}")


def ours(method, count, parameters, **settings):
    names = list(WEIGHTS)[:count]
    spec = {parameter.name for m in registered_methods() if m.spec.name == method for parameter in m.spec.parameters}
    merge = Merge(
        method=method,
        weights={name: WEIGHTS[name] if "weight" in spec else 1.0 for name in names},
        parameters={key: _of(value, names) for key, value in parameters.items()},
        dtype="float32",
        **settings,
    )
    Path("ours").mkdir()
    write(Merged(*open_stages(names), merge), Path("ours"), {})
    return load_file("ours/model.safetensors")


def theirs(method, count, parameters, tmp_path):
    """mergekit's planner and executor; per-stage values are written at each model, as mergekit wants them."""
    (contract, spec), *_ = [(m.spec.contract, m.spec.parameters) for m in registered_methods() if m.spec.name == method]
    names = list(WEIGHTS)[:count]
    models = []
    for name in names:
        own = {key: value[name] for key, value in parameters.items() if isinstance(value, dict)}
        if any(parameter.name == "weight" for parameter in spec):
            own["weight"] = WEIGHTS[name]
        models.append({"model": str(tmp_path / f"full-{name}"), "parameters": own})
    config = {
        "merge_method": method,
        "models": models,
        "parameters": {key: value for key, value in parameters.items() if not isinstance(value, dict)},
        "dtype": "float64" if method == "arcee_fusion" else "float32",  # in float32 its result is rounding noise
        "out_dtype": "float32",
    }
    if contract.base.value != "ignored":
        config["base_model"] = str(BASE.resolve())
        config["models"].insert(0, {"model": str(BASE.resolve())})
    options = MergeOptions(copy_tokenizer=False, quiet=True, device="cpu")
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), options)
    return load_file(tmp_path / "theirs" / "model.safetensors")


def _of(value, names):
    return {name: value[name] for name in names} if isinstance(value, dict) else value


@pytest.fixture
def seeded(monkeypatch):
    """mergekit draws from one stream; give its random methods our seed of each tensor, and nothing else."""
    original = GeneralizedTaskArithmeticMerge.merge_group

    def merge_group(self, group, /, **parameters):
        digest = hashlib.sha256(f"0/{group.metadata.name}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
        return original(self, group, **parameters)

    monkeypatch.setattr(GeneralizedTaskArithmeticMerge, "merge_group", merge_group)


def test_the_list_is_all_of_mergekit():
    """Fails when a new mergekit brings, drops or renames a method or a parameter."""
    known = {m.spec.name: {p.name for p in m.spec.parameters} for m in registered_methods() if m.spec.name not in OURS}
    assert known.keys() == METHODS.keys()
    generalised = {"int8_mask", "normalize", "rescale", "lambda", "weight", "density"}
    assert known == {
        "linear": {"weight", "normalize"},
        "slerp": {"t"},
        "nuslerp": {"weight", "nuslerp_row_wise", "nuslerp_flatten"},
        "multislerp": {"weight", "normalize_weights", "eps"},
        "karcher": {"max_iter", "tol"},
        **dict.fromkeys(("task_arithmetic", "ties", "dare_linear", "dare_ties"), generalised),
        **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), generalised | {"gamma"}),
        **dict.fromkeys(("della", "della_linear"), generalised | {"epsilon"}),
        "sce": {"int8_mask", "select_topk"},
        "model_stock": {"filter_wise"},
        "nearswap": {"t"},
        "arcee_fusion": set(),
        "ram": {"epsilon"},
        "ramplus_tl": {"r", "alpha", "epsilon"},
        "passthrough": {"scale"},
    }


def test_what_is_known_of_mergekits_methods_is_about_methods_and_parameters_that_it_has():
    known = {m.spec.name: {p.name for p in m.spec.parameters} for m in registered_methods()}
    for name, traits in MERGEKITS.items():
        assert traits.ranges.keys() <= known[name], name


NO_SUM = "linear", 3, {"normalize": False}, 0  # weights that do not sum to 1 are no base + Σ cᵢΔᵢ


@pytest.mark.parametrize(
    ("method", "count", "parameters", "deviation"), [*((method, *row) for method, row in METHODS.items()), NO_SUM]
)
def test_every_method_equals_mergekit(
    whole_checkpoints, seeded, tmp_path, monkeypatch, method, count, parameters, deviation
):
    monkeypatch.setattr(kernels, "PART", 500)  # so that tensors are merged in parts where that is done

    found = ours(method, count, parameters)
    wanted = theirs(method, count, parameters, tmp_path)

    base = load_file(BASE / "model.safetensors")
    assert found.keys() == wanted.keys() == base.keys()
    assert any(not torch.equal(wanted[name], base[name]) for name in base)
    for name in found:
        assert (found[name] - wanted[name]).abs().max() <= deviation, name


@pytest.mark.parametrize("whole_checkpoints", [1e-4], indirect=True)
def test_what_is_kept_of_small_changes_is_not_left_to_rounding(whole_checkpoints, tmp_path):
    found, wanted = ours("arcee_fusion", 1, {}), theirs("arcee_fusion", 1, {}, tmp_path)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", ["karcher", "multislerp", "model_stock"])
def test_tensors_that_no_stage_touches_are_the_bases_where_mergekit_alters_or_refuses_them(method):
    make_base("llama-untied")
    for name in WEIGHTS:
        make_stage(name, load_base(), "lora", "1")
    base = load_file(BASE / "model.safetensors")
    found = ours(method, 3, {})
    for name, weight in found.items():
        assert torch.equal(weight, base[name]) == (not (".layers.1." in name and "_proj" in name)), name


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("gamma", [None, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("distinct", [True, False])
def test_trimming_keeps_the_entries_that_mergekit_keeps(density, gamma, distinct):
    torch.manual_seed(0)
    delta = torch.randn(50, 70) if distinct else (torch.randn(50, 70) * 8).round() / 1024
    if gamma is None:
        values, truth = {"density": {"a": density}}, magnitude(delta, density)
    else:
        values = {"density": {"a": density}, "gamma": {"a": gamma}}
        truth = magnitude_outliers(delta, density, gamma=gamma)
    trimmed, left = trim({"a": delta.clone()}, values)
    assert left["density"] == {"a": 1.0}
    if distinct:
        assert torch.equal(trimmed["a"], truth)
    else:  # which of the entries of one magnitude is kept is the sort's whim, how many are is not
        assert torch.equal(trimmed["a"].abs().flatten().sort().values, truth.abs().flatten().sort().values)
        assert torch.equal(trimmed["a"], trimmed["a"] * (trimmed["a"] == delta))


def test_random_methods_depend_on_the_seed_and_the_tensors_name_alone():
    make_base("llama-tied")
    make_stage("first", load_base(), "lora", "0-1")
    settings = {"method": "dare_linear", "weights": {"first": 1.0}, "parameters": {"density": 0.5}}
    path = "model.layers.1.mlp.up_proj"

    def draw(seed):
        return Merged(*open_stages(["first"]), Merge(seed=seed, **settings)).module(path)["weight"]

    torch.manual_seed(5)
    first = draw(0)
    torch.manual_seed(6)
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
