"""The training loop: steps, gradients, the best weights, and a state to go on from after a kill.

Several `processes` divide the examples of every step and add their gradients, so their number changes the result by
rounding alone. What is trained is small beside the model, so each holds all of it; of the frozen weights too, unless
the launcher divides them (`stages.training.shard`).
"""

import math
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import get_scheduler

from stages.errors import MistakeError, placed
from stages.methods.copies import COPY
from stages.models.loading import load_tokenizer
from stages.models.losses import pad, token_losses
from stages.records.tokens import Example
from stages.settings.stage import Training
from stages.training.batches import Source
from stages.training.prefix import Prefix
from stages.training.protection import PREFIX, Protection
from stages.training.resume import load_state, random_states, save_state, set_random_states
from stages.training.surgery import combine

CHECK_EVERY = 10  # steps; a state is a few times the adapter, so saving costs little beside training

Curve = list[dict[str, float]]


def fit(
    model: Any,
    stage: Training,
    sources: list[Source],
    seed: int,
    accelerator: Accelerator,
    work: Path,
    prefix: Prefix | None = None,
    tuning: list[Example] | None = None,
    title: str = "",
    tell: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train the model in place and return its loss curve, going on from the state in `work` if there is one.

    Every CHECK_EVERY steps `tell` gets the curve so far; a tracker of the accelerator gets every point.

    With `keep: best` the model ends with the weights that had the lowest loss on the examples of `tuning`.

    Raises:
        MistakeError: the loss is no longer finite.
    """
    training = Run(model, stage, accelerator, prefix)
    curve = training.restore(work)
    if not curve:
        # The start of a step is where resuming happens, so the first start is made alike.
        set_seed(seed)
    quiet = not accelerator.is_main_process
    bar = tqdm(total=stage.steps, initial=len(curve), desc=title, unit="step", dynamic_ncols=True, disable=quiet)
    while len(curve) < stage.steps and not is_stale(curve, stage.patience):
        with placed(f"params.yaml: stages.{title}."):
            point = training.step([source.batch(len(curve)) for source in sources], len(curve))
        if not math.isfinite(point["loss"]):
            raise MistakeError(
                f"params.yaml: stages.{title}.lr {stage.lr} made the loss infinite at step {len(curve) + 1}; lower it"
            )
        curve.append({"step": len(curve) + 1} | point)
        if len(curve) % CHECK_EVERY == 0 or len(curve) == stage.steps:
            if tuning:
                training.check(tuning, curve)
            training.save(work, curve)
            tell(curve)
        accelerator.log({key: value for key, value in curve[-1].items() if key != "step"}, step=len(curve))
        bar.set_postfix(loss=f"{point['loss']:.3f}")
        bar.update()
    bar.close()
    training.keep_best()
    return curve


def is_stale(curve: Curve, patience: int | None) -> bool:
    """Whether the tuning loss has not become lower in the last `patience` checks."""
    checks = [point["tuning_loss"] for point in curve if "tuning_loss" in point]
    return patience is not None and len(checks) > patience and min(checks[-patience:]) >= min(checks[:-patience])


class Run:
    """A model in training: its trained parameters, optimizer and schedule, and its best weights so far.

    Args:
        model: the wrapped model; what requires a gradient is trained.
        stage: its settings.
        accelerator: where it runs, and in what precision.
        prefix: what the frozen layers below make of each batch, if that is kept.
    """

    def __init__(self, model: Any, stage: Training, accelerator: Accelerator, prefix: Prefix | None = None) -> None:
        self.model, self.stage, self.accelerator, self.prefix = model, stage, accelerator, prefix
        self.trained: dict[str, torch.nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=stage.lr, weight_decay=stage.weight_decay)
        # The first step of a warm-up has a rate of 0, so the only step of a stage must not be one.
        warmup = min(math.ceil(stage.warmup * stage.steps), stage.steps - 1)
        self.schedule = get_scheduler(stage.schedule, self.optimizer, warmup, stage.steps)
        self.protection = Protection(model, stage.protect) if stage.protect else None
        self.filler = load_tokenizer().pad_token_id
        self.best: dict[str, torch.Tensor] = {}
        self._is_checked = False

    def step(self, groups: list[list[Example]], number: int) -> dict[str, float]:
        """One optimizer step, `number` from 0, on the examples of every source."""
        rate = self.schedule.get_last_lr()[0]
        loss = self.apart(groups) if self.stage.surgery and len(groups) > 1 else self.together(groups)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.stage.clip)
        self.optimizer.step()
        self.stage.stepped(self.model, number)
        if self.protection:
            self.protection()
        self.schedule.step()
        self.optimizer.zero_grad()
        tokens = sum(len(example.ids) for group in groups for example in group)
        return {"loss": loss, "lr": rate, "gradient_norm": float(norm), "tokens": tokens}

    def together(self, groups: list[list[Example]]) -> float:
        """Gradient of the mean loss Σwᵢlᵢ/Σ|wᵢ| over all tokens of all sources; returns that loss in nats."""
        learned = sum(example.learned for group in groups for example in group)
        pieces = [piece for group in groups for piece in self._pieces(group)]
        mine = pieces[self.accelerator.process_index :: self.accelerator.num_processes]
        # Where layers are divided, each needs all processes: one with nothing left to do takes part for nothing.
        idle = -(-len(pieces) // self.accelerator.num_processes) - len(mine)
        total = torch.zeros(1, device=self.accelerator.device)
        for piece, share in [(piece, 1) for piece in mine] + [(pieces[0], 0)] * idle:
            loss = self.loss(piece) * share / learned
            if loss.requires_grad:  # nothing that is trained has a part in it, such as experts that no token goes to
                self.accelerator.backward(loss)
            total += loss.detach()
        if not self._is_checked:
            self._tell_unreached()
        if self.accelerator.num_processes > 1:
            for parameter in self.trained.values():
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(found, "sum")
            total = self.accelerator.reduce(total, "sum")
        return float(total)

    def _tell_unreached(self) -> None:
        """Warn of adapters that no gradient reaches in any layer, since the model goes past them: they stay at zero.

        Not of those of experts, which the router may choose in a later step.

        Raises:
            MistakeError: one starts from the weight, which it took its start off.
        """
        self._is_checked = True
        reached: dict[str, bool] = {}
        for name, parameter in self.trained.items():
            path = name.partition(".lora_")[0]
            are_experts = getattr(self.model.get_submodule(path), "num_experts", 1) > 1 if path != name else False
            if COPY not in name and not are_experts:  # a weight that a model does not use is no worse for being trained
                kind = re.sub(r"\.\d+\.", ".*.", path.removeprefix(PREFIX))
                reached[kind] = reached.get(kind, False) or parameter.grad is not None
        if missed := [kind for kind, is_reached in reached.items() if not is_reached]:
            found = f"{', '.join(missed)} of {self.model.config.model_type} learns nothing by method"
            found += f" {self.stage.method!r}, for the loss does not depend on what is beside the weight"
            if getattr(self.stage, "init", "default") != "default":
                raise MistakeError(f"init starts from the weights, but {found}; remove init, or name others in layers")
            warnings.warn(found, stacklevel=4)

    def apart(self, groups: list[list[Example]]) -> float:
        """Combine the gradient of each source's mean loss by `surgery`; returns the mean loss over all tokens."""
        learned = [sum(example.learned for example in group) for group in groups]
        losses, rows = [], []
        for group in groups:
            losses.append(self.together([group]))
            found = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.trained.values()]
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
            self.optimizer.zero_grad()
        direction = combine(torch.stack(rows), str(self.stage.surgery))
        sizes = [parameter.numel() for parameter in self.trained.values()]
        for parameter, part in zip(self.trained.values(), direction.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        return sum(share * loss for share, loss in zip(learned, losses, strict=True)) / sum(learned)

    def loss(self, piece: list[Example]) -> torch.Tensor:
        """Σwᵢlᵢ over the tokens of some examples, in nats."""
        batch = pad(piece, self.filler, self.accelerator.device)
        with self.accelerator.autocast(), self.prefix(self.model, batch) if self.prefix else nullcontext():
            losses, weights = token_losses(self.model, batch)
        return (losses * weights).sum()

    @torch.no_grad()
    def check(self, tuning: list[Example], curve: Curve) -> None:
        """Write the loss on `tuning` into the curve's last point, and keep the weights if it is the lowest."""
        self.model.eval()
        total = sum(float(self.loss(piece)) for piece in self._pieces(tuning))
        self.model.train()
        curve[-1]["tuning_loss"] = total / sum(example.learned for example in tuning)
        if curve[-1]["tuning_loss"] == min(point.get("tuning_loss", math.inf) for point in curve):
            self.best = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def keep_best(self) -> None:
        """Go back to the best weights, where they were looked for."""
        if self.stage.keep == "best":
            for name, weights in self.best.items():
                self.trained[name].copy_(weights)

    def save(self, work: Path, curve: Curve) -> None:
        """Write all that the next step depends on. Every process has to call it, and the main one writes."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"best/{name}": weights for name, weights in self.best.items()}
        tensors |= {f"method/{name}": values for name, values in self.stage.state(self.model).items()}
        for kind, state in random_states(self.accelerator.device).items():
            rows = self.accelerator.gather(state[None].to(self.accelerator.device))  # processes draw apart
            tensors[f"random/{kind}"] = rows.cpu()
        for name, parameter in self.trained.items():
            tensors |= {f"optimizer/{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        schedule = {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
        if self.accelerator.is_main_process:
            save_state(work, tensors, {"curve": curve, "schedule": schedule})

    @torch.no_grad()
    def restore(self, work: Path) -> Curve:
        """Read it back; the curve so far, empty at the first start."""
        saved = load_state(work)
        if saved is None:
            return []
        tensors, facts = saved

        def found(kind: str) -> dict[str, torch.Tensor]:
            return {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}

        self.best = {name: value.to(self.trained[name].device) for name, value in found("best").items()}
        for name, value in found("weight").items():
            self.trained[name].copy_(value)
        for place, value in found("optimizer").items():
            key, _, name = place.partition("/")
            parameter = self.trained[name]
            self.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        self.stage.load_state(self.model, found("method"))
        self.schedule.load_state_dict(facts["schedule"] | {"lr_lambdas": [None]})
        for group, rate in zip(self.optimizer.param_groups, facts["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        set_random_states({kind: rows[self.accelerator.process_index] for kind, rows in found("random").items()})
        return list(facts["curve"])

    def _pieces(self, group: list[Example]) -> list[list[Example]]:
        size = self.stage.micro_batch_size
        return [group[start : start + size] for start in range(0, len(group), size)]
