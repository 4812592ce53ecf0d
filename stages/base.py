"""Fetch the base model and keep it as safetensors, with its tokenizer: `python -m stages.base`."""

import dataclasses
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import stages.models.modeling_houlsby as houlsby
from stages.errors import MistakeError, first_line, placed, run
from stages.files import BASE, FORMAT, publish, sha256, write_json
from stages.models.architecture import auto_class, depth, describe
from stages.models.names import carry_over, copy_weights, lost, pieces_of, refuse_lost, shapes_in
from stages.models.room import add_adapters, add_biases, add_neurons
from stages.models.source import (
    files_of,
    forget_quantisation,
    locate,
    read_config,
    refuse_rounded,
    refuse_speechless,
    refuse_unfit,
    refuse_unsound,
    resolve_dtype,
    whole_config,
)
from stages.project.check import load_checked, refuse_chats, refuse_layers_outside, refuse_misfits
from stages.records.template import Chat

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("length_penalty", "early_stopping", "diversity_penalty", "num_beam_groups", "constraints")


def main() -> None:
    """Write checkpoints/base: config, tokenizer, weights (in shards if they are many) and stage.json."""
    params = load_checked()
    settings = params.base
    source = locate(settings)
    dtype = resolve_dtype(settings.dtype)
    room = settings.model_dump(include={"add_biases", "extra_neurons", "adapter_size"})
    try:
        refuse_unfit(settings.model, source)
        is_gguf = "gguf_file" in source  # which is a text model always, and slow to read
        kind = AutoModelForCausalLM if is_gguf else auto_class(read_config(source))
        loaded: Any = kind.from_pretrained(
            dtype="auto" if any(room.values()) and files_of(source) else dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source,
        )
        model, told = loaded
        source.pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(trust_remote_code=False, **source)
    except MistakeError:
        raise
    except Exception as error:  # each library raises its own at a file that is not as it should be
        raise MistakeError(
            f"params.yaml: base.model {settings.model!r} does not load ({first_line(error)});"
            " give a hub id with its revision, or a folder or .gguf file of a causal language model"
        ) from None
    refuse_unsound(settings.model, model, told)
    refuse_rounded(settings.model, files_of(source))
    if (tokenizer.pad_token_id or 0) >= len(model.get_input_embeddings().weight):
        tokenizer.pad_token = tokenizer.eos_token  # one was added that the embeddings have no row for
    refuse_layers_outside(params, depth(model))
    forget_quantisation(model)
    if settings.add_biases:
        model = add_biases(model)
    if settings.extra_neurons:
        model = add_neurons(model, settings.extra_neurons)
    if settings.adapter_size:
        model = add_adapters(model, settings.adapter_size)
    architecture = describe(model)
    refuse_misfits(params, model, architecture)
    answers = model.generation_config
    if not hasattr(answers, "do_sample"):
        raise MistakeError(
            f"params.yaml: base.model {settings.model!r} does not write token by token, as its"
            f" {type(answers).__name__} tells; choose a causal language model"
        )
    answers.eos_token_id = stop_tokens(answers.eos_token_id, tokenizer)
    if answers.do_sample is None:  # generate() is then greedy, and a pipeline draws at random
        answers.do_sample = False
    forget_idle(answers)
    with publish(BASE) as folder:
        tokenizer.save_pretrained(folder)
        with placed("params.yaml: base.model: "):
            keep(model, files_of(source), folder, is_changed=any(room.values()))
            shapes = shapes_in(folder)
            pieces = pieces_of(model, shapes)
            refuse_lost(model, folder, pieces)
        refuse_speechless(settings.model, model)  # last, for some models change their weights on the way
        copies = [name for name in architecture.tied if pieces.get(name, [(name, [])])[0][0] in shapes]
        dataclasses.replace(architecture, pieces=pieces, copies=copies).write(folder)
        if settings.adapter_size:
            shutil.copy(houlsby.__file__, folder)
        record = {
            "format": FORMAT,
            "name": "base",
            "model": settings.model,
            "revision": settings.revision,
            "pin": settings.sha256,
            "room": room,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "layers": architecture.layers,
            "sha256": sha256(sorted(folder.glob("*.safetensors"))),
        }
        write_json(folder / "stage.json", record)
    refuse_chats(params)


def keep(model: PreTrainedModel, source: Path | None, folder: Path, is_changed: bool) -> None:
    """Write config and weights: where they are the source's, which a .gguf file has none of, then as they are there.

    transformers makes other weights of a few files, such as of one with the head of a tied pair alone.
    """
    if source and not is_changed and lost(model, source, pieces_of(model, shapes_in(source))) is None:
        copy_weights(source, folder)
        shutil.copyfile(source / "config.json", folder / "config.json")
        model.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        if source:
            keep_the_rest(model, source, folder)
    for path in source.glob("*processor_config.json") if source else ():
        shutil.copyfile(path, folder / path.name)


def keep_the_rest(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Beside a text model that is written anew, keep all else of its checkpoint as it is: weights and config."""
    carry_over(model, source, folder)
    if (whole := whole_config(model, source)) is not model.config:
        if other := sorted(shapes_in(folder).keys() - shapes_in(source).keys()):
            raise MistakeError(
                f"{type(model).__name__} writes {other[0]}, a name that the whole model's file does not have; choose"
                " another model"
            )
        whole.save_pretrained(folder)


def forget_idle(config: GenerationConfig) -> None:
    """Take out what has no effect without sampling or beams, with which transformers refuses to write the config."""
    idle = [] if config.do_sample else list(SAMPLING)
    idle += [] if (config.num_beams or 1) > 1 else list(BEAMS)
    for key in idle:
        if getattr(config, key, None) is not None:
            setattr(config, key, None)


def stop_tokens(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the generation config, the tokenizer's, and the chat template's own.

    The config is what the merged model is used with: a token that a stage learns to end its answers with must be there.

    Raises:
        MistakeError: what the generation config has is no token.
    """
    ends = [known] if isinstance(known, int) else known or []
    if not isinstance(ends, list) or not all(type(end) is int and end >= 0 for end in ends):
        raise MistakeError(
            f"params.yaml: base.model has eos_token_id {known!r} in its generation_config.json; write the number of a"
            " token, or a list of them"
        )
    if tokenizer.eos_token_id is not None:
        ends = [*ends, tokenizer.eos_token_id]
    with suppress(MistakeError):  # a base that is not asked in chats needs no template
        if end := Chat([], tokenizer).end[0]:
            ends = [*ends, tokenizer.get_vocab()[end]]
    return sorted(set(ends))


if __name__ == "__main__":
    run(main)
