"""Which examples go into which step."""

import tracemalloc

from stages.records.lines import Lines
from stages.records.tokens import Example
from stages.training.batches import Encoded, Source, apportion


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

    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


def test_records_with_nothing_to_learn_and_other_parts_are_left_out_and_cuts_are_counted():
    answers = ["a", "bcd", "e", "f"]
    records = [
        {"prompt": "12", "completion": text, "part": "y" if text == "e" else "x", "weight": float(text != "f")}
        for text in answers
    ]
    found = Encoded(records, Bytes(), 4, part="x")
    assert [bytes(example.ids) for example in found] == [b"12a\0", b"12bc"]
    assert found.cut == 2


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
