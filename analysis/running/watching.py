"""What a running model makes of texts, and how far two of them are apart, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    """What a model made of one text. Where it has no such thing, as a recurrent layer has no attention, there is NaN.

    Attributes:
        hidden: the embeddings, then the output of every layer, the last one normalised; float32 [layers + 1, tokens,
            width].
        attention: where each token looks, float32 [layers, heads, tokens, tokens]; rows sum to 1. `heads` is 0 where
            no layer has attention.
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
    with _seen_in(model, ids.shape) as seen:
        logits = model(input_ids=ids, output_attentions=True, use_cache=False).logits
    head = _head(model)
    # Where a model scales or caps what its output layer gives, the lens does too.
    speak = head if torch.equal(head(seen.first).float(), logits.float()) else partial(_own_logits, model)
    hidden, attention, written = seen.hidden(), seen.attention(), seen.written()
    return [
        Activations(
            hidden[:, row, :end],
            attention[:, row, :, :end, :end],
            {name: values[:, row, :end] for name, values in written.items()},
            _lens(model, hidden[1:, row, :end][first:-1], seen.last[row, :end], speak),
        )
        for row, end in enumerate(map(len, texts))
    ]


class _Seen:
    """What passes through a model: the outputs of its layers and of their parts.

    Attributes:
        outputs: the embeddings, then the output of each layer; float32 [texts, tokens, width].
        last: what the output layer reads, normalised, in some models of another width; the same.
        first: of this the first position, as it is read.
    """

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []
        self.last = self.first = torch.empty(0)
        self._written: dict[str, dict[int, torch.Tensor]] = {}  # by part and layer, [texts, tokens]
        self._attention: dict[int, torch.Tensor] = {}  # by layer, [texts, heads, tokens, tokens]

    def add(self, name: str, layer: int, output: Any) -> None:
        """Keep the size of what a part adds to the hidden states, and its attention if it has one."""
        found = (output,) if isinstance(output, torch.Tensor) else output
        incoming = self.outputs[layer]
        texts, tokens, width = incoming.shape
        if found[0].shape[-1] == width and found[0].numel() == incoming.numel():  # else it is read by another part
            size = found[0].reshape(texts, tokens, width).float().norm(dim=-1).cpu()
            self._written.setdefault(name, {})[layer] = _ratio(size, incoming.norm(dim=-1))
        for each in found[1:]:
            if isinstance(each, torch.Tensor) and each.dim() == 4 and each.shape[-2:] == (tokens, tokens):
                self._attention[layer] = each.float().cpu()

    def hidden(self) -> torch.Tensor:
        """[layers + 1, texts, tokens, width] with `last` in the place of the last layer's output."""
        own = self.outputs[-1]
        return torch.stack([*self.outputs[:-1], self.last if self.last.shape == own.shape else own])

    def attention(self) -> torch.Tensor:
        """[layers, texts, heads, tokens, tokens]."""
        texts, tokens, _ = self.outputs[0].shape
        heads = max((each.shape[1] for each in self._attention.values()), default=0)
        whole = torch.full((len(self.outputs) - 1, texts, heads, tokens, tokens), torch.nan)
        for layer, each in self._attention.items():
            whole[layer, :, : each.shape[1]] = each
        return whole

    def written(self) -> dict[str, torch.Tensor]:
        """[layers, texts, tokens] by part."""
        nothing = torch.full(self.outputs[0].shape[:2], torch.nan)
        layers = range(len(self.outputs) - 1)
        return {name: torch.stack([each.get(i, nothing) for i in layers]) for name, each in self._written.items()}


