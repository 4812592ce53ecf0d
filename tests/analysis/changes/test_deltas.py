import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from analysis.changes import tensors
from analysis.changes.deltas import measure, sign_conflict
from analysis.changes.measured import COLUMNS, SPECTRUM
from analysis.changes.metrics import METRICS, PARTS
from analysis.changes.tables import (
    NO_STAGE,
    cosine_by_chance,
    cosines,
    frozen_check,
    significant,
    summarise,
    survival,
)
from analysis.changes.tally import Tally, Where, parts
from analysis.changes.tensors import TensorChange, inner_products
from stages.files import BASE, MERGED, write_json
from stages.merging.merged import Merged
from stages.models.architecture import OUTSIDE, place
from stages.project.params import load_params
from stages.settings.merge import Merge
from stages.weights.checkpoint import Checkpoint, open_stages
from tests.conftest import COMMON, MIXTURES, make_base, make_stage

ALL = ["sums", "names", "prose"]
DECLARED = {"sums": [0, 1], "names": [1, 2], "prose": [3]}


def measured():
    settings = load_params()
    base, stages = open_stages(ALL)
    listed = [stage for stage in stages if stage.name in settings.merge.weights]
    return measure(stages, Merged(base, listed, settings.merge), Checkpoint(MERGED, "merged"))


def dense(name):
    """The whole delta of a stage, or of the merge, as one float64 array by tensor."""
    base, stages = open_stages(ALL)
    if name == "merged":
        merged = load_file("merged/model.safetensors")
        found = {key: merged[key].double() - base.stored(key).double() for key in merged}
    else:
        stage = stages[ALL.index(name)]
        found = {
            f"{path}.{parameter}": delta.double()
            for path in sorted(stage.adapter.modules)
            for parameter, delta in stage.delta(path).items()
        }
    return {key: delta for key, delta in found.items() if delta.any()}


def stored(name):
    return open_stages([])[0].stored(name)


def norm(tensors):
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


def inner(first, second):
    return sum(float((first[key] * second[key]).sum()) for key in first.keys() & second.keys())


def test_relative_change_and_floor_are_those_of_dense_float64(project):
    project.params(dtype="bfloat16", rounding="nearest")
    project.merge()
    result = measured()
    whole = summarise(result.rows, ["stage"]).set_index("stage")
    for name in [*ALL, "merged"]:
        delta = dense(name)
        size = norm(stored(key) for key in delta)
        assert whole.loc[name, "relative_change"] == pytest.approx(norm(delta.values()) / size, rel=1e-6)
        assert whole.loc[name, "max_abs"] == pytest.approx(max(float(d.abs().max()) for d in delta.values()), rel=1e-6)
    sums = dense("sums")
    errors = [(stored(key) + delta.float()).bfloat16().double() - stored(key) - delta for key, delta in sums.items()]
    same = sum(int(((stored(key) + delta.float()).bfloat16() == stored(key)).sum()) for key, delta in sums.items())
    assert whole.loc["sums", "floor"] == pytest.approx(norm(errors) / norm(stored(key) for key in sums), rel=1e-3)
    assert whole.loc["sums", "floor_share"] == pytest.approx(norm(errors) / norm(sums.values()), rel=1e-3)
    assert whole.loc["sums", "unchanged"] == same / sum(delta.numel() for delta in sums.values())


def test_floor_of_the_merged_file_is_its_distance_to_the_exact_merge(project):
    project.params(dtype="bfloat16")
    project.merge()
    whole = summarise(measured().rows, ["stage"]).set_index("stage")
    exact = {}
    for name in ALL:
        for key, delta in dense(name).items():
            exact[key] = exact.get(key, 0) + delta
    merged = dense("merged")
    errors = [merged.get(key, torch.zeros_like(total)) - total for key, total in exact.items()]
    assert whole.loc["merged", "floor_share"] == pytest.approx(norm(errors) / norm(merged.values()), rel=1e-3)


@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_the_parts_of_a_tensor_do_not_depend_on_its_pieces(monkeypatch, chunk):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    weight, delta = (torch.randn(5, 9, generator=generator) for _ in range(2))
    delta[0], delta[1] = 0, 1e-6  # entries that are not moved, and some that bfloat16 does not see
    exact = weight + delta
    found = parts(TensorChange(weight, delta, exact, exact.bfloat16()))
    same = exact.bfloat16() == weight.bfloat16()
    assert found["entries"] == 45 and found["moved"] == int((exact != weight).sum())
    assert found["unchanged"] == int(same.sum()) and found["lost"] == int((same & (exact != weight)).sum()) > 0
    assert found["max_abs"] == float(delta.abs().max())
    assert found["weight_squared"] == pytest.approx(float(weight.double().square().sum()), rel=1e-14)
    assert found["delta_squared"] == pytest.approx(float(delta.double().square().sum()), rel=1e-14)
    error = exact.bfloat16().double() - exact.double()
    assert found["error_squared"] == pytest.approx(float(error.square().sum()), rel=1e-5)


