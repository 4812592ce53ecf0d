"""docs/experiments.md: every command that it names, on a tiny model, in its order."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.files import sha256
from tests.conftest import ROOT
from tests.forked import Pipeline, commit, write_branched
from tools import experiments

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
NAMES = {"arithmetic": "sums", "reversal": "words", "siblings": "side"}  # of the default, and here
INSTALLED = {"dvc": [sys.executable, "-m", "dvc"], "strata": [sys.executable, "-m", "tools.cli"]}
QUEUE = 600  # seconds that the queue may take
EXPERIMENTS = 11  # that the page tells to run


def commands():
    """The words of every command, in the names of the tiny project."""
    text = (ROOT / "docs/experiments.md").read_text(encoding="utf-8").replace("s3://bucket/strata", "../storage")
    for old, new in NAMES.items():
        text = re.sub(rf"\b{old}\b", new, text)
    for line in "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines():
        for part in line.split("&&"):
            if words := shlex.split(re.sub(r"^ *uv run (--extra \w+ )?", "", part), comments=True):
                yield words


def call(words):
    ended = subprocess.run([*INSTALLED.get(words[0], words[:1]), *words[1:]], capture_output=True, text=True)
    assert ended.returncode == 0, f"{words}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def wait_for_queue():
    deadline = time.monotonic() + QUEUE
    while re.search("Queued|Running", told := call(["dvc", "queue", "status"])):
        assert time.monotonic() < deadline, told
        time.sleep(5)
    assert "Failed" not in told


def test_every_command(project, monkeypatch):
    write_branched(project)
    pipeline = Pipeline(monkeypatch)
    pipeline.repro()
    commit(project)
    subprocess.run(["git", "init", "-q", "--bare", "../origin.git"], check=True)
    subprocess.run(["git", "remote", "add", "origin", "../origin.git"], check=True)
    before, name = sha256([Path("merged/model.safetensors")]), ""
    for words in commands():
        words = [name if word == "NAME" else word for word in words]
        match words:
            case ["strata", "watch"] | ["rm", *_]:  # drawn until training ends; tried by benchmarks/crash.py
                continue
            case ["dvc", "exp", "run", *more] if not {"--temp", "--queue"} & {*more}:
                pipeline.experiment(*more)
                continue
        told = call(words)
        match words[:3]:
            case ["dvc", "queue", "start"]:
                wait_for_queue()
            case ["dvc", "exp", "show"]:
                assert "merge.method" in told and "kept" in told and "reports/" not in told
                assert len(re.findall(r"[├└]── \w+ \[", told)) == EXPERIMENTS, told
            case ["strata", "experiments"]:
                page = (experiments.FOLDER / "index.html").read_text(encoding="utf-8")
                names = re.findall(r'<a href="\w+\.html">([\w-]+)</a>', page)
                assert "merge.method task_arithmetic → ties" in page and len(names) == EXPERIMENTS
                name = names[0]
            case ["git", "reset", _]:
                call(["dvc", "checkout"])
                assert sha256([Path("merged/model.safetensors")]) == before
