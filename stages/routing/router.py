"""Which stage a prompt is for: multinomial logistic regression on hidden states of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from stages.models.losses import pad
from stages.records.record import Record
from stages.records.tokens import Example, turns
from stages.routing.modeling_routed import decide, mean_hidden

BATCH = 16  # prompts that pass through the base at once
LEAST = 0.5  # threshold; below it another choice, or none, could be as likely
TRIED = 100  # thresholds from there to 1


@dataclass(frozen=True)
class Router:
    """Of hidden states h: the choice with the largest softmax(weight·h + bias), if that is at least `threshold`.

    Attributes:
        weight: float32 [choices + 1, width]; the last row is for no choice.
        bias: float32 [choices + 1].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    threshold: float

    def choose(self, hidden: torch.Tensor) -> torch.Tensor:
        """The number of each choice from 1, and 0 for none; int64 [prompts], of float32 [prompts, width]."""
        return decide(hidden, self.weight, self.bias, self.threshold)


def fit(hidden: torch.Tensor, labels: torch.Tensor, tuning: torch.Tensor, tuning_labels: torch.Tensor) -> Router:
    """Train a router.

    The weights minimise Σ cross-entropy + ½‖W‖² over standardised hidden states (ridge-penalised logistic regression
    by L-BFGS, in float64). The threshold gets the most tuning prompts right; of equals it is the one in the middle.

    Args:
        hidden: of the training prompts, float32 [prompts, width].
        labels: the number of each one's choice from 1, and 0 for none; int64 [prompts].
        tuning: as `hidden`, of prompts that the weights have not seen.
        tuning_labels: as `labels`.
    """
    rows = int(labels.max()) + 1
    mean, scale = hidden.double().mean(0), hidden.double().std(0).clamp_min(torch.finfo(torch.float32).tiny)
    standard, classes = (hidden.double() - mean) / scale, (labels - 1) % rows  # none is the last
    weight = torch.zeros(rows, hidden.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(rows, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        likelihood = torch.nn.functional.cross_entropy(standard @ weight.T + bias, classes, reduction="sum")
        total = likelihood + weight.square().sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    scaled = weight.detach() / scale
    found = scaled.float(), (bias.detach() - scaled @ mean).float()
    tried = torch.linspace(LEAST, 1, TRIED + 1, dtype=torch.float64)[:-1]
    right = torch.stack([(decide(tuning, *found, float(each)) == tuning_labels).sum() for each in tried])
    equals = tried[right == right.max()]
    return Router(*found, round(float(equals[len(equals) // 2]), 3))


def prompt_ids(record: Record, tokenizer: Any) -> list[int]:
    """Token ids of what a record asks; of one that asks nothing, such as a text, all of it."""
    turn = turns(record, tokenizer)[-1]
    return turn.asked.ids if {"prompt", "messages"} & record.keys() else turn.asked.ids + turn.answered.ids


def hidden_states(model: Any, prompts: list[list[int]], filler: int) -> torch.Tensor:
    """The mean hidden state of each prompt at the layer of the base that is looked at, float32 [prompts, width].

    Args:
        model: the base.
        prompts: token ids.
        filler: a token id.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, torch.Tensor] = {}
    for start in tqdm(range(0, len(order), BATCH), desc="read prompts", unit="batch", dynamic_ncols=True):
        rows = order[start : start + BATCH]
        batch = pad([Example(prompts[i], [0.0] * len(prompts[i])) for i in rows], filler, model.device)
        found |= zip(rows, mean_hidden(model, batch.ids, batch.present).cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(prompts))])
