"""Which bases a routed model can be made of, by their kinds."""

import pytest
from transformers import LlavaConfig

from stages.errors import MistakeError
from stages.files import BASE
from stages.models.architecture import describe, empty_model
from stages.models.classes import class_names
from stages.models.modeling_houlsby import HoulsbyLlamaForCausalLM
from tests.conftest import make_base


def test_the_classes_are_those_that_transformers_has():
    make_base("qwen3")
    model = empty_model(BASE)
    assert class_names(model, describe(model)) == ("Qwen3Config", "Qwen3ForCausalLM")


@pytest.mark.parametrize("kind", ["has experts", "has code of its own", "reads images"])
def test_a_base_of_another_kind_is_refused_in_a_sentence(kind):
    if kind == "has experts":
        make_base("mixtral")
    elif kind == "reads images":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"model_type": "llama", "vocab_size": 128, **sizes}
        vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **sizes}
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=5).save_pretrained(BASE)
    else:
        HoulsbyLlamaForCausalLM.config_class(adapter_size=4, vocab_size=128, num_hidden_layers=2).save_pretrained(BASE)
    model = empty_model(BASE)
    with pytest.raises(MistakeError, match=rf"a base of type \w+ cannot be routed, for it {kind}; remove the router"):
        class_names(model, describe(model))
