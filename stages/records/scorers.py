"""How an answer is scored: the key `score` of a dataset.

A score goes from 0 (wrong) to 1 (right). What a thinking model thinks before it answers is no part of the answer.
"""

import importlib.util
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator

from stages.errors import MistakeError, first_line
from stages.files import refuse_untracked, sha256
from stages.records.record import Record, answer, restore_tuples, without_thinking
from stages.settings.section import mistake, nearest

SHORT = (5, 32)  # words and characters that a short reference has at most
MOST = 0.9  # of the references, which have to be short for `exact`

Choice = dict[str, str]  # `scorer`, `why`, and for a function of the user's own `sha256` of its file
Score = Callable[[str, str, Record], Any]  # of an answer and its reference; a function of the user's gives anything

OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# One mark is a sign only where no operand is before it. Groups of three digits may be apart by a comma or a space.
NUMBER = re.compile(
    r"(?:(?<![\w)])[-+−])?(?:(?:(?<!\d)\d{1,3}(?:[, \u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\w))?"
)
UNCLEAR = re.compile(r"\d[:/]\d|\d,\d{1,2}(?!\d)|\d,\d{4}")  # a time, a fraction, a decimal comma
OPTION = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*(?:option\b)?\W*(\w+)", re.IGNORECASE)
# An English "I" or "a" before another word is no option, but in "A is right" it is.
WORD = r"(?:[Ii]['’]|[IiAa]\s+(?!(?:is|was|and|or|because|since)\b)[a-z])"
LETTER = re.compile(rf"(?<![A-Za-z\d])(?<![A-Za-z]['’])(?!{WORD})([A-Za-z]|\d+)(?![A-Za-z\d])|\b([^\W\d_A-Za-z])\b")


def exact(said: str, reference: str, _: Record) -> float:
    """Whether the answer is the reference, however its accents are encoded (Unicode NFC)."""
    return float(_normal(said) == _normal(reference))


def contains(said: str, reference: str, _: Record) -> float:
    """Whether the reference is in the answer, in upper or lower case; a number not as a part of another."""
    wanted = _normal(reference).casefold()
    before = r"(?<!\d)(?<!\d[.,])" if wanted[:1].isdigit() else ""
    after = r"(?![.,]?\d)" if wanted[-1:].isdigit() else ""
    return float(bool(re.search(f"{before}{re.escape(wanted)}{after}", _normal(said).casefold())))


def number(said: str, reference: str, _: Record) -> float:
    """Whether the last number of the answer is that of the reference."""
    wanted = _last_number(reference)
    return float(wanted is not None and _last_number(said) == wanted)


def choice(said: str, reference: str, _: Record) -> float:
    """Whether the answer names the option of the reference, a letter, number or word.

    It is what follows "answer", "option" or "choice", else the first letter or number that stands alone, if the
    reference's is one, else the first word.
    """
    wanted = _option(reference)
    return float(wanted is not None and _option(said, len(wanted) == 1 or wanted.isdigit()) == wanted)


def task(said: str, _: str, record: Record) -> float:
    """Whether the scorer of a generated task gives full marks."""
    from reasoning_gym import get_score_answer_fn

    try:
        return float(get_score_answer_fn(record["task"])(said, restore_tuples(record["entry"])) >= 1.0)
    except Exception:  # some scorers raise on a malformed answer, which is then simply wrong
        return 0.0


def chrf(said: str, reference: str, _: Record) -> float:
    """F-score of common character n-grams (Popović 2015), as sacrebleu computes it for one sentence, over 100."""
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(said, [reference]).score) / 100


def rouge_l(said: str, reference: str, _: Record) -> float:
    """F-score of the longest common subsequence of words (Lin 2004), as rouge-score computes it."""
    return float(_rouge().score(reference, said)["rougeL"].fmeasure)


class Scorer(NamedTuple):
    """A function that scores answers, and what its mean over a dataset is called."""

    score: Score
    measure: str


SCORERS = {
    "task": Scorer(task, "accuracy"),
    "exact": Scorer(exact, "accuracy"),
    "contains": Scorer(contains, "accuracy"),
    "number": Scorer(number, "accuracy"),
    "choice": Scorer(choice, "accuracy"),
    "chrf": Scorer(chrf, "chrf"),
    "rouge_l": Scorer(rouge_l, "rouge_l"),
}
OTHERS = ("auto", "loss")  # names that stand for no function


def _check_name(name: str) -> str:
    known = [*OTHERS, *SCORERS]
    if name not in known and not OWN.fullmatch(name):
        raise mistake(f" {name!r} is no scorer; {nearest(name, [*known, 'module:function'])}")
    return name


ScorerName = Annotated[str, AfterValidator(_check_name)]


def measure_of(names: Iterable[str]) -> str:
    """What the mean over records is called that these scorers scored; `loss` where none of them has an answer."""
    measures = {SCORERS[name].measure if name in SCORERS else "score" for name in names if name != "loss"}
    return measures.pop() if len(measures) == 1 else "score" if measures else "loss"


def choose(name: str, pin: str | None, records: Iterable[Record], where: str) -> Choice:
    """The scorer of a dataset, and why it is that one.

    Args:
        name: of params.yaml.
        pin: hash of the file of a function of the user's own.
        records: of the evaluation split.
        where: where the dataset stands in params.yaml, for sentences about mistakes.

    Raises:
        MistakeError: the scorer does not go with the records, or the user's function is not there.
    """
    asked = [record for record in records if answer(record) is not None]
    if name == "auto":
        name, why = _fitting(asked)
        return {"scorer": name, "why": why}
    chosen = {"scorer": name, "why": "score names it"}
    if name == "loss":
        return chosen
    if not asked:
        raise MistakeError(f"{where}.score is {name!r}, but no record has an answer to compare with; remove it")
    if name in SCORERS:
        _refuse_unfit(name, asked, where)
        return chosen
    function = _guarded(name, f"{where}.score")
    found = sha256([_file(name)])
    if pin not in (None, found):
        raise MistakeError(
            f"{where}.score_sha256 is not that of {_file(name)}; if it was meant to change, write {found}"
        )
    reference = without_thinking(str(answer(asked[0])))
    function(reference, reference, asked[0])
    return chosen | {"sha256": found}


