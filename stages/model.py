"""A running model from a virtual checkpoint, and its logits at the tokens that count."""

import warnings
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Batch:
    """Padded examples: token ids, where there is one, and its weight in the loss, all [examples, length]."""

    ids: torch.Tensor
    present: torch.Tensor
    weights: torch.Tensor


def pad(examples: list[Example], filler: int, device: torch.device | str = "cpu") -> Batch:
    """Put examples into one batch, `filler` (a token id) after the short ones."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), filler)
    present = torch.zeros_like(ids)
    weights = torch.zeros(ids.shape)
    for row, example in enumerate(examples):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        present[row, :end] = 1
        weights[row, :end] = torch.tensor(example.weights)
    return Batch(ids.to(device), present.to(device), weights.to(device))


def token_losses(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of every token with a weight, and these weights: float32, in one dimension.

    Only such positions pass through the output layer: its vocabulary is what makes logits dear.
    """
    targets = batch.weights[:, 1:] != 0
    select = model.get_output_embeddings().register_forward_pre_hook(lambda _, hidden: hidden[0][:, :-1][targets])
    try:
        logits = model(input_ids=batch.ids, attention_mask=batch.present, use_cache=False).logits
    finally:
        select.remove()
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.ids[:, 1:][targets], reduction="none")
    return losses, batch.weights[:, 1:][targets]
