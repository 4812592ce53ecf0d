"""Which examples go into which step."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from stages import base, data, select, train
from stages.errors import MistakeError
from stages.files import BASE
from stages.models.loading import load_tokenizer
from stages.models.losses import pad
from stages.project.params import load_params
from stages.records.lines import Lines, load_split
from stages.records.tokens import Example, encode
from stages.training.batches import Encoded, Source, apportion, hash_of, sources
from stages.training.model import put_on
from stages.training.protection import REMEMBERED_BATCHES, input_bases, remember_inputs
from tests.conftest import PARAMS, make_base
from tests.stages.test_train import make_examples, make_stage, prepare


def make(count=10, size=4):
    return Source(
        "d", [Example([i] * (1 + i % 3), [1.0] * (1 + i % 3)) for i in range(count)], size, seed=1, order_seed=2
    )


def names(batch):
    return sorted(example.ids[0] for example in batch)


def test_a_pass_sees_every_example_and_the_next_has_the_same_batches_in_another_order():
    source = make(12)
    first, second = ([tuple(names(source.batch(step))) for step in steps] for steps in (range(3), range(3, 6)))
    assert sorted(name for batch in first for name in batch) == list(range(12))
    assert sorted(first) == sorted(second)
    orders = {tuple(tuple(names(source.batch(turn * 3 + i))) for i in range(3)) for turn in range(6)}
    assert len(orders) > 1


def test_the_last_batch_is_filled_up():
    batches = [names(make(10).batch(step)) for step in range(3)]
    assert {name for batch in batches for name in batch} == set(range(10))
    assert [len(batch) for batch in batches] == [4, 4, 4]


def test_more_room_than_examples():
    assert len(make(3, 8).batch(0)) == 8


def test_a_batch_is_a_function_of_its_number():
    assert make().batch(17) == make().batch(17)


def test_shares():
    assert apportion({"a": 0.7, "b": 0.3}, 10) == {"a": 7, "b": 3}
    assert apportion({"a": 1, "b": 1, "c": 1}, 16) == {"a": 6, "b": 5, "c": 5}
    assert apportion({"a": 0.99, "b": 0.01}, 8) == {"a": 8, "b": 0}


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id, bos_token_id, chat_template = 0, None, None
    rows = 256

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


def test_records_with_nothing_to_learn_and_other_parts_are_left_out():
    answers = ["a", "bcd", "e", "f"]
    records = [
        {"prompt": "12", "completion": text, "part": "y" if text == "e" else "x", "weight": float(text != "f")}
        for text in answers
    ]
    found = Encoded(records, Bytes(), 4, part="x")
    assert [bytes(example.ids) for example in found] == [b"12a\0", b"12bc"]


@pytest.mark.parametrize("length", [5, 4, 3, 2])
def test_records_that_lose_tokens_are_counted_those_of_which_nothing_is_left_too(length):
    """With the end-of-text token the records have 5, 4, 3 and 5 tokens."""
    records = [{"prompt": "ab", "completion": text} for text in ("cd", "c")] + [{"text": "ab"}, {"text": "abcd"}]
    found = Encoded(records, Bytes(), length)
    assert found.cut == sum(n > length for n in (5, 4, 3, 5))
    assert len(found) == sum(start < length for start in (2, 2, 1, 1))  # nothing predicts the first token
    assert all(len(example.ids) <= length for example in found)


def test_examples_of_a_large_file_are_not_in_memory(tmp_path):
    path = tmp_path / "train.jsonl"
    line = '{"text": "%s"}\n' % ("word " * 2000)
    path.write_text(line * 500)
    tracemalloc.start()
    source = Source("d", Encoded(Lines(path), Bytes(), 10000), 4, seed=1, order_seed=2)
    batches = [source.batch(step) for step in range(3)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(len(example.ids) == 10000 for batch in batches for example in batch)
    assert peak < path.stat().st_size


def write_params(both):
    """The tiny project with a mix `both`, on which its stage `words` trains."""
    text = PARAMS.replace("stages:", f"  both: {json.dumps({'source': 'mix', 'parts': both})}\nstages:", 1)
    Path("params.yaml").write_text(text.replace("    dataset: words\n", "    dataset: both\n", 1))
    return load_params()


def parts(sums, words):
    return {
        name: {"source": "file", "path": f"{name}.jsonl", "eval": 5, "weight": weight}
        for name, weight in (("sums", sums), ("words", words))
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def counts(found):
    return [(source.name, source.count, source.replayed) for source in found]


def test_the_weights_of_a_mix_are_a_part_of_its_data(project):
    """DVC gives training the folder alone: what is not in it cannot run a stage again."""
    found = {}
    for weights in [(1.0, 1.0), (3.0, 1.0), (6.0, 2.0)]:
        write_params(parts(*weights))
        data.main("both")
        found[weights] = contents("data/both"), hash_of("both")
    assert found[3.0, 1.0] == found[6.0, 2.0]  # the same shares
    for one, other in zip(found[1.0, 1.0], found[3.0, 1.0], strict=True):
        assert one != other
    assert json.loads(found[3.0, 1.0][0]["mix.json"]) == {"sums": 0.75, "words": 0.25}


def test_a_mix_is_divided_as_its_data_says_and_a_selection_from_it_is_a_mix(project):
    settings = write_params(parts(3.0, 1.0))
    base.main()
    data.main("both")
    data.main("sums")
    stage = settings.stages["words"].model_copy(update={"replay": 0.0})
    assert counts(sources(settings, "words", stage, 0)) == [("sums", 12, False), ("words", 4, False)]
    stage = stage.model_copy(update={"replay": 0.25})
    divided = [("sums", 9, False), ("words", 3, False), ("replay", 4, True)]
    assert counts(sources(settings, "words", stage, 0)) == divided

    text = Path("params.yaml").read_text()
    selection = {"dataset": "both", "parent": "base", "reference": "sums", "keep": 0.9}
    text = text.replace("selections: {}", f"selections: {json.dumps({'hard': selection})}")
    Path("params.yaml").write_text(text.replace("dataset: both", "dataset: hard"))
    train.main("sums")
    select.main("hard")
    settings = load_params()
    stage = settings.stages["words"]
    found = sources(settings, "words", stage, 0)
    assert counts(found) == divided
    own = {tuple(record["input_ids"]) for record in load_split("hard", "train") if record["part"] == "sums"}
    assert {tuple(example.ids) for example in found[0].examples} <= own


@pytest.mark.parametrize("where", ["dataset", "part"])
def test_a_dataset_or_a_part_may_be_called_replay(project, where):
    Path("replay.jsonl").write_bytes(Path("words.jsonl").read_bytes())
    if where == "part":
        named = {"replay" if name == "words" else name: part for name, part in parts(1.0, 1.0).items()}
        settings = write_params(named)
        expected = [("sums", 6, False), ("replay", 6, False), ("replay", 4, True)]
    else:
        Path("params.yaml").write_text(PARAMS.replace("words", "replay"))
        settings = load_params()
        expected = [("replay", 12, False), ("replay", 4, True)]
    base.main()
    for dataset in settings.datasets:
        data.main(dataset)
    name = list(settings.stages)[-1]
    found = sources(settings, name, settings.stages[name], 0)
    assert sorted(counts(found)) == sorted(expected)
    tokenizer = load_tokenizer()
    own = {tuple(encode(record, tokenizer, 99)[0].ids) for record in load_split(settings.stages[name].dataset, "train")}
    earlier = {tuple(encode(record, tokenizer, 99)[0].ids) for record in load_split("sums", "train")}
    for source in found:
        assert {tuple(example.ids) for example in source.examples} <= (earlier if source.replayed else own)


def test_a_part_of_which_a_selection_keeps_nothing_is_refused(project):
    settings = write_params(parts(1.0, 1.0))
    base.main()
    data.main("both")
    path = Path("data/both/train.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | {"weight": float(r["part"] == "sums")}) + "\n" for r in records))
    with pytest.raises(MistakeError, match=r"stages.words learns nothing of words"):
        sources(settings, "words", settings.stages["words"].model_copy(update={"replay": 0.0}), 0)


def test_what_a_stage_remembers_is_of_its_own_examples_whatever_their_name():
    make_base()
    stage, accelerator, examples = make_stage("full", remember=0.9), Accelerator(), make_examples()
    own = Source("replay", examples[:4], 4, 3, 5)
    replayed = Source("replay", examples[4:], 4, 3, 5, replayed=True)
    model = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE), torch.float32)
    found = remember_inputs(model, stage.remember, [own, replayed], accelerator)
    truth = input_bases(model, list(found), [pad(own.batch(step), 0) for step in range(REMEMBERED_BATCHES)], 0.9)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_batches_are_the_dataset_shuffled_by_its_seed_in_the_order_of_the_stages(project):
    """Written out with torch alone: no batch of a stage that has run may ever change."""
    prepare()
    settings = load_params()
    own, replayed = sources(settings, "words", settings.stages["words"], 5)
    tokenizer = load_tokenizer()
    composition = int.from_bytes(hashlib.sha256(b"0/words").digest()[:4], "big")
    for source, name, count in ((own, "words", 12), (replayed, "sums", 4)):
        encoded = [encode(record, tokenizer, 1024)[0] for record in load_split(name, "train")]
        batches = -(-len(encoded) // count)
        shuffled = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(composition)).tolist()
        for step in (0, 3, batches + 1):
            turn, position = divmod(step, batches)
            order = torch.randperm(batches, generator=torch.Generator().manual_seed((5 << 20) + turn)).tolist()
            first = order[position] * count
            chosen = [encoded[shuffled[i % len(encoded)]] for i in range(first, first + count)]
            assert source.batch(step) == sorted(chosen, key=lambda example: len(example.ids))


def test_ties_of_shares_go_by_name():
    by_name = apportion({"siblings": 0.5, "replay": 0.5}, 15)
    assert by_name == {"siblings": 7, "replay": 8}
    keyed = apportion({("siblings", False): 0.5, ("replay", True): 0.5}, 15)
    assert keyed == {("siblings", False): 7, ("replay", True): 8}