def scorers_of(dataset: str, chosen: dict[str, Choice], records: Iterable[Record]) -> list[str]:
    """The name of the scorer of each record.

    Args:
        dataset: its name, for sentences about mistakes.
        chosen: by part of a mix; any other dataset has one part, itself.
        records: of the dataset.

    Raises:
        MistakeError: the file of a function of the user's own has changed since the dataset was made.
    """
    for each in chosen.values():
        file = _file(each["scorer"])
        if "sha256" in each and not (file.is_file() and each["sha256"] == sha256([file])):
            raise MistakeError(
                f"{file} has changed since dataset {dataset} was made; run dvc repro --force data@{dataset}, then"
                " dvc repro"
            )
    if len(chosen) == 1:
        (only,) = chosen.values()
        return [only["scorer"] for _ in records]
    return [chosen[record["part"]]["scorer"] for record in records]


def score_answers(names: Sequence[str], texts: Sequence[str], records: Sequence[Record]) -> list[float]:
    """Scores from 0 to 1.

    Args:
        names: of each record's scorer.
        texts: the answers.
        records: that have a reference answer.

    Raises:
        MistakeError: a function of the user's own is not there, raises, or gives no number from 0 to 1.
    """
    functions = {name: SCORERS[name].score if name in SCORERS else _guarded(name) for name in set(names)}
    return [
        functions[name](without_thinking(text), without_thinking(str(answer(record))), record)
        for name, text, record in zip(names, texts, records, strict=True)
    ]


def words(text: str) -> list[str]:
    """Words in any script; of those that put no space between words, such as Chinese, each character is one."""
    import regex

    alone = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    return regex.findall(rf"(?V1){alone}\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{alone}]+", _normal(text).lower())


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(re.sub("[, \u00a0\u202f]", "", found[-1]).replace("−", "-")) if found else None


def _option(text: str, stands_alone: bool = True) -> str | None:
    found = OPTION.search(text) or (LETTER.search(text) if stands_alone else None) or re.search(r"(\w+)", text)
    return _normal(next(filter(None, found.groups()))).casefold() if found else None


class _Words:
    """The tokenizer that rouge-score takes; its own knows no letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _fitting(asked: Sequence[Record]) -> tuple[str, str]:
    """The scorer that fits records with a reference answer, and why."""
    if not asked:
        return "loss", "no record has an answer to compare with"
    if all(map(_is_task, asked)):
        return "task", "the task scores its answers"
    references = [without_thinking(str(answer(record))) for record in asked]
    short = sum(len(words(text)) <= SHORT[0] and len(text) <= SHORT[1] for text in references) / len(references)
    told = f"{100 * short:.0f} % of the answers have at most {SHORT[0]} words and {SHORT[1]} characters"
    return ("exact" if short >= MOST else "chrf"), told


def _is_task(record: Record) -> bool:
    return isinstance(record.get("task"), str) and isinstance(record.get("entry"), dict)


def _refuse_unfit(name: str, asked: Sequence[Record], where: str) -> None:
    """Refuse a scorer by which not even a reference would be right."""
    if name == "task" and not all(map(_is_task, asked)):
        raise MistakeError(f"{where}.score is 'task', but its records are of no task that scores answers; write auto")
    if name not in ("number", "choice"):
        return
    find = _last_number if name == "number" else _option
    references = [without_thinking(str(answer(record))) for record in asked]
    for text in references:
        if find(text) is None:
            raise MistakeError(f"{where}.score is {name!r}, but the answer {text[:40]!r} holds none; choose another")
        if name == "number" and UNCLEAR.search(text):
            raise MistakeError(
                f"{where}.score is 'number', but the answer {text[:40]!r} is not read in one way; write decimals with a"
                " point, or choose exact"
            )
    if name == "choice" and len(asked) > 1 and len(set(map(_option, references))) == 1:
        raise MistakeError(f"{where}.score is 'choice', but all answers name one option; choose another")


def _file(name: str) -> Path:
    """The file of a function of the user's own, in the folder of params.yaml."""
    return Path(*name.partition(":")[0].split(".")).with_suffix(".py")


def _load(name: str, where: str) -> Score:
    """A function of the user's own."""
    file, function = _file(name), name.partition(":")[2]
    refuse_untracked(file, where)
    if not file.is_file():
        raise MistakeError(f"{where} is {name!r}, but there is no file {file}; write it, or correct the name")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise MistakeError(f"{where} is {name!r}, but {file} does not import ({_told(error)}); correct it") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise MistakeError(f"{where} is {name!r}, but {file} has no function {function}; correct the name")
    return found


def _guarded(name: str, where: str = "a dataset's score") -> Score:
    """The same, whose mistakes are sentences."""
    function, file = _load(name, where), _file(name)

    def score(said: str, reference: str, record: Record) -> float:
        try:
            value = function(said, reference, record)
        except Exception as error:  # whatever the user's code raises
            raise MistakeError(
                f"{file}: {name} raises {_told(error)} for the answer {said[:40]!r}; correct the function"
            ) from None
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise MistakeError(f"{file}: {name} gives {value!r}; it should give a number from 0 to 1")
        return float(value)

    return score


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
