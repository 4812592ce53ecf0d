"""Two models that Strata did not make: against float64 differences, PEFT's own merge, and measured rounding."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.errors import MistakeError
from tools import compare

TOUCHED = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def first(workspace):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("first")
    return Path("first")


def changed(folder, seed, size=0.05, names=(TOUCHED,), dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained("first", dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(size * torch.randn_like(model.get_parameter(name)))
    model.to(dtype).save_pretrained(folder)
    return Path(folder)


def test_dense_models_against_float64(first):
    folders = [first, changed("one", 1), changed("two", 2, names=(TOUCHED, "model.layers.2.mlp.up_proj.weight"))]
    compared = compare.compare(*compare.open_models(folders))
    assert set(compared.rows["layer"]) == {1, 2} and len(compared.rows) == 3
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    one, two = (w[TOUCHED].double() - weights[0][TOUCHED].double() for w in weights[1:])
    row = compared.rows.iloc[0]
    assert row["delta_squared"] ** 0.5 == pytest.approx(float(one.norm()), rel=1e-6)
    assert row["weight_squared"] ** 0.5 == pytest.approx(float(weights[0][TOUCHED].double().norm()), rel=1e-6)
    truth = float((one * two).sum() / one.norm() / two.norm())
    gram = compared.grams[1]
    assert gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1]) == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_expected_rounding_error_is_the_measured_one(dtype):
    exact = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = (exact.to(dtype).double() - exact).norm()
    expected = compare.spacing(exact.to(dtype)).double().norm() / 12**0.5
    assert float(expected / measured) == pytest.approx(1, abs=0.01)


def test_spacing_is_the_next_number():
    values = torch.tensor([1.0, 1.5, -3.0, 0.1, 0.0], dtype=torch.float32)
    next_ones = torch.nextafter(values.abs(), torch.tensor(torch.inf)) - values.abs()
    assert torch.equal(compare.spacing(values)[:4], next_ones[:4]) and compare.spacing(values)[4] == 0


def test_an_adapter_is_what_peft_merges(first):
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained("adapter")
    fresh = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    before = fresh.get_parameter(TOUCHED).detach().clone()
    after = PeftModel.from_pretrained(fresh, "adapter").merge_and_unload().get_parameter(TOUCHED)
    compared = compare.compare(*compare.open_models([first, Path("adapter")]))
    assert len(compared.rows) == 1
    assert compared.rows["delta_squared"][0] ** 0.5 == pytest.approx(float((after - before).double().norm()), rel=1e-6)


def test_a_difference_within_rounding_is_said_to_be(first):
    compare.main(first, [changed("rounded", 1, size=1e-5, dtype=torch.float16)], Path("page.html"))
    compared = compare.compare(*compare.open_models([first, changed("small", 1, size=2e-5)]))
    assert any("Rounding alone accounts for" in told for told in compare.headline(compared, "first"))
    clear = compare.compare(*compare.open_models([first, changed("clear", 1)]))
    assert not any("Rounding" in told for told in compare.headline(clear, "first"))


def test_the_page_is_whole_repeats_itself_and_names_no_place(first, capsys):
    both = [first, changed("one", 1), changed("same/one", 1), changed("twice", 1, size=0.1)]
    compare.main(both[0], both[1:], Path("a.html"))
    compare.main(both[0], both[1:], Path("b.html"))
    page = Path("a.html").read_text()
    assert page == Path("b.html").read_text() and str(Path.cwd()) not in page
    assert "moved the same way" in capsys.readouterr().out
    assert page.count("<svg") == 2 and not re.search(r'(src|href)="http', page)


def test_files_that_round_one_model_alike_are_not_said_to_move_together(first):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.rand_like(parameter))
    model.save_pretrained("first")  # with more digits than the others
    compared = compare.compare(*compare.open_models([first, *(changed(f"small{n}", n, size=1e-5) for n in (1, 2))]))
    assert compared.gram[0, 1] > 0.9 * compared.gram[0, 0]
    assert not any("moved the same way" in told for told in compare.headline(compared, "first"))


def test_equal_models_and_tensors_that_one_lacks_are_told(first):
    shutil.copytree(first, "copy")
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16)
    model.resize_token_embeddings(70)
    model.save_pretrained("longer")
    compare.main(first, [Path("copy"), Path("longer")], Path("page.html"))
    page = Path("page.html").read_text()
    assert "copy equals first in every tensor that both have." in page
    assert "Not compared in longer" in page and "model.embed_tokens.weight" in page


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (["nowhere", "first"], "nowhere is no model with config.json"),
        (["first", "nowhere"], "nowhere holds no model.safetensors"),
    ],
)
def test_a_folder_that_is_no_model_is_one_sentence(first, folders, sentence):
    with pytest.raises(MistakeError, match=sentence):
        compare.open_models([Path(folder) for folder in folders])


def test_an_adapter_that_means_something_else_to_peft_is_one_sentence(first):
    model = AutoModelForCausalLM.from_pretrained("first", dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="olora")).save_pretrained(
        "olora"
    )
    with pytest.raises(MistakeError, match=r"olora/adapter_config.json: init_lora_weights is 'olora', with which"):
        compare.open_models([first, Path("olora")])
