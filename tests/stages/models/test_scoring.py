"""The matrix against transformers' own loss and its generation without padding."""

import pytest
import torch

from stages.files import BASE
from stages.models import scoring
from stages.models.loading import load_model, load_tokenizer
from stages.records.tokens import encode
from stages.settings.evaluate import Evaluate
from stages.weights.checkpoint import Checkpoint
from tests.conftest import make_base

RECORDS = [{"prompt": "x" * n, "completion": "yz" * n} for n in (1, 4, 2, 9)]


def make_model():
    make_base("llama-untied")
    return load_model(Checkpoint(BASE, "base"), torch.float32), load_tokenizer()


def test_loss_is_per_token_whatever_the_batch():
    model, tokenizer = make_model()
    total, count = 0.0, 0
    for record in RECORDS:
        example = encode(record, tokenizer, 100)
        labels = [i if learned else -100 for i, learned in zip(example.ids, example.weights, strict=True)]
        loss = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * sum(example.weights), count + sum(example.weights)
    for batch_size in (1, 3, 8):
        found = scoring.mean_loss(model, tokenizer, RECORDS, batch_size)
        assert found == pytest.approx(total / count, rel=1e-5)


def test_a_padded_batch_answers_as_each_question_alone():
    model, tokenizer = make_model()
    together = scoring.generate(model, tokenizer, RECORDS, Evaluate(batch_size=4, max_new_tokens=8))
    alone = [
        scoring.generate(model, tokenizer, [record], Evaluate(batch_size=1, max_new_tokens=8))[0] for record in RECORDS
    ]
    shortest = [min(len(a), len(b)) for a, b in zip(together, alone, strict=True)]
    assert [t[:n] for t, n in zip(together, shortest, strict=True)] == [
        a[:n] for a, n in zip(alone, shortest, strict=True)
    ]
    assert max(shortest) > 0


@pytest.mark.parametrize(
    ("record", "text", "right"),
    [
        ({"prompt": "a", "completion": "12"}, "12", True),
        ({"prompt": "a", "completion": "12"}, "12.", False),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, "r", True),
        ({"prompt": "a", "completion": "12", "task": "chain_sum", "entry": {"answer": "12"}}, "13", False),
        ({"prompt": "a", "completion": "12", "task": "time_intervals", "entry": {}}, "not a time", False),
    ],
)
def test_what_counts_as_right(record, text, right):
    assert scoring.is_right(record, text) == right
