"""Losses of every causal language model that transformers knows: against the cross-entropy of its own logits."""

import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stages.models.losses import pad, token_losses
from tests.stages.models.test_losses import whole
from tests.stages.test_train import make_examples

SECONDS = 20  # for one type
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
TINY = (
    {
        "hidden_size": 32,
        "n_embd": 32,
        "d_model": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "n_inner": 64,
    }
    | {"ffn_dim": 64, "d_ff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128, "pad_token_id": 0}
    | {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "is_decoder": True, "use_cache": False}
    | {"max_position_embeddings": 256, "n_positions": 256}
    | {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_expand": 2}
    | dict.fromkeys(LAYERS, 2)
    | dict.fromkeys(HEADS, 4)
    | dict.fromkeys(EXPERTS, 4)
    | dict.fromkeys(CHOSEN, 2)
)
RANKS = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ATTEMPTS = [
    TINY | {"head_dim": 8},
    TINY,
    TINY | RANKS | {"head_dim": 8, "num_key_value_heads": 4, "rotary_dim": 4},
    TINY | {"head_dim": 8, "num_key_value_heads": 4, "num_heads": 8},  # Mamba 2 expands its width
]


class LateError(BaseException):
    """A type took longer than its time; no `except Exception` holds it up."""


@contextmanager
def time_limit():
    def late(*_):
        raise LateError(f"takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def build(kind, keys):
    """A tiny model whose logits, wherever a setting can rescale them, are rescaled."""
    text = AutoConfig.for_model(kind).get_text_config(decoder=True)
    known = text.to_dict()
    keys = {key: value for key, value in keys.items() if key in known or key in text.attribute_map}
    rescaled = {key for key, value in known.items() if isinstance(value, float) and ("logit" in key or "lm_h" in key)}
    config = type(text)(**keys | dict.fromkeys(rescaled, 0.5))
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 3e7:
        raise ValueError(f"has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def first_that_runs(kind, batch):
    """A model and the truth about it.

    Raises:
        RuntimeError: no attempt makes one.
    """
    reasons = []
    for keys in ATTEMPTS:
        try:
            model = build(kind, keys)
            return model, whole(model, batch).detach()
        except Exception as error:  # each type has its own ways to refuse a size
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0][:120])
    raise RuntimeError("; ".join(dict.fromkeys(reasons)))


@pytest.mark.slow
def test_losses_are_those_of_the_models_own_logits():
    batch = pad(make_examples(4), 0)
    ways, wrong, not_built = {}, {}, {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            with time_limit(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, truth = first_that_runs(kind, batch)
                found = token_losses(model, batch)[0].detach()
        except (LateError, RuntimeError) as error:
            not_built[kind] = str(error)
            continue
        ways.setdefault(model.way_to_losses, []).append(kind)
        if not torch.allclose(found, truth, rtol=1e-4, atol=1e-4):
            wrong[kind] = float((found - truth).abs().max())
    print(*not_built.items(), *ways.items(), sep="\n")
    assert not wrong
    assert sum(map(len, ways.values())) >= 150
    assert {"falcon_h1", "recurrent_gemma", "gemma2", "cohere", "granite"} <= set(ways["asked"])
    assert {"llama", "qwen3", "gpt2", "mixtral", "phi3", "mamba"} <= set(ways["chunks"])
