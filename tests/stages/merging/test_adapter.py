"""One adapter for the merged delta: the fits against dense float64, the file against PEFT itself."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from analysis.changes.deltas import delta_of
from stages import merge as merge_stage
from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS
from stages.merging.adapter_output import AdapterOutput, as_dora, check_errors, fit_dora, fit_lora
from stages.merging.merged import Merged
from stages.models.layers import linear_modules, select
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_stages
from tests.conftest import make_base, make_outside, make_stage


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def distance(found, target, base):
    """Relative Frobenius error of a delta, in float64."""
    found, target, base = found.double(), target.double(), base.double()
    return ((found - target).square().sum() / (target - base).square().sum()).sqrt().item()


def dora(base, fit):
    direction = base.double() + fit.B.double() @ fit.A.double()
    return direction * (fit.magnitude.double() / direction.square().sum(1).sqrt())[:, None]


def low(out, size, rank, scale):
    return scale * torch.randn(out, rank, dtype=torch.float64) @ torch.randn(rank, size, dtype=torch.float64)


def mixed(out, size, rank=4):
    """A base and the sum of a LoRA, a DoRA and an rsLoRA delta on it, in float64."""
    torch.manual_seed(0)
    base = torch.randn(out, size, dtype=torch.float64) * 0.05
    direction = base + low(out, size, rank, 2e-3)
    magnitude = base.norm(dim=1) * (1 + 0.05 * torch.randn(out, dtype=torch.float64))
    rescaled = direction * (magnitude / direction.norm(dim=1))[:, None]
    return base, rescaled + low(out, size, rank, 3e-3) + low(out, size, rank, 1e-3) * rank**0.5


@pytest.mark.parametrize(("out", "size", "rank"), [(40, 70, 5), (70, 40, 30), (16, 16, 16)])
def test_lora_is_recompressed_exactly_and_to_no_more_than_its_rank(out, size, rank):
    torch.manual_seed(0)
    left, right = torch.randn(out, rank), torch.randn(rank, size)
    left, right = torch.cat([left, 0.5 * left], 1), torch.cat([right, right])  # two stages that learned the same

    fit = fit_lora(left, right)

    dense = left.double() @ right.double()
    error = distance(fit.B.double() @ fit.A.double(), dense, torch.zeros_like(dense))
    assert fit.B.shape == (out, rank) and fit.A.shape == (rank, size) and fit.magnitude is None
    assert error < 1e-6 and fit.error == pytest.approx(error, rel=1e-3)
    assert torch.allclose(fit.B.norm(dim=0), fit.A.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_lora_with_biases_is_a_lora_again(bias):
    make_base("qwen2")
    targets = ["q_proj", "k_proj"]
    make_outside("one", load_base(), LoraConfig(r=4, target_modules=targets, bias=bias, init_lora_weights=False))
    truth = PeftModel.from_pretrained(load_base(), CHECKPOINTS / "one").merge_and_unload().state_dict()
    merge = Merge(weights={"one": 1.0}, dtype="float32", outputs=["adapter"])
    Path("merged").mkdir()
    merge_stage.write(Merged(*open_stages(["one"]), merge), Path("merged"), {"format": "pt"})
    assert not json.loads(Path("merged/adapter/adapter_config.json").read_text())["use_dora"]
    found = PeftModel.from_pretrained(load_base(), "merged/adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(found[name], weights, atol=1e-6) for name, weights in truth.items())
    stage = open_stages(["one"])[1][0]
    for path in stage.adapter.modules:
        delta = delta_of(stage, path, stage.adapter.factors(path))
        assert delta.keys() == stage.delta(path).keys()
        assert all(torch.allclose(delta[name], change, atol=1e-6) for name, change in stage.delta(path).items())


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_factors_are_those_of_the_dense_merge_and_leave_out_who_changed_nothing(method):
    make_base()
    for name in ("moved", "still"):
        make_stage(name, load_base(), "lora", "0-1", rank=4)
    file = CHECKPOINTS / "still" / "adapter_model.safetensors"
    save_file({key: values * ("lora_A" in key) for key, values in load_file(file).items()}, file)
    merge = Merge(method=method, weights={"moved": 0.5, "still": 0.5}, dtype="float32")
    merged = Merged(*open_stages(["moved", "still"]), merge)
    for path in merged.changed():
        left, right = merged.factors(path)
        delta = merged.module(path)["weight"] - merged.base.module(path)["weight"]
        assert left.shape[1] == right.shape[0] == 4 and delta.any()
        assert torch.allclose(left @ right, delta, rtol=0, atol=1e-6)


def test_a_delta_of_nothing_is_an_adapter_that_does_nothing():
    fit = fit_lora(torch.zeros(6, 2), torch.randn(2, 5))

    assert fit.A.shape == (1, 5) and not (fit.B @ fit.A).any() and fit.error == 0


@pytest.mark.parametrize(("out", "size"), [(96, 64), (64, 160), (16, 32), (64, 12)])
def test_a_sum_of_lora_dora_and_rslora_is_a_dora_of_their_ranks(out, size):
    base, target = mixed(out, size)
    state = torch.get_rng_state()

    fit, again = fit_dora(base, target, 12), fit_dora(base, target, 12)

    error = distance(dora(base, fit), target, base)
    assert len(fit.A) <= 12
    assert error < 1e-5 and fit.error == pytest.approx(error, rel=1e-3)
    assert torch.equal(fit.A, again.A) and torch.equal(fit.B, again.B)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_of_zeros_stays_and_a_row_may_turn_round():
    base, target = mixed(64, 32)
    base[3] = target[3] = 0
    target[5] *= -1

    fit = fit_dora(base, target, 12)

    assert fit.magnitude[5] < 0 and fit.error < 1e-6
    assert torch.allclose(dora(base, fit), target, atol=1e-7)


def test_a_delta_without_low_rank_reports_its_error_and_is_turned_down():
    base, _ = mixed(96, 64)
    target = base + 1e-3 * torch.randn(96, 64, dtype=torch.float64)

    fit = fit_dora(base, target, 4)

    error = distance(dora(base, fit), target, base)
    sizes = torch.linalg.svdvals(target - base)
    assert fit.error == pytest.approx(error, rel=1e-6)
    assert 0.8 < error < 1.03 * (sizes[4:].norm() / sizes.norm()).item()
    with pytest.raises(
        MistakeError, match=r"merge\.adapter\.tolerance is 0\.01.* of h\.1\.mlp; raise merge\.adapter\.rank"
    ):
        check_errors({"h.0.mlp": 0.02, "h.1.mlp": fit.error, "h.2.mlp": 1e-6}, 0.01)
    check_errors({"h.2.mlp": 1e-6}, 0.01)
    check_errors({}, 0.01)
    with pytest.raises(MistakeError, match=r"h\.0"):
        check_errors({"h.0": float("nan")}, 0.01)


def merged(*stages):
    """The base and the sum of the stages' deltas on it, by PEFT itself, added up in float64."""
    base = load_base()
    before = base.state_dict()
    target = {name: weight.double() for name, weight in before.items()}
    for number, keys in enumerate(stages):
        after = make_stage(str(number), load_base(), size=0.01, **keys).merge_and_unload().state_dict()
        for name in target:
            target[name] += after[name].double() - before[name].double()
    return base, {name: weight.float() for name, weight in target.items()}


