"""Every way to name a base model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import base, params
from stages.errors import MistakeError
from stages.files import BASE, read_json


def use(model, dtype="float32"):
    text = Path("params.yaml").read_text().replace("model: model", f"model: {model}")
    Path("params.yaml").write_text(text.replace("dtype: float32", f"dtype: {dtype}", 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_keeps_its_weights(project, dtype):
    use("model", dtype)
    base.main()
    before, after = load_file("model/model.safetensors"), load_file(BASE / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(after[name], weight.to(getattr(torch, dtype))) for name, weight in before.items())
    assert read_json(BASE / "stage.json")["layers"] == 4


def test_a_sharded_folder_is_read(project):
    AutoModelForCausalLM.from_pretrained("model").save_pretrained("shards", max_shard_size="20KB")
    AutoTokenizer.from_pretrained("model").save_pretrained("shards")
    assert len(list(Path("shards").glob("*.safetensors"))) > 1
    use("shards")
    base.main()
    assert set(load_file(BASE / "model.safetensors")) == set(load_file("model/model.safetensors"))


def test_layers_that_the_new_model_does_not_have_are_told_before_training(project):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("layers: 0-1", "layers: 0-30"))
    with pytest.raises(MistakeError, match=r"stages.sums.layers: '0-30' is outside the model"):
        base.main()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("bundled:gpt5", "is not bundled; use bundled:smollm2-135m-instruct"),
        ("nowhere.gguf", "is not a file; correct the path"),
        ("./nowhere", "is no folder and no hub id"),
        ("owner/name", "base.revision is missing"),
        ("broken", "does not load"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(project, model, sentence):
    Path("broken").mkdir()
    use(model)
    with pytest.raises(MistakeError) as mistake:
        base.main()
    assert sentence in str(mistake.value) and "\n" not in str(mistake.value)
    assert not BASE.exists()


def test_a_hub_id_is_passed_on_with_its_revision():
    found = base.locate(params.Base(model="owner/name", revision="abc"))
    assert found == {"pretrained_model_name_or_path": "owner/name", "revision": "abc"}


def test_the_default_is_a_real_model_from_a_gguf_file(project):
    use("bundled:smollm2-135m-instruct", "auto")
    base.main()
    record = read_json(BASE / "stage.json")
    assert (record["parameters"], record["layers"]) == (134_515_008, 30)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in text
