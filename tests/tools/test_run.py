"""`strata run` is `dvc repro`: the same files, whatever runs beside what, and whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.files import sha256
from tests.forked import Pipeline, write_branched
from tools.plan import plan

pytestmark = pytest.mark.slow
OUTPUTS = ("checkpoints", "data", "merged", "picked", "reports")
RUN = [sys.executable, "-m", "tools.cli", "run", "-j", "2"]


@pytest.fixture
def pipeline(project, monkeypatch):
    """A chain of two stages and one beside it."""
    write_branched(project)
    return Pipeline(monkeypatch)


def files():
    found = [path for folder in OUTPUTS for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): sha256([path]) for path in found}


def clear():
    subprocess.run(["git", "clean", "-qfdx"], check=True)
    for folder in Path(".dvc/cache"), Path(".dvc/tmp"):
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def start():
    return subprocess.Popen(RUN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_side_by_side_interrupted_and_killed_it_leaves_the_files_of_repro(pipeline):
    pipeline.repro()
    truth = files()
    clear()
    started = start()
    while "data@sums │ done" not in (line := started.stdout.readline()):
        assert line
    os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 1 and err.endswith("error: stopped; strata run goes on from where it was\n")
    assert "Traceback" not in out + err
    started = start()
    while "train@sums │ done" not in (line := started.stdout.readline()):
        assert line
    time.sleep(0.5)
    below = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.communicate()
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
    ended = subprocess.run(RUN, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "stages done in" in ended.stdout and "train@sums │" not in ended.stdout
    assert files() == truth
    assert plan()[0] == [] and pipeline.repro() == set()
    ended = subprocess.run(RUN, capture_output=True, text=True, check=True)
    assert ended.stdout == "All 23 stages are up to date.\n"


@pytest.mark.exhaustive
def test_a_stage_that_fails_leaves_the_others_results(pipeline):
    code = Path("stages/train.py")
    good = code.read_text()
    planted = "    if name == 'side':\n        sys.exit('error: planted')\n    settings = load_checked()"
    code.write_text(good.replace("    settings = load_checked()", planted))
    ended = subprocess.run(RUN, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stdout + ended.stderr
    assert ended.stderr.endswith("error: train@side failed, and what depends on it was left out; the reason is above\n")
    assert "train@side │ error: planted\n" in ended.stdout
    assert "train@words │ done in" in ended.stdout and "merge │" not in ended.stdout
    assert not {"base", "train@sums", "train@words"} & {step.stage for step in plan()[0]}
    code.write_text(good)
