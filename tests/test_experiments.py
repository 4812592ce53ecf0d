"""docs/experiments.md: every command that it names, on a tiny model, in its order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stages.files import sha256
from tests.conftest import ROOT
from tests.forked import Pipeline, commit, write_branched
from tools import experiments

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
NAMES = {"reversal": "words", "siblings": "side"}  # of the default, and here
INSTALLED = {"dvc": [sys.executable, "-m", "dvc"], "strata": [sys.executable, "-m", "tools.cli"]}


def commands():
    text = (ROOT / "docs/experiments.md").read_text()
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    return [line.partition("  #")[0].strip().removeprefix("uv run ") for line in lines if line.strip()]


def run(line):
    for old, new in NAMES.items():
        line = re.sub(rf"\b{old}\b", new, line)
    words = shlex.split(line)
    ended = subprocess.run([*INSTALLED.get(words[0], words[:1]), *words[1:]], capture_output=True, text=True)
    assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def test_every_command(project, monkeypatch):
    write_branched(project)
    Pipeline(monkeypatch).repro()
    commit(project)
    subprocess.run(["git", "init", "-q", "--bare", "../origin.git"], check=True)
    subprocess.run(["git", "remote", "add", "origin", "../origin.git"], check=True)
    before = sha256([Path("merged/model.safetensors")])
    name = ""
    for line in commands():
        line = re.sub(r"\bNAME\b", name, line).replace("s3://bucket/strata", "../storage")
        if line.startswith(("strata watch", "rm dvc.lock")):
            continue  # the first is drawn until training ends; the second is tried by benchmarks/crash.py
        for part in line.split(" && "):
            out = run(part.removeprefix("uv run "))
        if line.startswith("dvc exp show"):
            assert len(out.splitlines()[1].split("│")) <= 12 + 4  # beside the experiment, its date and the borders
        if line == "strata experiments":
            page = (experiments.FOLDER / "index.html").read_text()
            names = re.findall(r'<a href="([\w-]+)\.html">', page)
            assert "merge.method task_arithmetic → ties" in page and len(names) >= 6
            name = next(each for each in names if "-" in each)
        if line.startswith("git reset"):
            assert sha256([Path("merged/model.safetensors")]) == before
