"""A running model from a virtual checkpoint."""

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import stages.models.modeling_houlsby  # noqa: F401  # makes its models known to transformers
from stages.files import BASE, read_record
from stages.models.architecture import auto_class


class Weights(Protocol):
    """What a model can be loaded from: a checkpoint, virtual or not, or a merge."""

    name: str
    base: Any  # the folder with its config and its files

    def module(self, path: str) -> dict[str, torch.Tensor]:
        """Effective parameters of module `path`, in float32."""

    def changed(self) -> list[str]:
        """Modules that may differ from the base's."""


logging.disable_progress_bar()
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # between peft and transformers


def compute_dtype() -> torch.dtype:
    """The dtype that the base stage chose for training and evaluation."""
    return getattr(torch, read_record(BASE)["dtype"])


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_model(
    checkpoint: Weights, dtype: torch.dtype, place: torch.device | str = "cpu", attention: str | None = None
) -> PreTrainedModel:
    """A model in evaluation mode whose weights are the checkpoint's effective ones, rounded once to `dtype`.

    `attention` is transformers' name of an implementation; without one it is the model's own choice.
    """
    changed, base = checkpoint.changed(), checkpoint.base
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0  # RWKV would scale its weights in place whenever it is asked, and back in training
    if base.untied_by(changed):
        for each in (config, config.get_text_config(decoder=True)):
            each.tie_word_embeddings = False
    settings = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    model: Any = auto_class(config).from_pretrained(base.folder, config=config, **settings)
    model.to(place)
    set_weights(model, checkpoint, changed)
    return model.eval()


@torch.no_grad()
def set_weights(model: PreTrainedModel, checkpoint: Weights, modules: list[str]) -> None:
    """Give these modules the checkpoint's effective weights, rounded once to the model's dtype."""
    for path in modules:
        module = model.get_submodule(path)
        for name, weight in checkpoint.module(path).items():
            getattr(module, name).copy_(weight)


def load_tokenizer(folder: Path = BASE) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the end-of-text token, or any, for padding where it has none of its own.

    Its `rows` are the tokens that the embedding has too, and `turns` refuses a record that needs others.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    tokenizer.rows = min(getattr(config, "vocab_size", len(tokenizer)), len(tokenizer))
    return tokenizer
