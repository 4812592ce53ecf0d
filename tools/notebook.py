"""What notebooks/pipeline.ipynb calls: each function a thin call of what a command of `strata` or of DVC calls."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout, suppress
from importlib import metadata
from pathlib import Path

import dvc.api
import pandas as pd
from dvc.exceptions import DvcException
from dvc.repo import Repo
from IPython.display import SVG, display
from tqdm import tqdm

from analysis.telling.figures import loss_curves
from stages.errors import MistakeError
from stages.files import REPORTS
from stages.project.params import load_params
from tools import plan as planning
from tools.watch import path

LOG, BAR = Path(".dvc/tmp/notebook.log"), "{desc:<22}|{bar}| {n_fmt} of {total_fmt}"
warnings.filterwarnings("ignore", message="IProgress not found")  # no bar here needs ipywidgets


def versions() -> None:
    """Print what everything runs on; the environment is a hash of every installed package and its version."""
    named = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "dvc")]
    print(f"Python {sys.version.split()[0]}, {', '.join(named)}, {load_params().thread_count} threads")
    installed = sorted({f"{each.name}=={each.version}" for each in metadata.distributions()})
    print(f"environment {hashlib.sha256(' '.join(installed).encode()).hexdigest()[:16]}")


def plan() -> None:
    """`strata plan`."""
    planning.main(as_json=False)


def run(jobs: int = 1) -> None:
    """`strata run` with bars, and the loss as it falls; interrupted, the next call goes on."""
    begun, (steps, _) = time.time(), planning.plan()
    command = [sys.executable, "-m", "tools.cli", "run", "-j", str(jobs)]
    with LOG.open("w") as log:  # in a session of its own, so that an interrupt reaches it once, from here
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    bars, picture = (display({"text/plain": ""}, raw=True, display_id=True) for _ in range(2))
    running, drawn = True, dict[str, list]()
    try:
        while running:
            time.sleep(1)
            running, (told, curves) = process.poll() is None, _look(steps, begun)
            bars.update({"text/plain": told}, raw=True)
            if curves != drawn:
                picture.update(_fitting(loss_curves(drawn := curves)))
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise MistakeError("stopped; run() goes on from where it was") from None
    said, _, last = LOG.read_text(encoding="utf-8").rstrip().rpartition("\n")
    if process.returncode:
        print(said)
        raise MistakeError(last.removeprefix("error: "))
    print(last)


def _look(steps: list[planning.Step], begun: float) -> tuple[str, dict[str, list]]:
    """What is done, as bars and by what `strata run` said of stages that ended; and the losses written so far."""
    ended = re.findall(r"^\S+ │ (?:done in .+|failed)$", LOG.read_text(encoding="utf-8"), re.MULTILINE)
    training = {step.stage for step in steps if step.fate != planning.CACHED}
    bars, curves = [("all stages", len(ended), len(steps))], {}
    for name, stage in load_params().stages.items():
        with suppress(FileNotFoundError):  # or dvc removed the last run's
            if f"train@{name}" in training and path(name).stat().st_mtime > begun:
                curves[name] = json.loads(path(name).read_text(encoding="utf-8"))
                bars.append((f"steps of {name}", len(curves[name]), getattr(stage, "steps", 0)))
    told = [tqdm.format_meter(done, of, 0, ncols=72, prefix=name, bar_format=BAR) for name, done, of in bars]
    return "\n".join([*told, "", *ended]), curves


def keep(name: str) -> None:
    """Keep settings and results under a name: `dvc exp save`."""
    with Repo(".") as repo:
        repo.experiments.save(name=name, force=True, include_untracked=[str(REPORTS)])
    print(f"kept as {name}")


def show(picture: str, *names: str) -> None:
    """A picture of reports/, such as evaluation or layers: as it is now, or as it was kept under each of the names."""
    for name in names or (None,):
        try:
            svg = dvc.api.read(f"{REPORTS}/{picture}.svg", rev=name)
        except DvcException as error:
            raise MistakeError(f"there is no picture {picture!r} ({error}); run() makes it, keep() keeps it") from None
        print(name or picture)
        display(_fitting(svg))


def _fitting(svg: str) -> SVG:
    """A picture as wide as the page, which cuts off what is wider."""
    return SVG(re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2))


def ask(questions: list[str], *names: str) -> pd.DataFrame:
    """What all models answer, or those named: each question is asked anew, as `strata chat --questions` does."""
    from tools.chat import Chat

    pd.set_option("display.max_colwidth", None)
    settings, answers = load_params(), dict[str, list[str]]()
    for name in names or settings.models:
        chat = Chat(settings, max_new_tokens=64)  # one model at a time in memory
        chat.swap([name])
        for question in questions:
            chat.reset()
            with redirect_stdout(io.StringIO()):
                chat.ask(question)
            answers.setdefault(name, []).append(chat.said[name][-1]["content"])
    return pd.DataFrame(answers, index=[" ".join(question.split()) for question in questions])
