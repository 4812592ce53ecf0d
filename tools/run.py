"""What `dvc repro` does, with independent stages side by side: `strata run -j 2`.

Each stage is DVC's own `repro --single-item`, under DVC's locks, once the stages that it depends on are done. Its
command runs in a fork of a process that has imported what most stages need; the stage's own code is imported anew. So
the files are those of `dvc repro`, to the byte, and a stage that is killed goes on from its state.
"""

import importlib
import logging
import os
import runpy
import select
import shlex
import signal
import sys
import time
import traceback
from argparse import ArgumentParser
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.errors import MistakeError, end_with_parent
from stages.project.params import load_params
from tools.plan import CACHED, Step, plan
from tools.terminal import duration, positive

MODELS = ("base", "select", "train", "score", "probe")  # verbs that run a model: on a GPU, where there is one
# Threads that wait for each other by turning in circles would take the cores from the other stage.
PATIENT = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
tqdm.monitor_interval = 0  # no thread where processes fork
HEAVY = ("accelerate", "peft", "transformers.generation.utils", "transformers.modeling_utils")
OWN = ("stages", "analysis", "tools", "mergekit")  # mergekit keeps a register of methods, ours among them


def add_arguments(parser: ArgumentParser) -> None:
    """How many at once."""
    parser.add_argument("-j", "--jobs", type=positive, default=1, help="stages that may run at the same time; 1")


def main(jobs: int) -> None:
    """Run what is not up to date; a stage that fails leaves out what depends on it, and nothing else.

    Raises:
        MistakeError: params.yaml has a mistake, or a stage failed.
    """
    if jobs > 1 and PATIENT["OMP_WAIT_POLICY"] != os.environ.get("OMP_WAIT_POLICY"):
        os.environ |= PATIENT
        os.execv(sys.executable, sys.orig_argv)  # torch is there already, and has read them
    steps, total = plan()
    start, failed = time.monotonic(), _Run(steps, jobs).everything()
    if failed:
        raise MistakeError(f"{', '.join(failed)} failed, and what depends on it was left out; the reason is above")
    done = f"{len(steps)} of {total} stages done in {duration(time.monotonic() - start)}"
    print(done if steps else f"All {total} stages are up to date.")


@dataclass
class _Job:
    """A stage that is running, and what it said last."""

    step: Step
    process: ForkProcess
    output: Connection
    bar: Any
    gpu: str | None
    start: float = field(default_factory=time.monotonic)
    said: bytes = b""


