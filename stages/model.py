"""A running model from a virtual checkpoint, and its logits at the tokens that count."""

import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from stages.files import BASE, read_json
from stages.records import Example
from stages.weights.checkpoint import Weights

logging.disable_progress_bar()
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # between peft and transformers


def compute_dtype() -> torch.dtype:
    """The dtype that the base stage chose for training and evaluation."""
    return getattr(torch, read_json(BASE / "stage.json")["dtype"])


def load_model(checkpoint: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """A model in evaluation mode whose weights are the checkpoint's effective ones, rounded once to `dtype`."""
    changed, base = checkpoint.changed(), checkpoint.base
    untied = {"tie_word_embeddings": False} if base.untied_by(changed) else {}
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype, **untied)
    set_weights(model, checkpoint, changed)
    return model.eval()


@torch.no_grad()
def set_weights(model: PreTrainedModel, checkpoint: Weights, modules: list[str]) -> None:
    """Give these modules the checkpoint's effective weights, rounded once to the model's dtype."""
    for path in modules:
        module = model.get_submodule(path)
        for name, weight in checkpoint.module(path).items():
            getattr(module, name).copy_(weight)


def load_tokenizer(folder: Path = BASE) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the end-of-text token for padding where it has none of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def supervised_losses(model: PreTrainedModel, examples: list[Example], pad: int) -> torch.Tensor:
    """Cross-entropy in nats of every supervised token of `examples`, float32, in one dimension.

    Only supervised positions pass through the output layer: its vocabulary is what makes logits dear.
    """
    device = next(model.parameters()).device
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad)
    present = torch.zeros_like(ids)
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        present[row, :end] = 1
        supervised[row, :end] = torch.tensor(example.supervised)
    ids, present, targets = ids.to(device), present.to(device), supervised[:, 1:].to(device)
    select = model.get_output_embeddings().register_forward_pre_hook(lambda _, hidden: hidden[0][:, :-1][targets])
    try:
        logits = model(input_ids=ids, attention_mask=present, use_cache=False).logits
    finally:
        select.remove()
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][targets], reduction="none")