def test_what_a_method_trims_is_not_lost_to_rounding(project):
    text = Path("params.yaml").read_text().replace("method: task_arithmetic", "method: ties")
    Path("params.yaml").write_text(text.replace("  dtype:", "  parameters: {density: 0.5}\n  dtype:"))
    project.merge()
    merged = summarise(measured().rows, ["stage"]).set_index("stage").loc["merged"]
    assert merged["unchanged"] > 0.3 and merged["rounded_away"] == 0


def test_what_rounding_takes_is_told_apart_from_the_rounding_of_the_base():
    generator = torch.Generator().manual_seed(0)
    weight, noise = (torch.randn(100_000, generator=generator) for _ in range(2))
    rows = {}
    for name, size, base in (
        ("fine", 1e-4, weight),
        ("lost", 1e-4, weight.bfloat16()),
        ("kept", 0.1, weight.bfloat16()),
    ):
        before, delta = base.float(), size * noise
        row = parts(TensorChange(before, delta, before + delta, (before + delta).bfloat16()))
        rows[name] = {"stage": name, "layer": 0, "module": "m", "parameter": "weight"} | row
    table = summarise(pd.DataFrame(rows.values()), ["stage"]).set_index("stage")
    assert table.loc["fine", "floor_share"] > 5  # the base itself is rounded, and the change is there all the same
    assert table.loc["fine", "lost_to_rounding"] < 0.1
    assert table.loc["lost", "lost_to_rounding"] > 0.9
    assert table.loc["kept", "lost_to_rounding"] == pytest.approx(0, abs=1e-3)


def test_the_last_digits_of_computing_a_merge_move_nothing():
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    merged = weight * 0.3 + weight * 0.7  # a weighted mean of equal numbers
    assert not torch.equal(merged, weight)
    assert parts(TensorChange(weight, merged - weight, merged, merged.bfloat16()))["moved"] == 0


@pytest.mark.parametrize(("comparisons", "deviations"), [(1, 3.0902), (10, 3.7190)])
def test_more_comparisons_ask_for_more_deviations(comparisons, deviations):
    assert significant(comparisons) == pytest.approx(deviations, abs=1e-4)  # of a table of the normal distribution


def test_the_gain_of_a_norm_may_be_one_more_than_its_weight():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(BASE)
    write_json(BASE / "stage.json", {"name": "base"})
    make_stage("one", model, "full", "1", size=0.02)
    base, stages = open_stages(["one"])
    exact = Merged(base, stages, Merge(weights={"one": 1.0}, dtype="float32"))
    table = summarise(measure(stages, exact, exact).rows, ["stage", "module", "parameter"]).set_index("module")
    path = "model.layers.1.post_feedforward_layernorm"
    weight, delta = base.module(path)["weight"].double(), stages[0].delta(path)["weight"].double()
    found = table[table["stage"] == "one"].loc["post_feedforward_layernorm", "relative_change"]
    assert found == pytest.approx(float(delta.norm() / (1 + weight).norm()), rel=1e-6)
    path = "model.layers.1.mlp.up_proj"
    weight, delta = base.module(path)["weight"].double(), stages[0].delta(path)["weight"].double()
    found = table[table["stage"] == "one"].loc["mlp.up_proj", "relative_change"]
    assert found == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)


def test_weights_of_zero_have_no_relative_change():
    zero, delta = torch.zeros(4, 5), torch.ones(4, 5)
    row = {"stage": "one", "layer": 0, "module": "m", "parameter": "bias"}
    rows = pd.DataFrame([row | parts(TensorChange(zero, delta, delta, delta))])
    table = summarise(rows, ["stage"]).iloc[0]
    assert np.isnan(table["relative_change"]) and np.isnan(table["floor"])
    assert table["floor_share"] == 0 and table["max_abs"] == 1 and table["unchanged"] == 0


def test_names_of_parts_and_metrics_are_unique():
    for names in ([part.name for part in PARTS], [metric.name for metric in METRICS], COLUMNS + SPECTRUM):
        assert len(set(names)) == len(names)


def test_a_table_without_rows_has_every_metric():
    table = summarise(pd.DataFrame([], columns=COLUMNS), ["stage", "layer"])
    assert list(table) == ["stage", "layer", *(metric.name for metric in METRICS)] and not len(table)


