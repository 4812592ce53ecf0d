"""`strata run -j 2` beside `dvc repro`, from nothing: `python benchmarks/side_by_side.py`.

Two clones of this commit run one after the other: the default, of which two stages stand on the first; and six short
stages on the base, with 20 questions of each skill and one thread a stage (`threads: 1`): two of them have a core each.
What dvc.lock holds must be equal. Compare ratios: the seconds are this machine's. Let nothing else run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import Clone, six

COMMANDS = {"dvc repro": ["-m", "dvc", "repro"], "strata run -j 2": ["-m", "tools.cli", "run", "-j", "2"]}


def short(text: str) -> str:
    """Six stages side by side, one thread each."""
    return six(text).replace("eval: 100", "eval: 20").replace("threads: auto", "threads: 1")


PROJECTS: dict[str, Callable[[str], str]] = {"the default": str, "six stages on the base": short}


def main(names: list[str]) -> None:
    """Print the table; exit with code 1 where the results differ."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    print("| project | dvc repro, s | strata run -j 2, s | ratio | results |\n|---|--:|--:|--:|---|")
    different = False
    for project in names:
        seconds, locks = [], []
        for command in COMMANDS.values():
            with tempfile.TemporaryDirectory(prefix="strata-") as name:
                clone = Clone("HEAD", Path(name, "clone"))
                clone.edit(PROJECTS[project])
                (clone.folder / "dvc.lock").unlink()
                start = time.monotonic()
                subprocess.run([sys.executable, *command], cwd=clone.folder, env=environment, check=True)
                seconds.append(time.monotonic() - start)
                locks.append((clone.folder / "dvc.lock").read_text(encoding="utf-8"))
        different |= sorted(locks[0].splitlines()) != sorted(locks[1].splitlines())
        told = "differ" if different else "equal"
        ratio = f"{seconds[1] / seconds[0]:.2f}"
        print(f"| {project} | {seconds[0]:.0f} | {seconds[1]:.0f} | {ratio} | {told} |", flush=True)
    sys.exit(different)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--projects", nargs="+", choices=PROJECTS, default=list(PROJECTS), help="which of them")
    main(parser.parse_args().projects)
