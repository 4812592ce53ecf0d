"""Strike a tiny pipeline at random moments, then `dvc repro`: `python benchmarks/crash.py --strikes 100 --seed 0`.

Each round starts from nothing, waits for a stage drawn at random to start and for a random part of the time that it
takes, and strikes: `kill -9` of the stage, of dvc (whose stage goes on alone) or of both; SIGTERM for both; a disk
that takes no more (a limit on the size of files), memory that gives no more (a limit on address space), or folders
that have become read-only. `dvc repro`, after `rm dvc.lock` where dvc was just writing that, must then end with the
files of the run that nothing disturbed, to the byte and with none beside them, with every file of DVC's cache having
the content that its name says, and no process left.

Three methods are trained in a project; all of them take turns. Stages run in forks of this process (tests/forked.py),
which spares them the imports. Root may write to read-only folders; take its right first:
`setpriv --bounding-set=-dac_override,-dac_read_search python benchmarks/crash.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: F401  a fork finds it imported
import matplotlib.figure  # noqa: F401
import psutil
import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tests.conftest import BASE, make_base
from tests.forked import Pipeline, copy_repository
from tests.stages.methods.test_matrix import ROWS

ROOM = {"bitfit": {"add_biases": True}, "bottleneck": {"extra_neurons": 12}, "houlsby": {"adapter_size": 12}}
FOLDERS = ("checkpoints", "data", "picked", "merged", "reports", ".")
DVCS_OWN = (
    ".git",
    ".dvc/cache",
    ".dvc/tmp/times.jsonl",
    ".dvc/tmp/btime",
    ".dvc/tmp/lock",
    ".dvc/tmp/rwlock",
    ".dvc/tmp/rwlock.lock",
)

Files = dict[str, str]  # hash by path


def prepare(methods: list[str]) -> None:
    """A project of these methods in the current folder: the second on top of the first, the others beside them."""
    make_base("llama-untied")
    shutil.move(BASE, "model")
    Path("model/stage.json").unlink()
    base = {"model": "model", "dtype": "float32"}
    stages = {}
    for number, row in enumerate(methods):
        method = ROWS[row].method or row
        base |= ROOM.get(method, {})
        parent = methods[0] if number == 1 else "base"
        own = {"method": method, "parent": parent, "dataset": "words" if number == 1 else "sums", "layers": "1-2"}
        stages[row] = {"lr": 0.01, "steps": 40, "batch_size": 8} | own | ROWS[row].keys
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    words = [{"prompt": f"say {a}{b}:", "completion": f"{b}{a}"} for a in "abcdef" for b in "ghijkl"]
    for name, records in (("sums", sums), ("words", words)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    params = {
        "seed": 0,
        "threads": 1,  # more wait for each other where something else runs too
        "launch": "python",
        "base": base,
        "selections": {},
        "routers": {},
        "datasets": {name: {"source": "file", "path": f"{name}.jsonl", "eval": 5} for name in ("sums", "words")},
        "stages": stages,
        "merge": {"method": "task_arithmetic", "dtype": "float32", "weights": dict.fromkeys(methods, 0.5)},
        "evaluate": {"max_new_tokens": 2},
        "warn": {},
    }
    Path("params.yaml").write_text(json.dumps(params, indent=2))
    copy_repository(Path())


def clear() -> None:
    """The project as it was before its first run."""
    subprocess.run(["git", "reset", "-q", "--hard"], check=True)
    subprocess.run(["git", "clean", "-qfdx", "-e", "__pycache__"], check=True)
    for folder in (".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(folder, ignore_errors=True)


class Told(Pipeline):
    """A pipeline that tells each stage that it starts through a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        super().__init__(pytest.MonkeyPatch())

    def _run(self, executable: str, cmd: str, *, cwd: str, env: dict[str, str], **_: object) -> None:
        os.write(self._pipe, f"{env['DVC_STAGE']}\n".encode())
        super()._run(executable, cmd, cwd=cwd, env=env)


class Repro:
    """`dvc repro` in a fork of this process, which leads a group of its own; `log` takes what it prints."""

    def __init__(self, log: Path) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.setsid()
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                Told(writing).repro()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        self.starts = os.fdopen(reading)
        self.dvc = psutil.Process(self.pid)

    def stages(self) -> Iterator[str]:
        """Names of the stages as they start."""
        for line in self.starts:
            yield line.strip()

    def wait(self) -> int:
        """Its exit code, once it ends."""
        status = os.waitpid(self.pid, 0)[1]
        self.starts.close()
        return os.waitstatus_to_exitcode(status)


def kill(*processes: psutil.Process, by: int = signal.SIGKILL) -> None:
    """Send a signal to those processes that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(by)


def limit(kind: int, size: Callable[[psutil.Process], int], processes: list[psutil.Process]) -> None:
    """Set the limit of a resource for each process."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            resource.prlimit(process.pid, kind, (size(process), resource.RLIM_INFINITY))


def forbid() -> None:
    """Take the right to write from the folders of the project."""
    for folder in map(Path, FOLDERS):
        for each in (folder, *folder.glob("*/")) if folder.exists() else ():
            each.chmod(0o555)


def allow() -> None:
    """Give it back."""
    for folder in map(Path, FOLDERS[::-1]):
        for each in (folder, *folder.glob("*/")) if folder.exists() else ():
            each.chmod(0o755)


