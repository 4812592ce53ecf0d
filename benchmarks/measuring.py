"""What a process costs: wall time, CPU time, memory at the peak, bytes left on disk."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.02
SHARING_SECONDS = 0.25  # reading smaps_rollup halts the process for milliseconds, status does not


@dataclass(frozen=True)
class Cost:
    """Seconds of wall and CPU time, bytes of memory at the peak (anonymous, and with mapped files), bytes on disk.

    `reported` is what the process says itself: the seconds of its work alone, without start and imports.
    """

    wall: float
    cpu: float
    anonymous: float
    total: float
    written: float
    reported: float = 0.0

    def then(self, other: "Cost") -> "Cost":
        """Both, one after the other: times and files add up, of the peaks the higher one counts."""
        peaks = max(self.anonymous, other.anonymous), max(self.total, other.total)
        return Cost(self.wall + other.wall, self.cpu + other.cpu, *peaks, self.written + other.written)


@dataclass(frozen=True)
class Imports:
    """A process that imports and does nothing else: its time, and the bytes that it holds at its end."""

    wall: float
    cpu: float
    anonymous: int
    mapped: int


NOTHING = Imports(0, 0, 0, 0)


class ContenderError(Exception):
    """A process ended with an error; the message is the last line that it printed, without paths."""


def measure(command: Sequence[str], folder: Path, imports: Imports = NOTHING) -> tuple[Cost, str]:
    """Run `command` in `folder`.

    Memory is that of the process and its children, above what it holds after its imports. Pages that forked
    processes share count once; libraries that a child maps again do not count.

    Returns:
        Its cost, nothing counted as written, and what it printed; `seconds N` there is what it reports.

    Raises:
        ContenderError: it failed.
    """
    os.sync()  # nobody waits for the pages that the one before left to be written
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        memory = _Memory(process.pid, imports)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            memory.sample()
            time.sleep(SAMPLE_SECONDS)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        log.seek(0)
        printed = log.read().strip()
    if process.returncode:
        last = printed.splitlines()[-1] if printed else f"exit code {process.returncode}"
        raise ContenderError(re.sub(r"/\S*/", "", last))
    cpu = ended[2].ru_utime + ended[2].ru_stime
    reported = re.search(r"^seconds ([\d.e-]+)$", printed, re.M)
    return Cost(wall, cpu, memory.anonymous, memory.total, 0, float(reported[1]) if reported else 0.0), printed


def measure_imports(code: str, folder: Path) -> Imports:
    """Run `code`, which imports, and see what its process holds when it is done."""
    report = "print(open('/proc/self/status').read())"
    cost, printed = measure([sys.executable, "-c", f"{code}\n{report}"], folder)
    held = _sizes(printed, "RssAnon", "VmRSS")
    return Imports(cost.wall, cost.cpu, held["RssAnon"], held["VmRSS"] - held["RssAnon"])


class _Memory:
    """Peaks of a process and its children, sampled."""

    def __init__(self, pid: int, imports: Imports) -> None:
        self.anonymous = self.total = 0
        self._pid, self._imports = pid, imports
        self._members, self._counted_twice, self._next = 1, 0, 0.0

    def sample(self) -> None:
        family = list(_tree(self._pid))
        now = [sizes for pid in family if (sizes := _read(pid, "status", "RssAnon", "VmRSS"))]
        if len(now) > 1 and (len(now) != self._members or time.perf_counter() > self._next):
            # Here the shares are added up, for a process that begins or ends in between would be counted in part.
            maps = [sizes for pid in family if (sizes := _read(pid, "smaps_rollup", "Anonymous", "Pss_Anon"))]
            held = sum(sizes["Pss_Anon"] for sizes in maps)
            self._counted_twice = sum(sizes["Anonymous"] for sizes in maps) - held
            self._members, self._next = len(maps), time.perf_counter() + SHARING_SECONDS
        else:
            held = sum(sizes["RssAnon"] for sizes in now) - (self._counted_twice if len(now) > 1 else 0)
        anonymous = max(0, held - self._imports.anonymous)
        mapped = sum(max(0, sizes["VmRSS"] - sizes["RssAnon"] - self._imports.mapped) for sizes in now)
        self.anonymous = max(self.anonymous, anonymous)
        self.total = max(self.total, anonymous + mapped)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))
    except OSError:
        return


def _read(pid: int, file: str, *keys: str) -> dict[str, int]:
    """Sizes from a file of /proc; empty when the process is gone."""
    try:
        sizes = _sizes(Path(f"/proc/{pid}/{file}").read_text(), *keys)
    except OSError:
        return {}
    return sizes if len(sizes) == len(keys) else {}


def _sizes(text: str, *keys: str) -> dict[str, int]:
    return {key: 1024 * int(size) for key, size in re.findall(rf"^({'|'.join(keys)}):\s+(\d+) kB", text, re.M)}
