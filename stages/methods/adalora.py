"""AdaLoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.models.architecture import exactly
from stages.models.layers import all_in_modules, beside
from stages.settings.stage import Training

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import AdaLoraConfig, PeftModel
    from transformers import PreTrainedModel

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's rank allocator, by parameter
LEFT = "rank_pattern"


class AdaLora(Training):
    """LoRA that drops its least useful directions on the way (arXiv 2303.10512).

    Finds which layers need rank; wants 100 steps and more.

    It starts with 1.5 times the rank and ends with `rank` on average; the first tenth of the steps drops nothing, and
    the last third trains what is left.
    """

    method: Literal["adalora"]
    rank: int = Field(default=16, gt=0)
    """What a matrix has left on average at the end."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the change; twice the rank unless it is given."""

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> AdaLoraConfig:
        """Adapt each weight matrix among `modules`; alpha is twice the rank unless it is given."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type="CAUSAL_LM",
            target_r=self.rank,
            init_r=max(self.rank + 1, round(1.5 * self.rank)),
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            total_step=self.steps,
            tinit=self.steps // 10,
            tfinal=self.steps // 3,
            target_modules=exactly(beside(self.method, model, all_in_modules(repr(self.method), model, modules))),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )

    def stepped(self, model: PeftModel, step: int) -> None:
        """Drop directions; PEFT wants it after the optimizer's step, while the gradients are still there."""
        model.base_model.update_and_allocate(step)  # type: ignore[operator]

    def state(self, model: PeftModel) -> dict[str, torch.Tensor]:
        """PEFT's running averages of how much each number matters, and which directions are left."""
        import torch

        allocator: Any = model.base_model.rankallocator
        state = {f"{kind}/{name}": values for kind in AVERAGES for name, values in getattr(allocator, kind).items()}
        left: dict[str, list[bool]] = allocator.peft_config.rank_pattern or {}
        return state | {f"{LEFT}/{name}": torch.tensor(kept) for name, kept in left.items()}

    def load_state(self, model: PeftModel, state: dict[str, torch.Tensor]) -> None:
        """Take them back."""
        allocator: Any = model.base_model.rankallocator
        left = {}
        for key, values in state.items():
            kind, _, name = key.partition("/")
            if kind == LEFT:
                left[name] = values.tolist()
            else:
                getattr(allocator, kind)[name] = values.to(model.device)
        allocator.peft_config.rank_pattern = left or None

    def save(self, model: PeftModel, folder: Path) -> None:
        """Save it as the LoRA that it is by now: PEFT scales an AdaLoRA that it loads again in another way."""
        from peft import LoraConfig
        from peft.tuners.adalora import AdaLoraLayer
        from safetensors.torch import save_file

        config: AdaLoraConfig = model.peft_config["default"]  # type: ignore[assignment]
        layers: dict[str, Any] = {n: module for n, module in model.named_modules() if isinstance(module, AdaLoraLayer)}
        tensors = {}
        for name, layer in layers.items():
            a, e, b = (part["default"].detach().cpu() for part in (layer.lora_A, layer.lora_E, layer.lora_B))
            scale = layer.scaling["default"] / (layer.ranknum["default"].detach().cpu() + 1e-5)
            tensors[f"{name}.lora_A.weight"] = (a * e * scale).contiguous()
            tensors[f"{name}.lora_B.weight"] = b.contiguous()
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.init_r,
            lora_alpha=config.init_r,
            target_modules=config.target_modules,
            fan_in_fan_out=config.fan_in_fan_out,
            base_model_name_or_path=config.base_model_name_or_path,
            inference_mode=True,
        ).save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
