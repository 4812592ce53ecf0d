"""Twenty and more wrong params.yaml files: each gets one sentence with file, key and fix."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import base
from stages.errors import MistakeError
from stages.files import BASE, read_json, write_json
from stages.project.check import load_checked
from stages.project.params import load_params
from tests.conftest import PARAMS, ROOT, make_base
from tools import check

MISTAKES = {
    # name: (text to replace, its replacement, what the sentence says)
    "unknown key": ("    rank: 4", "    rnak: 4", "stages.sums.rnak is not a known key; did you mean rank?"),
    "unknown section": ("merge:", "merges:", "merges is not a known key; did you mean merge?"),
    "key of another method": ("    method: ln", "    method: ln\n    rank: 4", "stages.words.rank is not a known key"),
    "unknown parent": ("parent: sums", "parent: sum", "stages.words.parent names 'sum', which is not a stage;"),
    "unknown dataset": ("dataset: words", "dataset: wrods", "stages.words.dataset names 'wrods'"),
    "cycle": (
        "parent: base",
        "parent: words",
        "stages.sums closes a circle (stages.sums → stages.words → stages.sums)",
    ),
    "own parent": ("parent: sums", "parent: words", "closes a circle (stages.words → stages.words)"),
    "router of nothing": (
        "routers: {}",
        "routers: {pick: {stages: [sums, wrods]}}",
        "routers.pick.stages names 'wrods', which is not a stage; did you mean words?",
    ),
    "router of one twice": (
        "routers: {}",
        "routers: {pick: {stages: [sums, sums]}}",
        "routers.pick.stages names 'sums', whose prompts are those of 'sums'; name one of them, once",
    ),
    "router named as a stage": (
        "routers: {}",
        "routers: {Words: {stages: [sums]}}",
        "routers.Words has the name of stages.words; choose another",
    ),
    "router named as the merge": (
        "routers: {}",
        "routers: {merged: {stages: [sums]}}",
        "routers.merged has a name that stands for the merged model; choose another",
    ),
    "routed merge": (
        "  dtype: float32\nevaluate",
        "  dtype: float32\n  outputs: [model, routed]\nevaluate",
        "merge.outputs.1 is none of its outputs; a routed model is a name under routers, see docs/routing.md",
    ),
    "selection of nothing": (
        "selections: {}",
        "selections:\n  hard: {dataset: wrods, parent: base, reference: sums, keep: 0.5}",
        "selections.hard.dataset names 'wrods', which is not a dataset; did you mean words?",
    ),
    "selection by nobody": (
        "selections: {}",
        "selections:\n  hard: {dataset: words, parent: base, reference: smus, keep: 0.5}",
        "selections.hard.reference names 'smus', which is not a stage; did you mean sums?",
    ),
    "selection of all": (
        "selections: {}",
        "selections:\n  hard: {dataset: words, parent: base, reference: sums, keep: 1}",
        "selections.hard.keep is 1; it should be less than 1",
    ),
    "selection named as a dataset": (
        "selections: {}",
        "selections:\n  sums: {dataset: words, parent: base, reference: sums, keep: 0.5}",
        "selections.sums has the name of datasets.sums; choose another",
    ),
    "layers outside": ("layers: 0-1", "layers: 0-4", "stages.sums.layers: '0-4' is outside the model"),
    "too many last layers": ("layers: last 2", "layers: last 9", "which has layers 0-3"),
    "layers backwards": ("layers: 0-1", "layers: 3-1", "runs backwards; write the smaller layer first"),
    "layers in words": ("layers: 0-1", "layers: first two", "is no layer range; write all, 0-3"),
    "integer name": ("  sums:\n    source", "  7:\n    source", "datasets.7 is no usable name;"),
    "dotted name": ("  sums:\n    source", "  a.b:\n    source", "datasets.a.b is no usable name;"),
    "reserved name": (
        "  sums:\n    parent",
        "  base:\n    parent",
        "stages.base has a name that stands for the model",
    ),
    "weight of no stage": ("    words: 1.0", "    wrods: 1.0", "merge.weights.wrods names 'wrods'"),
    "weight in words": ("    words: 1.0", "    words: much", "merge.weights.words is 'much'; it should be a number"),
    "no weights": ("  weights:\n    sums: 1.0\n    words: 1.0\n", "", "merge.weights is missing; add it"),
    "text for a number": ("lr: 1.0e-2\n    steps: 4", "lr: fast\n    steps: 4", "stages.words.lr is 'fast'"),
    "negative rate": ("lr: 1.0e-2\n    steps: 4", "lr: -1.0\n    steps: 4", "it should be greater than 0"),
    "fraction for a count": ("steps: 25", "steps: 2.5", "stages.sums.steps is 2.5"),
    "unknown method": ("method: lora", "method: lroa", "stages.sums.method 'lroa' is not known; did you mean lora?"),
    "method missing": ("    method: lora\n", "", "stages.sums.method is missing; choose one of"),
    "unknown source": ("source: file\n    path: sums", "source: web\n    path: sums", "datasets.sums.source 'web'"),
    "replay of nothing": ("    rank: 4", "    replay: 0.5", "stages.sums.replay has nothing to replay"),
    "replay of all": ("replay: 0.25", "replay: 1.0", "stages.words.replay is 1.0; it should be less than 1"),
    "filter without value": (
        "    words: 1.0",
        "    words: [{filter: mlp}]",
        "merge.weights.words is [{'filter': 'mlp'}]; it should be a number, a list of numbers",
    ),
    "unknown output": (
        "  dtype: float32\nev",
        "  outputs: [lora]\nev",
        "merge.outputs.0 is 'lora'; it should be",
    ),
    "dtype of the base": ("dtype: float32", "dtype: int8", "base.dtype is 'int8'; it should be 'auto', 'float32' or"),
    "hub without a split": (
        "source: file\n    path: sums.jsonl",
        "source: hub\n    id: a/b",
        "datasets.sums.revision is missing",
    ),
    "no extra neurons": (
        "method: lora\n    layers: 0-1\n    rank: 4",
        "method: bottleneck\n    layers: 0-1",
        "write base.extra_neurons: 64",
    ),
    "section missing": ("base:\n  model: model\n  dtype: float32\n", "", "base is missing;"),
    "a cosine above zero": (
        "rounding: 0.25",
        "cosine: 0.5",
        "warn.cosine is 0.5; it should be less than or equal to 0",
    ),
    "evaluation missing": ("evaluate:\n  max_new_tokens: 4\n", "", "evaluate is missing;"),
    "threads missing": ("threads: 1\n", "", "threads is missing; add it"),
    "key twice": ("seed: 0", "seed: 0\nseed: 1", "line 2 is not valid YAML"),
    "broken YAML": ("  model: model", "  model: [model", "is not valid YAML"),
    "a weight that is a flag": (
        "    words: 1.0",
        "    words: true",
        "merge.weights.words is true; it should be a number",
    ),
    "digits of another script": ("layers: 0-1", "layers: ٣", "stages.sums.layers: '٣' is no layer range; write all"),
    "no groups of layers": ("layers: 0-1", "layers: {}", "stages.sums.layers: it names no modules; write a range"),
    "a search for an unknown merge": (
        "evaluate:",
        "search:\n  methods: [tise]\nevaluate:",
        "search.methods.0 'tise' is not known; did you mean ties?",
    ),
    "a choice by nothing": (
        "selections: {}",
        "selections:\n  hard: {dataset: words, parent: base, reference: base, keep: 0.5}",
        "selections.hard.reference is its parent too, so that no token stands out; name another stage",
    ),
    "the best step of no split": (
        "    rank: 4",
        "    keep: best",
        "stages.sums looks for its best step, but tune is 0 in its dataset 'sums'; give the tuning split some records",
    ),
    "a method for which the model has nothing": (
        "method: ln",
        "method: bitfit",
        "stages.words.method 'bitfit' trains biases, and LlamaForCausalLM has none in these layers; write base.add_bia",
    ),
    "a module of another model": (
        "layers: 0-1",
        "layers: {c_attn: all}",
        "stages.sums.layers names 'c_attn', which no module of the model is called; write attention, embeddings,",
    ),
    "nothing to train": (
        "method: lora\n    layers: 0-1",
        "method: lora\n    layers: {norms: all}",
        "stages.sums.method finds nothing to train in these layers; choose another method",
    ),
    "parts whose names differ in case": (
        "  words:\n    source: file\n    path: words.jsonl\n    eval: 10",
        "  words:\n    source: mix\n    parts:\n"
        "      one: {source: file, path: words.jsonl, eval: 10, weight: 1.0}\n"
        "      ONE: {source: file, path: sums.jsonl, eval: 10, weight: 1.0}",
        "datasets.words.parts.ONE has the name of datasets.words.parts.one; choose another",
    ),
    "threads none": ("threads: 1", "threads: 0", "threads is 0; it should be auto, or a number from 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_gets_its_sentence(project, name):
    make_base("llama-untied")  # the model is there, so layer ranges can be checked
    text, replacement, sentence = MISTAKES[name]
    content = Path("params.yaml").read_text()
    assert text in content
    Path("params.yaml").write_text(content.replace(text, replacement, 1))
    with pytest.raises(MistakeError) as mistake:
        check.main()
    message = str(mistake.value)
    assert message.startswith("params.yaml") and sentence in message
    assert "\n" not in message and ";" in message


def test_a_selection_cannot_be_made_by_the_stage_that_trains_on_it(project):
    text = Path("params.yaml").read_text().replace("dataset: words", "dataset: hard")
    selection = "selections:\n  hard: {dataset: words, parent: base, reference: words, keep: 0.5}"
    Path("params.yaml").write_text(text.replace("selections: {}", selection))
    with pytest.raises(MistakeError, match=r"closes a circle .*selections\.hard"):
        load_params()


def test_the_file_as_it_stands_is_right(project):
    settings = load_params()
    assert settings.ancestors("words") == ["sums"]
    assert settings.stages["sums"].lr == 0.01


@pytest.mark.parametrize("rate", ["1e-05", "1e-5", "0.00001", "1.0e-5"])
def test_small_numbers_are_numbers_however_they_are_written(project, rate):
    content = Path("params.yaml").read_text().replace("lr: 1.0e-2\n    steps: 4", f"lr: {rate}\n    steps: 4")
    Path("params.yaml").write_text(content)
    assert load_params().stages["words"].lr == 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    ["tools.cli check", "stages.base", "stages.data sums", "stages.train sums", "stages.pick sums", "stages.merge"],
)
def test_every_stage_says_it_on_the_command_line_without_a_traceback(project, monkeypatch, stage):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 0", "sead: 0", 1))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(project)}
    done = subprocess.run([sys.executable, "-m", *stage.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: params.yaml: sead is not a known key; did you mean seed?"


@pytest.mark.parametrize(
    ("text", "replacement", "sentence"),
    [
        ("method: task_arithmetic", "method: tiess", "merge.method 'tiess' is not known; did you mean ties?"),
        ("path: words.jsonl", "path: wrods.jsonl", "datasets.words.path 'wrods.jsonl' is not there; correct the path"),
        (
            "path: words.jsonl",
            "path: params.yaml",
            "datasets.words.path 'params.yaml' is no ",
        ),
        (
            "path: words.jsonl",
            "path: words.jsonl\n    sha256: abc",
            "datasets.words.sha256 is not that of words.jsonl;",
        ),
        (
            "source: file\n    path: words.jsonl",
            "source: reasoning_gym\n    task: chain_smu\n    train: 9",
            "datasets.words: reasoning_gym does not make task 'chain_smu' with this config (Dataset 'chain_smu' not",
        ),
        (
            "source: file\n    path: words.jsonl",
            "source: reasoning_gym\n    task: chain_sum\n    config: {min_term: 2}\n    train: 9",
            "datasets.words: reasoning_gym does not make task 'chain_sum' with this config (",
        ),
        (
            "source: file\n    path: words.jsonl\n    eval: 10",
            "source: mix\n    parts:\n      one: {source: file, path: none.jsonl, eval: 10, weight: 1.0}",
            "datasets.words.parts.one.path 'none.jsonl' is not there; correct the path",
        ),
        (
            "method: ln",
            "method: peft\n    peft: {peft_type: LOHA, rnak: 4}",
            "stages.words.peft.rnak is not a known key of LOHA; known keys are alpha, ",
        ),
        (
            "method: ln",
            "method: peft\n    peft: {peft_type: LOHA, modul_dropout: 0.1}",
            "stages.words.peft.modul_dropout is not a known key of LOHA; did you mean module_dropout?",
        ),
        (
            "method: ln",
            "method: peft\n    peft: {peft_type: LORAX}",
            "stages.words.peft.peft_type is 'LORAX'; PEFT knows",
        ),
        (
            "method: ln",
            "method: peft\n    peft: {peft_type: PROMPT_TUNING}",
            "stages.words.peft.peft_type 'PROMPT_TUNING' leaves no change of weights that can be merged (it adds",
        ),
        (
            "    parent: sums\n    dataset: words\n    method: ln\n    layers: last 2\n    lr: 1.0e-2\n    steps: 4\n"
            "    replay: 0.25\n",
            "    parent: base\n    dataset: words\n    method: import\n    path: nowhere\n",
            "stages.words.path 'nowhere' holds no adapter_config.json; give the folder of a PEFT adapter",
        ),
    ],
)
def test_what_only_a_later_stage_would_find_is_told_before_any_training(project, text, replacement, sentence):
    content = Path("params.yaml").read_text()
    assert text in content
    Path("params.yaml").write_text(content.replace(text, replacement))
    for first in (base.main, check.main):
        with pytest.raises(MistakeError) as mistake:
            first()
        assert str(mistake.value).startswith(f"params.yaml: {sentence}") and "\n" not in str(mistake.value)


@pytest.mark.parametrize("method", ["oft", "bitfit"])
def test_a_base_that_a_later_stages_method_does_not_go_with_is_told_before_any_training(project, method):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("method: ln", f"method: {method}"))
    make_base("gpt2" if method == "oft" else "llama-tied")
    shutil.rmtree("model")
    shutil.move(BASE, "model")
    with pytest.raises(MistakeError, match=rf"^params\.yaml: stages\.words\.method '{method}'"):
        base.main()
    assert not BASE.exists()


def test_what_dvc_has_made_already_needs_its_files_no_more(project):
    """As on a colleague's machine, which has the results and not the user's own files."""
    Path("words.jsonl").unlink()
    made = {"datasets.words": {"source": "file", "path": "words.jsonl", "eval": 10}, "seed": 0}
    lock = {"schema": "2.0", "stages": {"data@words": {"cmd": "x", "params": {"params.yaml": made}}, "pick": {}}}
    Path("dvc.lock").write_text(json.dumps(lock))
    check.main()
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("eval: 10\nstages", "eval: 11\nstages"))
    with pytest.raises(MistakeError, match=r"datasets\.words\.path 'words\.jsonl' is not there"):
        check.main()


def test_a_new_base_with_more_layers_is_not_held_against_the_old_one(project):
    make_base()  # of four layers, and another model than params.yaml's
    write_json(BASE / "stage.json", read_json(BASE / "stage.json") | {"model": "older"})
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("layers: 0-1", "layers: 0-7"))
    assert load_params().stages["sums"].layers == "0-7"


@pytest.mark.parametrize("name", ["Base", "MERGED"])
def test_a_stage_cannot_have_the_name_of_a_model_that_is_none(project, name):
    text = Path("params.yaml").read_text().replace("  words:\n    parent", f"  {name}:\n    parent")
    Path("params.yaml").write_text(text)
    with pytest.raises(MistakeError, match=f"stages.{name} has a name that stands for the"):
        load_params()


def test_names_that_differ_in_case_alone_are_one_file_on_some_systems(project):
    text = Path("params.yaml").read_text().replace("  words:\n    parent", "  SUMS:\n    parent")
    Path("params.yaml").write_text(text)
    with pytest.raises(MistakeError, match=r"stages\.SUMS has the name of stages\.sums; choose another"):
        load_params()


def test_a_missing_file_is_one_sentence(workspace):
    with pytest.raises(MistakeError, match=r"params\.yaml is missing; run the command in the folder that holds it"):
        load_params()


def test_the_projects_own_params_are_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    load_params()


def test_two_stages_may_not_train_the_same_new_neurons(project):
    text = Path("params.yaml").read_text().replace("base:\n", "base:\n  extra_neurons: 8\n")
    for method in ("lora", "ln"):
        text = text.replace(f"method: {method}", "method: bottleneck\n    neurons: 0-3")
    Path("params.yaml").write_text(text.replace("    rank: 4\n", "").replace("layers: last 2", "layers: 2-3"))
    base.main()
    check.main()
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("layers: 2-3", "layers: 1-3"))
    with pytest.raises(MistakeError, match=r"stages.words.neurons: stage sums has some of '0-3' too"):
        check.main()


@pytest.mark.parametrize(("section", "text"), [("warn", "warn:\n  rounding: 0.25\n"), ("routers", "routers: {}\n")])
def test_a_section_that_dvc_asks_for_is_needed_where_dvc_runs(project, section, text):
    Path("params.yaml").write_text(PARAMS.replace(text, ""))
    load_checked()  # as of a stage that is run by hand
    Path("dvc.yaml").touch()
    with pytest.raises(MistakeError, match=rf"{section} is missing, and DVC asks for it; write {section}: {{}}"):
        load_checked()
