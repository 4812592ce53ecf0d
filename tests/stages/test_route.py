"""A routed model against PEFT's own merge of each stage, loaded by plain transformers."""

import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import route
from stages.errors import MistakeError
from stages.files import ANSWERS, BASE, CHECKPOINTS, DATA, ROUTED, read_json, write_json
from stages.project.params import load_params
from stages.records.lines import Lines
from stages.routing.router import prompt_ids
from tests.conftest import make_base, make_stage, make_tokenizer
from tools.models import load

ASKED = {"one": "say {}:", "two": "{} + {} =", "three": "<{}>"}
PARAMS = """\
seed: 0
threads: 1
base: {{model: model}}
datasets:
{datasets}
stages:
{stages}
merge: {{weights: {{one: 1.0}}}}
routers: {{routed: {{stages: [one, two, three]}}}}
evaluate: {{max_new_tokens: 4}}
"""
STAGES = {  # by name: parent, method, layers
    "one": ("base", "lora", "0-2"),
    "two": ("one", "dora", "1-3"),
    "three": ("one", "full", "2"),
}


def load_base(folder=BASE, **named):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **named).eval()


def prompts(name: str, count: int) -> list[str]:
    return [ASKED[name].format(number, number % 7) for number in range(count)]


def ids_of(prompt: str) -> list[int]:
    return make_tokenizer()(prompt, add_special_tokens=False)["input_ids"]


