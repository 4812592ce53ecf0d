"""The whole pipeline on tiny models: every method, every way to choose layers, imports, every form of the merge.

Each project is one real run of DVC with as many stages side by side as it takes, all the way to the report.
"""

import gc
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from analysis.telling.facts import gather
from stages.files import sha256
from stages.project.params import load_params
from tests.conftest import ARCHITECTURES, COMMON, make_tokenizer
from tests.forked import Pipeline, copy_repository
from tests.stages.methods.test_matrix import ROWS

pytestmark = pytest.mark.slow

ALL = {0, 1, 2, 3}
MIDDLE = {"self_attn": {1, 2}, "mlp": {1, 2}}
NORMS = {"input_layernorm", "post_attention_layernorm"}
EMBEDDINGS = {"model.embed_tokens": {-1}, "lm_head": {-1}}

Changed = dict[str, set[int]]  # by kind of module, the layers that change

# Every method, and on the way every form of `layers`: the row of the matrix test, what `layers` is, what then changes.
METHODS: dict[str, tuple[Any, Changed]] = {
    "lora": ("all", {"self_attn": ALL, "mlp": ALL}),
    "rslora": (2, {"self_attn": {2}, "mlp": {2}}),
    "pissa": ("0-1", {"self_attn": {0, 1}, "mlp": {0, 1}}),
    "olora": ("0-0,2-3", {"self_attn": {0, 2, 3}, "mlp": {0, 2, 3}}),
    "dora": ([0, 3], {"self_attn": {0, 3}, "mlp": {0, 3}}),
    "ia3": ("last 2", {"self_attn": {2, 3}, "mlp": {2, 3}}),
    "lokr": ({"attention": "0-1", "mlp": "last 2"}, {"self_attn": {0, 1}, "mlp": {2, 3}}),
    "oft": ({"q_proj": "all", "v_proj": "all"}, {"self_attn": ALL}),
    "ln": ({"norms": "all"}, dict.fromkeys(NORMS, ALL)),
    "full": ({"embeddings": "all"}, EMBEDDINGS),
    **dict.fromkeys(["miss", "shira", "adalora", "vera", "peft"], ("1-2", MIDDLE)),
}
WITH_ROOM = {"bitfit", "bottleneck", "houlsby"}  # they need a base of their own


@dataclass(frozen=True)
class Project:
    """A params.yaml, and what its report must be.

    Attributes:
        stages: by name, what differs from four steps on the base, or from an adapter's import.
        changed: what each of them changes.
        sections: of the page; the others have nothing to show.
        base: more of the section `base`.
        merge: more of the section `merge`.
        architecture: of the model.
        metric: one more entry of METRICS, as code.
        said: what the page must say.
        unsaid: what it must not.
    """

    stages: dict[str, dict[str, Any]]
    changed: dict[str, Changed]
    sections: set[int]
    base: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    architecture: str = "llama-untied"
    metric: str = ""
    said: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()


def stage(row: str, layers: Any, **more: Any) -> dict[str, Any]:
    return {"method": ROWS[row].method or row, "layers": layers} | ROWS[row].keys | more


