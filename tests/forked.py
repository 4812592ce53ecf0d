"""DVC as a user runs it, but for one thing: a stage's command runs in a fork of this process, which has imported torch
and transformers already. The code of the stage is imported anew, from the folder that it runs in.
"""

import compileall
import shutil
import subprocess
import time
from pathlib import Path

import dvc.cli
import dvc.stage.run
import pytest
from dvc.repo import Repo

from tests.conftest import PARAMS, ROOT
from tools.run import run_in_fork

# A branch beside the chain, so that there is something that must not run again.
BRANCH = """\
  side:
    parent: base
    dataset: words
    method: dora
    layers: 1-2
    rank: 2
    lr: 1.0e-3
    steps: 3
merge:
"""


def write_branched(folder: Path) -> None:
    """The repository's files, committed with the tiny project of `folder` and a branch beside its chain."""
    text = PARAMS.replace("merge:\n", BRANCH).replace("    words: 1.0\n", "    words: 1.0\n    side: 0.5\n")
    (folder / "params.yaml").write_text(text)
    copy_repository(folder)


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
        run_in_fork(executable, cmd, cwd=cwd, env=env)