def prepare(architecture: str) -> dict[str, torch.nn.Module]:
    """A project of three trained stages, and the model that PEFT makes of each."""
    make_base(architecture)
    models = {"base": load_base()}
    for name, (parent, method, layers) in STAGES.items():
        models[name] = (
            make_stage(name, copy.deepcopy(models[parent]), method, layers, parent=parent, size=0.3)
            .merge_and_unload()
            .eval()
        )
        record = read_json(CHECKPOINTS / name / "stage.json") | {"dataset": name}
        write_json(CHECKPOINTS / name / "stage.json", dict(record))
        folder = DATA / name
        folder.mkdir(parents=True)
        for split, count in (("train", 40), ("tune", 0), ("eval", 5)):
            lines = [json.dumps({"prompt": prompt, "completion": "x"}) for prompt in prompts(name, count)]
            (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    datasets = "".join(f"  {name}: {{source: file, path: x.jsonl, eval: 5}}\n" for name in STAGES)
    stages = "".join(
        f"  {name}: {{parent: {parent}, dataset: {name}, method: {method}, layers: {layers}, lr: 0.1, steps: 1}}\n"
        for name, (parent, method, layers) in STAGES.items()
    )
    Path("params.yaml").write_text(PARAMS.format(datasets=datasets, stages=stages))
    return models


@torch.inference_mode()
def logits(model, prompt):
    return model(input_ids=torch.tensor([ids_of(prompt)])).logits


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3", "gpt2"])
def test_a_prompt_gets_the_stage_that_learned_its_like_and_no_other(architecture):
    truth = prepare(architecture)

    route.main("routed")

    routed = load_base(ROUTED / "routed", trust_remote_code=True)
    own = load(load_params(), "routed")  # as strata chat has it, without the code of the folder
    asked = {"base": "Wie geht es dir?", **{name: prompts(name, 50)[-1] for name in STAGES}}
    for name, prompt in asked.items():
        assert torch.equal(logits(own, prompt), logits(routed, prompt))
        torch.testing.assert_close(logits(routed, prompt), logits(truth[name], prompt), rtol=1e-4, atol=1e-4)

    tokenizer = make_tokenizer()
    batch = tokenizer(list(asked.values()), padding=True, padding_side="left", return_tensors="pt")
    keys = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = routed.generate(**pick(batch), **keys)[:, batch["input_ids"].shape[1] :].tolist()
    beams = routed.generate(**pick(batch), **keys, num_beams=2)[:, batch["input_ids"].shape[1] :].tolist()
    for row, (name, prompt) in enumerate(asked.items()):
        ids = torch.tensor([ids_of(prompt)])
        for model in (routed, truth[name]):
            alone = model.generate(ids, **keys)[0, ids.shape[1] :].tolist()
            assert together[row][: len(alone)] == alone, (name, model is routed)
        alone = truth[name].generate(ids, **keys, num_beams=2)[0, ids.shape[1] :].tolist()
        assert beams[row][: len(alone)] == alone, name

    folder = ROUTED / "routed/adapters"
    adapted = PeftModel.from_pretrained(load_base(), folder / "one", "one")
    for name in ("two", "three"):
        adapted.load_adapter(folder / name, name)
    for name in STAGES:
        if architecture == "gpt2":  # PEFT has one bias for all adapters, that of the last one
            adapted = PeftModel.from_pretrained(load_base(), folder / name, name)
        adapted.set_adapter(name)
        torch.testing.assert_close(logits(adapted, asked[name]), logits(truth[name], asked[name]), rtol=1e-4, atol=1e-4)


def test_the_file_is_the_base_and_what_each_stage_adds():
    prepare("llama-untied")

    route.main("routed")
    first = (ROUTED / "routed/model.safetensors").read_bytes()
    route.main("routed")

    assert (ROUTED / "routed/model.safetensors").read_bytes() == first
    found, base = load_file(ROUTED / "routed/model.safetensors"), load_file(BASE / "model.safetensors")
    assert all(torch.equal(found[name], values) for name, values in base.items())
    with safe_open(ROUTED / "routed/model.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["strata"])
    assert told == read_json(ROUTED / "routed/lineage.json")
    assert [stage["name"] for stage in told["stages"]] == ["one", "three", "two"]
    report = read_json(ANSWERS / "routed.json")
    added = {
        str(number): sum(v.numel() * v.itemsize for name, v in found.items() if f".changes.{number}." in name)
        for number in (1, 2, 3)
    }
    told = {str(i): each["low_rank"] + each["whole"] for i, each in enumerate(report["choices"].values(), start=1)}
    assert told == added
    assert report["choices"]["one"]["whole"] == 0 < report["choices"]["three"]["whole"]
    assert all(each["error"] < 1e-3 for each in report["choices"].values())
    assert report["tuning"] == {"prompts": 32 + 3 * 8, "right": 32 + 3 * 8}


def test_neutral_prompts_are_asked_as_those_of_a_dataset_are():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    neutral = list(Lines(route.HERE / "neutral.jsonl"))
    told = [tokenizer.decode(prompt_ids(record, tokenizer)) for record in neutral]
    assert {text.startswith("[user]") for text, record in zip(told, neutral, strict=True) if "prompt" in record} == {
        True
    }
    assert {text.startswith("[user]") for text, record in zip(told, neutral, strict=True) if "text" in record} == {
        False
    }
    assert not any("[assistant]." in text for text in told)  # which would be an answer


def test_however_it_is_called_a_prompt_gets_its_own_stage():
    truth = prepare("llama-tied")
    route.main("routed")
    routed = load_base(ROUTED / "routed", trust_remote_code=True)
    asked = {name: torch.tensor([ids_of(prompts(name, 50)[-1])]) for name in STAGES}
    keys = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}  # which does not end a text, as 0 does
    alone = {name: truth[name].generate(ids, **keys) for name, ids in asked.items()}

    with ThreadPoolExecutor(3) as threads:
        for name, found in threads.map(lambda pair: (pair[0], routed.generate(pair[1], **keys)), [*asked.items()] * 3):
            assert torch.equal(found, alone[name]), name
    ids = asked["three"]
    padded, mask = (
        torch.cat([torch.full((1, 40), fill), row], 1) for fill, row in ((1, ids), (0, torch.ones_like(ids)))
    )
    assert torch.equal(routed.generate(padded, **keys)[:, 40:], alone["three"])  # transformers finds the mask by itself
    assert torch.equal(routed.generate(ids, use_cache=False, **keys), alone["three"])
    with torch.inference_mode():
        assert torch.equal(routed(padded, mask).logits, routed(input_ids=padded, attention_mask=mask).logits)
        with routed.chosen(torch.tensor([1])):
            torch.testing.assert_close(routed(ids).logits, truth["one"](ids).logits, rtol=1e-4, atol=1e-4)
    assert routed.to(torch.bfloat16).choose(ids).tolist() == [3]


def test_nobody_goes_on_without_a_choice():
    prepare("llama-tied")
    route.main("routed")
    routed = load_base(ROUTED / "routed", trust_remote_code=True)
    ids = torch.tensor([ids_of(prompts("three", 50)[-1])])

    with torch.inference_mode():
        past = routed(ids, use_cache=True).past_key_values
    for go_on in (routed.forward, routed.generate):
        with pytest.raises(ValueError, match="so that the choice is kept"), torch.inference_mode():
            go_on(torch.cat([ids, ids], 1), past_key_values=past)
    with pytest.raises(ValueError, match="the router reads input_ids"):
        routed(inputs_embeds=torch.zeros(1, 3, 64))
    with (
        pytest.raises(ValueError, match=r"choices are numbers from 0, for none, to 3, and not \[4\]"),
        routed.chosen(torch.tensor([4])),
    ):
        pass
    routed.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 64)  # as quantisation does
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj was replaced, and its changes are lost"):
        routed.generate(ids)


def test_a_module_that_is_run_past_its_change_is_noticed(monkeypatch):
    prepare("llama-tied")
    monkeypatch.setattr("stages.routing.modeling_routed.Routed._run", lambda _, __, forward, *x: forward(*x))

    with pytest.raises(MistakeError, match=r"the routed model does not say what one says .* is missing"):
        route.main("routed")

    assert not (ROUTED / "routed").exists()


def pick(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.slow
def test_the_example_chooses_and_answers_as_the_model_does():
    prepare("llama-tied")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(BASE)
    route.main("routed")

    prompt = prompts("three", 50)[-1]
    ids = torch.tensor([ids_of(prompt)])
    routed = load_base(ROUTED / "routed", trust_remote_code=True)
    answer = routed.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
    command = [sys.executable, ROUTED / "routed/example.py", prompt]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"{tokenizer.decode(answer, skip_special_tokens=True)}\n"
