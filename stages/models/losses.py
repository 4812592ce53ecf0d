"""Losses of the tokens that count."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.models.architecture import layer_stack, text_config
from stages.records.record import Record
from stages.records.tokens import Example, encode


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
SEEN = 8  # positions from the start of each example that ways are compared on

Way = Literal["chunks", "asked", "whole"]  # how the losses are computed, the cheapest first


def token_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of every token with a weight, and these weights: float32, in one dimension.

    Only the positions before such a token pass through the last MLP and the output layer, CHUNK of them at a time
    through the latter, because logits are [tokens, vocabulary]. A model whose own logits differ from what that gives
    makes them itself, all at once.
    """
    asked = torch.zeros_like(batch.present, dtype=torch.bool)
    asked[:, :-1] = batch.weights[:, 1:] != 0
    words, weights = batch.ids.roll(-1, 1)[asked], batch.weights.roll(-1, 1)[asked]
    way = _way(model, batch)
    if way == "whole":
        return _cross_entropy(_run(model, batch)[asked], words), weights
    head = model.get_output_embeddings()
    with _last_mlp_for(asked, model), _head_sees(head, lambda h: h[asked], 0 if way == "chunks" else None) as hidden:
        logits = _run(model, batch)
    if way == "asked":
        return _cross_entropy(logits, words), weights
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        return _FrozenHead.apply(hidden[0], words, head), weights

    def losses(part: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(head(part), words)

    parts = zip(hidden[0].split(CHUNK), words.split(CHUNK), strict=True)
    return torch.cat([checkpoint(losses, part, word, use_reentrant=False) for part, word in parts]), weights


def _run(model: Any, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch.ids, attention_mask=batch.present, use_cache=False).logits


@contextmanager
def _head_sees(
    head: nn.Module, choose: Callable[[torch.Tensor], torch.Tensor], most: int | None = None
) -> Iterator[list[torch.Tensor]]:
    """Within the block the output layer gets what `choose` makes of its input, which is left in the list.

    Args:
        head: the output layer.
        choose: from hidden states [examples, length, width].
        most: rows of the choice that the output layer gets; the list has all of them.
    """
    chosen: list[torch.Tensor] = []

    def select(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        chosen.append(choose(inputs[0]))
        return chosen[0][:most]

    hook = head.register_forward_pre_hook(select)
    try:
        yield chosen
    finally:
        hook.remove()


def _way(model: Any, batch: Batch) -> Way:
    """The cheapest way to the losses that is right for this model, found once, on the first batch."""
    if batch.ids.shape[1] == 1:  # nothing is learned, and nothing to compare
        return "whole"
    if not hasattr(model, "way_to_losses"):
        with _undisturbed(model):
            model.way_to_losses = _compare_ways(model, batch)
        if model.way_to_losses != "chunks":
            warnings.warn(
                f"the logits of a {model.config.model_type} model are not its output layer's alone, so all those of a"
                " batch are in memory at once; smaller batches need less",
                stacklevel=3,
            )
    return model.way_to_losses


def _compare_ways(model: Any, batch: Batch) -> Way:
    """Compare each way with the model's own logits, on some positions of the batch.

    The batch and not a smaller one, because `stages.training.prefix` may stand in for the first layers, for this batch
    alone. Every other position is asked for, so that an MLP that mixes positions is seen to.
    """
    asked = batch.present.bool()
    asked[:, ::2] = False
    seen = asked.clone()
    seen[:, SEEN:] = False
    try:
        head = model.get_output_embeddings()
        with _head_sees(head, lambda hidden: hidden[:, :SEEN]):
            own = _run(model, batch)[seen[:, :SEEN]]
        with _last_mlp_for(asked, model), _head_sees(head, lambda hidden: hidden[seen]) as hidden:
            narrowed = _run(model, batch)
        product = head(hidden[0])
    except Exception:  # whatever a model of another shape raises: its own forward is all that is left
        return "whole"
    if not _are_close(narrowed, own, 0.02):  # bfloat16 differs by some thousandths where another kernel multiplies
        return "whole"
    # The same product of the same numbers: whatever differs is the model's doing, however little it is here.
    return "chunks" if _are_close(product, narrowed, 1e-6) else "asked"


def _are_close(found: torch.Tensor, truth: torch.Tensor, tolerance: float) -> bool:
    found, truth = found.float(), truth.float()
    return found.shape == truth.shape and bool((found - truth).norm() <= tolerance * truth.norm())


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Within the block nothing drops out and no gradient is kept; after it all is as before, random numbers too."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def _last_mlp_for(asked: torch.Tensor, model: Any) -> Iterator[None]:
    """Within the block the last layer's MLP computes the positions `asked` [examples, length] alone.

    What it gives at the others reaches no output. Left as they are: experts, whose router counts all tokens, and layers
    that checkpointing computes again, after the block.
    """
    mlp = getattr(model.get_submodule(layer_stack(model))[-1], "mlp", None)
    if mlp is None or hasattr(mlp, "experts") or model.is_activation_checkpointing:
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


def mean_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int
) -> float:
    """Cross-entropy in nats, averaged over the supervised tokens of `records` by their weights."""
    found = record_losses(model, tokenizer, records, batch_size)
    return sum(loss for loss, _ in found) / sum(weight for _, weight in found)


@torch.inference_mode()
def record_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int
) -> list[tuple[float, float]]:
    """Of each record Σwᵢlᵢ, the cross-entropy of its supervised tokens in nats by their weights, and Σ|wᵢ|."""
    positions = getattr(text_config(model), "max_position_embeddings", None)  # BLOOM, MPT and Mamba have no limit
    examples = [
        (place, example) for place, record in enumerate(records) for example in encode(record, tokenizer, positions)
    ]
    examples.sort(key=lambda each: len(each[1].ids))
    found = [(0.0, 0.0)] * len(records)
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        losses, weights = token_losses(
            model, pad([example for _, example in rows], tokenizer.pad_token_id, model.device)
        )
        counts = [sum(weight != 0 for weight in example.weights[1:]) for _, example in rows]
        for (place, example), own in zip(rows, (losses * weights).cpu().split(counts), strict=True):
            total, learned = found[place]
            found[place] = (total + float(own.sum()), learned + example.learned)
    return found
