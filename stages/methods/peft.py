"""Any other adapter that PEFT knows (`peft`), once it has shown on a tiny model that the pipeline understands it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.errors import MistakeError, first_line
from stages.models.architecture import exactly
from stages.models.layers import linear_modules, plain_matrices, select
from stages.settings.section import nearest
from stages.settings.stage import Training

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


class Passthrough(Training):
    """Any other adapter of PEFT, here `peft: {peft_type: LOHA}`.

    You know why; it is tried out on a tiny model first.

    The modules come from `layers`, as ever.
    """

    method: Literal["peft"]
    peft: dict[str, Any]
    """PEFT's own settings, with its `peft_type`."""

    def try_out(self) -> None:
        """Put the adapter on a tiny model, move it, save it, and see whether its checkpoint gives the same model.

        Raises:
            MistakeError: PEFT refuses it, or the checkpoint does not.
        """
        import torch
        from peft import get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        from stages.models.architecture import describe
        from stages.weights.adapter import Adapter

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
            plain = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
            plain.load_state_dict(model.state_dict())
            ids = torch.arange(32)[None]
            config = self._config(exactly(linear_modules(model, select(model, "all"))))
            try:
                wrapped = get_peft_model(model, config).eval()
                with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
                    for parameter in wrapped.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn_like(parameter), alpha=0.02)
                    self.save(wrapped, Path(folder))
                    truth, before = wrapped(ids).logits, plain(ids).logits
                    adapter = Adapter(Path(folder), describe(plain))
                    for path in adapter.modules:
                        module = plain.get_submodule(path)
                        weights = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
                        module.load_state_dict(adapter.apply(path, weights))
                    moved, missed = (truth - before).abs().max(), (plain(ids).logits - truth).abs().max()
            except Exception as error:
                raise self._refusal(first_line(error)) from None
        if not missed <= 1e-4 + 1e-3 * moved or moved == 0:
            raise self._refusal(f"its weights give logits {float(missed):.2g} away from its own")

    def adapter_config(self, model: PreTrainedModel, modules: list[str]) -> PeftConfig:
        """PEFT's configuration for the weight matrices among `modules`.

        Raises:
            MistakeError: PEFT refuses it, or what it trains is no change of weights that a merge could take.
        """
        self.try_out()
        return self._config(exactly(plain_matrices(self.method, model, modules)))

    def _config(self, target: str) -> PeftConfig:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        keys = dict(self.peft)
        kind = keys.pop("peft_type", None)
        kinds: dict[str, Any] = {str(name.value): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if kind not in kinds:
            raise MistakeError(f"peft.peft_type is {kind!r}; PEFT knows {', '.join(sorted(kinds))}")
        fields = kinds[kind].__dataclass_fields__.keys()
        if "target_modules" not in fields:
            raise self._refusal("it adds prompts or the like")
        known = fields - {"peft_type", "task_type", "target_modules"}
        for key in keys:
            if key not in known:
                raise MistakeError(f"peft.{key} is not a known key of {kind}; {nearest(key, known, 'known keys are')}")
        try:
            return kinds[kind](task_type="CAUSAL_LM", target_modules=target, **keys)
        except Exception as error:  # PEFT raises what it likes for what it cannot do
            raise MistakeError(f"peft: {kind} refuses its keys ({first_line(error)}); correct them") from None

    def _refusal(self, reason: str) -> MistakeError:
        return MistakeError(
            f"peft.peft_type {self.peft['peft_type']!r} leaves no change of weights that can be merged ({reason});"
            " choose another method"
        )