@contextmanager
def _seen_in(model: PreTrainedModel, shape: torch.Size) -> Iterator[_Seen]:
    """Collect what every layer and every part of it that has weight matrices gives, while the model runs.

    Where a model has several streams of hidden states, they are side by side in one width.

    Args:
        model: that runs.
        shape: [texts, tokens].
    """
    seen, hooks, layers = _Seen(), [], list(model.get_submodule(layer_stack(model)).children())

    def states(found: torch.Tensor) -> torch.Tensor:
        found = found if found.shape[:2] == shape else found.movedim(0, 2)  # Gemma 3n has its streams first
        return found.flatten(2).float().cpu()

    def came_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while len(seen.outputs) <= number:  # Mllama goes past the layers that see images
            seen.outputs.append(states(args[0] if args else kwargs["hidden_states"]))

    def went_out(_: nn.Module, args: Any, output: Any) -> None:
        seen.outputs.append(states(output if isinstance(output, torch.Tensor) else output[0]))

    def read(_: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.outputs += seen.outputs[-1:] * (len(layers) + 1 - len(seen.outputs))
        seen.last, seen.first = args[0].float().cpu(), args[0][:, :1]
        return seen.first  # nobody looks at the other logits

    hooks.append(_head(model).register_forward_pre_hook(read))
    for number, layer in enumerate(layers):
        hooks += [
            layer.register_forward_pre_hook(lambda _, *given, at=number: came_in(at, *given), with_kwargs=True),
            layer.register_forward_hook(went_out),
        ]
        hooks += [
            part.register_forward_hook(lambda _, args, output, at=(name, number): seen.add(at[0], at[1], output))
            for name, part in layer.named_children()
            if any(parameter.dim() == 2 for parameter in part.parameters())
        ]
    try:
        yield seen
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


def _head(model: PreTrainedModel) -> nn.Linear:
    return cast(nn.Linear, model.get_output_embeddings())


def _own_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """The logits that a model makes of what its output layer reads, [rows, positions, width]."""
    hook = _head(model).register_forward_pre_hook(lambda *_: states)
    try:
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        return cast(torch.Tensor, model(input_ids=token, use_cache=False).logits)
    finally:
        hook.remove()


def _lens(
    model: PreTrainedModel, hidden: torch.Tensor, last: torch.Tensor, speak: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What the output layer makes of the outputs of layers, and of what it does read.

    Args:
        model: whose output layer it is.
        hidden: of the layers before the last, [lens layers - 1, tokens, width].
        last: what the output layer reads, [tokens, its width]; where that is another width, it cannot read `hidden`.
        speak: makes logits of what the output layer reads.
    """
    tokens, head = len(last), _head(model)
    positions = torch.linspace(1, tokens - 1, min(LENS, tokens - 1)).round().long()
    last = last[positions].to(head.weight)[None]
    if hidden.shape[-1] != last.shape[-1]:
        own = speak(last).float().log_softmax(-1)
        return torch.cat([own.new_full((len(hidden), *own.shape[1:]), torch.nan), own])
    normed = final_norm(model)(hidden[:, positions].to(head.weight))
    return speak(torch.cat([normed, last])).float().log_softmax(-1)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The normalisation between the last layer and the output layer; one that changes nothing where there is none.

    It is the first one behind the layers: what comes before them may be the embedding's, as Bloom has one.
    """
    stack = layer_stack(model)
    paths = [path for path, module in model.named_modules() if is_norm(module) or path == stack]
    outside = [path for path in paths if place(path, stack)[0] == OUTSIDE]
    behind = outside[outside.index(stack) + 1 :] + outside[: outside.index(stack)]
    return model.get_submodule(behind[0]) if behind else nn.Identity()


def attention_of(texts: list[Activations]) -> dict[str, Any]:
    """Sink mass (share of attention that goes to the first token) and entropy in bits, by layer and head.

    `sets_in` is the first layer whose sink mass, a mean over its heads, is above SINK; None if there is none. A layer
    without attention has NaN for each head.
    """
    sink = torch.stack([each.attention[:, :, 1:, 0].mean(2) for each in texts]).mean(0)
    entropy = torch.stack([-_x_log2(each.attention)[:, :, 1:].sum(-1).mean(2) for each in texts]).mean(0)
    above = (sink.nanmean(1) > SINK).nonzero()
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
    # The others do not tell where the tokens look, and Falcon asked for it later forgets its mask.
    return load_model(checkpoint, dtype or compute_dtype(), device(), attention="eager")
