"""The matrix, what the merged model keeps of each skill, and what is compared with what."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import BloomConfig, BloomForCausalLM

from stages import data, evaluate, pick, score
from stages.comparing import Scores
from stages.errors import MistakeError
from stages.files import ANSWERS, BASE, PICKED, read_json, write_json, write_table
from stages.project.params import load_params
from stages.records.lines import load_split
from tests.conftest import PARAMS, make_base

MODELS = ["base", "sums", "words", "merged"]


def scores(measure, **means):
    return {model: Scores(measure, np.full(200, mean), np.ones(200)) for model, mean in means.items()}


def test_retention_is_the_kept_share_of_the_gain():
    kept = evaluate.retention(scores("chrf", base=0.1, stage=0.9, merged=0.7), "stage")
    assert (kept["measure"], kept["retention"]) == ("chrf", pytest.approx(0.75))
    assert kept["interval"][0] < 0.75 < kept["interval"][1]
    kept = evaluate.retention(scores("loss", base=4.0, stage=1.0, merged=2.5), "stage")
    assert kept["retention"] == 0.5 and kept["gain"] == -3
    kept = evaluate.retention(scores("chrf", base=0.5, stage=0.5, merged=0.6), "stage")
    assert kept["retention"] is kept["interval"] is None
    kept = evaluate.retention(scores("chrf", base=0.5, stage=0.502, merged=0.6), "stage")
    assert kept["retention"] and kept["interval"] is None  # chance alone gives such a gain


def write_answers(right, losses, scorer="exact", questions=40):
    """Answers of MODELS to two datasets: how many are right, and the loss."""
    for model in MODELS:
        rows = [
            {"dataset": dataset, "record": number, "question": f"{number}?", "reference": "a", "answer": "b"}
            | {"scorer": scorer, "score": float(number <= right[model]), "loss": losses[model] * 2, "weight": 2.0}
            for dataset in ("sums", "words")
            for number in range(1, questions + 1)
        ]
        write_table(ANSWERS / f"{model}.parquet", pd.DataFrame(rows, columns=list(score.COLUMNS)).astype(score.COLUMNS))


ONES = dict.fromkeys(MODELS, 1.0)


def test_the_matrix_has_the_means_and_the_answers_lie_side_by_side(project):
    write_answers({"base": 0, "sums": 30, "words": 20, "merged": 10}, ONES | {"merged": 1.5})
    evaluate.main()
    found = read_json(Path("reports/evaluation.json"))
    assert found["matrix"]["sums"]["words"] == {"loss": 1.0, "accuracy": 0.75}
    assert found["matrix"]["merged"]["sums"] == {"loss": 1.5, "accuracy": 0.25}
    low, high = found["intervals"]["sums"]["words"]["accuracy"]
    assert low < 0.75 < high and found["intervals"]["merged"]["sums"]["loss"] == [1.5, 1.5]
    assert found["questions"] == {"sums": 40, "words": 40}
    assert found["retention"]["sums"]["retention"] == pytest.approx(1 / 3, rel=1e-5)
    table = pd.read_parquet("reports/answers.parquet")
    assert list(table["model"][:5]) == [*MODELS, "base"] and list(table["record"][:5]) == [1, 1, 1, 1, 2]
    assert list(table["dataset"].unique()) == ["sums", "words"] and len(table) == 2 * 40 * 4


def test_each_skill_is_compared_with_what_it_was_before(project):
    write_answers({"base": 0, "sums": 40, "words": 39, "merged": 10}, ONES)
    evaluate.main()
    found = {
        (each["model"], each["against"], each["dataset"]): each
        for each in read_json(Path("reports/evaluation.json"))["comparisons"]
    }
    assert set(found) == {
        ("words", "sums", "sums"),
        ("merged", "sums", "sums"),
        ("merged", "words", "words"),
        ("sums", "base", "sums"),
        ("words", "base", "words"),
    }
    later, merged = found["words", "sums", "sums"], found["merged", "sums", "sums"]
    assert (later["before"], later["after"], later["difference"]) == (1.0, 0.975, -0.025)
    assert later["p"] == 1 and not later["clear"] and later["needed"] > 40
    assert merged["p"] == pytest.approx(2 / 2**30, rel=1e-5) and merged["clear"]


@pytest.mark.parametrize(
    ("right", "losses", "measure"),
    [
        (dict.fromkeys(MODELS, 0), {"base": 3.0, "sums": 1.0, "words": 1.0, "merged": 1.0}, "loss"),
        (dict.fromkeys(MODELS, 0), dict.fromkeys(MODELS, 3.0), "accuracy"),  # neither moved
        (
            {"base": 0, "sums": 2, "words": 0, "merged": 0},
            {"base": 3.0, "sums": 1.0, "words": 1.0, "merged": 1.0},
            "loss",
        ),
        (
            {"base": 0, "sums": 20, "words": 0, "merged": 0},
            {"base": 3.0, "sums": 1.0, "words": 1.0, "merged": 1.0},
            "accuracy",
        ),
    ],
)
def test_where_no_answer_is_right_the_loss_tells_what_was_learned(project, right, losses, measure):
    write_answers(right, losses)
    evaluate.main()
    found = read_json(Path("reports/evaluation.json"))
    assert found["measures"]["sums"] == found["retention"]["sums"]["measure"] == measure
    assert set(found["matrix"]["base"]["sums"]) == {"loss", "accuracy"}


def test_two_runs_write_the_same_bytes(project):
    write_answers({"base": 0, "sums": 40, "words": 39, "merged": 10}, ONES)
    evaluate.main()
    first = [path.read_bytes() for path in Path("reports").glob("*.*")]
    evaluate.main()
    assert [path.read_bytes() for path in Path("reports").glob("*.*")] == first and len(first) == 2


@pytest.mark.parametrize("limited", [True, False])
def test_every_answer_is_kept(project, limited):
    make_base("llama-untied")
    if not limited:  # Bloom's config tells no longest text
        config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=4, n_head=4, pad_token_id=0, eos_token_id=0)
        BloomForCausalLM(config).save_pretrained(BASE)
    Path("data/sums").mkdir(parents=True)
    lines = ['{"prompt": "1+1=", "completion": "2", "part": "a"}', "", '{"text": "Привет", "part": "b"}']
    Path("data/sums/eval.jsonl").write_text("\n".join(lines))
    chosen = {"a": {"scorer": "number"}, "b": {"scorer": "loss"}}
    write_json(PICKED / "scorers.json", {"sums": chosen})
    Path("params.yaml").write_text(PARAMS)
    score.main("base")
    table = pd.read_parquet("reports/answers/base.parquet")
    assert list(table.columns) == list(score.COLUMNS)
    assert list(table["record"]) == [1, 2] and len(load_split("sums", "eval")) == 2
    asked, text = table.to_dict("records")
    assert (asked["question"], asked["reference"], asked["scorer"]) == ("1+1=", "2", "number")
    assert isinstance(asked["answer"], str) and asked["score"] in (0, 1)
    assert text["question"] == "Привет" and pd.isna([text["answer"], text["score"], text["scorer"]]).all()
    assert (table["loss"] > 0).all() and (table["weight"] > 0).all()
    assert load_params().evaluate.max_new_tokens == 4


def test_a_function_of_ones_own_scores_from_the_data_to_the_answers(project):
    make_base("llama-untied")
    Path("params.yaml").write_text(PARAMS.replace("    train: 40", "    score: mine:half\n    train: 40", 1))
    Path("mine.py").write_text("def half(answer, reference, record):\n    return 0.5\n")
    for name in ("sums", "words"):
        data.main(name)
    pick.main("data")
    assert read_json(PICKED / "scorers.json")["words"] == {"words": {"scorer": "exact"}}
    score.main("base")
    table = pd.read_parquet("reports/answers/base.parquet")
    assert set(table.loc[table["dataset"] == "sums", "score"]) == {0.5}
    assert set(table.loc[table["dataset"] == "words", "scorer"]) == {"exact"}
    Path("mine.py").write_text("def half(answer, reference, record):\n    return 0.6\n")
    with pytest.raises(MistakeError, match=r"mine.py has changed since dataset sums was made"):
        score.main("base")