ALL_SECTIONS = {1, 2, 3, 4, 5, 6, 7, 8}
PROJECTS = {
    "every method and every choice of layers": Project(
        stages={row: stage(row, layers) for row, (layers, _) in METHODS.items()},
        changed={row: changed for row, (_, changed) in METHODS.items()},
        sections=ALL_SECTIONS,
        merge={"dtype": "bfloat16"},
        unsaid=("A grey cell",),
    ),
    "a merge that trims, stages with names of the report's, neurons in the base": Project(
        stages={
            "frozen_check": stage("lora", {"attention": "0-1"}),
            "unexplained": stage("lora", {"mlp": "1-2"}, parent="frozen_check", dataset="words", replay=0.25),
            "bottleneck": stage("bottleneck", "1-2"),
        },
        changed={
            "frozen_check": {"self_attn": {0, 1}},
            "unexplained": {"mlp": {1, 2}},
            "bottleneck": {"mlp": {1, 2}},
        },
        sections=ALL_SECTIONS,
        base={"extra_neurons": 12},
        merge={"method": "ties", "parameters": {"density": 0.6}},
        said=("loses nothing of the change",),
        unsaid=("start from one seed", "lost no skill", "lowered an earlier skill"),
    ),
    "an import beside adapters of the base, none in attention, merged as an adapter": Project(
        stages={"alien": {"method": "import", "path": "mlp"}, "houlsby": stage("houlsby", "1-2")},
        changed={"alien": {"mlp": {1}}, "houlsby": MIDDLE},
        sections=ALL_SECTIONS,
        base={"adapter_size": 12},
        merge={"outputs": ["adapter"]},
        said=("trained elsewhere", "What is left of it in the merge", "No model was stored"),
        unsaid=("Storing the merged model", "lost to rounding in the file", '<td>alien</td><td class="sentence">'),
    ),
    "an import that changes nothing, merged as a delta": Project(
        stages={"zero": {"method": "import", "path": "zeros"}},
        changed={"zero": {}},
        sections={1, 6, 8},
        merge={"outputs": ["delta"]},
        unsaid=(
            "declared",
            "lost no skill",
            "lost to rounding",
            "rounding error",
            "overlap of two stages",
            "of their size",
        ),
    ),
    "embeddings alone": Project(
        stages={"embeddings": stage("full", {"embeddings": "all"})},
        changed={"embeddings": EMBEDDINGS},
        sections={1, 3, 5, 6, 7, 8},
        merge={"outputs": ["model", "adapter", "delta"]},
        architecture="llama-tied",
        said=("outside the layers", "Nothing outside the declared layers changed."),
        unsaid=("in layers ,", "overlap of two stages"),
    ),
    "biases of zero, and nothing else": Project(
        stages={"biases": stage("bitfit", "all")},
        changed={"biases": {"self_attn": ALL, "mlp": ALL}},
        sections={1, 2, 3, 5, 6, 7, 8},
        base={"add_biases": True},
        said=("A grey cell changed weights that were zero", "and was zero before"),
        unsaid=("of their size",),
    ),
    "norms that multiply by one more than their weight, one step": Project(
        stages={"gains": stage("ln", "all", lr=0.02, steps=1, warmup=0.0)},
        changed={"gains": dict.fromkeys([*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"], ALL)},
        sections={1, 2, 3, 5, 6, 7, 8},
        architecture="gemma2",
        metric='Metric("mean_change", "mean change", "Mean of Δ.", (MEAN, ENTRIES), _ratio, is_share=False)',
        said=("<th>mean change</th>",),
        unsaid=("moved by more than",),  # than a tenth of 1 + w, of which 0.02 is a fiftieth
    ),
}


def make_model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if architecture != "gemma2":
        return ARCHITECTURES[architecture]()
    model = Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model


def make_adapters() -> None:
    """Adapters that were trained elsewhere: one of the MLP of one layer, and one that is fresh and changes nothing."""
    for name, deviation in (("mlp", 0.1), ("zeros", 0.0)):
        model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        config = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], layers_to_transform=[1])
        wrapped = get_peft_model(model, config)
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name and deviation:
                torch.nn.init.normal_(parameter, std=deviation)
        wrapped.save_pretrained(name)


def complete(special: dict[str, Any]) -> dict[str, Any]:
    """All settings of a stage, of which a project tells what is special."""
    whole = {"parent": "base", "dataset": "sums"} | special
    if whole["method"] == "import":
        files = ("adapter_config.json", "adapter_model.safetensors")
        return whole | {"sha256": sha256(Path(whole["path"]) / file for file in files)}
    return {"lr": 0.01, "steps": 4, "batch_size": 4} | whole


def prepare(project: Project) -> None:
    """Everything that the project needs, in the current folder."""
    make_model(project.architecture).save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    make_adapters()
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(5)]
    words = [{"prompt": f"say {a}{b}:", "completion": f"{b}{a}"} for a in "abcdef" for b in "ghijkl"]
    for name, records in (("sums", sums), ("words", words)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    used = {special.get("dataset", "sums") for special in project.stages.values()}
    datasets = {name: {"source": "file", "path": f"{name}.jsonl", "train": 20, "eval": 5} for name in sorted(used)}
    params = {
        "seed": 0,
        "threads": 1,
        "launch": "python",
        "base": {"model": "model", "dtype": "float32"} | project.base,
        "selections": {},
        "routers": {},
        "datasets": datasets,
        "stages": {name: complete(special) for name, special in project.stages.items()},
        "merge": {"method": "task_arithmetic", "dtype": "float32"} | project.merge,
        "evaluate": {"max_new_tokens": 2},
        "warn": {},
    }
    params["merge"]["weights"] = dict.fromkeys(project.stages, 1.0)
    Path("params.yaml").write_text(json.dumps(params))
    copy_repository(Path())
    add_metric(project.metric)


def add_metric(code: str) -> None:
    """Put one more entry into METRICS, and nothing else anywhere."""
    path = Path("analysis/changes/metrics.py")
    entry = f'MEAN = Part("total", lambda change: float(change.delta.sum()))\nMETRICS = [\n    {code},\n'
    path.write_text(path.read_text(encoding="utf-8").replace("METRICS = [\n", entry if code else "METRICS = [\n"))


@pytest.fixture(autouse=True)
def _frozen_heap():
    """Collecting garbage walks through all that was imported, again and again: a tenth of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_goes_all_the_way_to_its_report(name, monkeypatch):
    project = PROJECTS[name]
    prepare(project)
    ran = Pipeline(monkeypatch).repro()
    assert {"report", *(f"train@{name}" for name in project.stages)} <= ran
    check_changes(project)
    check_numbers(project)
    check_page(project, Path("reports/report.html").read_text(encoding="utf-8"))


def check_changes(project: Project) -> None:
    """What the stages changed is what they say, to the layer."""
    rows = pd.read_parquet("reports/measured/rows.parquet")
    for name, expected in project.changed.items():
        found: Changed = {}
        for row in rows[rows["stage"] == name].itertuples():
            kind = row.module if row.layer == -1 else row.module.partition(".")[0]
            found.setdefault(kind, set()).add(row.layer)
        assert found == expected, name


def check_numbers(project: Project) -> None:
    """No file has a number that is none, and the frozen check is zero where something was to be checked."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in Path("reports").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert not gather(load_params()).frozen["max_abs"].any()
    assert ("mean_change" in set(pd.read_parquet("reports/deltas.parquet")["metric"])) == bool(project.metric)


def check_page(project: Project, page: str) -> None:
    assert {int(number) for number in re.findall(r'<h2 id="s(\d)">', page)} == project.sections
    assert set(re.findall(r'href="#s(\d)"', page)) <= set(map(str, project.sections))
    text = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None|Undefined)\b", text)
    for name in project.stages:
        assert f"<td>{name}</td>" in page and f"<h3>{name}</h3>" in page, name
    told = re.sub(r"\s+", " ", text.partition("<h2>Words")[0])
    for words in project.said:
        assert words in told, words
    for words in project.unsaid:
        assert words not in told, words


def test_every_method_is_in_a_project():
    assert {*METHODS, *WITH_ROOM} == set(ROWS)
