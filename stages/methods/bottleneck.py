"""New neurons beside those of the MLP: a parallel adapter that becomes part of a plain model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stages.errors import MistakeError
from stages.models.architecture import describe, exactly
from stages.models.layers import linear_modules, mlp_width
from stages.settings.ranges import Range, numbers, parse
from stages.settings.stage import Stage, Training

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from stages.settings.base import Base


class Bottleneck(Training):
    """New neurons of the MLPs, made by `base.extra_neurons` (arXiv 2110.04366).

    Adds room and leaves the old weights alone; stages never collide.

    It is saved as a LoRA, one factor of which is frozen and picks the neurons: B [out, neurons] where the MLP reads the
    hidden state, and A [neurons, in] where it writes to it. So it is merged, measured and loaded like any other.
    """

    method: Literal["bottleneck"]
    neurons: Range = "all"
    """Which of the base's extra neurons, from 0: `all`, or a range such as `0-31`."""

    def check(self, name: str, base: Base, stages: dict[str, Stage], num_layers: int | None) -> None:
        """The base needs the neurons, and two stages that both give a neuron its weights would disturb each other."""
        own = chosen_neurons(self.neurons, base.extra_neurons)
        earlier = list(stages)[: list(stages).index(name)]
        for other, stage in ((other, stages[other]) for other in earlier):
            if not isinstance(stage, Bottleneck) or num_layers is None:
                continue
            layers = set(numbers(self.layers, num_layers)) & set(numbers(stage.layers, num_layers))
            if layers and set(own) & set(chosen_neurons(stage.neurons, base.extra_neurons)):
                raise MistakeError(
                    f"neurons: stage {other} has some of {self.neurons!r} too; give each its own, such as 0-31 and"
                    " 32-63, and raise base.extra_neurons if they are too few"
                )

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LoraConfig:
        """Adapt the MLP's matrices among `modules`.

        Raises:
            MistakeError: the base has no extra neurons, or not these.
        """
        from peft import LoraConfig

        count = len(chosen_neurons(self.neurons, getattr(model.config, "extra_neurons", 0)))
        architecture, width = describe(model), mlp_width(model.config)
        inside = set(architecture.select({"mlp": "all"}))
        matrices = [path for path in linear_modules(model, modules) if path in inside]
        # The matrices of an adapter behind the MLP (`base.adapter_size`) have none of its neurons.
        matrices = [path for path in matrices if width in architecture.modules[path].parameters["weight"]]
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=count,
            lora_alpha=count,
            target_modules=exactly(matrices),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )

    def started(self, model: PeftModel) -> None:
        """Let one factor of each matrix pick the neurons; the writing one starts at zero, so nothing changes yet."""
        import torch
        from peft.tuners.lora import LoraLayer

        width, extra = mlp_width(model.config) or 0, model.config.extra_neurons
        rows = torch.tensor(chosen_neurons(self.neurons, extra)) + width - extra
        layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        with torch.no_grad():
            for layer in layers:
                down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                picks = down if layer.in_features == width else up.T
                picks.zero_()[range(len(rows)), rows] = 1
                (down if layer.in_features == width else up).requires_grad_(False)


def chosen_neurons(neurons: Range, extra: int) -> list[int]:
    """Numbers of the chosen ones among the extra neurons, from 0."""
    if not extra:
        raise MistakeError(
            "method 'bottleneck' trains neurons that are added to the MLPs; write base.extra_neurons: 64"
        )
    try:
        return parse(neurons, extra)
    except MistakeError:
        raise MistakeError(
            f"neurons is {neurons!r}, but base.extra_neurons gives it 0-{extra - 1}; stay within them"
        ) from None
