"""Kinds of chat templates and tokenizers: what is learned is what the model sees and says when it is used."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stages.base import stop_tokens
from stages.errors import MistakeError
from stages.records.tokens import encode, encode_question
from tests.conftest import train_bpe

# Written for these tests after those of the models whose name they have.
SMOLLM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|begin|>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}<|start|>system<|stop|>\n\nToday is "
    "{{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot|>{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<turn_end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
QWEN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content "
    "else '' %}{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<end>{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}<A>{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|over|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<end>{% endif %}"
)
HARMONY = (  # gpt-oss: what is said stands in a channel, and so do thoughts
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant{% if m.thinking and loop.last %}"
    "<|channel|>analysis<|stop|>{{ m.thinking }}<|eot|><|start|>assistant{% endif %}<|channel|>final<|stop|>"
    "{{ m.content }}{{ '<|over|>' if loop.last else '<|eot|>' }}{% else %}<|start|>{{ m.role }}<|stop|>{{ m.content }}"
    "<|eot|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
LAST_SYSTEM = (  # Mistral 0.3: the system's words stand before the user's as long as these are the last
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}<s>{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ system + '\n\n' if system and loop.last else '' }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<end>{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n{% else %}"
    "### Instruction:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start|>", "<|stop|>", "<|eot|>", "<bos>", "<turn>"]
SPECIAL += ["<|channel|>", "<turn_end>", "<s>", "<U>", "<A>", "<|user|>", "<|assistant|>", "<|system|>"]
PLAIN = ["<think>", "</think>", "<|over|>"]  # tokens of their own that decoding does not leave out, as Phi's

QUESTION, ANSWER = "What is 17 + 25?", "The answer is 42."


def finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", bos_token="<s>")
    fast.add_tokens(SPECIAL, special_tokens=True)
    fast.add_tokens(PLAIN)
    return fast


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it."""
    return finish(train_bpe("the answer is 42. What is 17 + 25? user assistant", vocab_size=320))


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: a space is a letter, the first text gets one, and so does BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<end>", *[f"<0x{i:02X}>" for i in range(256)]]
    )
    tokenizer.train_from_iterator(
        ["The answer is 42. What is 17 + 25? user model assistant [INST] [/INST]"] * 50, trainer
    )
    fast = finish(tokenizer)
    fast._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.convert_tokens_to_ids("<s>"))]
    )
    return fast


TOKENIZERS = {"byte-level": byte_level(), "sentence-piece": sentence_piece()}
TEMPLATES = {  # what a chat of one answer learns, and what ends an answer
    "SmolLM2": (SMOLLM, f"{ANSWER}<|im_end|>", "<|im_end|>"),
    "Llama 3": (LLAMA, f"{ANSWER}<|eot|>", "<|eot|>"),
    "Gemma": (GEMMA, f"{ANSWER}<turn_end>", "<turn_end>"),
    "Qwen3": (QWEN, f"<think>\n\n</think>\n\n{ANSWER}<|im_end|>", "<|im_end|>"),
    "Mistral": (MISTRAL, f" {ANSWER}<end>", "<end>"),
    "DeepSeek-R1": (DEEPSEEK, f"\n</think>\n\n{ANSWER}<end>", "<end>"),
    "Phi": (PHI, f"{ANSWER}<|over|>", "<|over|>"),
    "gpt-oss": (HARMONY, f"<|channel|>final<|stop|>{ANSWER}<|over|>", "<|over|>"),
    "Alpaca": (ALPACA, f"{ANSWER}<end>", "<end>"),
}
CHAT = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def learned(example, tokenizer):
    """The text of what counts, which is at the end."""
    ids = [i for i, weight in zip(example.ids, example.weights, strict=True) if weight]
    assert example.ids[-len(ids) :] == ids
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def asked(tokenizer, messages, **keywords):
    """What plain transformers gives a model to answer."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **keywords)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("record", [CHAT, {"prompt": QUESTION, "completion": f" {ANSWER} "}], ids=["chat", "pair"])
def test_what_is_learned_is_the_answer_to_what_is_asked(name, record, tokenizer):
    tokenizer.chat_template, answer, end = TEMPLATES[name]
    (example,) = encode(record, tokenizer, None)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ strftime_now('%d %b %Y') }}", "01 Jan 2025")
    question = asked(tokenizer, CHAT["messages"][:-1])
    assert example.ids[: len(question)] == question == encode_question(record, tokenizer)
    assert example.weights == [0.0] * len(question) + [1.0] * (len(example.ids) - len(question))
    said = example.ids[len(question) :]
    assert tokenizer.decode(example.ids) == tokenizer.decode(question) + answer  # as one text, spaces and all
    assert tokenizer.convert_ids_to_tokens(said[-1]) == end
    assert said[-1] in stop_tokens(7, tokenizer) and {7, tokenizer.eos_token_id} <= {*stop_tokens([7], tokenizer)}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("DeepSeek-R1", "Alpaca")])
def test_where_a_template_shows_what_it_asks_for_the_tokens_are_its_own(name, tokenizer):
    tokenizer.chat_template, _, _ = TEMPLATES[name]
    (example,) = encode(CHAT, tokenizer, None)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ strftime_now('%d %b %Y') }}", "01 Jan 2025")
    whole = tokenizer.apply_chat_template(CHAT["messages"], return_dict=False)
    assert whole[: len(example.ids)] == example.ids


def talk(*contents, system=None):
    """A chat of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + turns}