def test_the_cosine_of_unrelated_changes_is_as_large_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    sizes, found = ((30, 1.0), (12, 5.0), (50, 0.1)), []
    for _ in range(400):
        tally = Tally(["one", "other", "merged"])
        for layer, (count, size) in enumerate(sizes):
            deltas = {name: size * torch.randn(count, generator=generator) for name in ("one", "other")}
            weight = torch.ones(count)
            for name, delta in deltas.items():
                tally.add_row(name, Where(layer, "m", "weight"), TensorChange(weight, delta, weight + delta, weight))
            tally.add_products(layer, deltas)
        found.append(cosines(sum(tally.grams.values()))[0, 1])
    chance = cosine_by_chance(pd.DataFrame(tally.rows), "one", "other")
    assert np.std(found) == pytest.approx(chance, rel=0.2)


def test_one_layer_is_measured_alone(project):
    project.merge()
    table = summarise(measured().rows, ["stage", "layer"]).set_index(["stage", "layer"])
    here = {key: delta for key, delta in dense("names").items() if ".layers.2." in key}
    expected = norm(here.values()) / norm(stored(key) for key in here)
    assert table.loc[("names", 2), "relative_change"] == pytest.approx(expected, rel=1e-6)
    assert ("names", 0) not in table.index


def test_cosines_are_those_of_dense_float64(project):
    project.merge()
    result = measured()
    found = cosines(sum(result.grams.values()))
    every = [dense(name) for name in [*ALL, "merged"]]
    for i, first in enumerate(every):
        for j, second in enumerate(every):
            expected = inner(first, second) / (norm(first.values()) * norm(second.values()))
            assert found[i, j] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("weights", "expected"), [((1.0, 1.0, 1.0), [1, 1, 1]), ((0.5, 0.5, 0.25), [0.5, 0.5, 0.25])])
def test_task_arithmetic_survives_with_its_weights(project, weights, expected):
    project.params(weights=weights)
    project.merge()
    result = measured()
    whole = survival(sum(result.grams.values()), result.names, ALL)
    assert list(whole["survival"][:3]) == pytest.approx(expected, rel=1e-4)
    assert whole["share"].sum() == pytest.approx(1)
    assert whole["share"].iloc[-1] == pytest.approx(0, abs=1e-6)
    layer = survival(result.grams[3], result.names, ALL)
    assert list(layer["stage"]) == ["prose", NO_STAGE]


def test_average_of_two_keeps_half_of_each():
    first, second = torch.randn(1000), torch.randn(1000)
    gram = inner_products([first, second, (first + second) / 2])
    assert list(survival(gram, ["a", "b", "merged"], ["a", "b"])["survival"][:2]) == pytest.approx([0.5, 0.5])


def test_dare_explains_the_share_that_it_keeps(project):
    base, stages = open_stages(["sums"])
    merge = Merge(method="dare_linear", weights={"sums": 1.0}, parameters={"density": 0.2}, dtype="float32", seed=1)
    merged = Merged(base, stages, merge)
    found = measure(stages, merged, merged)
    whole = survival(sum(found.grams.values()), found.names, ["sums"])
    assert whole["survival"].iloc[0] == pytest.approx(1, abs=0.05)
    assert whole["share"].tolist() == pytest.approx([0.2, 0.8], abs=0.02)


def test_unexplained_is_what_no_stage_did():
    stage, stranger = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    gram = inner_products([stage, stranger])
    assert survival(gram, ["a", "merged"], ["a"])["share"].tolist() == pytest.approx([0.5, 0.5])


def test_what_float64_leaves_is_no_share():
    stages = [torch.randn(50, generator=torch.Generator().manual_seed(seed)).double() for seed in range(5)]
    gram = inner_products([*stages, 0.7 * sum(stages)])
    table = survival(gram, [*"abcde", "merged"], [*"abcde"])
    assert 0 < abs(1 - table["share"].sum()) < 1e-12 and table["share"].iloc[-1] == 0


def test_a_merge_that_changes_nothing_is_nobodys():
    table = survival(inner_products([torch.ones(3), torch.zeros(3)]), ["a", "merged"], ["a"])
    assert table["share"].isna().all() and table["survival"].tolist()[0] == 0


def test_inner_products_are_exact_across_chunks(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 7)
    rows = [torch.randn(5, 9) for _ in range(3)]
    flat = torch.stack(rows).double().reshape(3, -1).numpy()
    np.testing.assert_allclose(inner_products(rows), flat @ flat.T, rtol=1e-12)


