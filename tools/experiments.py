"""All experiments side by side: a table here, and a page with their layer maps and reports: `strata experiments`."""

import io
import json
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from analysis.telling.page import render
from analysis.telling.text import NOTHING, UNITS, percent, scored, whole_percent
from stages.errors import MistakeError, first_line
from stages.files import REPORTS, write_text
from stages.project.params import PARAMS
from tools.plan import differences

FOLDER = Path("experiments")


@dataclass(frozen=True)
class Row:
    """An experiment, or the commit that some began from: what the page tells of it.

    Attributes:
        changed: keys of params.yaml with both values, against the commit that it began from.
        skills: by stage, how much of its gain the merge keeps and what the stage itself can do.
        report, layers: files beside the page, empty where there is none.
    """

    name: str
    changed: list[str]
    skills: dict[str, str]
    change: str
    floor: str
    unexplained: str
    report: str = ""
    layers: str = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Which of them."""
    parser.add_argument(
        "--all", action="store_true", dest="everywhere", help="those of every commit, not of this alone"
    )


def main(everywhere: bool) -> None:
    """Print a line for each, and write experiments/index.html.

    Raises:
        MistakeError: there is none, or DVC cannot read the project.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(".") as repo:
            rows = [row for row in _rows(repo, everywhere) if row]
    except DvcException as error:
        raise MistakeError(f"dvc cannot list experiments ({first_line(error)}); see dvc exp list") from None
    if not rows:
        raise MistakeError("there is no experiment with results here; run dvc exp run -S merge.method=ties, say")
    stages = list(dict.fromkeys(stage for row in rows for stage in row.skills))
    content = {"rows": [{**vars(row), "skills": _filled(row, stages)} for row in rows], "stages": stages}
    write_text(FOLDER / "index.html", render("experiments.html", content))
    for row in rows:
        told = ", ".join(f"{stage} {text}" for stage, text in row.skills.items())
        print(f"{row.name}: {'; '.join(row.changed) or 'as committed'}")
        print(f"  kept of what each can: {told}; unexplained {row.unexplained}")
    print(f"\n{FOLDER / 'index.html'} has the layer maps and reports")


def _rows(repo: Any, everywhere: bool) -> Iterator[Row | None]:
    found = repo.experiments.ls(all_commits=everywhere)
    for baseline, experiments in found.items():
        yield _row(repo, baseline, f"commit {baseline[:7]}", None)
        for name, revision in sorted(experiments):
            yield _row(repo, revision, name, baseline)


def _row(repo: Any, revision: str, name: str, baseline: str | None) -> Row | None:
    """What the page tells of one revision; None where it has no results."""
    metrics = _read(repo, revision, REPORTS / "metrics.json")
    if metrics is None:
        return None
    found = json.loads(metrics)
    merged = found.pop("merged", {})
    layers, report = _read(repo, revision, REPORTS / "layers.svg"), _report(repo, revision)
    return Row(
        name,
        list(differences("", _params(repo, baseline), _params(repo, revision))) if baseline else [],
        {stage: _skill(each) for stage, each in found.items()},
        percent(merged.get("change")),
        percent(merged.get("floor")),
        percent(merged.get("unexplained")),
        _put(f"{revision[:7]}.html", report),
        _put(f"{revision[:7]}.svg", layers),
    )


def _filled(row: Row, stages: list[str]) -> dict[str, str]:
    return dict.fromkeys(stages, NOTHING) | row.skills


def _skill(metrics: dict[str, Any]) -> str:
    can = [scored(value, measure) for measure, value in metrics.items() if measure in UNITS]
    kept = [f"{whole_percent(metrics['kept'])} of"] if "kept" in metrics else []
    return " ".join(kept + can) or NOTHING


def _params(repo: Any, revision: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(io.BytesIO(_read(repo, revision, PARAMS) or b"{}"))


def _read(repo: Any, revision: str, path: Path) -> bytes | None:
    """A file that git has at a revision."""
    try:
        with repo.scm.get_fs(revision).open(str(path), "rb") as file:
            return bytes(file.read())
    except (FileNotFoundError, IsADirectoryError):
        return None


def _report(repo: Any, revision: str) -> bytes | None:
    """The report of a revision, where the cache has it."""
    lock = YAML(typ="safe").load(io.BytesIO(_read(repo, revision, Path("dvc.lock")) or b"{}"))
    outs = lock.get("stages", {}).get("report", {}).get("outs", [])
    hashes = [out["md5"] for out in outs if out["path"] == str(REPORTS / "report.html")]
    path = Path(repo.cache.local.oid_to_path(hashes[0])) if hashes else None
    return path.read_bytes() if path and path.exists() else None


def _put(name: str, content: bytes | None) -> str:
    if content is None:
        return ""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_bytes(content)
    return name