def shown(record, template, kind="byte-level"):
    """The text of each example of a record, with ⟨…⟩ around what is learned."""
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = template
    texts = []
    for example in encode(record, tokenizer, None):
        text, before = "", 0.0
        for token, weight in zip(example.ids, example.weights, strict=True):
            text += "⟩" * (weight == 0 < before) + "⟨" * (before == 0 < weight) + tokenizer.decode([token])
            before = weight
        texts.append(text + "⟩" * (before > 0))
    return texts


SPANS = talk("q", "a", "r", "b")
SPANS["messages"][1]["weight"] = 0
MARKED = talk("q", "a")
MARKED["messages"][1]["spans"] = [[0, 1, 2.0]]
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "two and"}
LATER = talk("q", "a", "r", "b")
LATER["messages"][2]["weight"] = 1


@pytest.mark.parametrize(
    ("template", "record", "examples"),
    [
        (  # one example where the template leaves earlier turns as they were
            PHI.replace("{% else %}<end>", ""),
            talk("q", "a", "r", "b"),
            ["<|user|>\nq<|over|>\n<|assistant|>\n⟨a<|over|>⟩\n<|user|>\nr<|over|>\n<|assistant|>\n⟨b<|over|>⟩"],
        ),
        (  # one for each answer where it does not
            QWEN,
            talk("q", "<think>\nhm\n</think>\n\na", "r", "b"),
            [
                "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟨<think>\nhm\n</think>\n\na<|im_end|>⟩",
                "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
                "<|im_start|>assistant\n⟨<think>\n\n</think>\n\nb<|im_end|>⟩",
            ],
        ),
        (  # the template is told what the record says; the empty thought is then part of the question
            QWEN,
            talk("q", "a") | {"chat_template_kwargs": {"enable_thinking": False}},
            ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟨a<|im_end|>⟩"],
        ),
        (  # asked not to think, the model learns no thoughts
            QWEN,
            talk("q", "<think>\nhm\n</think>\n\na") | {"chat_template_kwargs": {"enable_thinking": False}},
            ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟨a<|im_end|>⟩"],
        ),
        (DEEPSEEK, talk("q", "<think>\nhm\n</think>\n\na"), ["<U>q<A><think>\n⟨hm\n</think>\n\na<end>⟩"]),
        (
            DEEPSEEK,
            talk("q", "a", "r", "b"),
            ["<U>q<A><think>\n⟨\n</think>\n\na<end>⟩", "<U>q<A>a<end><U>r<A><think>\n⟨\n</think>\n\nb<end>⟩"],
        ),
        (  # answers that do not count are context
            PHI,
            SPANS,
            ["<|user|>\nq<|over|>\n<|assistant|>\na<|over|>\n<|user|>\nr<|over|>\n<|assistant|>\n⟨b<|over|>⟩"],
        ),
        (  # a message of the user that counts does so once
            DEEPSEEK,
            LATER,
            [
                "<U>q<A><think>\n⟨\n</think>\n\na<end>⟩",
                "<U>q<A>a<end><U>⟨r⟩<A><think>\n⟨\n</think>\n\nb<end>⟩",
            ],
        ),
        (  # nobody asked for a greeting
            PHI.replace("{% else %}<end>", ""),
            {"messages": [{"role": "assistant", "content": "hi"}, *talk("q", "a")["messages"]]},
            ["<|assistant|>\nhi<|over|>\n<|user|>\nq<|over|>\n<|assistant|>\n⟨a<|over|>⟩"],
        ),
        (  # what the template says elsewhere once it is answered is asked as it is asked
            LAST_SYSTEM,
            talk("q", "a", system="s"),
            ["<s>[INST] s\n\nq [/INST]⟨ a<end>⟩"],
        ),
        (
            DEEPSEEK,
            {"messages": [talk("q")["messages"][0], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
            ["<U>q<A><think>\n⟨hm\n</think>\n\na<end>⟩"],
        ),
        (ALPACA, talk("q", "a"), ["### Instruction:\nq\n\n### Response:\n⟨a<end>⟩"]),
        (
            "{% if tools %}{{ tools[0].name }}<|over|>{% endif %}" + PHI,
            talk("q", "a") | {"tools": [{"name": "add"}]},
            ["add<|over|><|user|>\nq<|over|>\n<|assistant|>\n⟨a<|over|>⟩"],
        ),
        (PHI, {"prompt": "q", "completion": "a", "format": "plain"}, ["q⟨a<end>⟩"]),
        (PHI, {"text": "a b"}, ["⟨a b<end>⟩"]),
    ],
)  # fmt: skip
def test_every_answer_is_learned_as_the_model_sees_it(template, record, examples):
    assert shown(record, template) == examples


@pytest.mark.parametrize(
    ("template", "record", "sentence"),
    [
        (GEMMA, talk("q", "a", system="s"), r"refuses \(System role not supported\); change its roles"),
        (GEMMA, {"messages": [*talk("q")["messages"], *talk("q", "a")["messages"]]}, r"\(Conversation roles must"),
        (GEMMA, {"messages": [{"role": "assistant", "content": "hi"}, *talk("q", "a")["messages"]]}, "must alternate"),
        (None, talk("q", "a"), "has no chat template for them; use a chat model"),
        (None, {"prompt": "q", "completion": "a", "format": "chat"}, "has no chat template for them"),
        ({"tool_use": PHI, "rag": PHI}, talk("q", "a"), "the chat templates rag, tool_use and none called default"),
        ({"tool_use": PHI}, {"prompt": "q", "completion": "a"}, "the chat templates tool_use and none called default"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", talk("q", "a"), "does not show what the assistant says"),
        ("{{ messages | length }}" + PHI, talk("q", "a"), "shows otherwise than it asks for it"),
        (DEEPSEEK, MARKED, "shows otherwise than it asks for it"),
        (PHI, {"messages": [*talk("q")["messages"], CALLS]}, r"message of role assistant .* does not show .*'weather'"),
        (PHI, {"messages": [*talk("q")["messages"], THOUGHT]}, r"assistant .* does not show in full \('two and'\)"),
        (
            PHI.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
            {"messages": [*talk("q")["messages"], {"role": "tool", "content": "Sunny"}, LATER["messages"][3]]},
            r"message of role tool .* does not show in full \('Sunny'\)",
        ),
    ],
)  # fmt: skip
def test_a_chat_that_the_template_does_not_take(template, record, sentence):
    with pytest.raises(MistakeError, match=sentence):
        shown(record, template)


def test_of_several_templates_the_default_is_taken():
    assert shown(talk("q", "a"), {"default": PHI, "rag": QWEN}) == ["<|user|>\nq<|over|>\n<|assistant|>\n⟨a<|over|>⟩"]


def test_a_prompt_and_its_completion_go_on_as_the_prompt_ends():
    tokenizer = TOKENIZERS["sentence-piece"]
    tokenizer.chat_template = None
    record = {"prompt": "What is 17 + 25? ", "completion": "The answer"}
    question = tokenizer(record["prompt"])["input_ids"]
    (example,) = encode(record, tokenizer, None)
    assert encode_question(record, tokenizer) == question == example.ids[: len(question)]
    assert question[0] == tokenizer.bos_token_id
    assert tokenizer.decode(example.ids, skip_special_tokens=True) == "What is 17 + 25? The answer"


def test_something_comes_before_an_answer_to_nothing():
    tokenizer = TOKENIZERS["byte-level"]
    tokenizer.chat_template = None
    assert encode_question({"prompt": "", "completion": "a"}, tokenizer) == [tokenizer.bos_token_id]
