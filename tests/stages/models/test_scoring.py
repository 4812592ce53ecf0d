"""The matrix against transformers' own loss and its generation without padding."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from stages.files import BASE, read_json, write_json
from stages.models import scoring
from stages.models.loading import load_model, load_tokenizer
from stages.models.losses import mean_loss
from stages.records.tokens import encode, encode_question
from stages.settings.evaluate import Evaluate
from stages.weights.checkpoint import Checkpoint
from tests.conftest import make_base, make_tokenizer

RECORDS = [{"prompt": "x" * n, "completion": "yz" * n} for n in (1, 4, 2, 9)]


def make_model():
    make_base("llama-untied")
    return load_model(Checkpoint(BASE, "base"), torch.float32), load_tokenizer()


def test_loss_is_per_token_whatever_the_batch():
    model, tokenizer = make_model()
    total, count = 0.0, 0
    for record in RECORDS:
        (example,) = encode(record, tokenizer, 100)
        labels = [i if learned else -100 for i, learned in zip(example.ids, example.weights, strict=True)]
        loss = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * sum(example.weights), count + sum(example.weights)
    for batch_size in (1, 3, 8):
        found = mean_loss(model, tokenizer, RECORDS, batch_size)
        assert found == pytest.approx(total / count, rel=1e-5)


def test_a_model_without_a_limit_of_positions_reads_all():
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)).eval()
    record = {"text": "abcdefgh" * 20}
    ids = torch.tensor([encode(record, make_tokenizer(), None)[0].ids])
    found = mean_loss(model, make_tokenizer(), [record], 1)
    assert ids.shape == (1, 161) and found == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_a_padded_batch_answers_as_each_question_alone():
    model, tokenizer = make_model()
    together = [
        each.text for each in scoring.generate(model, tokenizer, RECORDS, Evaluate(batch_size=4, max_new_tokens=8))
    ]
    bounds = Evaluate(batch_size=1, max_new_tokens=8)
    alone = [scoring.generate(model, tokenizer, [record], bounds)[0].text for record in RECORDS]
    shortest = [min(len(a), len(b)) for a, b in zip(together, alone, strict=True)]
    assert [t[:n] for t, n in zip(together, shortest, strict=True)] == [
        a[:n] for a, n in zip(alone, shortest, strict=True)
    ]
    assert max(shortest) > 0


def greedy(model, tokenizer, record, most, stops=(0,)):
    """The most probable token after the other, up to one that ends an answer."""
    ids = encode_question(record, tokenizer)
    start = len(ids)
    while len(ids) < start + most:
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in stops:
            return tokenizer.decode(ids[start:-1], skip_special_tokens=True).strip()
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


OTHERWISE = [  # what a base's generation_config.json may ask for
    {},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 9},
    {"min_length": 30},
    {"max_length": 3},
    {"max_new_tokens": 1},
    {"max_time": 1e-9},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"do_sample": True, "temperature": 9.0},
    {"do_sample": True, "num_return_sequences": 3},
    {"suppress_tokens": list(range(64))},
    {"begin_suppress_tokens": list(range(64))},
    {"bad_words_ids": [[token] for token in range(64)]},
    {"sequence_bias": [[[99], 100.0]]},
    {"forced_bos_token_id": 99},
    {"forced_eos_token_id": 99},
    {"exponential_decay_length_penalty": [1, 50.0]},
    {"stop_strings": ["a", "b", "c", "x", "y", "z"]},
    {"penalty_alpha": 0.9, "top_k": 5},
    {"encoder_repetition_penalty": 5.0},
    {"guidance_scale": 3.0},
    {"prompt_lookup_num_tokens": 3},
    {"dola_layers": "low"},
    {"pad_token_id": 99},
    {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 50.0}},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"return_dict_in_generate": True, "output_scores": True},
    {"token_healing": True},
    {"renormalize_logits": True},
]


@pytest.mark.parametrize("asked", OTHERWISE, ids=lambda asked: ",".join(asked) or "nothing")
def test_answers_are_greedy_whatever_the_base_asks_for(asked):
    make_base("llama-untied")
    records = [{"prompt": text * 3, "completion": "z" * 8} for text in "abc"]
    path = BASE / "generation_config.json"
    write_json(path, read_json(path) | asked)
    model, tokenizer = load_model(Checkpoint(BASE, "base"), torch.float32), load_tokenizer()
    truth = [greedy(model, tokenizer, record, 9) for record in records]
    answers = scoring.generate(model, tokenizer, records, Evaluate(batch_size=3, max_new_tokens=9))
    assert [each.text for each in answers] == truth
    assert max(map(len, truth)) > 3


def test_an_answer_ends_with_every_token_of_the_generation_config():
    make_base("llama-untied")
    record = {"prompt": "aaa", "completion": "z" * 8}
    model, tokenizer = load_model(Checkpoint(BASE, "base"), torch.float32), load_tokenizer()
    whole = greedy(model, tokenizer, record, 9)
    path = BASE / "generation_config.json"
    write_json(path, read_json(path) | {"eos_token_id": [0, ord(whole[4])]})
    model = load_model(Checkpoint(BASE, "base"), torch.float32)
    for _ in range(2):  # a second dataset is scored with the same model
        (answer,) = scoring.generate(model, tokenizer, [record], Evaluate(max_new_tokens=20))
        assert answer == (whole[: whole.index(whole[4])].strip(), "stop")


def test_special_tokens_are_no_part_of_an_answer():
    model, tokenizer = make_model()
    record = {"prompt": "aaa", "completion": "z"}
    whole = greedy(model, tokenizer, record, 9)
    tokenizer.add_tokens([whole[4]], special_tokens=True)
    (answer,) = scoring.generate(model, tokenizer, [record], Evaluate(max_new_tokens=9))
    assert answer.text == whole.replace(whole[4], "").strip() != whole


def test_questions_that_are_longer_than_the_model_have_no_answer():
    make_base("gpt2")  # 256 positions, of which none may be passed
    model, tokenizer = load_model(Checkpoint(BASE, "base"), torch.float32), load_tokenizer()
    records = [{"prompt": "x" * n, "completion": "yyyy"} for n in (300, 256, 254, 5)]
    answers = scoring.generate(model, tokenizer, records, Evaluate(max_new_tokens=5))
    assert answers[:2] == [("", "unasked")] * 2
    whole = [greedy(model, tokenizer, record, most) for record, most in zip(records[2:], (2, 5), strict=True)]
    assert answers[2:] == [(text, "cut") for text in whole]


def test_every_record_has_its_loss_and_what_is_asked_its_answer():
    model, tokenizer = make_model()
    records = [{"text": "abc"}, *RECORDS[:2], {"prompt": "a", "completion": "b" * 5, "weight": 0.5}]
    rows = scoring.score(model, tokenizer, records, ["loss", "exact", "loss", "chrf"], Evaluate(batch_size=3))
    assert ["answer" in row for row in rows] == [False, True, False, True]
    assert [row.get("scorer") for row in rows] == [None, "exact", None, "chrf"]
    assert [row["reference"] for row in rows] == [None, "yz", "yzyzyzyz", "bbbbb"]
    assert [row["question"] for row in rows] == ["abc", "x", "xxxx", "a"]
    assert [row["weight"] for row in rows] == [3, 3, 9, 3]  # nothing predicts the first
    for record, row in zip(records, rows, strict=True):
        alone = mean_loss(model, tokenizer, [record], 1)
        assert row["loss"] / row["weight"] == pytest.approx(alone, rel=1e-5)
    alone = scoring.generate(model, tokenizer, [records[3]], Evaluate())[0].text
    assert rows[3]["answer"][: len(alone)] == alone or alone.startswith(rows[3]["answer"])


@pytest.mark.parametrize("scorer", ["exact", "contains"])
def test_an_answer_may_be_longer_than_its_reference(scorer):
    model, tokenizer = make_model()  # it may think first
    record = {"prompt": "aaa", "completion": "z"}
    (row,) = scoring.score(model, tokenizer, [record], [scorer], Evaluate(max_new_tokens=12))
    assert (row["answer"], row["end"]) == (greedy(model, tokenizer, record, 12), "cut")


def test_what_a_template_puts_before_an_answer_is_no_part_of_it():
    model, tokenizer = make_model()
    said = greedy(model, tokenizer, {"prompt": "<aaa>", "completion": "z"}, 6)  # a token is a character
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}<{{{{ m.content }}}}>{{% else %}}{said[0]}{said[1]}"
        "{{ m.content }}<end>{% endif %}{% endfor %}"
    )
    (answer,) = scoring.generate(model, tokenizer, [{"prompt": "aaa", "completion": "z"}], Evaluate(max_new_tokens=6))
    assert answer == (said[2:], "cut") and len(said) > 2
