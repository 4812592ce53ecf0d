"""Models that give each prompt one of several changes of themselves, or none.

A change is what a stage with its ancestors made of the base, at full strength: mixtures of adapters that were trained
alone do worse (arXiv 2606.31413). A router looks at each prompt once, before anything is answered: at the mean of the
hidden states that a middle layer of the base makes of it.

`stages.route` copies this file beside the weights and puts the base's own classes at its end, so that plain
transformers loads them with `trust_remote_code=True`: it imports nothing of Strata.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class LowRank(nn.Module):
    """What a stage makes of a linear layer's output y of an input x: y + up·down·x + gain·y + shift.

    A LoRA has `down` [rank, in] and `up` [out, rank] alone; a DoRA has a `gain` [out], and a changed bias a `shift`
    [out].
    """

    def __init__(self, rows: int, columns: int, rank: int, gain: bool, shift: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.zeros(rank, columns)), nn.Parameter(torch.zeros(rows, rank))
        self.gain = nn.Parameter(torch.zeros(rows)) if gain else None
        self.shift = nn.Parameter(torch.zeros(rows)) if shift else None

    def forward(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output changed, of the same shape."""
        changed = output + nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        if self.gain is not None:
            changed = changed + self.gain * output
        return changed if self.shift is None else changed + self.shift


class Reached(Exception):  # noqa: N818  it is no error: nothing behind the layer is of interest
    """A layer gave its output."""


READING: ContextVar[bool] = ContextVar("reading", default=False)  # whether the run ends at the layer that is looked at
CHOICES: ContextVar[dict[int, "Choice"]] = ContextVar("choices")  # by model; of each thread its own, as READING


def look_at(layer: nn.Module) -> None:
    """Let `mean_hidden` end a run of the model at one of its layers; this changes no other run."""

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        if READING.get():
            raise Reached(output[0] if isinstance(output, tuple) else output)

    layer.register_forward_hook(stop)


