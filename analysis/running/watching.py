"""What a running model makes of texts, and how far two of them are apart, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from stages.models.architecture import OUTSIDE, is_norm, layer_stack, place
from stages.models.loading import Weights, compute_dtype, device, load_model

LENS = 4  # positions of a text that the output layer looks at
SINK = 0.3  # attention to the first token from which a layer is said to have the sink
RESAMPLES = 1000
Layered = torch.Tensor  # float32 [layers]


@dataclass(frozen=True)
class Activations:
    """What a model made of one text.

    Attributes:
        hidden: the embeddings, then the output of every layer, the last one normalised; float32 [layers + 1, tokens,
            width].
        attention: where each token looks, float32 [layers, heads, tokens, tokens]; rows sum to 1.
        written: what each part of a layer, such as its MLP, adds to the hidden states, over the size of those that come
            into the layer, by name; float32 [layers, tokens].
        lens: log-probabilities of the next token if a layer were the last, at LENS positions; float32 [lens layers,
            positions, vocabulary], on the model's device.
    """

    hidden: torch.Tensor
    attention: torch.Tensor
    written: dict[str, torch.Tensor]
    lens: torch.Tensor


@torch.inference_mode()
def watch(model: PreTrainedModel, texts: list[torch.Tensor], first: int = -1) -> list[Activations]:
    """Run a model with eager attention on texts, all at once: what is filled in stands after them, where none looks.

    The logit lens looks at the layers from `first` on.
    """
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)
    with _sizes_of_outputs(model) as sizes:
        # Without the output layer, whose logits nobody looks at here.
        output = model.base_model(input_ids=ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    hidden, attention = (torch.stack(each).float().cpu() for each in (output.hidden_states, output.attentions))
    incoming = hidden[:-1].norm(dim=-1)
    written = {
        name: _ratio(torch.stack(each).cpu(), incoming) for name, each in sizes.items()
    }  # [layers, texts, tokens]
    return [
        Activations(
            hidden[:, row, :end],
            attention[:, row, :, :end, :end],
            {name: values[:, row, :end] for name, values in written.items()},
            _lens(model, hidden[1:, row, :end][first:]),
        )
        for row, end in enumerate(map(len, texts))
    ]


@contextmanager
def _sizes_of_outputs(model: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect ‖output‖ [texts, tokens] of every part of every layer that has weight matrices, by its name."""
    sizes: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        sizes.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).float().norm(dim=-1))

    hooks = [
        part.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
        for layer in model.get_submodule(layer_stack(model)).children()
        for name, part in layer.named_children()
        if any(parameter.dim() == 2 for parameter in part.parameters())
    ]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def drift(before: Activations, after: Activations) -> Layered:
    """Median over tokens of ‖h'−h‖/‖h‖ after each layer, without the first token: its norm is 100 times the others'."""
    old, new = before.hidden[1:, 1:], after.hidden[1:, 1:]
    return _ratio((new - old).norm(dim=-1), old.norm(dim=-1)).median(dim=1).values


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`part` over `whole`, and 0 where that is 0: a text of unknown tokens, if they are padding, has states of zero."""
    return torch.where(whole > 0, part / whole, 0.0)


def lens_divergence(before: Activations, after: Activations) -> Layered:
    """KL(base ‖ model) in nats of the next token, if a layer were the last: for all that `after` has a lens of."""
    log_p, log_q = before.lens[-len(after.lens) :], after.lens
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).cpu()


def _lens(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the output layer makes of hidden states [lens layers, tokens, width], of which the last are normalised."""
    tokens, head = hidden.shape[1], cast(nn.Linear, model.get_output_embeddings())
    positions = torch.linspace(1, tokens - 1, min(LENS, tokens - 1)).round().long()
    hidden = hidden[:, positions].to(head.weight)
    normed = torch.cat([final_norm(model)(hidden[:-1]), hidden[-1:]])
    return head(normed).float().log_softmax(-1)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The normalisation between the last layer and the output layer."""
    stack = layer_stack(model)
    return next(m for path, m in model.named_modules() if is_norm(m) and place(path, stack)[0] == OUTSIDE)


def attention_of(texts: list[Activations]) -> dict[str, Any]:
    """Sink mass (share of attention that goes to the first token) and entropy in bits, by layer and head.

    `sets_in` is the first layer whose sink mass, a mean over its heads, is above SINK; None if there is none.
    """
    sink = torch.stack([each.attention[:, :, 1:, 0].mean(2) for each in texts]).mean(0)
    entropy = torch.stack([-_x_log2(each.attention)[:, :, 1:].sum(-1).mean(2) for each in texts]).mean(0)
    above = (sink.mean(1) > SINK).nonzero()
    return {"sink": sink.tolist(), "entropy": entropy.tolist(), "sets_in": int(above[0]) if len(above) else None}


def written(texts: list[Activations]) -> dict[str, list[float]]:
    """What each part of each layer adds to the hidden states, over their size: medians over tokens but the first."""
    medians = {
        name: torch.stack([each.written[name][:, 1:].median(1).values for each in texts]) for name in texts[0].written
    }
    return {name: values.mean(0).tolist() for name, values in medians.items()}


def attention_divergence(before: Activations, after: Activations) -> torch.Tensor:
    """Jensen-Shannon divergence in bits of where the tokens look, float32 [layers, heads]."""
    p, q = before.attention[:, :, 1:], after.attention[:, :, 1:]
    middle = (p + q) / 2
    return ((_x_log2(p) + _x_log2(q)) / 2 - _x_log2(middle)).sum(-1).mean(-1)


def _x_log2(values: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(values, values) / np.log(2)


def interval(values: torch.Tensor) -> dict[str, Any]:
    """Mean over texts [texts, …] and its 95 % bootstrap interval."""
    numbers = values.double().numpy()
    drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.percentile(numbers[drawn].mean(1), [2.5, 97.5], axis=0)
    return {"mean": numbers.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}


def load_eager(checkpoint: Weights, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model that tells where its tokens look."""
    model = load_model(checkpoint, dtype or compute_dtype(), device())
    model.set_attn_implementation("eager")  # the others do not tell where the tokens look
    return model