def test_frozen_check_is_zero_when_all_kept_their_word(project):
    for dtype in ("float32", "bfloat16", "float16"):
        project.params(dtype=dtype)
        project.merge()
        assert (frozen_check(measured(), DECLARED, has_file=True)["max_abs"] == 0).all()


def test_a_stage_that_trains_an_undeclared_layer_is_found(project):
    project.train("prose", secretly=[2, 3])
    project.merge()
    found = frozen_check(measured(), DECLARED, has_file=True).set_index("checkpoint")
    expected = max(float(d.abs().max()) for key, d in dense("prose").items() if ".layers.2." in key)
    assert found.loc["prose", "max_abs"] == pytest.approx(expected)
    assert found.loc["sums", "max_abs"] == 0


def test_a_merged_tensor_that_no_stage_changed_is_compared(project):
    project.merge()
    weights = load_file("merged/model.safetensors")
    weights["model.embed_tokens.weight"][3, 5] += 0.5
    save_file(weights, "merged/model.safetensors")
    found = frozen_check(measured(), {"sums": [0, 1]}, has_file=True).set_index("checkpoint")
    assert found.loc["merged", "max_abs"] == pytest.approx(0.5)


def test_what_nothing_was_checked_of_is_not_told(project):
    project.merge()
    assert list(frozen_check(measured(), {"sums": [0, 1]}, has_file=False)["checkpoint"]) == ["sums"]
    everything = dataclasses.replace(measured(), untouched=0)
    assert not len(frozen_check(everything, {}, has_file=True))


def test_place_reads_layer_and_module():
    assert place("model.layers.12.self_attn.q_proj", "model.layers") == (12, "self_attn.q_proj")
    assert place("model.norm", "model.layers") == (OUTSIDE, "model.norm")


@pytest.mark.parametrize(("count", "null"), [(2, 0.5), (3, 0.75), (4, 0.875)])
def test_unrelated_deltas_disagree_as_often_as_chance_says(count, null):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1.0, count + 1)[:, None, None]
    found = sign_conflict(list(sizes * torch.randn(count, 400, 500, generator=generator)))
    assert found["disagreeing"] / found["entries"] == pytest.approx(null, abs=0.003)
    assert found["summed"] == pytest.approx(found["summed_by_chance"], rel=0.005)


def test_a_stage_and_its_opposite_disagree_everywhere_and_nothing_is_left():
    delta = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    delta[0] = 0
    found = sign_conflict([delta, -delta])
    assert found["disagreeing"] == found["entries"] == 29 * 20
    assert found["summed"] == 0 and found["size"] == pytest.approx(2 * float(delta.abs().sum()), rel=1e-6)
    assert sign_conflict([delta, 2 * delta])["disagreeing"] == 0


def test_only_merged_stages_that_meet_in_a_tensor_are_in_conflict(project):
    project.merge()
    found = measured().conflicts
    assert set(found["stages"]) == {"sums, names"} and set(found["layer"]) == {1}
    first, second = (dense(name) for name in ("sums", "names"))
    shared = sorted(first.keys() & second.keys())
    signs = [torch.cat([stage[key].flatten() for key in shared]).sign() for stage in (first, second)]
    assert found["disagreeing"].sum() == int((signs[0] * signs[1] < 0).sum())
    project.params(weights=(1.0, 0.0, 1.0))
    project.merge()
    assert not len(measured().conflicts)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_an_expert_is_a_matrix_of_its_own(architecture):
    make_base(architecture)
    for name, method, keys in (("one", "lora", {"rank": 3}), ("two", "full", {})):
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        make_stage(name, model, method, {"experts": "1", "router": "1"}, **keys)
    base, stages = open_stages(["one", "two"])
    merged = Merged(base, stages, Merge(weights={"one": 1.0, "two": 1.0}, dtype="float32"))
    rows = measure(stages, merged, merged).rows.set_index(["stage", "parameter"])
    for stage, rank in zip(stages, (3, 32), strict=True):
        for parameter in ("gate_up_proj", "down_proj"):
            found = rows.loc[(stage.name, parameter)]
            values = torch.linalg.svdvals(stage.delta("model.layers.1.mlp.experts")[parameter].double())
            energy = values.square() / values.square().sum(1, keepdim=True)
            assert found["spectral_norm"] == pytest.approx(float(values.max()), rel=1e-4)
            assert found["stable_rank"] == pytest.approx(float((1 / energy[:, 0]).mean()), rel=1e-4)
            used = torch.exp(-torch.xlogy(energy, energy).sum(1)).mean()
            assert found["effective_rank"] == pytest.approx(float(used), rel=1e-4)
            assert found["directions"] == min(
                rank, *base.specification(f"model.layers.1.mlp.experts.{parameter}")[0][1:]
            )