@torch.no_grad()
def mean_hidden(model: Any, ids: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """The mean, over the tokens of each prompt, of what the layer given to `look_at` makes; float32 [prompts, width].

    Args:
        model: runs up to the layer.
        ids: of tokens, [prompts, length].
        present: 1 where there is one, [prompts, length]; without it there is one everywhere.
    """
    present = torch.ones_like(ids) if present is None else present
    inputs = {"input_ids": ids, "attention_mask": present, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (present.cumsum(-1) - 1).clamp_min(0)  # as generate() has them
    token = READING.set(True)
    try:
        model(**inputs)
    except Reached as reached:
        weights = present.unsqueeze(-1).float()
        return (reached.args[0].float() * weights).sum(1) / weights.sum(1).clamp_min(1)
    finally:
        READING.reset(token)
    raise ValueError("the model does not run through the layer that is looked at")


def decide(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threshold: float) -> torch.Tensor:
    """The likeliest choice, from 1, by softmax(weight·hidden + bias), where that is at least `threshold`; else 0.

    Args:
        hidden: float32 [prompts, width].
        weight: float32 [choices + 1, width]; the last row is for none.
        bias: float32 [choices + 1].
        threshold: a probability.
    """
    likely, best = nn.functional.linear(hidden, weight, bias).softmax(-1)[:, :-1].max(-1)
    return torch.where(likely >= threshold, best + 1, 0)


@dataclass
class Choice:
    """What was chosen for the prompts of a batch.

    Attributes:
        rows: places of the prompts that get a change, by its number; all of them as a slice. None: not chosen yet.
        prompts: how many there are.
    """

    rows: dict[int, Any] | None = None
    prompts: int = 0

    def make(self, numbers: torch.Tensor) -> None:
        """Choose a number for each prompt, int64 [prompts]."""
        chosen = numbers.tolist()
        self.prompts = len(chosen)
        self.rows = {
            number: slice(None) if chosen.count(number) == len(chosen) else (numbers == number).nonzero()[:, 0]
            for number in sorted(set(chosen))
        }


class Routed:
    """Gives a model, of which it is a base class before the model's own, the changes and the router of `config.routed`.

    That has `choices` (names of the stages, of which the first is number 1), `layer`, `width`, `threshold`, and
    `changes`: by module, then by number, the arguments of `LowRank`, or nothing where another module takes its place.
    """

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the model's own
        settings = config.routed
        self.router = nn.Linear(settings["width"], len(settings["choices"]) + 1)  # the last is for none
        for path, changes in sorted(settings["changes"].items(), key=lambda item: len(item[0])):  # outer ones first
            module = self.get_submodule(path)  # type: ignore[attr-defined]
            made = {key: LowRank(**form) if form else copy.deepcopy(module) for key, form in changes.items()}
            module.changes = nn.ModuleDict(made)
            module.forward = functools.partial(self._run, module, module.forward)
        look_at(self.get_submodule(settings["layer"]))  # type: ignore[attr-defined]

    @torch.no_grad()
    def choose(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The number of each prompt's change, and 0 for none; int64 [prompts].

        A change is chosen where its probability is the largest and at least `threshold`.
        """
        with self.chosen(torch.zeros(len(input_ids), dtype=torch.long)):
            return self.decide(mean_hidden(self, input_ids, attention_mask))

    @torch.no_grad()
    def decide(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `choose` chooses for prompts of these mean hidden states, float32 [prompts, width]."""
        threshold = self.config.routed["threshold"]
        return decide(hidden, self.router.weight.float(), self.router.bias.float(), threshold)

    @contextmanager
    def chosen(self, numbers: torch.Tensor) -> Iterator[None]:
        """Within the block each prompt of a batch gets the change of that number, int64 [prompts], and no other.

        Raises:
            ValueError: there is no such number; or what has changes was replaced since the model was made.
        """
        known = len(self.config.routed["choices"])
        if not ((numbers >= 0) & (numbers <= known)).all():
            raise ValueError(f"choices are numbers from 0, for none, to {known}, and not {numbers.tolist()}")
        with self._holding() as choice:
            choice.make(numbers)
            yield

    def forward(self, **named: Any) -> Any:
        """The model's own forward; without past keys and values, all that it is given is the prompt to choose for.

        Raises:
            ValueError: it is to go on from past keys and values, and nobody says what was chosen; or there are no ids.
        """
        choice = CHOICES.get({}).get(id(self))
        if choice is None:
            with self._holding():
                return self.forward(**named)
        if choice.rows is None:
            past, ids = named.get("past_key_values"), named.get("input_ids")
            if past is not None and past.get_seq_length():
                raise ValueError("go on within `with model.chosen(model.choose(prompt)):`, so that the choice is kept")
            if ids is None:
                raise ValueError("the router reads input_ids; give them, or choose: `with model.chosen(…):`")
            choice.make(self.choose(ids, named.get("attention_mask")))
        return super().forward(**named)  # type: ignore[misc]

    def generate(self, *inputs: Any, **named: Any) -> Any:
        """The model's own generate; each prompt is chosen for once, when it is first read."""
        if id(self) in CHOICES.get({}):
            return super().generate(*inputs, **named)  # type: ignore[misc]
        with self._holding():
            return super().generate(*inputs, **named)  # type: ignore[misc]

    @contextmanager
    def _holding(self) -> Iterator[Choice]:
        """Within the block a choice, once it is made, stays."""
        find: Any = self.get_submodule  # type: ignore[attr-defined]
        if lost := [path for path in self.config.routed["changes"] if not hasattr(find(path), "changes")]:
            raise ValueError(f"{lost[0]} was replaced, and its changes are lost; load the model without quantisation")
        choice = Choice()
        token = CHOICES.set(CHOICES.get({}) | {id(self): choice})
        try:
            yield choice
        finally:
            CHOICES.reset(token)

    def _run(self, module: Any, forward: Any, *inputs: Any, **named: Any) -> Any:
        """What a module gives for each prompt, after the change that was chosen for it."""
        choice = CHOICES.get({}).get(id(self)) or Choice()
        chosen = {number: places for number, places in (choice.rows or {}).items() if str(number) in module.changes}
        changes = {number: module.changes[str(number)] for number in chosen}
        for number, change in changes.items():
            if isinstance(chosen[number], slice) and not isinstance(change, LowRank):
                return change(*inputs, **named)
        output = forward(*inputs, **named)
        for number, change in changes.items():
            places = chosen[number]
            if isinstance(places, slice):
                return change(output, *inputs)
            own = [_of(places, value, choice.prompts) for value in inputs]
            if isinstance(change, LowRank):
                changed = change(_of(places, output, choice.prompts), *own)
            else:
                changed = change(*own, **{key: _of(places, value, choice.prompts) for key, value in named.items()})
            output = output.clone()
            # Beams of a prompt, and its tokens where a model has all of a batch in a row, follow each other.
            by_prompt = output.view(choice.prompts, -1, *output.shape[1:])
            by_prompt[places] = changed.view(len(places), -1, *output.shape[1:])
        return output


def _of(places: torch.Tensor, value: Any, prompts: int) -> Any:
    """The part of some prompts, of what has a part for each of so many."""
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) % prompts:
        return value
    return value.view(prompts, -1, *value.shape[1:])[places].flatten(0, 1)


def routed(base_config: Any, base_model: Any) -> tuple[Any, Any]:
    """The config and the model that route, as classes, of a base's own."""
    signature = inspect.signature(base_model.forward)
    others = next((each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), "")

    class RoutedConfig(base_config):
        model_type = f"routed_{base_config.model_type}"
        routed: dict[str, Any] | None = None

    class RoutedForCausalLM(Routed, base_model):
        config_class = RoutedConfig
        _keep_in_fp32_modules_strict = [*(base_model._keep_in_fp32_modules_strict or []), "router"]

        @functools.wraps(base_model.forward)  # transformers reads what it takes
        def forward(self, *inputs: Any, **named: Any) -> Any:  # type: ignore[override]
            given = dict(signature.bind_partial(self, *inputs, **named).arguments)
            del given["self"]
            return Routed.forward(self, **given.pop(others, {}), **given)

    return RoutedConfig, RoutedForCausalLM