def strike(kind: str, dvc: psutil.Process) -> None:
    """Do to a running pipeline what `kind` says."""
    stage = dvc.children(recursive=True)
    match kind:
        case "kill stage":
            kill(*stage[:1])
        case "kill dvc":
            kill(dvc)
        case "kill both":
            kill(dvc, *stage[:1])
        case "terminate":
            kill(dvc, *stage, by=signal.SIGTERM)
        case "full disk":
            limit(resource.RLIMIT_FSIZE, lambda _: 1 << 12, stage)  # dvc itself would leave half a dvc.lock
        case "no memory":
            limit(resource.RLIMIT_AS, lambda process: process.memory_info().vms + (1 << 20), stage)
        case "read-only":
            forbid()


def kinds() -> list[str]:
    """Kinds of strikes that mean something here."""
    always = ["kill stage", "kill dvc", "kill both", "terminate", "full disk", "no memory"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        return always if os.access(folder, os.W_OK) else [*always, "read-only"]


def tree() -> Files:
    """Every file of the project that is not DVC's or git's own, with its hash."""
    found = {}
    for path in sorted(Path().rglob("*")):
        own = any(path.is_relative_to(folder) for folder in DVCS_OWN)
        if path.is_file() and not own and "__pycache__" not in path.parts:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def unsound() -> list[str]:
    """Files of DVC's cache that do not have the content that their name says."""
    files = [path for path in Path(".dvc/cache/files/md5").glob("*/*") if path.is_file()]
    names = {path: (path.parent.name + path.name).removesuffix(".dir") for path in files}
    return [str(path) for path in files if hashlib.md5(path.read_bytes()).hexdigest() != names[path]]


def left() -> list[str]:
    """Processes other than this one that work in the project."""
    found, here = [], str(Path.cwd())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and process.cwd() == here:
                found.append(f"{process.pid} {process.status()}")
    return found


def undisturbed(log: Path) -> tuple[dict[str, float], Files]:
    """Seconds that each stage takes, and the files that all of them leave."""
    repro, starts = Repro(log), []
    for name in repro.stages():
        starts.append((name, time.monotonic()))
    if repro.wait():
        sys.exit(f"error: the pipeline fails when nothing disturbs it; see {log}")
    ends = [start for _, start in starts[1:]] + [time.monotonic()]
    return {name: end - start for (name, start), end in zip(starts, ends, strict=True)}, tree()


def differences(truth: Files) -> list[str]:
    """What is not as it was in the run that nothing disturbed."""
    found = tree()
    return [
        *(f"{path} is missing" for path in sorted(truth.keys() - found.keys())),
        *(f"{path} is left" for path in sorted(found.keys() - truth.keys())),
        *(f"{path} differs" for path in sorted(truth.keys() & found.keys()) if truth[path] != found[path]),
        *(f"{path} is unsound" for path in unsound()),
        *(f"process {process} is left" for process in left()),
    ]


def is_torn(lock: Path) -> bool:
    """Whether dvc was killed while it wrote its lock file; the way out is in docs/experiments.md."""
    try:
        return "schema" not in YAML(typ="safe").load(lock)
    except (TypeError, YAMLError):
        return True


def one(kind: str, stage: str, moment: float, truth: Files, log: Path) -> tuple[bool, float, list[str]]:
    """Strike once; returns whether that ended the run, the seconds until all was right again, and what was not."""
    clear()
    log.write_text(f"{kind} in {stage} after {moment:.2f} s\n")
    repro = Repro(log)
    next(name for name in repro.stages() if name == stage)
    time.sleep(moment)
    strike(kind, repro.dvc)
    was_hit = repro.wait() != 0
    allow()
    start = time.monotonic()
    with log.open("a") as file:
        file.write("\nagain\n")
    code = Repro(log).wait()
    if code and is_torn(Path("dvc.lock")):  # dvc writes it in place
        Path("dvc.lock").unlink()
        code = Repro(log).wait()
    seconds = time.monotonic() - start
    return was_hit, seconds, [*([f"dvc repro ends with {code}"] if code else []), *differences(truth)]


def main() -> None:
    """Strike, and tell what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--strikes", type=int, default=10, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--methods", default=",".join(ROWS), help="rows of tests/stages/methods/test_matrix.py")
    parser.add_argument("--kinds", default=",".join(kinds()), help="of strikes")
    options = parser.parse_args()
    methods = options.methods.split(",")
    groups = [methods[start : start + 3] for start in range(0, len(methods), 3)]
    draw, wrong, slowest = random.Random(options.seed), 0, 0.0
    struck: Counter[str] = Counter()
    for number, group in enumerate(groups):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            log = Path(tempfile.gettempdir()) / f"crash-{os.getpid()}.log"
            prepare(group)
            times, truth = undisturbed(log)
            print(
                f"{', '.join(group)}: {len(times)} stages, {sum(times.values()):.0f} s, {len(truth)} files", flush=True
            )
            for _ in range(number, options.strikes, len(groups)):
                kind, stage = draw.choice(options.kinds.split(",")), draw.choice(list(times))
                was_hit, seconds, found = one(kind, stage, draw.uniform(0, times[stage]), truth, log)
                slowest, wrong = max(slowest, seconds), wrong + bool(found)
                struck[kind if was_hit else "without effect"] += 1
                told = "; ".join(found) or ("as if nothing had been" if was_hit else "without effect")
                print(f"  {kind} in {stage}: {told} ({seconds:.0f} s)", flush=True)
                if found:
                    shutil.copy(log, f"{log}.{sum(struck.values())}")
            os.chdir("/")
    counts = ", ".join(f"{count} {kind}" for kind, count in struck.items())
    print(f"{sum(struck.values())} strikes ({counts}): {wrong} wrong; the slowest recovery took {slowest:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
