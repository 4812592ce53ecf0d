"""DVC as a user runs it, but for one thing: a stage's command runs in a fork of this process, which has imported torch
and transformers already. The code of the stage is imported anew, from the folder that it runs in.
"""

import compileall
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import dvc.cli
import dvc.stage.run
import pytest
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError

from tests.conftest import ROOT

OWN = ("stages", "analysis", "tools", "mergekit")  # mergekit keeps a register of methods, ours among them


def copy_repository(folder: Path) -> None:
    """Everything of the repository that a run needs, committed."""
    for name in ("stages", "analysis", "tools", ".dvc", "dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    subprocess.run(["git", "init", "-q"], check=True, cwd=folder)
    commit(folder)
    compileall.compile_dir(folder, quiet=1)  # every fork would compile what it imports


def commit(folder: Path) -> None:
    """Commit all that git tracks or could."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run(["git", *who, *words], check=True, cwd=folder)


class Pipeline:
    """The pipeline in the current folder.

    Attributes:
        ran: stages whose command ran in the last `repro`; what came from the run cache is not among them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: set[str] = set()
        monkeypatch.setattr(dvc.stage.run, "_run", self._run)

    def repro(self, *targets: str) -> set[str]:
        """`dvc repro`."""
        self.ran.clear()
        with Repo(".") as repo:
            repo.reproduce(targets=list(targets))
        return set(self.ran)

    def experiment(self, *words: str) -> set[str]:
        """`dvc exp run`."""
        self.ran.clear()
        assert dvc.cli.main(["exp", "run", *words]) == 0
        return set(self.ran)

    def go_back(self) -> None:
        """`git reset --hard`, `git clean` and `dvc checkout`: the last commit's files and results."""
        for words in (["reset", "-q", "--hard"], ["clean", "-qfd"]):
            subprocess.run(["git", *words], check=True)
        time.sleep(1 - time.time() % 1)  # git knows a file by its size and second: an edit in this one could escape it
        with Repo(".") as repo:
            repo.checkout(force=True)

    def _run(self, executable: str, cmd: str, *, cwd: str, env: dict[str, str], **_: object) -> None:
        self.ran.add(env["DVC_STAGE"])
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _run_here(shlex.split(cmd), cwd, env)
            finally:  # nothing of the parent's stack is to end here a second time
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            raise StageCmdFailedError(cmd, os.waitstatus_to_exitcode(status))


def _run_here(words: list[str], cwd: str, env: dict[str, str]) -> int:
    """`python -m MODULE …` in this process, with the modules of `cwd`; returns its exit code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
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
