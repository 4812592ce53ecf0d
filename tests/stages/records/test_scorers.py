"""Scorers against the numbers that their libraries document, and against what a reader would say."""

import json
from pathlib import Path

import pytest

from stages import data
from stages.errors import MistakeError
from stages.files import read_json, sha256
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.records.record import answer
from stages.records.scorers import (
    SCORERS,
    choose,
    measure_of,
    score_answers,
    scorers_of,
    without_thinking,
    words,
)
from tests.conftest import PARAMS


def score(name, text, reference):
    return score_answers([name], [text], [{"prompt": "q", "completion": reference}])[0]


RIGHT = [  # scorer, answer, reference, whether it is right
    ("exact", " yes\n", "yes", True),
    ("exact", "Yes", "yes", False),
    ("exact", "cafe\u0301", "caf\u00e9", True),
    ("exact", "12.", "12", False),
    ("exact", "<think>\nfirst 1, no\n</think>\n\n42", "42", True),
    ("exact", "I should add them.</think>42", "42", True),
    ("exact", "42", "<think>\n\n</think>\n\n42", True),
    ("exact", "<think>it is 42", "42", False),
    ("contains", "It is Paris, of course.", "Paris", True),
    ("contains", "it is PARIS", "Paris", True),
    ("contains", "It is Lyon.", "Paris", False),
    ("contains", "这是北京市。", "北京", True),
    ("contains", "В Москве", "москв", True),
    ("contains", "about 142", "42", False),
    ("contains", "about 4.2", "4", False),
    ("contains", "a (4) b.", "4", True),
    ("contains", "It is 42.", "42", True),
    ("contains", "a+b is (a+b)", "(a+b)", True),
    ("number", "The answer is 42.", "42", True),
    ("number", "6 * 7 = 42", "#### 42", True),
    ("number", "42 apples, I mean 43", "42", False),
    ("number", "It costs $1,234.50", "1234.5", True),
    ("number", "1,2 and 3", "3", True),
    ("number", "1 234 рублей".replace(" ", "\u00a0", 1), "1234", True),
    ("number", "it is 7 500", "2 500", False),
    ("number", "это 2 500 рублей", "2500", True),
    ("number", "5 000 000", "1 000 000", False),
    ("number", "12 34", "34", True),
    ("number", "x = -5", "-5", True),
    ("number", "x = −5", "-5", True),
    ("number", "10-3", "-3", False),
    ("number", "10-3", "3", True),
    ("number", "5", "-5", False),
    ("number", "42.0", "42", True),
    ("number", ".5", "0.50", True),
    ("number", "1e3", "1000", True),
    ("number", "٤٢", "42", True),
    ("number", "9007199254740993", "9007199254740992", False),
    ("number", "none", "42", False),
    ("choice", "B", "B", True),
    ("choice", "(B) because A is wrong", "B", True),
    ("choice", "b.", "B", True),
    ("choice", "The correct answer is: **B**", "B", True),
    ("choice", "Answer: C", "B", False),
    ("choice", "Option D is right", "D", True),
    ("choice", "B) Paris", "B) Paris", True),
    ("choice", "Yes, it does.", "yes", True),
    ("choice", "No", "yes", False),
    ("choice", "I think B is right", "B", True),
    ("choice", "I'd say (C)", "C", True),
    ("choice", "A good guess is C", "C", True),
    ("choice", "A is right", "A", True),
    ("choice", "A", "A", True),
    ("choice", "Б", "б", True),
    ("choice", "…", "B", False),
    ("choice", "The correct option is B", "B", True),
    ("choice", "The answer is: option B", "B", True),
    ("choice", "Ответ: В", "Ответ: Б", False),
    ("choice", "Ответ: Б", "Б", True),
    ("choice", "Answer C", "Answer B", False),
    ("choice", "Antwort: C", "Antwort: B", False),
    ("choice", "答案是B。", "B", True),
    ("choice", "No, A is wrong", "no", True),
    ("contains", "GPT4 and 5km", "GPT", True),
    ("contains", "GPT4 and 5km", "km", True),
]


@pytest.mark.parametrize(("name", "text", "reference", "right"), RIGHT)
def test_right_and_wrong(name, text, reference, right):
    assert score(name, text, reference) == right


def test_chrf_is_sacrebleus():
    assert score("chrf", "a", "ab") == pytest.approx(5 * 1 * 0.5 / (4 * 1 + 0.5))  # F₂ of precision 1 and recall ½
    text = "The dog bit the man."  # of sacrebleu's own tests of sentence_chrf, at its defaults
    assert score("chrf", text, text) == 1 and score("chrf", "", text) == 0
    assert score("chrf", "Niemiecki", "Niemiecka") == pytest.approx(by_hand("Niemiecki", "Niemiecka"))
    assert 0.3 < score("chrf", "Я забыл пароль", "Вы забыли свой пароль") < 0.9