MIXED = (
    {"method": "lora", "chosen": "0-2", "rank": 4},
    {"method": "dora", "chosen": "1-3", "rank": 2},
    {"method": "lora", "chosen": "2-3", "rank": 3, "alpha": 3**0.5 * 3},  # an rsLoRA of alpha 3
    {"method": "ln", "chosen": "1"},
)


METADATA = {"format": "pt", "strata": "{}", "more": "keys", "in": "any", "order": "at all"}


def write(folder, base, target, rank=9):
    """What a caller does: a DoRA of every weight matrix that changed, and a replacement of the rest."""
    output, before = AdapterOutput(), base.state_dict()
    linear = linear_modules(base, select(base, "all"))
    for path, module in base.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        changed = [name for name in names if not torch.equal(before[f"{path}.{name}"], target[f"{path}.{name}"])]
        if changed and path in linear:
            one, two = before[f"{path}.weight"], target[f"{path}.weight"]
            one, two = (one.T, two.T) if isinstance(module, Conv1D) else (one, two)
            bias, is_new = target.get(f"{path}.bias"), "bias" in changed
            fit = fit_dora(one, two, rank)
            output.add_linear(path, fit, bias if is_new else None, None if is_new else bias)
        elif changed:
            output.add_replacement(path, {name: target[f"{path}.{name}"] for name in names})
    folder.mkdir()
    return output.save(folder, "some/base", "abc123", base.config.model_type == "gpt2", METADATA)


