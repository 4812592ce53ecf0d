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


@torch.no_grad()
def mean_hidden(model: Any, layer: str, ids: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of a layer's hidden states over the tokens of each prompt; float32 [prompts, width].

    Args:
        model: runs up to the layer.
        layer: its name, such as `model.layers.15`.
        ids: of tokens, [prompts, length].
        present: 1 where there is one, [prompts, length]; without it there is one everywhere.
    """
    present = torch.ones_like(ids) if present is None else present
    inputs = {"input_ids": ids, "attention_mask": present, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (present.cumsum(-1) - 1).clamp_min(0)  # as generate() has them

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        raise Reached(output[0] if isinstance(output, tuple) else output)

    hook = model.get_submodule(layer).register_forward_hook(stop)
    try:
        model(**inputs)
    except Reached as reached:
        weights = present.unsqueeze(-1).float()
        return (reached.args[0].float() * weights).sum(1) / weights.sum(1)
    finally:
        hook.remove()
    raise ValueError(f"{layer} is no layer that the model runs through")


class Routed:
    """Gives a model, of which it is a base class before the model's own, the changes and the router of `config.routed`.

    That has `choices` (names of the stages, of which the first is number 1), `layer`, `width`, `threshold`, and
    `changes`: by module, then by number, the arguments of `LowRank`, or nothing where another module takes its place.
    """

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the model's own
        settings = config.routed
        self.rows: dict[int, Any] | None = None  # of prompts that get a change, by its number; None: not chosen yet
        self.prompts = 0
        self.router = nn.Linear(settings["width"], len(settings["choices"]) + 1)  # the last is for none
        for path, changes in sorted(settings["changes"].items(), key=lambda item: len(item[0])):  # outer ones first
            module = self.get_submodule(path)  # type: ignore[attr-defined]
            made = {key: LowRank(**form) if form else copy.deepcopy(module) for key, form in changes.items()}
            module.changes = nn.ModuleDict(made)
            module.forward = functools.partial(self._run, module, module.forward)

    @torch.no_grad()
    def choose(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The number of each prompt's change, and 0 for none; int64 [prompts].

        A change is chosen where its probability is the largest and at least `threshold`.
        """
        with self.chosen(torch.zeros(len(input_ids), dtype=torch.long)):
            return self.decide(mean_hidden(self, self.config.routed["layer"], input_ids, attention_mask))

    @torch.no_grad()
    def decide(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `choose` chooses for prompts of these mean hidden states, float32 [prompts, width]."""
        likely, best = self.router(hidden).softmax(-1)[:, :-1].max(-1)
        return torch.where(likely >= self.config.routed["threshold"], best + 1, 0)

    @contextmanager
    def chosen(self, numbers: torch.Tensor) -> Iterator[None]:
        """Within the block each prompt of a batch gets the change of that number, [prompts]; the router has no say.

        Raises:
            ValueError: what has changes was replaced since the model was made, as quantisation does.
        """
        find: Any = self.get_submodule  # type: ignore[attr-defined]
        if lost := [path for path in self.config.routed["changes"] if not hasattr(find(path), "changes")]:
            raise ValueError(f"{lost[0]} was replaced, and its changes are lost; load the model without quantisation")
        before, chosen = (self.rows, self.prompts), numbers.tolist()
        self.prompts = len(chosen)
        self.rows = {
            number: slice(None) if chosen.count(number) == len(chosen) else (numbers == number).nonzero()[:, 0]
            for number in sorted(set(chosen))
        }
        try:
            yield
        finally:
            self.rows, self.prompts = before

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's own forward; without past keys and values, all that it is given is the prompt to choose for.

        Raises:
            ValueError: it is to go on from past keys and values, and nobody says what was chosen.
        """
        if self.rows is not None:
            return super().forward(*inputs, **named)  # type: ignore[misc]
        past = named.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError("call it within `with model.chosen(model.choose(prompt)):`, so that the choice is kept")
        with self.chosen(self._choice(inputs[0] if inputs else None, named)):
            return super().forward(*inputs, **named)  # type: ignore[misc]

    def generate(self, inputs: torch.Tensor | None = None, *others: Any, **named: Any) -> Any:
        """The model's own generate; each prompt is chosen for once."""
        if self.rows is not None:
            return super().generate(inputs, *others, **named)  # type: ignore[misc]
        with self.chosen(self._choice(inputs, named)):
            return super().generate(inputs, *others, **named)  # type: ignore[misc]

    def _choice(self, ids: torch.Tensor | None, named: dict[str, Any]) -> torch.Tensor:
        ids = named.get("input_ids") if ids is None else ids
        if ids is None:
            raise ValueError("the router reads input_ids; give them, or say what is chosen: `with model.chosen(…):`")
        return self.choose(ids, named.get("attention_mask"))

    def _run(self, module: Any, forward: Any, *inputs: Any, **named: Any) -> Any:
        """What a module gives for each prompt, after the change that was chosen for it."""
        chosen = {number: places for number, places in (self.rows or {}).items() if str(number) in module.changes}
        changes = {number: module.changes[str(number)] for number in chosen}
        for number, change in changes.items():
            if isinstance(chosen[number], slice) and not isinstance(change, LowRank):
                return change(*inputs, **named)
        output = forward(*inputs, **named)
        for number, change in changes.items():
            places = chosen[number]
            if isinstance(places, slice):
                return change(output, *inputs)
            own = [self._of(places, value) for value in inputs]
            if isinstance(change, LowRank):
                changed = change(self._of(places, output), *own)
            else:
                changed = change(*own, **{key: self._of(places, value) for key, value in named.items()})
            output = output.clone()
            # Beams of a prompt, and its tokens where a model has all of a batch in a row, follow each other.
            by_prompt = output.view(self.prompts, -1, *output.shape[1:])
            by_prompt[places] = changed.view(len(places), -1, *output.shape[1:])
        return output

    def _of(self, places: torch.Tensor, value: Any) -> Any:
        """The part of some prompts, of what has a part for each."""
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) % self.prompts:
            return value
        return value.view(self.prompts, -1, *value.shape[1:])[places].flatten(0, 1)


def routed(base_config: Any, base_model: Any) -> tuple[Any, Any]:
    """The config and the model that route, as classes, of a base's own."""

    class RoutedConfig(base_config):
        model_type = f"routed_{base_config.model_type}"
        routed: dict[str, Any] | None = None

    class RoutedForCausalLM(Routed, base_model):
        config_class = RoutedConfig
        _keep_in_fp32_modules_strict = [*(base_model._keep_in_fp32_modules_strict or []), "router"]

        @functools.wraps(base_model.forward)  # transformers reads what it takes
        def forward(self, *inputs: Any, **named: Any) -> Any:
            return super().forward(*inputs, **named)

    return RoutedConfig, RoutedForCausalLM
