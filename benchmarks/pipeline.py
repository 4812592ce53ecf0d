"""How quick the pipeline is to change, beside an earlier commit: `python benchmarks/pipeline.py`.

Both commits are cloned and run in turn, by `dvc repro` and with the Python that runs this, in four situations: the
default from nothing; another merge method; a seventh stage beside six (its scores and its probe alone count, on two
steps of training, for training takes the same time in both); nothing changed. Compare ratios: the seconds are this
machine's. Let nothing else run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
EARLIER = "216fc2e"
STAGE = """\
  {name}:
    parent: base
    dataset: arithmetic
    method: lora
    layers: {layer}
    rank: 16
    lr: 1.0e-3
    steps: 2
"""
COUNTED = ("score", "evaluate", "probe")

Times = dict[str, float]  # seconds by stage; `all` is everything, DVC's own time too


class Clone:
    """One commit in a folder of its own."""

    def __init__(self, commit: str, folder: Path) -> None:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=folder, check=True)
        self.folder = folder

    def repro(self) -> Times:
        """Run `dvc repro` and take the time of every stage, from its first line of output to the next one's."""
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        command = [sys.executable, "-m", "dvc", "repro"]
        start = last = time.monotonic()
        times: Times = {}
        name = ""
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout or ():
                if found := re.match(r"Running stage '([^']+)'|Stage '", line):
                    now = time.monotonic()
                    times[name] = times.get(name, 0) + now - last
                    name, last = found[1] or "", now
        if process.returncode:
            sys.exit(f"error: dvc repro failed in {self.folder}")
        times[name] = times.get(name, 0) + time.monotonic() - last
        return times | {"all": time.monotonic() - start}

    def edit(self, change: Callable[[str], str]) -> None:
        """Change params.yaml."""
        path = self.folder / "params.yaml"
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def six(text: str) -> str:
    """The default's base and data, with six short stages side by side."""
    head, rest = text.split("\nstages:\n")
    tail = rest[rest.index("\nmerge:\n") :]
    names = [f"stage{number}" for number in range(1, 7)]
    stages = "".join(STAGE.format(name=name, layer=number) for number, name in enumerate(names))
    weights = "".join(f"    {name}: 1.0\n" for name in names)
    tail = re.sub(r"  weights:\n(    \w+: 1\.0\n)+", f"  weights:\n{weights}", tail, count=1)
    return f"{head}\nstages:\n{stages}{tail}"


def seventh(text: str) -> str:
    """One stage more, not merged."""
    return text.replace("\nmerge:\n", "\n" + STAGE.format(name="stage7", layer=7) + "\nmerge:\n", 1)


def counted(times: Times) -> float:
    """Seconds of scoring and probing; the merged model's too, where they are one with the stages'."""
    return sum(seconds for name, seconds in times.items() if name.startswith(COUNTED))


def main(earlier: str, work: Path | None, output: Path | None) -> None:
    """Run all situations and print the table."""
    with tempfile.TemporaryDirectory(prefix="strata-", dir=work) as folder:
        clones = {"earlier": Clone(earlier, Path(folder) / "earlier"), "now": Clone("HEAD", Path(folder) / "now")}
        rows = []

        def row(title: str, change: Callable[[str], str] | None, figure: Callable[[Times], float]) -> None:
            seconds = {}
            for name, clone in clones.items():
                if change:
                    clone.edit(change)
                seconds[name] = figure(clone.repro())
            ratio = seconds["now"] / seconds["earlier"]
            rows.append(f"| {title} | {seconds['earlier']:.1f} | {seconds['now']:.1f} | {ratio:.2f} |")
            print(rows[-1], flush=True)

        def everything(times: Times) -> float:
            return times["all"]

        row("the default from nothing", None, everything)
        row("nothing changed", None, everything)
        row("another merge method", lambda text: text.replace("method: task_arithmetic", "method: ties"), everything)
        for clone in clones.values():
            clone.edit(six)
            clone.repro()
        row("a seventh stage: scores and probe", seventh, counted)
    table = "\n".join([f"| situation | {earlier}, s | now, s | ratio |", "|---|--:|--:|--:|", *rows]) + "\n"
    print(table)
    if output:
        output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--earlier", default=EARLIER, help="the commit to compare with")
    parser.add_argument("--work", type=Path, help="where the temporary folder goes")
    parser.add_argument("--output", type=Path, help="a file for the table")
    main(**vars(parser.parse_args()))
