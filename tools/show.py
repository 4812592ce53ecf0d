"""What a dataset is read as, and its training examples token by token, with their weights: `strata show NAME`."""

import math
import os
import sys
from argparse import ArgumentParser
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from stages.errors import MistakeError
from stages.files import BASE, DATA, REPORTS, read_json
from stages.project.check import datasets_to_make
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.records.record import Record
from stages.records.rows import report_of
from stages.records.source import Source
from stages.records.sources.mix import Mix
from stages.records.tokens import Example, encode
from tools.terminal import positive, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREENS, REDS = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # ANSI colours of weights, from small to large
COUNTED = {
    "rows": "rows read",
    "empty": "empty",
    "repeated": "there twice",
    "other_answers": "other answers to questions of eval and tune",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Which dataset, and how many examples."""
    parser.add_argument("name", help="a dataset or selection of params.yaml")
    parser.add_argument("count", nargs="?", type=positive, default=3, help="how many examples; 3 by default")


def main(name: str, count: int) -> None:
    """Print what a dataset is read as, and its or a selection's first training examples token by token with weights.

    Raises:
        MistakeError: the base, which has the tokenizer, or the selection is not there.
    """
    settings = load_params()
    dataset: Source = settings.find("datasets", settings.selected_from(name))
    if name in settings.selections and not (DATA / name).is_dir():
        raise MistakeError(f"{DATA / name} is missing, for it has not been chosen yet; run dvc repro select@{name}")
    if not BASE.is_dir():
        raise MistakeError(f"{BASE} is missing, and with it the tokenizer; run dvc repro base")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE, trust_remote_code=False)
    if name in settings.selections or name not in datasets_to_make(settings):
        records, report = _made(name, count)
    else:
        records, report = _training(dataset, name, settings.seed, count)
    for line in told(dataset, report):
        print(line)
    found = [(record, example) for record in records for example in encode(record, tokenizer, None)]
    examples = [example for _, example in found]
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    scale = max(abs(weight) for example in examples for weight in _counted(example)) if coloured else None
    print(legend(scale))
    for number, (record, example) in enumerate(found, start=1):
        part = f" of {record['part']}" if "part" in record else ""
        drawn = draw(texts(example.ids, tokenizer), _counted(example), scale)
        print(f"\nexample {number}{part}, {summary([example])}\n{drawn}")
    print(f"\ntogether {summary(examples)}")


def legend(scale: float | None) -> str:
    """What colours mean where there are any: the strongest is a weight of `scale`."""
    if not scale:
        return "⟨weight⟩ of the tokens that follow; · between two of the same weight"
    steps = [scale * step / len(GREENS) for step in range(-len(REDS), len(GREENS) + 1)]
    return "weight up to " + "".join(paint(f" {step:.3g} ", step, scale) for step in steps)


def texts(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What each token adds to the text: a character of several tokens comes with the last of them."""
    found, before, start = [], 0, 0  # a token is decoded after others, for SentencePiece strips the first of its space
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[before:end]))[len(str(tokenizer.decode(ids[before:start]))) :]
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
        else:
            found.append(text)
            before, start = start, end
    return found


def draw(texts: list[str], weights: list[float], scale: float | None) -> str:
    """Tokens with dots between those of the same weight, which is a colour or, without a scale, a number."""
    drawn, before = "", None
    for text, weight in zip(texts, weights, strict=True):
        if weight != before:
            drawn += "" if scale else f"⟨{weight:g}⟩"
        elif not drawn.endswith("\n"):
            drawn += "·"
        shown = visible(text.replace("\n", "↵"))
        drawn += paint(shown, weight, scale) if scale else shown
        if "\n" in text:
            drawn += "\n"
        before = weight
    return drawn.rstrip("\n")


def paint(text: str, weight: float, scale: float) -> str:
    """Text on green, or on red if the weight is negative; the stronger, the larger the weight beside `scale`."""
    if not weight:
        return text
    shade = math.ceil(len(GREENS) * (abs(weight) / scale))
    return f"\x1b[38;5;16;48;5;{(GREENS if weight > 0 else REDS)[shade - 1]}m{text}\x1b[0m"


def summary(examples: list[Example]) -> str:
    """How many tokens there are, and how many of them count in the loss."""
    tokens = sum(len(example.ids) for example in examples)
    learned = sum(weight != 0 for example in examples for weight in _counted(example))
    return f"{tokens} tokens, {learned} of them supervised ({100 * learned / tokens:.0f} %)"


def _made(name: str, count: int) -> tuple[list[Record], dict[str, Any]]:
    """The first training records and what was found, as the data stage left them."""
    report = REPORTS / "data" / f"{name}.json"
    return list(islice(load_split(name, "train"), count)), read_json(report)[name] if report.exists() else {}


def _training(dataset: Source, name: str, seed: int, count: int) -> tuple[list[Record], dict[str, Any]]:
    """The same, of a dataset that the data stage has still to make as params.yaml says it now."""
    splits = dataset.splits(name, seed, f"params.yaml: datasets.{name}")
    for part in ("eval", "tune"):
        deque(splits.parts[part], maxlen=0)  # a stream gives them first
    return list(islice(splits.parts["train"], count)), report_of(splits.found)


def told(dataset: Source, report: dict[str, Any]) -> Iterator[str]:
    """What each part of a dataset was read as, and what the settings make of it; then what is in no split, and why."""
    for name, read in report.get("read", {}).items():
        part = dataset.parts[name] if isinstance(dataset, Mix) else dataset
        settings = [
            f"{key} {getattr(part, key)}" for key in ("format", "learn", "chat_template_kwargs") if getattr(part, key)
        ]
        yield f"{name}: {read}; {', '.join(settings)}"
    if counts := [f"{report[key]} {words}" for key, words in COUNTED.items() if report.get(key)]:
        first = f" (the first empty one is {report['first_empty']})" if report["empty"] else ""
        yield ", ".join(counts) + first


def _counted(example: Example) -> list[float]:
    """Weights as they count: nothing predicts the first token."""
    return [0.0, *example.weights[1:]]
