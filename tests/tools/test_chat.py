"""A chat and a server with every model of a run: what they say is what scoring found."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from openai import NotFoundError, OpenAI
from transformers import AutoTokenizer

from stages import base, data, pick, score, train
from stages.errors import MistakeError
from tools import chat
from tools.terminal import visible

TEMPLATE = "{% for message in messages %}{{ message.content }}={% endfor %}"


@pytest.fixture
def answers(project):
    """A base with a chat format, and a stage on it, scored: what each said to each question."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("model")
    base.main()
    for name in ("sums", "words"):
        data.main(name)
    train.main("sums")
    pick.main("data")
    for name in ("base", "sums"):
        score.main(name)
    tables = {name: pd.read_parquet(f"reports/answers/{name}.parquet") for name in ("base", "sums")}
    return {name: dict(zip(table["question"], table["answer"], strict=True)) for name, table in tables.items()}


def squeezed(text):
    return "".join(text.replace("\\n", "").split())


def test_models_side_by_side_say_what_they_said_when_they_were_scored(answers, capsys, monkeypatch):
    first, second = list(answers["base"])[:2]
    Path("questions.txt").write_text(f"{first}\n\n{second}\n")
    chat.main(["base", "sums"], Path("questions.txt"), 4)
    said = {name: [answers[name][question] for question in (first, second)] for name in answers}
    out = capsys.readouterr().out
    for number, question in enumerate((first, second)):
        part = out.split(f"> {question}\n")[1]
        one, _, other = part.partition("> ")[0].removeprefix("[base]\n").partition("[sums]\n")
        for shown, name in ((one, "base"), (other, "sums")):
            assert squeezed(shown.replace(chat.CUT, "")) == squeezed(visible(said[name][number]))

    lines = iter(["/swap nobody", "/swap sums", first, "/reset", first, first, "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main(["base"], None, 4)
    told = capsys.readouterr().out.split("\n")
    assert "there is no model 'nobody'; choose one of base, merged, sums, words" in told[1]
    assert [line for line in told if said["sums"][0] == line.strip()] and chat.HELP in told
    with pytest.raises(MistakeError, match="merged holds no merged model; run `dvc repro merge`"):
        chat.main(["merged"], None, 4)
    Path("questions.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MistakeError, match=r"questions.txt cannot be read"):
        chat.main(["base"], Path("questions.txt"), 4)


@pytest.mark.slow
def test_any_client_of_openai_talks_to_every_model_several_at_once(answers):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tools.cli", "serve", "--port", str(port)]
    environment = {"PYTHONPATH": str(Path(chat.__file__).parents[1])}
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert f"base, sums, words, merged at http://127.0.0.1:{port}/v1" in server.stdout.readline()
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        assert [model.id for model in client.models.list()] == ["base", "sums", "words", "merged"]

        def ask(name, question, stream):
            messages = [{"role": "user", "content": question}]
            found = client.chat.completions.create(
                model=name, messages=messages, max_tokens=4, stream=stream, temperature=0
            )
            if not stream:
                return found.choices[0].message.content
            return "".join(chunk.choices[0].delta.content or "" for chunk in found if chunk.choices)

        asked = [(name, question, stream) for name in answers for question in answers[name] for stream in (False, True)]
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(lambda words: ask(*words), asked))
        for (name, question, _), found in zip(asked, said, strict=True):
            assert found.strip() == answers[name][question]
        with pytest.raises(NotFoundError) as refused:
            ask("gpt2", "1+1", False)
        assert "there is no model 'gpt2'; take base, sums, words, merged" in str(refused.value)
    finally:
        server.kill()
        server.wait()