def by_hand(said, reference):
    """Popović 2015: the mean over n-grams of one to six characters of precision and recall, then F₂."""
    pairs = []
    for n in range(1, 7):
        a, b = ([text[i : i + n] for i in range(len(text) - n + 1)] for text in (said, reference))
        common = sum(min(a.count(gram), b.count(gram)) for gram in set(a))
        pairs.append((common / len(a), common / len(b)))
    precision, recall = (sum(each) / 6 for each in zip(*pairs, strict=True))
    return 5 * precision * recall / (4 * precision + recall)


def test_rouge_l_is_rouge_scores_and_knows_other_scripts():
    reference, said = "The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."
    assert score("rouge_l", said, reference) == pytest.approx(0.5882, abs=1e-4)  # of rouge-score's documentation
    assert score("rouge_l", "Кошка спит на окне", "кошка сидит на окне.") == pytest.approx(3 / 4)
    assert score("rouge_l", "今天天气好", "今天天气很好。") == pytest.approx(2 * 1 * (5 / 6) / (1 + 5 / 6))


def test_words_are_those_of_any_script():
    assert words("Don't stop: 3.5") == ["don", "t", "stop", "3", "5"]
    assert words("हिंदी में café") == ["हिंदी", "में", "café"]
    assert words("ok 今天 すし") == ["ok", "今", "天", "す", "し"]


def test_thinking_is_no_part_of_an_answer():
    assert without_thinking("<think>a</think> b </think>") == "b </think>"
    assert without_thinking(" plain ") == "plain"
    thoughts = ["<think>hm", "<think>hm</think>\n", "hm</think>", "<think>hm</think> 42"]
    assert [answer({"prompt": "q", "completion": text}) for text in thoughts] == [None, None, None, thoughts[-1]]
    assert choose("auto", None, [{"prompt": "q", "completion": thoughts[0]}], "")["scorer"] == "loss"


@pytest.mark.parametrize(
    ("names", "measure"),
    [
        (["exact", "task"], "accuracy"),
        (["chrf", "loss"], "chrf"),
        (["chrf", "exact"], "score"),
        (["mine:f"], "score"),
        (["loss"], "loss"),
        ([], "loss"),
    ],
)
def test_what_the_mean_is_called(names, measure):
    assert measure_of(names) == measure


def records(*answers):
    return [{"prompt": f"{number}?", "completion": text} for number, text in enumerate(answers)]


LONG = "Open the settings, choose your account, and press the button that resets it."


@pytest.mark.parametrize(
    ("asked", "scorer", "why"),
    [
        (records(*["yes"] * 9, LONG), "exact", "90 % of the answers have at most 5 words"),
        (records(*["yes"] * 8, LONG, LONG), "chrf", "80 % of the answers have at most 5 words"),
        (records("a b c d e f"), "chrf", "0 % of"),
        (records("x" * 33), "chrf", "0 % of"),
        (records("今天天气很好，我们去公园吧"), "chrf", "0 % of"),
        (records("<think>\n\n</think>\n\n42"), "exact", "100 % of"),
        ([{"text": "once"}], "loss", "no record has an answer"),
        ([{"prompt": "a", "completion": LONG, "task": "chain_sum", "entry": {}}], "task", "the task scores"),
        ([{"prompt": "a", "completion": "b", "task": "a column of the user's"}], "exact", "100 % of"),
    ],
)
def test_auto_takes_what_fits_and_says_why(asked, scorer, why):
    chosen = choose("auto", None, asked, "here")
    assert chosen["scorer"] == scorer and chosen["why"].startswith(why)


MINE = """
def half(answer, reference, record):
    return 0.5 if record["level"] == 2 else float(answer == reference)


def wrong(answer, reference, record):
    return "good"


def fails(answer, reference, record):
    return record["none"]


number = 3
"""


def test_a_function_of_ones_own_sees_the_record():
    Path("mine.py").write_text(MINE)
    asked = [{"prompt": "a", "completion": "b", "level": level} for level in (1, 2)]
    chosen = choose("mine:half", None, asked, "here")
    assert chosen["sha256"] == sha256([Path("mine.py")])
    assert score_answers(["mine:half"] * 2, ["b", "b"], asked) == [1.0, 0.5]
    assert scorers_of("d", {"d": chosen}, asked) == ["mine:half"] * 2
    for edit in (lambda: Path("mine.py").write_text(MINE + "\n"), Path("mine.py").unlink):
        edit()
        with pytest.raises(
            MistakeError, match=r"mine.py has changed since dataset d was made; run dvc repro --force data"
        ):
            scorers_of("d", {"d": chosen}, asked)


