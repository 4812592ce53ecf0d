"""Other adapters of PEFT, for those who have a reason to choose one; docs/methods.md compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.layers import exactly, linear_modules
from stages.methods.stage import Training, plain_matrices

if TYPE_CHECKING:
    from pathlib import Path

    from peft import AdaLoraConfig, IA3Config, LoKrConfig, MissConfig, OFTConfig, PeftModel, ShiraConfig, VeraConfig
    from transformers import PreTrainedModel


class IA3(Training):
    """One trained factor for each output of every matrix, and each input of `down_proj` (arXiv 2205.05638)."""

    method: Literal["ia3"]

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> IA3Config:
        """Scale the weight matrices among `modules`; those that end an MLP by their inputs, as the paper does."""
        from peft import IA3Config

        matrices = linear_modules(model, modules)
        ends = [path for path in matrices if path.endswith(("down_proj", "mlp.c_proj", "fc2"))]
        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=exactly(matrices),
            feedforward_modules=exactly(ends) if ends else [],
            fan_in_fan_out=model.config.model_type == "gpt2",
        )


class LoKr(Training):
    """The delta is a Kronecker product of a small matrix and a low-rank one (arXiv 2309.14859)."""

    method: Literal["lokr"]
    rank: int = Field(default=8, gt=0)
    alpha: float | None = Field(default=None, gt=0)

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> LoKrConfig:
        """Adapt each weight matrix among `modules`; alpha is the rank unless it is given."""
        from peft import LoKrConfig

        alpha = self.rank if self.alpha is None else self.alpha
        return LoKrConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            alpha=alpha,  # type: ignore[arg-type]
            target_modules=exactly(plain_matrices(self, model, modules)),
        )


class OFT(Training):
    """Blocks of inputs are rotated by trained orthogonal matrices (arXiv 2306.07280); norms and angles are kept."""

    method: Literal["oft"]
    block_size: int = Field(default=32, gt=1)

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> OFTConfig:
        """Rotate the inputs of each weight matrix among `modules`."""
        from peft import OFTConfig

        return OFTConfig(
            task_type="CAUSAL_LM",
            r=0,
            oft_block_size=self.block_size,
            use_cayley_neumann=False,  # the series is only nearly orthogonal
            target_modules=exactly(plain_matrices(self, model, modules)),
        )


class MiSS(Training):
    """One small matrix, repeated over blocks of the weight, is added to it (arXiv 2409.15371)."""

    method: Literal["miss"]
    rank: int = Field(default=16, gt=0)

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> MissConfig:
        """Adapt each weight matrix among `modules`."""
        from peft import MissConfig

        matrices = plain_matrices(self, model, modules)
        return MissConfig(task_type="CAUSAL_LM", r=self.rank, target_modules=exactly(matrices))


class SHiRA(Training):
    """As many single weights as a LoRA of `rank` has, chosen at random, are trained (arXiv 2406.13175)."""

    method: Literal["shira"]
    rank: int = Field(default=16, gt=0)

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> ShiraConfig:
        """Train a random few weights of each matrix among `modules`; the stage's seed chooses them."""
        import torch
        from peft import ShiraConfig

        matrices = plain_matrices(self, model, modules)
        seed = int(torch.initial_seed() % 2**31)
        return ShiraConfig(task_type="CAUSAL_LM", r=self.rank, random_seed=seed, target_modules=exactly(matrices))


class VeRA(Training):
    """One random pair of factors for all matrices; each trains a factor for its rows and for the rank alone.

    W' = W + diag(b)·B·diag(d)·A (arXiv 2310.11454). Every stage has a pair of its own, kept in its checkpoint.
    """

    method: Literal["vera"]
    rank: int = Field(default=256, gt=0)

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> VeraConfig:
        """Adapt each weight matrix among `modules`; the stage's seed chooses the random pair."""
        import torch
        from peft import VeraConfig

        return VeraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            projection_prng_key=int(torch.initial_seed() % 2**31),
            target_modules=exactly(linear_modules(model, modules)),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )


class AdaLora(Training):
    """LoRA in the form of an SVD, whose least useful directions are dropped on the way (arXiv 2303.10512).

    It starts with 1.5 times the rank and ends with `rank` on average; the first tenth of the steps drops nothing, and
    the last third trains what is left.
    """

    method: Literal["adalora"]
    rank: int = Field(default=16, gt=0)
    alpha: float | None = Field(default=None, gt=0)

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
            target_modules=exactly(linear_modules(model, modules)),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )

    def stepped(self, model: PeftModel, step: int) -> None:
        """Drop directions; PEFT wants it after the optimizer's step, while the gradients are still there."""
        model.base_model.update_and_allocate(step)  # type: ignore[operator]

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
