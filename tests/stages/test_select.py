"""Token selection: losses against the library's own, choices worked out by hand, and a stage trained on one."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from stages import base, data, evaluate, merge, pick, score, select, train
from stages.errors import MistakeError
from stages.files import BASE, read_json
from stages.records.lines import load_split
from stages.records.tokens import Example
from tests.conftest import make_base
from tools.show import main as show


def test_losses_are_those_of_the_library_for_every_example_alone():
    make_base()
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(1, 128, (n,), generator=generator).tolist(), [float(i % 3 != 1) for i in range(n)])
        for n in (9, 4, 17, 6)
    ]
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for example, found in zip(examples, select.losses("base", examples, 0), strict=True):
        ids = torch.tensor([example.ids])
        logits = model(ids).logits.double()[0, :-1]
        truth = -logits.log_softmax(-1)[range(len(example.ids) - 1), example.ids[1:]]
        wanted = truth[[weight != 0 for weight in example.weights[1:]]]
        assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_the_largest_excess_of_the_whole_dataset_is_kept():
    examples = [Example([5, 6, 7, 8], [1.0, 0.0, 2.0, 1.0]), Example([5, 6, 7], [0.0, 0.5, 1.0])]
    chosen = select.choose(examples, [torch.tensor([0.3, 0.1]), torch.tensor([-0.2, 0.9])], keep=0.5)
    assert [example.weights for example in chosen] == [[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    assert [example.ids for example in chosen] == [example.ids for example in examples]


def test_among_equals_the_first_stay_and_what_is_unlearned_keeps_its_weight():
    examples = [Example([1, 2, 3, 4, 5], [0.0, -1.0, 1.0, 1.0, 1.0])]
    chosen = select.choose(examples, [torch.tensor([9.0, 0.5, 0.5, 0.5])], keep=0.3)
    assert chosen[0].weights == [0.0, -1.0, 1.0, 0.0, 0.0]


@pytest.fixture
def noisy(project):
    """A dataset whose answers are `yes` and then noise, and a tutor that was trained on `yes` alone."""
    draw = random.Random(0)
    questions = [f"is {a}{b}?" for a in "abcdefgh" for b in "ijklmnop"]
    noise = ["".join(draw.choices("qrstuvwxz0123456789", k=3)) for _ in questions]
    for name, ends in (("sums", [""] * len(noise)), ("words", noise)):
        records = [
            {"prompt": question, "completion": "yes" + end} for question, end in zip(questions, ends, strict=True)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    yaml = YAML()
    content = yaml.load(Path("params.yaml"))
    content["stages"]["sums"] |= {"method": "full", "layers": "all"}
    del content["stages"]["sums"]["rank"]
    content["stages"]["words"] = {**content["stages"]["words"], "parent": "base", "dataset": "hard"}
    del content["stages"]["words"]["replay"]
    content["selections"] = {"hard": {"dataset": "words", "parent": "base", "reference": "sums", "keep": 0.4}}
    yaml.dump(content, Path("params.yaml"))
    return project


def test_noise_is_left_out_and_the_stage_is_scored_on_the_whole_skill(noisy, capsys):
    base.main()
    for name in ("sums", "words"):
        data.main(name)
    train.main("sums")
    with pytest.raises(MistakeError, match="run dvc repro select@hard"):
        show("hard", 1)
    select.main("hard")
    kept = [
        chr(token)
        for record in load_split("hard", "train")
        for token, weight in zip(record["input_ids"], record["loss_weights"], strict=True)
        if weight
    ]
    answers = len(load_split("words", "train"))
    assert len(kept) == read_json(Path("reports/data/hard.json"))["hard"]["kept_tokens"] == -(-2 * 7 * answers // 5)
    # Three of an answer's seven tokens are `yes`, so chance would make it 43 %.
    assert sum(letter in "yes" for letter in kept) > 0.9 * len(kept)
    show("hard", 1)
    assert re.search(r"⟨1⟩s⟨0⟩\w·\w·\w·<end>", capsys.readouterr().out)

    for split in ("eval", "tune"):
        assert list(load_split("hard", split)) == list(load_split("words", split))

    train.main("words")
    merge.main()
    pick.main("data")
    for name in ("base", "sums", "words", "merged"):
        score.main(name)
    evaluate.main()
    report = read_json(Path("reports/evaluation.json"))
    assert set(report["matrix"]["words"]) == {"sums", "words"}
    assert report["retention"]["words"]["dataset"] == "words"


def test_an_unknown_selection_is_refused(project):
    with pytest.raises(MistakeError, match="selections has no 'x'; it has none"):
        select.main("x")
