"""Losses of the tokens that count."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.models.architecture import layer_stack
from stages.records.tokens import Example


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


CHUNK = 512  # tokens whose logits are in memory at once
RESCALED = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # configs of models that change their logits


def token_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of every token with a weight, and these weights: float32, in one dimension.

    Only the positions before such a token pass through the last MLP and the output layer, CHUNK of them at a time
    through the latter, for the vocabulary makes logits dear.
    """
    asked = torch.zeros_like(batch.present, dtype=torch.bool)
    asked[:, :-1] = batch.weights[:, 1:] != 0
    words, weights = batch.ids.roll(-1, 1)[asked], batch.weights.roll(-1, 1)[asked]
    chunked = not any(getattr(model.config, key, None) for key in RESCALED)
    hidden: list[torch.Tensor] = []

    def select(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        hidden.append(inputs[0][asked])
        return hidden[0][:0] if chunked else hidden[0]

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select)
    try:
        with _last_mlp_for(asked, model):
            logits = model(input_ids=batch.ids, attention_mask=batch.present, use_cache=False).logits
    finally:
        hook.remove()
    if not chunked:
        return _cross_entropy(logits, words), weights
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        return _FrozenHead.apply(hidden[0], words, head), weights

    def losses(part: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(head(part), words)

    parts = zip(hidden[0].split(CHUNK), words.split(CHUNK), strict=True)
    return torch.cat([checkpoint(losses, part, word, use_reentrant=False) for part, word in parts]), weights


@contextmanager
def _last_mlp_for(asked: torch.Tensor, model: Any) -> Iterator[None]:
    """Within the block the last layer's MLP computes the positions `asked` [examples, length] alone.

    What it gives at the others reaches no output. Left as they are: experts, whose router counts all tokens, and layers
    that checkpointing computes again, after the block.
    """
    mlp = getattr(model.get_submodule(layer_stack(model))[-1], "mlp", None)
    if mlp is None or hasattr(mlp, "experts") or model.is_gradient_checkpointing:
        yield
        return
    forward = mlp.forward

    def narrowed(hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        if more:  # such as Bloom's, which gets the residual and adds it
            return forward(hidden, *more)
        found = forward(hidden[asked][None])
        return found.new_zeros(hidden.shape).index_put((asked,), found[0])

    mlp.forward = narrowed
    try:
        yield
    finally:
        del mlp.forward  # the class's own is seen again


class _FrozenHead(torch.autograd.Function):
    """Cross-entropy of hidden states [tokens, width] under a linear output layer that is not trained.

    A token's loss log Σexp(z) - z[word] depends on its own hidden state alone, so its gradient (softmax(z) - e[word])·W
    is taken together with it, in the memory of its logits z. They are [vocabulary, tokens]: on a CPU that
    product takes two thirds of the time of the other way round.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, words: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        losses, gradients = [], []
        for part, word in zip(hidden.split(CHUNK), words.split(CHUNK), strict=True):
            logits = (head.weight @ part.T).float()
            if head.bias is not None:
                logits += head.bias[:, None]
            own, largest = logits.gather(0, word[None])[0], logits.amax(0)
            total = logits.sub_(largest).exp_().sum(0)
            losses.append(total.log() + largest - own)
            if hidden.requires_grad:
                logits[word, torch.arange(len(word))] -= total
                gradients.append(logits.T.to(head.weight.dtype) @ head.weight / total[:, None])
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * weights[:, None].to(gradients.dtype), None, None


def _cross_entropy(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), words, reduction="none")