def load(folder):
    """The adapter on the base, by PEFT; fails on warnings, and on keys that are missing or have no place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # between peft and transformers
        model = PeftModel.from_pretrained(load_base(), folder).eval()
    file, state = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert all(torch.equal(state[key], value) for key, value in file.items())
    assert state.keys() == file.keys()
    return model


def assert_equals(model, base, target):
    """The model's tokens are those of `target`, and its merged weights too, to 1e-4 of each delta."""
    reference = load_base()
    reference.load_state_dict(target)
    ids = torch.arange(1, 97).reshape(4, 24)
    with torch.no_grad():
        p, q = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (reference, model))
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-9
    found = model.merge_and_unload().state_dict()
    before = base.state_dict()
    assert found.keys() == target.keys()
    for name, weight in found.items():
        if torch.equal(before[name], target[name]):
            assert torch.equal(weight, target[name]), name
        else:
            assert distance(weight, target[name], before[name]) < 1e-4, name


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "qwen3"])
def test_peft_loads_the_merge_of_mixed_stages(architecture, workspace):
    make_base(architecture)
    base, target = merged(*MIXED)

    errors = write(workspace / "adapter", base, target)

    assert set(errors) == set(linear_modules(base, select(base, "all"))) and max(errors.values()) < 1e-4
    assert_equals(load(workspace / "adapter"), base, target)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_a_linear_modules_bias_is_part_of_the_adapter(architecture, workspace):
    make_base(architecture)
    base, target = merged(*MIXED)
    biases = [name for name in target if name.endswith((".1.self_attn.q_proj.bias", ".1.attn.c_attn.bias"))]
    target |= {name: target[name] + 0.1 for name in biases}

    write(workspace / "adapter", base, target)

    assert len(biases) == 1
    assert_equals(load(workspace / "adapter"), base, target)


def test_stages_of_norms_alone_are_an_adapter_without_matrices(workspace):
    make_base()
    base, target = merged(MIXED[3])

    assert write(workspace / "adapter", base, target) == {}
    assert_equals(load(workspace / "adapter"), base, target)


def factors(layer):
    scaling = layer.scaling["default"]
    return scaling * layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()


@pytest.mark.parametrize("as_", ["lora", "dora"])
@pytest.mark.parametrize("architecture", ["llama-untied", "gpt2"])
def test_factors_of_lora_stages_are_one_adapter_of_either_kind(architecture, as_, workspace):
    make_base(architecture)
    base, target = merged(MIXED[0], MIXED[2])
    one, two = (PeftModel.from_pretrained(load_base(), f"checkpoints/{number}") for number in (0, 1))
    output = AdapterOutput()
    for path, module in base.named_modules():
        layers = [model.base_model.model.get_submodule(path) for model in (one, two)]
        parts = [factors(layer) for layer in layers if hasattr(layer, "lora_A")]
        if not parts:
            continue
        fit = fit_lora(torch.cat([left for left, _ in parts], 1), torch.cat([right for _, right in parts]))
        weights = module.weight.detach(), target[f"{path}.weight"]
        if as_ == "dora":
            fit = as_dora(fit, *(weight.T if isinstance(module, Conv1D) else weight for weight in weights))
        output.add_linear(path, fit)

    Path("adapter").mkdir()
    errors = output.save(Path("adapter"), "some/base", None, architecture == "gpt2", METADATA)

    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["use_dora"] == (as_ == "dora") and config["modules_to_save"] is None
    assert config["r"] == 7 and set(config["rank_pattern"].values()) == {3, 4}
    assert max(errors.values()) < (1e-6 if as_ == "lora" else 1e-5)
    assert_equals(load(workspace / "adapter"), base, target)


def test_a_mixture_of_lora_and_dora_is_refused(workspace):
    base, target = mixed(16, 32)
    output = AdapterOutput()
    output.add_linear("a", fit_dora(base, target, 12))
    output.add_linear("b", fit_lora(torch.randn(16, 2), torch.randn(2, 32)))

    with pytest.raises(ValueError, match="as_dora"):
        output.save(workspace, "some/base", None, False, METADATA)


def test_the_same_merge_gives_the_same_bytes_and_names_no_folder(workspace):
    make_base()
    base, target = merged(*MIXED)

    write(workspace / "one", base, target)
    write(workspace / "two", base, dict(reversed(target.items())))

    files = {path.name: path.read_bytes() for path in (workspace / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (workspace / "two").iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    config = files["adapter_config.json"].decode()
    assert json.loads(config)["base_model_name_or_path"] == "some/base" and str(workspace) not in config
