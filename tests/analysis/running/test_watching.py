"""The running model: planted changes are found where they are, and every measure equals its formula by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from transformers import AutoConfig, AutoModelForCausalLM

from analysis import probe
from analysis.running.watching import (
    LENS,
    Activations,
    attention_divergence,
    attention_of,
    interval,
    lens_divergence,
    load_eager,
    watch,
    written,
)
from analysis.telling.figures import behaviour_lines, drift_lines
from analysis.telling.page import behaviour_rows
from stages import pick
from stages.files import BASE, rounded, write_json
from stages.models.losses import mean_loss
from stages.project.params import load_params
from stages.weights.checkpoint import open_stages
from tests.conftest import COMMON, make_base, make_stage, make_tokenizer
from tests.stages.models.test_every_architecture import TINY, build

TEXTS = {"on": [torch.arange(1, 20), torch.arange(3, 30)], "off": [torch.arange(5, 40, 2), torch.arange(60, 90)]}


def fresh():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def probed(**stages):
    """Probe stages of random changes: their layers by name."""
    make_base("llama-tied")
    for name, layers in stages.items():
        make_stage(name, fresh(), "full", layers)
    base, opened = open_stages(list(stages))
    model = load_eager(base)
    before = {domain: watch(model, each, probe.LENS_FROM[domain]) for domain, each in TEXTS.items()}
    return [probe.probe(stage, base, TEXTS, before) for stage in opened]


def test_drift_begins_at_the_first_trained_layer():
    (found,) = probed(one="2")
    for domain in ("on", "off"):
        drift = found[domain]["drift"]["mean"]
        assert drift[:2] == [0, 0] and min(drift[2:]) > 0.001  # the last layer is not trained: it propagates
        assert found[domain]["kl"]["low"] <= found[domain]["kl"]["mean"] <= found[domain]["kl"]["high"]
    assert found["lens"][:2] == [0, 0] and found["lens"][2] > 0
    assert np.all(np.array(found["attention"]["divergence"])[:2] == 0)


def test_early_layers_are_the_cause_where_only_they_changed():
    early, late = probed(early="0", late="3")
    assert early["early"]["share"] == pytest.approx(1) and early["early"]["left"] == pytest.approx(0, abs=1e-9)
    assert late["early"]["share"] == pytest.approx(0, abs=1e-6) and late["early"]["left"] > 0


def test_divergence_is_that_of_the_two_models_own_logits():
    make_base("llama-tied")
    make_stage("one", fresh(), "full", "1-2")
    base, (stage,) = open_stages(["one"])
    models = [load_eager(each) for each in (base, stage)]
    ids = torch.arange(1, LENS + 2)  # as many positions as are looked at
    found = lens_divergence(*(watch(model, [ids])[0] for model in models))
    with torch.no_grad():
        p, q = (model(ids[None]).logits[0, 1:].double().softmax(-1).numpy() for model in models)
    assert found.shape == (1,) and float(found) == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-3)


def test_texts_seen_together_are_as_seen_alone():
    make_base("llama-tied")
    model = load_eager(open_stages([])[0])
    for together, ids in zip(watch(model, TEXTS["on"]), TEXTS["on"], strict=True):
        (alone,) = watch(model, [ids])
        assert torch.allclose(together.hidden, alone.hidden, atol=1e-5)
        assert torch.allclose(together.attention, alone.attention, atol=1e-6)


HYBRID = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
# Kind of model: its config, a module to train, the layers that have attention, and by part the layers that write by it.
OTHERS = {
    "opt": (OPT, "q_proj", {0, 1, 2, 3}, {"self_attn": {0, 1, 2, 3}, "fc2": {0, 1, 2, 3}}),
    "mamba": ({"state_size": 8}, "in_proj", set(), {"mixer": {0, 1, 2, 3}}),
    "qwen3_5_text": (
        HYBRID | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
        "down_proj",
        {1, 3},
        {"linear_attn": {0, 2}, "self_attn": {1, 3}, "mlp": {0, 1, 2, 3}},
    ),
}


def has_value(rows):
    return {
        layer for layer, row in enumerate(np.array(rows, float).reshape(4, -1)) if row.size and not np.isnan(row).any()
    }


@pytest.mark.parametrize("kind", OTHERS)
def test_what_an_architecture_does_not_have_is_left_out(kind):
    keys, module, attends, parts = OTHERS[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | keys)).save_pretrained(BASE)
    write_json(BASE / "stage.json", {"dtype": "float32"})
    make_stage("one", fresh(), "full", {module: "1-2"})
    base, (stage,) = open_stages(["one"])
    before = probe.watch_all(load_eager(base), TEXTS)
    for text in before["off"]:
        sums = text.attention.sum(-1)  # [layers, heads, tokens]
        assert has_value(sums) == attends and torch.allclose(sums[list(attends)], torch.ones(1), atol=1e-5)
    found = {"trained": [1, 2], **probe.probe(stage, base, TEXTS, before)}
    whole = probe.probe_base(base, TEXTS["off"], before["off"]) | {"checkpoints": {"one": found, "merged": found}}
    whole = json.loads(json.dumps(rounded(whole)))
    found = whole["checkpoints"]["one"]
    assert has_value(found["attention"]["divergence"]) == attends
    assert {part: has_value(values) for part, values in found["written"].items()} == parts
    assert (
        found["off"]["drift"]["mean"][0] == 0
        and min(found["off"]["drift"]["mean"][1:]) > 0
        and found["off"]["kl"]["mean"] > 0
    )
    for picture in (drift_lines(whole, 4), behaviour_lines(whole, 4)):
        assert picture.startswith("<svg")
    assert [bool(row["attention"]) for row in behaviour_rows(whole)] == [bool(attends)] * 2


def test_the_output_layer_reads_what_the_model_gives_it_whatever_its_width():
    keys = {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}  # as OPT-350M: no norm at the end
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **COMMON | keys)).save_pretrained(BASE)
    write_json(BASE / "stage.json", {"dtype": "float32"})
    model, ids = load_eager(open_stages([])[0]), torch.arange(1, LENS + 2)
    (seen,) = watch(model, [ids], 0)
    with torch.no_grad():
        truth = model(ids[None]).logits[0, 1:].log_softmax(-1)
    assert seen.lens.shape[0] == 4 and torch.allclose(seen.lens[-1], truth, atol=1e-5) and seen.lens[:-1].isnan().all()


def test_attention_by_hand():
    rows = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
    other = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0.25, 0.25, 0.5]])
    one, two = (Activations(torch.zeros(2, 3, 1), each.expand(1, 2, 3, 3), {}, rows) for each in (rows, other))
    found = attention_of([one])
    assert found["sink"] == [[0.375] * 2] and found["entropy"] == [[1.25] * 2] and found["sets_in"] == 0
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0])
    js = (rel_entr(p, (p + q) / 2).sum() + rel_entr(q, (p + q) / 2).sum()) / 2 / np.log(2)
    assert attention_divergence(one, two).tolist() == [pytest.approx([js / 2] * 2)] and js > 0


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_what_the_parts_of_a_layer_write_is_what_it_adds(architecture):
    make_base(architecture)
    model = load_eager(open_stages([])[0])
    ids = torch.arange(1, 20)
    (seen,) = watch(model, [ids])
    attention, mlp = seen.written.values()
    inner = model.get_submodule(probe.layer_stack(model))
    parts = [[], []]
    for part, name in enumerate(seen.written):
        for layer in inner:
            out = layer.get_submodule(name).register_forward_hook(
                lambda _, args, output, part=part: parts[part].append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
            assert out
    with torch.no_grad():
        hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states
    for layer in range(len(inner) - 1):  # the last one's output is normalised
        added = hidden[layer + 1] - hidden[layer]
        assert torch.allclose(parts[0][layer] + parts[1][layer], added, atol=1e-4)
        size = hidden[layer][0].norm(dim=-1)
        assert torch.allclose(attention[layer], parts[0][layer].reshape(len(ids), -1).norm(dim=-1) / size, rtol=1e-4)
        assert torch.allclose(mlp[layer], parts[1][layer].reshape(len(ids), -1).norm(dim=-1) / size, rtol=1e-4)
    assert written([seen])["mlp"][0] == pytest.approx(float(mlp[0, 1:].median()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_is_what_bfloat16_makes_whatever_is_computed_in(dtype):
    make_base("llama-tied", dtype=dtype)
    base, _ = open_stages([])
    model = load_eager(base)
    assert model.dtype == dtype
    found = probe.floor(base, TEXTS["off"], watch(model, TEXTS["off"], 0))
    assert len(found["drift"]) == len(found["lens"]) == 4
    assert min(found["drift"]) > 2**-11 and max(found["drift"]) < 2**-5  # bfloat16 has 8 binary digits
    assert found["kl"] == found["lens"][-1] > 0 and 0 < found["attention"] < 2**-5


def test_intervals_hold_the_mean_of_few_texts():
    found = interval(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert found == {"mean": [2, 5], "low": [1, 5], "high": [3, 5]}


def test_off_domain_texts_are_many_kinds_and_short():
    records = [json.loads(line) for line in probe.PROBES.read_text().splitlines()]
    assert {record["kind"] for record in records} >= {"prose", "language", "code"}
    assert len({record["name"] for record in records}) == len(records) >= 12


def test_the_whole_probe_of_a_project(project):
    project.merge()
    make_tokenizer().save_pretrained(BASE)
    for name in ("sums", "names", "prose"):
        for part in ("eval", "train"):
            path = Path("data") / name / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"prompt": "a b c", "completion": " d e"}\n' * 3)
    pick.main("data")
    names = ["base", "sums", "names", "prose", "merged"]

    def probe_all():
        for name in names:
            probe.main(name)
        return [Path(f"reports/probe/{name}.json").read_bytes() for name in names]

    first = probe_all()
    assert probe_all() == first
    found = dict(zip(names, map(json.loads, first), strict=True))
    assert found["merged"]["trained"] == [0, 1, 2, 3]
    assert found["names"]["trained"] == [0, 1, 2]  # its parent's layers too
    assert 0 < found["merged"]["early"]["share"] < 1
    assert found["prose"]["off"]["drift"]["mean"][:3] == [0, 0, 0]

    _, stages = open_stages(["names"])
    records = [{"prompt": "a b c", "completion": " d e"}] * 3
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).eval()
    for path in stages[0].changed():
        source = stages[0].parent if ".layers.2." in path else stages[0]
        for name, weight in source.module(path).items():
            getattr(model.get_submodule(path), name).data.copy_(weight)
    truth = mean_loss(model, probe.load_tokenizer(), records, load_params().evaluate.batch_size)
    row = next(
        r for r in found["names"]["ablation"] if r["stage"] == "names" and r["layers"] == [2] and r["dataset"] == "sums"
    )
    assert row["without"] == pytest.approx(truth, rel=1e-4) and row["without"] != row["loss"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_the_last_lens_is_what_the_model_says_with_its_logits_scaled_and_capped(kind):
    model = build(kind, TINY | {"head_dim": 8})
    model.set_attn_implementation("eager")
    texts = [torch.arange(1, LENS + 2), torch.arange(9, LENS + 10)]
    with torch.no_grad():
        truth = [model(input_ids=text[None]).logits[0, 1:].log_softmax(-1) for text in texts]
    for found, own in zip(watch(model, texts), truth, strict=True):
        assert torch.allclose(found.lens[-1], own, rtol=0, atol=1e-5)