@pytest.mark.parametrize(
    ("name", "pin", "asked", "sentence"),
    [
        ("chrf", None, [{"text": "once"}], "here.score is 'chrf', but no record has an answer to compare with; remove"),
        ("task", None, records("b"), "here.score is 'task', but its records are of no task"),
        ("number", None, records("4", "four"), "here.score is 'number', but the answer 'four' holds none; choose"),
        ("number", None, records("2,5"), "here.score is 'number', but the answer '2,5' is not read in one way; write"),
        ("number", None, records("1/3"), "here.score is 'number', but the answer '1/3' is not read in one way"),
        ("number", None, records("at 4:30"), "the answer 'at 4:30' is not read in one way"),
        ("choice", None, records("A dog", "A cat"), "here.score is 'choice', but all answers name one option"),
        ("choice", None, records("…"), "here.score is 'choice', but the answer '…' holds none"),
        ("none:half", None, records("b"), "here.score is 'none:half', but there is no file none.py; write it"),
        ("in.none:half", None, records("b"), "but there is no file in/none.py"),
        ("mine:third", None, records("b"), "here.score is 'mine:third', but mine.py has no function third"),
        ("mine:number", None, records("b"), "mine.py has no function number"),
        ("broken:half", None, records("b"), "but broken.py does not import (SyntaxError"),
        (
            "mine:half",
            "abc",
            records("b"),
            "here.score_sha256 is not that of mine.py; if it was meant to change, write ",
        ),
    ],
)
def test_a_scorer_that_does_not_go_is_one_sentence(name, pin, asked, sentence):
    Path("mine.py").write_text(MINE)
    Path("broken.py").write_text("def half(:")
    with pytest.raises(MistakeError) as mistake:
        choose(name, pin, asked, "here")
    assert sentence in str(mistake.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mine:wrong", "mine.py: mine:wrong gives 'good'; it should give a number from 0 to 1"),
        ("mine:fails", "mine.py: mine:fails raises KeyError: 'none' for the answer 'b'; correct the function"),
    ],
)
def test_a_function_that_fails_is_one_sentence(name, sentence):
    Path("mine.py").write_text(MINE)
    with pytest.raises(MistakeError) as mistake:
        score_answers([name], ["b"], records("b"))
    assert sentence in str(mistake.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("crf", "did you mean chrf?"), ("bleu", "choose one of auto, choice, chrf,")]
)
def test_an_unknown_scorer_is_one_sentence(project, name, nearest):
    Path("params.yaml").write_text(PARAMS.replace("    train: 40", f"    score: {name}\n    train: 40", 1))
    with pytest.raises(MistakeError) as mistake:
        load_params()
    assert f"datasets.sums.score '{name}' is no scorer; {nearest}" in str(mistake.value)


def test_a_hash_without_a_function_is_refused(project):
    Path("params.yaml").write_text(PARAMS.replace("    train: 40", "    score_sha256: abc\n    train: 40", 1))
    with pytest.raises(MistakeError, match=r"datasets.sums.score_sha256 is of use with score: module:function alone"):
        load_params()


def test_the_data_stage_says_how_answers_are_scored(project):
    part = {"source": "file", "eval": 10, "weight": 1}
    parts = {
        "sums": part | {"path": "sums.jsonl", "score": "number"},
        "words": part | {"path": "words.jsonl"},
    }
    mixed = json.dumps({"source": "mix", "parts": parts})
    Path("params.yaml").write_text(PARAMS.replace("stages:", f"  both: {mixed}\nstages:", 1))
    data.main("both")
    chosen = read_json(Path("reports/data/both.json"))["both"]["scorers"]
    assert {name: each["scorer"] for name, each in chosen.items()} == {"sums": "number", "words": "exact"}
    asked = load_split("both", "eval")
    wanted = ["number" if record["part"] == "sums" else "exact" for record in asked]
    assert scorers_of("both", chosen, asked) == wanted


def test_how_answers_are_scored_changes_nothing_that_is_trained_on(project):
    data.main("sums")
    before = {path.name: path.read_bytes() for path in Path("data/sums").iterdir()}
    Path("params.yaml").write_text(PARAMS.replace("    train: 40", "    score: chrf\n    train: 40", 1))
    data.main("sums")
    assert {path.name: path.read_bytes() for path in Path("data/sums").iterdir()} == before
    assert read_json(Path("reports/data/sums.json"))["sums"]["scorers"]["sums"]["scorer"] == "chrf"


def test_every_scorer_gives_the_reference_full_marks():
    for name in SCORERS.keys() - {"task"}:
        assert score(name, "42", "42") == 1, name