class _Run:
    """The stages of a plan, each started once those before it are done."""

    def __init__(self, steps: list[Step], jobs: int) -> None:
        self.steps = {step.stage: step for step in steps}
        self.jobs, self.needs, self.gpus = jobs, _needs(set(self.steps)), gpus()
        self.free = list(self.gpus)
        self.done: set[str] = set()
        self.failed: list[str] = []
        self.running: list[_Job] = []
        self.context = get_context("fork")
        if sum(step.fate != CACHED and _verb(step.stage) in MODELS for step in steps) > 1:
            for module in HEAVY:
                importlib.import_module(module)

    def everything(self) -> list[str]:
        """Run them; returns those that failed."""
        try:
            while self._start() or self.running:
                self._listen()
        except KeyboardInterrupt:  # which the stages got too
            for job in self.running:
                job.process.join()
            raise MistakeError("stopped; strata run goes on from where it was") from None
        return self.failed

    def _start(self) -> bool:
        """Start what can be started; whether anything was."""
        begun = False
        started = self.done | set(self.failed) | {job.step.stage for job in self.running}
        for name, step in self.steps.items():
            if len(self.running) == self.jobs:
                break
            if name in started or not self.needs[name] <= self.done:
                continue
            wants = bool(self.gpus) and _verb(name) in MODELS
            if wants and not self.free:
                continue
            begun = True
            self._launch(step, self.free.pop() if wants else None)
        return begun

    def _launch(self, step: Step, gpu: str | None) -> None:
        reading, writing = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_reproduce, args=(step.stage, writing, gpu))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # what Python runs around a fork would swallow it
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        writing.close()
        bar = tqdm(bar_format="{desc}", leave=False, disable=not sys.stderr.isatty())
        bar.set_description_str(step.stage)
        self.running.append(_Job(step, process, reading, bar, gpu))

    def _listen(self) -> None:
        """Show what the stages say, and take leave of those that end."""
        heard, _, _ = select.select([job.output for job in self.running], [], [])
        for job in [job for job in self.running if job.output in heard]:
            if chunk := os.read(job.output.fileno(), 1 << 16):
                self._tell(job, chunk)
            else:
                self._leave(job)

    def _tell(self, job: _Job, chunk: bytes) -> None:
        """Print lines with the stage's name before them; of a progress bar the last state, the others on a terminal."""
        *lines, job.said = (job.said + chunk).split(b"\n")
        for line in lines:
            if text := line.rpartition(b"\r")[2].decode(errors="replace").strip():
                tqdm.write(f"{job.step.stage} │ {text}", file=sys.stdout)
        job.said = job.said.rpartition(b"\r")[2]
        job.bar.set_description_str(f"{job.step.stage} │ {job.said.decode(errors='replace').strip()}")

    def _leave(self, job: _Job) -> None:
        if job.said:
            self._tell(job, b"\n")
        job.process.join()
        job.output.close()
        job.bar.close()
        self.running.remove(job)
        if job.gpu is not None:
            self.free.append(job.gpu)
        is_done = job.process.exitcode == 0
        if is_done:
            self.done.add(job.step.stage)
        else:
            self.failed.append(job.step.stage)
        ended = f"done in {duration(time.monotonic() - job.start)}" if is_done else "failed"
        tqdm.write(f"{job.step.stage} │ {ended}", file=sys.stdout)


def _needs(names: set[str]) -> dict[str, set[str]]:
    """Of each stage those among `names` that have to be done before it."""
    from dvc.repo import Repo

    with Repo(".") as repo:
        graph = repo.index.graph
        return {stage.addressing: {each.addressing for each in graph.successors(stage)} & names for stage in graph}


def _verb(stage: str) -> str:
    return stage.partition("@")[0].partition("_")[0]


def gpus() -> list[str]:
    """The GPUs of NVIDIA that may be used, by number; none where stages with several `processes` take their own."""
    if any(getattr(stage, "processes", 1) > 1 for stage in load_params().stages.values()):
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [each for each in chosen.split(",") if each]
    return [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]


def _reproduce(name: str, output: Connection, gpu: str | None) -> None:
    """DVC's `repro` of one stage, in a process of its own, whose output goes to the one that shows it."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import dvc.stage.run
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    dvc.stage.run._run = run_in_fork
    try:
        with Repo(".", _wait_for_lock=True) as repo:
            repo.reproduce(targets=[name], single_item=True)
    except DvcException as error:
        sys.exit(f"dvc: {error}" if not isinstance(error.__cause__, DvcException) else 1)


def run_in_fork(executable: str, cmd: str, *, cwd: str, env: dict[str, str], **more: object) -> None:
    """What DVC starts a stage's command with: `python -m MODULE …`, here in a fork of this process.

    Raises:
        StageCmdFailedError: the command failed.
    """
    from dvc.stage.exceptions import StageCmdFailedError

    child, code = os.fork(), 1
    if not child:
        try:
            code = _run_here(shlex.split(cmd), cwd, env)
        finally:  # nothing of the parent's stack is to end here a second time
            os._exit(code)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage has it, and ends
    try:
        _, status = os.waitpid(child, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    if status:
        raise StageCmdFailedError(cmd, os.waitstatus_to_exitcode(status))


def _run_here(words: list[str], cwd: str, env: dict[str, str]) -> int:
    """Run a module in this process, with the code of `cwd`; returns its exit code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for module in [module for module in sys.modules if module.split(".")[0] in OWN]:
        del sys.modules[module]
    sys.path.insert(0, cwd)
    sys.argv = words[2:]
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            print(end.code, file=sys.stderr, flush=True)
        return 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
