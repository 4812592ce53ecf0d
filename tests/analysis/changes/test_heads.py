"""Circuits of heads against the matrices themselves, in float64."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.changes.heads import circuit_change, measure_heads
from stages.files import BASE
from stages.merging.merged import Merged
from stages.settings.merge import Merge
from stages.weights.checkpoint import open_stages
from tests.conftest import ARCHITECTURES, COMMON, make_base, make_stage


def circuits(model, layer, head, config):
    """QK and OV of one head, [width, width]."""
    prefix = f"model.layers.{layer}.self_attn"
    q, k, v, o = (model.module(f"{prefix}.{part}_proj")["weight"].double().numpy() for part in "qkvo")
    size = config.head_dim
    group = head // (len(q) // len(k))
    own, shared = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
    return q[own].T @ k[shared], o[:, own] @ v[shared]


def relative(before, after):
    return np.linalg.norm(after - before) / np.linalg.norm(before)


def made(model, **stages):
    make_base(model)
    for name, (method, layers) in stages.items():
        make_stage(name, AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), method, layers)
    base, opened = open_stages(list(stages))
    merge = Merge(method="task_arithmetic", dtype="float32", weights=dict.fromkeys(stages, 1.0))
    exact = Merged(base, opened, merge)
    return base, opened, exact, measure_heads(opened, exact, exact)


def test_every_head_has_the_change_of_its_dense_circuits():
    base, (one, _), exact, found = made("llama-tied", one=("lora", "1-2"), two=("full", "2"))
    config = AutoConfig.from_pretrained(BASE)
    assert set(found["layer"]) == {1, 2} and set(found["stage"]) == {"one", "two", "merged"}
    for name, model in {"one": one, "merged": exact}.items():
        for head in range(config.num_attention_heads):
            row = found[(found["stage"] == name) & (found["layer"] == 2) & (found["head"] == head)].iloc[0]
            (qk, ov), (new_qk, new_ov) = (circuits(each, 2, head, config) for each in (base, model))
            assert row["qk"] == pytest.approx(relative(qk, new_qk), rel=1e-6)
            assert row["ov"] == pytest.approx(relative(ov, new_ov), rel=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "hunyuan_v1_dense"])
def test_where_queries_are_normalised_their_scale_does_not_count(monkeypatch, kind):
    config = AutoConfig.for_model(kind, head_dim=8, **COMMON)
    monkeypatch.setitem(ARCHITECTURES, kind, lambda: AutoModelForCausalLM.from_config(config))
    base, (one,), _, found = made(kind, one=("lora", "1"))
    qk, new = (circuits(each, 1, 0, AutoConfig.from_pretrained(BASE))[0] for each in (base, one))
    best = (qk * new).sum() / (new * new).sum()
    row = found[(found["stage"] == "one") & (found["head"] == 0)].iloc[0]
    assert row["qk"] == pytest.approx(relative(qk, best * new), rel=1e-5)


def test_layers_of_other_numbers_of_heads_have_a_row_for_each_of_theirs(monkeypatch):
    heads = [4, 4, 8, 4]
    keys = COMMON | {"head_dim": 8, "num_attention_heads_per_layer": heads, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("laguna", **keys)
    monkeypatch.setitem(ARCHITECTURES, "laguna", lambda: AutoModelForCausalLM.from_config(config))
    base, (one,), _, found = made("laguna", one=("lora", {"v_proj": "1-2", "o_proj": "1-2"}))
    rows = found[found["stage"] == "one"]
    assert [list(rows[rows["layer"] == layer]["head"]) for layer in (1, 2)] == [[*range(4)], [*range(8)]]
    for layer, head, ov in rows[["layer", "head", "ov"]].itertuples(index=False):
        old, new = (circuits(each, layer, head, config)[1] for each in (base, one))
        assert ov == pytest.approx(relative(old, new), rel=1e-6)


def test_fused_attention_gates_beside_queries_and_stages_elsewhere_have_no_rows(monkeypatch):
    gated = AutoConfig.for_model("qwen3_5_text", head_dim=8, layer_types=["full_attention"] * 4, **COMMON)
    monkeypatch.setitem(ARCHITECTURES, "gated", lambda: AutoModelForCausalLM.from_config(gated))
    assert not len(made("gated", one=("lora", "1"))[3])
    assert not len(made("gpt2", one=("lora", "1"))[3])
    assert not len(made("llama-tied", one=("lora", {"mlp": "all"}))[3])


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_changes_of_any_size_keep_their_digits(size):
    generator = torch.Generator().manual_seed(0)
    before, change = ([torch.randn(heads, 8, 64, generator=generator) for heads in (4, 2)] for _ in range(2))
    after = [old + size * new for old, new in zip(before, change, strict=True)]
    (q, k), (new_q, new_k) = ([each.double().numpy() for each in pair] for pair in (before, after))
    found = [values.numpy() for values in circuit_change(tuple(before), tuple(after))]
    for head in range(4):
        old, new = q[head].T @ k[head // 2], new_q[head].T @ new_k[head // 2]
        away = new - (old * new).sum() / (old * old).sum() * old
        expected = np.linalg.norm(new - old) / np.linalg.norm(old), np.linalg.norm(away) / np.linalg.norm(new)
        assert [values[head] for values in found] == pytest.approx(expected, rel=1e-5)
