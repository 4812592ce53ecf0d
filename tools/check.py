"""Check params.yaml and say what it means here: `strata check`."""

from argparse import ArgumentParser
from typing import TYPE_CHECKING

from stages.errors import MistakeError, placed
from stages.files import BASE, DATA, read_json
from stages.project.check import check_against_base, datasets_to_make, load_checked, stages_to_make
from stages.project.params import PARAMS
from stages.records.lines import load_split
from stages.records.record import Record, answer
from stages.records.template import as_chat, dated
from stages.records.tokens import turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_arguments(_: ArgumentParser) -> None:
    """Nothing to say."""


def main() -> None:
    """Tell the first mistake, or that there is none."""
    params = load_checked()
    if check_against_base(params):
        for name in stages_to_make(params):
            with placed(f"{PARAMS}: stages.{name}."):
                params.stages[name].try_on_base()
    print(f"{PARAMS}: {len(params.stages)} stages, {len(params.merge.weights)} of them merged; no mistakes")
    if params.threads == "auto":
        print(
            f"threads: auto is {params.thread_count} on this machine. A machine with another number gets other last"
            " digits, and DVC takes both for the same result; pin a number to share results bit for bit."
        )
    left = datasets_to_make(params)
    made = [name for name in params.datasets if name not in left and (DATA / name).is_dir()]
    if BASE.is_dir() and made:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(BASE, trust_remote_code=False)
        stops = read_json(BASE / "generation_config.json")["eos_token_id"]
        for name in made:
            record = next((record for record in load_split(name, "eval") if answer(record) is not None), None)
            if record:
                print(f"{name}: {hold_against_use(record, tokenizer, stops, f'datasets.{name}')}")


def hold_against_use(record: Record, tokenizer: "PreTrainedTokenizerBase", stops: list[int], where: str) -> str:
    """How a dataset's questions are asked and its answers end, which must be as plain transformers does it.

    Args:
        record: one with an answer.
        tokenizer: of the base.
        stops: tokens at which the model stops, of its generation config.
        where: of the dataset in params.yaml.

    Raises:
        MistakeError: it is not.
    """
    turn, chat = turns(record, tokenizer)[-1], as_chat(record, tokenizer)
    if chat:
        asked = tokenizer.apply_chat_template(
            chat.messages[:-1],
            chat.tools,
            chat_template=dated(chat.template),
            add_generation_prompt=True,
            return_dict=False,
            **chat.keywords,
        )
    else:
        asked = tokenizer(record["prompt"])["input_ids"]
    end = turn.answered.ids[-1]
    if turn.asked.ids != asked:
        raise MistakeError(
            f"{PARAMS}: {where} is asked with other tokens in training than in use, by base.model's tokenizer; use"
            f" format: {'plain' if chat else 'chat'}"
        )
    if end not in stops:
        raise MistakeError(
            f"{PARAMS}: {where} has answers that end with {tokenizer.decode([end])!r}, at which base.model does not"
            " stop; add its id to eos_token_id in generation_config.json"
        )
    return f"asked {'as a chat' if chat else 'in plain text'}; an answer ends with {tokenizer.decode([end])}"
